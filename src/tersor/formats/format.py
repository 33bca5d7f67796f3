"""What a number format is: the interface that every member of FORMATS implements.

A format says which numbers can be stored. It knows nothing of files or methods.

    params = fmt.fit(w, importance)   # scales, zeros, ... per group, from the weights
    codes = fmt.encode(w, params)     # integers
    w_hat = fmt.decode(codes, params)
    tensor = fmt.pack(codes, params)  # QuantizedTensor: the bytes as docs/formats.md draws them
    codes, params = fmt.unpack(tensor)

`quantize` and `dequantize` do all of it at once and are the fast (native) way; the four above are the numpy
reference, and what a method with its own idea about codes (GPTQ) calls group by group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import ceil, prod

import numpy as np

from tersor.errors import FormatError
from tersor.tensor import Array, Params, QuantizedTensor


class Format(ABC):
    """A number format. Instances are immutable and cheap.

    name:             canonical name, `get_format(name)` gives an equal format.
    bits:             bits of one code.
    group_size:       values along a row that share parameters (a k-quant's super-block: 256); 0 = the whole row;
                      -1 = the whole tensor.
    row_independent:  every row can be quantized by itself, and every field's first axis is the row.
    can_encode:       False for formats that can only be decoded.
    uses_importance:  whether `fit` weighs errors by importance. If False (a min-max grid has nothing to weigh), `fit` and
                      `quantize` refuse it with a FormatError; `quantize_clipped` uses it in every format.
    """

    name: str
    bits: float
    group_size: int
    row_independent: bool = True
    can_encode: bool = True
    uses_importance: bool = True

    @abstractmethod
    def layout(self) -> str:
        """Returns the documented layout, drawn, for docs/formats.md (fields, bytes, formula, source)."""

    @abstractmethod
    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Returns the exact bytes of a tensor of this shape, all fields together."""

    @abstractmethod
    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns the parameters of every group. w: (rows, in) float32; importance: (in,) float32 >= 0 or None.

        Each array's leading axes are (rows, groups), so a caller may choose between two fits group by group; those of a
        format that is not row-independent may belong to the whole tensor.
        """

    @abstractmethod
    def encode(self, w: Array, params: Params) -> Array:
        """Returns the codes nearest to w, (rows, in) uint8. Rounding is half to even unless the layout says otherwise."""

    @abstractmethod
    def decode(self, codes: Array, params: Params) -> Array:
        """Returns (rows, in) float32."""

    @abstractmethod
    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        """Returns the stored tensor. shape defaults to codes.shape."""

    @abstractmethod
    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        """Returns (codes, params) of a stored tensor, exactly as given to pack."""

    def quantize(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        """Returns w, (..., in) float32, stored in this format by round-to-nearest on the fitted grid."""
        self.check(w.shape)
        flat = as_rows(w)
        params = self.fit(flat, importance)
        return self.pack(self.encode(flat, params), params, w.shape)

    def dequantize(self, tensor: QuantizedTensor) -> Array:
        """Returns the float32 values of a stored tensor, in its shape."""
        codes, params = self.unpack(tensor)
        return self.decode(codes, params).reshape(tensor.shape)

    def refuse_importance(self, importance: Array | None) -> None:
        """Raises FormatError when there is an importance; called by the `fit` of formats that cannot use one."""
        if importance is not None:
            raise FormatError(f"{self.name}: its fit is plain min-max, which takes no importance; use the method clip")

    def bits_per_weight(self, shape: tuple[int, ...] = (4096, 4096)) -> float:
        """Returns the true bits per weight for this shape, metadata included."""
        return 8.0 * self.nbytes(shape) / prod(shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Returns whether a tensor of this shape can be stored."""
        return self.group_size <= 0 or shape[-1] % self.group_size == 0

    def check(self, shape: tuple[int, ...], where: str = "tensor") -> None:
        """Raises FormatError when a tensor of this shape cannot be stored; names an alternative."""
        if prod(shape) == 0 or not shape:
            raise FormatError(f"{self.name}: {where} has shape {shape}; need at least one value along every axis")
        if not self.fits(shape):
            raise FormatError(
                f"{self.name}: {where} has {shape[-1]} columns, not a multiple of {self.group_size}; {self.alternative(shape[-1])}"
            )

    def alternative(self, columns: int) -> str:
        """Returns the advice that ends the message of `check`."""
        return "use a format whose group divides the columns"

    def groups(self, columns: int) -> int:
        """Returns the number of groups in a row of this many columns."""
        return 1 if self.group_size <= 0 else ceil(columns / self.group_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<format {self.name}>"


def as_rows(w: Array) -> Array:
    """Returns w as a C-contiguous (rows, in) float32 matrix; a vector is one row."""
    return np.ascontiguousarray(w, dtype=np.float32).reshape(prod(w.shape[:-1]), w.shape[-1])
