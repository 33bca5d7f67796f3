"""A quantized matrix as a torch tensor, so that it can be a module's `weight`.

It has the shape of the matrix and the dtype that its values appear in, and no storage. What torch computes with it, it computes
with the dequantized values; rows are looked up without that (`embedding`), and what would change it in place is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tersor.errors import ModelError
from tersor.integrations.matrix import Matrix

_aten: Any = torch.ops.aten
_DATA: Any = torch.Tensor.__dict__.get("data") or torch._C.TensorBase.__dict__["data"]
_REFUSAL = (
    "a quantized weight cannot be changed in place (merging an adapter does that); keep the adapter apart, or make the layers float"
    " first: model.dequantize()"
)


class QuantizedWeight(torch.Tensor):
    """A tensor that stands for a Matrix. It needs no gradient and lives on the CPU."""

    matrix: Matrix
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type[QuantizedWeight], matrix: Matrix, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
        """Returns the tensor. dtype: of the values that torch sees; the matrix is what it is."""
        made: QuantizedWeight = torch.Tensor._make_wrapper_subclass(cls, matrix.shape, dtype=dtype, device=torch.device("cpu"))
        made.matrix = matrix
        return made

    def __init__(self, matrix: Matrix, dtype: torch.dtype = torch.float32) -> None:
        """See __new__."""

    def dense(self) -> torch.Tensor:
        """Returns the values as an ordinary tensor."""
        return torch.from_numpy(self.matrix.dequantize()).to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({self.matrix.format}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: object) -> torch.Tensor:
        """Returns a tensor, or parameter, that stands for the same matrix."""
        copy = QuantizedWeight(self.matrix, self.dtype)
        return torch.nn.Parameter(copy, requires_grad=False) if isinstance(self, torch.nn.Parameter) else copy

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """Pickles the stored numbers."""
        return _rebuilt, (self.matrix, self.dtype, isinstance(self, torch.nn.Parameter))

    @property
    def data(self) -> torch.Tensor:
        """The same without gradient."""
        found: torch.Tensor = _DATA.__get__(self)
        return found

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        """Raises ModelError for ordinary values."""
        if not isinstance(value, QuantizedWeight):
            raise ModelError(f"weight.data: {_REFUSAL}")
        self.matrix = value.matrix
        _DATA.__set__(self, value)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Does what the file's docstring says. Raises ModelError for a change in place and for another device than the CPU."""
        own = _OWN.get(func)
        if own is not None and isinstance(args[0], QuantizedWeight):
            return own(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            raise ModelError(f"{func}: {_REFUSAL}")
        args, kwargs = torch.utils._pytree.tree_map_only(QuantizedWeight, QuantizedWeight.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def _rebuilt(matrix: Matrix, dtype: torch.dtype, parameter: bool) -> torch.Tensor:
    made = QuantizedWeight(matrix, dtype)
    return torch.nn.Parameter(made, requires_grad=False) if parameter else made


def _alias(weight: QuantizedWeight, *args: object, **kwargs: object) -> QuantizedWeight:
    return QuantizedWeight(weight.matrix, weight.dtype)


def _to(weight: QuantizedWeight, dtype: torch.dtype | None = None, device: torch.device | None = None, **kwargs: object) -> torch.Tensor:
    if device is not None and torch.device(device).type == "meta":
        return torch.empty(weight.shape, dtype=dtype or weight.dtype, device="meta")
    if device is not None and torch.device(device).type != "cpu":
        raise ModelError(f"a quantized weight was moved to {device}; tersor's kernels run on the CPU, so leave the model there")
    return QuantizedWeight(weight.matrix, dtype or weight.dtype)


def _embedding(weight: QuantizedWeight, indices: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """Looks rows up; raises IndexError as torch does."""
    out, rows = weight.matrix.shape[0], indices.reshape(-1)
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < out:
        raise IndexError(f"embedding: indices {int(rows.min())} to {int(rows.max())}, need 0 to {out - 1}")
    values = weight.matrix.embed(np.ascontiguousarray(rows.numpy(), dtype=np.int32))
    return torch.from_numpy(values).view(*indices.shape, -1).to(weight.dtype)


_OWN: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _alias,  # nothing can change it, so a copy need not be one
    _aten._to_copy.default: _to,
    _aten.embedding.default: _embedding,
}
