"""TersorLinear: torch's linear layer on a quantized matrix, through this CPU's kernels.

    y = x W^T + b          x: (..., in) float32, float16 or bfloat16 -> y: (..., out) of the same dtype, computed in float32
    dL/dx = dL/dy W        W dequantized some rows at a time; W itself has no gradient

Layers that read the same input (q, k, v; gate and up) may be joined: the first one called computes the product of all of them, the
others take their part of it when they are given the very same tensor, unchanged. Otherwise they compute it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from tersor import _native, ops
from tersor.errors import ModelError
from tersor.integrations.matrix import Matrix
from tersor.integrations.weight import QuantizedWeight


class Joined:
    """The matrices of layers that read the same input, as one; each takes its rows of the product."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        """matrices: in the order in which the layers are called; all have the same columns and activations."""
        self._matrices = tuple(matrices)
        self.packed = ops.pack([m.tensor for m in matrices], None, matrices[0].activations)
        ends = np.cumsum([m.shape[0] for m in matrices]).tolist()
        self._rows = [slice(end - m.shape[0], end) for m, end in zip(matrices, ends)]
        self._last: tuple[torch.Tensor, int, torch.Tensor] | None = None  # input, its version, product

    def product(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Returns x W^T of matrix `index`, float32."""
        last = self._last  # read once, since another thread may replace it
        version = -1 if x.is_inference() else x._version  # what torch does not count changes of is computed each time
        if last is None or last[0] is not x or last[1] != version or version < 0:
            last = (x, version, product(x, self.packed))
        self._last = None if index == len(self._rows) - 1 else last
        return last[2][..., self._rows[index]].contiguous()

    def __deepcopy__(self, memo: object) -> Joined:
        """Returns itself: it is state of the matrices, and what it remembers is checked at every call."""
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return Joined, (self._matrices,)


class TersorLinear(torch.nn.Linear):
    """A linear layer whose weight is a QuantizedWeight. With any other weight it is torch's own layer."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype | None = None) -> None:
        """Makes a layer without values, on the meta device; `weight` is to be set."""
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self.joined: tuple[Joined, int] | None = None

    @classmethod
    def of(cls, matrix: Matrix, bias: torch.Tensor | None = None) -> TersorLinear:
        """Returns the layer of a matrix, (out, in)."""
        layer = cls(matrix.shape[1], matrix.shape[0], bias is not None)
        layer.weight = torch.nn.Parameter(QuantizedWeight(matrix), requires_grad=False)
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns x W^T + b. Raises ModelError for a tensor that is not on the CPU, ValueError for a wrong shape."""
        weight: object = self._parameters["weight"]
        if type(weight) is not QuantizedWeight:
            return super().forward(input)
        training = torch.is_grad_enabled() and input.requires_grad
        y: torch.Tensor = _Product.apply(input, self) if training else self.product(input)  # type: ignore[no-untyped-call]
        bias = self._parameters["bias"]
        if bias is not None:
            y = y + bias
        return y if y.dtype is input.dtype else y.to(input.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x W^T, float32."""
        if self.joined is not None:
            return self.joined[0].product(x, self.joined[1])
        weight: Any = self._parameters["weight"]
        return product(x, weight.matrix.packed)

    def extra_repr(self) -> str:
        """Returns torch's text and the format."""
        weight = self.weight
        return super().extra_repr() + (f", format={weight.matrix.format}" if isinstance(weight, QuantizedWeight) else "")


def product(x: torch.Tensor, weight: ops.Weight) -> torch.Tensor:
    """Returns x W^T, float32. x: (..., columns), any float dtype; no copy is made of a contiguous float32 x."""
    if x.device.type != "cpu":
        raise ModelError(f"TersorLinear: the input is on {x.device}; tersor's kernels run on the CPU, so leave model and inputs there")
    columns = weight.columns
    if x.shape[-1] != columns:
        raise ValueError(f"TersorLinear: the input has shape {tuple(x.shape)}, its last axis needs {columns}")
    values = x.detach().to(torch.float32).contiguous().numpy()
    y = np.empty((*x.shape[:-1], weight.rows), np.float32)
    if y.size:
        _native.linear(values.reshape(-1, columns), weight, y.reshape(-1, weight.rows), None)
    return torch.from_numpy(y)


class _Product(torch.autograd.Function):
    """x W^T, and its gradient with respect to x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: TersorLinear) -> torch.Tensor:
        weight: Any = layer.weight
        ctx.slabs, ctx.dtype = weight.matrix.slabs, x.dtype
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        total = torch.zeros(flat.shape[0], ctx.slabs.shape[1])
        for first, rows in ctx.slabs:
            total.addmm_(flat[:, first : first + len(rows)], torch.from_numpy(rows))
        return total.view(*gradient.shape[:-1], -1).to(ctx.dtype), None
