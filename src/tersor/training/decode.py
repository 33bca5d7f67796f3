"""Differentiable decoding of every format: the codes stay, the float parameters can be trained.

All formats but nvfp4_gs decode linearly in their float parameters (scales, minima, absmax, d and dmin, the nested ones of
double quantization), so a stored tensor is

    w_hat = sum over p of value_p * basis_p        basis_p = what the codes decode to when p is 1 and the others are 0

with value_p shared by a run of neighbouring weights, in the order of the rows. That holds for blocks, rows and tensors
alike and needs no knowledge of a format. Integer parameters (zeros, 6-bit scales, 8-bit absmax) are part of the basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.errors import ModelError
from tersor.formats import Format, get_format
from tersor.formats.float_zero import FloatZeroFormat
from tersor.formats.lookup import BLOCK, NESTED_BLOCK
from tersor.formats.ordered import OrderedFormat
from tersor.formats.outliers import OutlierFormat
from tersor.tensor import Array, QuantizedTensor

# What decodes linearly in no float parameter, or shares it among weights that are no run of neighbours.
_NOT_TRAINED = ("nvfp4_gs", "fp8_b128")


@dataclass(frozen=True, eq=False)
class TrainableTensor:
    """A stored tensor with fixed codes.

    names:  the trainable parameters, as Format.unpack calls them, without a float zero, which multiplies another; empty for float
            formats, mxfp4, nvfp4_gs, fp8_b128, and formats with an order of columns.
    start:  their stored values, float32, each (count,): value i belongs to the i-th run of weights.
    runs:   weights that share one of these values; the last run may be shorter.
    bases:  (count, run) int8 where the basis holds small integers, else float32; (1, 1) where it is the same everywhere.
    units:  (count,) float32, the change of a value that changes its run of weights by as much as their own root mean
            square, so that one learning rate serves every parameter. 0 where the run decodes to zeros.
    fixed:  the decoded weights (rows, in) when nothing can be trained, else None.
    """

    tensor: QuantizedTensor
    format: Format
    names: tuple[str, ...]
    start: tuple[Tensor, ...]
    runs: tuple[int, ...]
    bases: tuple[Tensor, ...]
    units: tuple[Tensor, ...]
    fixed: Tensor | None

    @classmethod
    def of(cls, tensor: QuantizedTensor) -> TrainableTensor:
        """Returns the stored tensor, ready to be trained. Any format, decode-only ones too (nothing of them is trained)."""
        format = get_format(tensor.format)
        codes, params = format.unpack(tensor) if format.can_encode and not isinstance(format, OrderedFormat | OutlierFormat) else (None, {})
        names = tuple(
            name
            for name, a in params.items()
            if a.dtype.kind == "f" and format.name not in _NOT_TRAINED and not (isinstance(format, FloatZeroFormat) and name == "zero")
        )
        decoded = torch.from_numpy(np.array(format.dequantize(tensor), np.float32).reshape(tensor.rows, -1))
        if codes is None or not names:
            return cls(tensor, format, (), (), (), (), (), decoded)
        start, runs, bases, units = [], [], [], []
        for name in names:
            ones = {other: np.full_like(a, other == name) if other in names else a for other, a in params.items()}
            count = params[name].size
            run = BLOCK * NESTED_BLOCK if name == "nested_absmax" else decoded.numel() // count
            basis = _in_runs(torch.from_numpy(format.decode(codes, ones)), count, run)
            start.append(torch.from_numpy(params[name].astype(np.float32).ravel()))
            runs.append(run)
            units.append((_in_runs(decoded, count, run).norm(dim=1) / basis.norm(dim=1)).nan_to_num(0, 0, 0))
            bases.append(_smallest(basis))
        return cls(tensor, format, names, tuple(start), tuple(runs), tuple(bases), tuple(units), None)

    def weight(self, values: Sequence[Tensor]) -> Tensor:
        """Returns w_hat, (rows, in) float32, for these values, each (count,). Not differentiable; see `product`."""
        if self.fixed is not None:
            return self.fixed
        rows, columns = self.tensor.rows, self.tensor.columns
        total: Tensor | None = None
        for value, run, basis in zip(values, self.runs, self.bases):
            part = (value[:, None] * basis).expand(len(value), run).reshape(-1)[: rows * columns].view(rows, columns)
            total = part if total is None else total + part
        assert total is not None
        return total

    def gradients(self, gradient: Tensor) -> list[Tensor]:
        """Returns d loss / d value for each parameter, (count,), from d loss / d w_hat, (rows, in)."""
        return [
            (_in_runs(gradient, len(value), run) * basis).sum(1, dtype=torch.float32)
            for value, run, basis in zip(self.start, self.runs, self.bases)
        ]

    def store(self, values: Sequence[Tensor]) -> QuantizedTensor:
        """Returns the tensor with these values in the precision that the format stores.

        Raises ModelError when one is not finite there: the training diverged.
        """
        if self.fixed is not None:
            return self.tensor
        codes, params = self.format.unpack(self.tensor)
        new: dict[str, Array] = dict(params)
        for name, value in zip(self.names, values):
            with np.errstate(over="ignore"):
                new[name] = value.detach().cpu().numpy().reshape(params[name].shape).astype(params[name].dtype)
            if not np.isfinite(new[name]).all():
                raise ModelError(f"{self.format.name}: a trained {name} is not finite in {new[name].dtype}; use a lower learning rate")
        return self.format.pack(codes, new, self.tensor.shape)


class _Product(torch.autograd.Function):
    """x W^T with W decoded on the fly in both directions, so that no decoded weight is kept between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: TrainableTensor, dtype: torch.dtype, *values: Tensor) -> Tensor:
        rounded = x.to(dtype)
        ctx.tensor, ctx.dtype = tensor, x.dtype
        ctx.save_for_backward(rounded, *values)
        return rounded @ tensor.weight(values).to(dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *values = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ ctx.tensor.weight(values).to(gradient.dtype)).to(ctx.dtype)
        of_values: list[Tensor] = []
        if values:
            of_w = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            of_values = ctx.tensor.gradients(of_w)
        return of_x, None, None, *of_values


def product(x: Tensor, tensor: TrainableTensor, values: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns x W^T in dtype, (..., rows), with gradients for x (..., in) and the values, each (count,) float32."""
    return _Product.apply(x, tensor, dtype, *values)  # type: ignore[no-untyped-call, no-any-return]


def _in_runs(w: Tensor, count: int, run: int) -> Tensor:
    """Returns w as (count, run), the last run filled up with zeros."""
    flat = w.reshape(-1)
    if flat.numel() < count * run:
        flat = torch.cat([flat, flat.new_zeros(count * run - flat.numel())])
    return flat.view(count, run)


def _smallest(basis: Tensor) -> Tensor:
    """Returns the basis in the smallest type that holds it exactly."""
    if bool((basis == basis[0, 0]).all()):
        return basis[:1, :1].clone()
    small = basis.to(torch.int8)
    return small if torch.equal(small.float(), basis) else basis


def decoded(tensor: QuantizedTensor) -> Tensor:
    """Returns the tensor's float32 values in its shape."""
    return torch.from_numpy(np.array(get_format(tensor.format).dequantize(tensor), np.float32))
