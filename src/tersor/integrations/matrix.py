"""A quantized matrix for a library that holds its weights itself: the stored numbers, and the same packed for this CPU's kernels.

    Matrix --packed-->   ops.Weight            what products read; made once, at the first product
           --slabs-->    float32, by rows      what a gradient, an export or an op without a kernel reads

The stored numbers stay where they are: of an opened checkpoint they are read again from its mapped file whenever they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from math import prod

import numpy as np

from tersor import ops
from tersor.containers.container import Checkpoint
from tersor.errors import RecipeError, unknown
from tersor.formats import get_format
from tersor.tensor import Array, QuantizedTensor

ACTIVATIONS = ("int8", "int8_token", "llm_int8", "float")  # of ops.pack, those that need no calibrated scale
SLAB_VALUES = 1 << 22  # values decoded at once, 16 MiB of float32


class Matrix:
    """One matrix, (out, in), that never changes, so that copies of a model share it.

    read: rows or None -> the stored tensor. activations: how products round their input, as ops.pack says.
    """

    def __init__(self, format: str, shape: tuple[int, ...], read: Callable[[slice | None], QuantizedTensor], activations: str) -> None:
        """Raises RecipeError for activations that are unknown or need a calibrated scale."""
        if activations not in ACTIVATIONS:
            raise RecipeError(unknown("activations", activations, ACTIVATIONS))
        self.format = format
        self.shape = shape
        self.activations = activations
        self._read = read

    @classmethod
    def of(cls, tensor: QuantizedTensor, activations: str = "int8") -> Matrix:
        """Returns the matrix of a tensor in memory."""
        return cls(tensor.format, tensor.shape, lambda rows: tensor if rows is None else _rows(tensor, rows), activations)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, name: str, activations: str = "int8") -> Matrix:
        """Returns the matrix of a checkpoint's tensor, which is read when it is needed; the checkpoint stays open."""
        info = checkpoint.tensors[name]
        return cls(info.format, info.shape, lambda rows: checkpoint.read(name, rows), activations)

    @property
    def tensor(self) -> QuantizedTensor:
        """The stored numbers."""
        return self._read(None)

    @cached_property
    def packed(self) -> ops.Weight:
        """The matrix as the kernels read it."""
        return ops.pack([self.tensor], None, self.activations)

    @cached_property
    def _table(self) -> QuantizedTensor:
        return self.tensor

    def embed(self, rows: Array) -> Array:
        """Returns these rows, (n, in) float32. rows: (n,) int32 in [0, out)."""
        return ops.embed(self._table, rows)

    @property
    def slabs(self) -> Slabs:
        """The values, some rows at a time. They do not hold the packed matrix, so that a graph that is left over does not either."""
        return Slabs(self.format, self.shape, self._read)

    def dequantize(self) -> Array:
        """Returns all values, float32."""
        values = np.empty((prod(self.shape[:-1]), self.shape[-1]), np.float32)
        for first, part in self.slabs:
            values[first : first + len(part)] = part
        return values.reshape(self.shape)

    def __deepcopy__(self, memo: object) -> Matrix:
        """Returns itself."""
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles the stored numbers."""
        return Matrix.of, (self.tensor, self.activations)


class Slabs:
    """An iterable of (first row, the values of some rows, float32), for all rows in order."""

    def __init__(self, format: str, shape: tuple[int, ...], read: Callable[[slice | None], QuantizedTensor]) -> None:
        self._format, self.shape, self._read = get_format(format), shape, read

    def __iter__(self) -> Iterator[tuple[int, Array]]:
        rows, columns = prod(self.shape[:-1]), self.shape[-1]
        step = max(1, SLAB_VALUES // columns) if self._format.row_independent else rows
        for first in range(0, rows, step):
            part = self._read(None if step >= rows else slice(first, min(rows, first + step)))
            yield first, self._format.dequantize(part).reshape(-1, columns)


def _rows(tensor: QuantizedTensor, rows: slice) -> QuantizedTensor:
    """Returns some rows of a tensor whose format is row-independent."""
    fields = {name: array[rows] for name, array in tensor.fields.items()}
    return QuantizedTensor(tensor.format, (len(range(tensor.rows)[rows]), tensor.columns), fields)
