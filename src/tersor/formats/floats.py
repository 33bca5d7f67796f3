"""The float formats: every value by itself, nothing shared, no parameters.

`f32` (IEEE binary32), `f16` (IEEE binary16) and `bf16` (the upper half of binary32, held as its raw uint16 bits because
numpy has no such type). Rounding is to nearest, ties to even. For these formats the codes of the Format interface are
the stored numbers themselves, so `encode` is a cast and `fit` has nothing to do.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from tersor import _native
from tersor.errors import FormatError
from tersor.formats.format import Format, as_rows
from tersor.tensor import Array, Params, QuantizedTensor

EXAMPLES = ("f32", "f16", "bf16")

_STORED: dict[str, np.dtype[Any]] = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(np.uint16)}

_LAYOUTS = {
    "f32": "values: float32 (rows, in)   sign 1 | exponent 8, bias 127 | mantissa 23\n",
    "f16": "values: float16 (rows, in)   sign 1 | exponent 5, bias 15 | mantissa 10; largest 65504, smallest 2^-24\n",
    "bf16": "values: uint16 (rows, in)    sign 1 | exponent 8, bias 127 | mantissa 7 = the upper 16 bits of float32\n",
}

_F16_END = 65520.0  # rounds to infinity, and all beyond
_PART_VALUES = 1 << 16  # looked at together by is_half


def parse(name: str) -> Format | None:
    """Returns the float format of this name, or None when it is no float format."""
    return FloatFormat(name) if name in _STORED else None


def bf16_from_f32(w: Array) -> Array:
    """Returns the raw bfloat16 bits, uint16, of w: float32, rounded to nearest, ties to even.

    bits16 = (bits32 + 0x7fff + (bits32 >> 16 & 1)) >> 16. A NaN keeps its upper bits and becomes quiet, since the
    carry of the rounding could turn it into an infinity or a zero; a finite value beyond the largest bfloat16
    (3.3895e38) becomes an infinity, as IEEE rounding demands.
    """
    bits = np.ascontiguousarray(w, dtype=np.float32).view(np.uint32)
    rounded: Array = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        rounded[nan] = (bits[nan] >> 16).astype(np.uint16) | np.uint16(0x40)
    return rounded


def f32_from_bf16(bits: Array) -> Array:
    """Returns the float32 values of raw bfloat16 bits (uint16); exact."""
    values: Array = _native.widen_bf16(np.require(bits, requirements=["C", "A"]).reshape(-1)).reshape(bits.shape)
    return values


def f32_from_f16(values: Array) -> Array:
    """Returns the float32 values of float16 values; exact, and a NaN keeps its payload."""
    bits = np.require(values, np.float16, ["C", "A"]).view(np.uint16)
    wide: Array = _native.widen_f16(bits.reshape(-1)).reshape(values.shape)
    return wide


def is_half(values: Array, is_bf16: bool = False) -> bool:
    """Returns whether every value is a float16 number; NaN is none. values: float16, float32, or uint16 when is_bf16."""
    flat = values.reshape(-1)
    for start in range(0, 0 if values.dtype == np.float16 else flat.size, _PART_VALUES):
        part = flat[start : start + _PART_VALUES]
        wide = f32_from_bf16(part) if is_bf16 else part
        with np.errstate(over="ignore", invalid="ignore"):
            if not np.array_equal(wide.astype(np.float16).astype(np.float32), wide):
                return False
    return True


class FloatFormat(Format):
    """f32, f16 or bf16. fields: {"values": (rows, in)} of float32, float16, or uint16 holding bfloat16 bits."""

    group_size = 1
    uses_importance = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.dtype = _STORED[name]
        self.bits = 8.0 * self.dtype.itemsize

    def layout(self) -> str:
        return _LAYOUTS[self.name]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) * self.dtype.itemsize

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns no parameters: a float carries its own exponent. Raises FormatError for any importance."""
        self.refuse_importance(importance)
        return {}

    def encode(self, w: Array, params: Params) -> Array:
        """Returns the nearest stored numbers (rows, in), ties to even: float32, float16, or uint16 for bf16.

        Raises FormatError when a finite value does not fit into float16.
        """
        if self.name == "bf16":
            return bf16_from_f32(w)
        if self.name == "f32":
            return np.ascontiguousarray(w, dtype=np.float32)
        w = np.ascontiguousarray(w, dtype=np.float32)
        values: Array = _native.narrow_f16(w.reshape(-1)).view(np.float16).reshape(w.shape)
        if not _native.largest_magnitude(w.reshape(-1)) < _F16_END:
            lost = np.isinf(values) & np.isfinite(w)
            if lost.any():
                raise FormatError(f"f16: tensor holds {w[lost].ravel()[0]:g}, beyond float16's largest 65504; use bf16 or f32")
        return values

    def decode(self, codes: Array, params: Params) -> Array:
        if self.name == "bf16":
            return f32_from_bf16(codes)
        return f32_from_f16(codes) if codes.dtype == np.float16 else codes.astype(np.float32, copy=False)

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        values = np.ascontiguousarray(codes, dtype=self.dtype).reshape(-1, codes.shape[-1])
        return QuantizedTensor(self.name, codes.shape if shape is None else shape, {"values": values})

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        return tensor.fields["values"], {}

    def quantize(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        self.refuse_importance(importance)
        return self.pack(self.encode(as_rows(w), {}), {}, w.shape)

    def quantize_clipped(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        """Returns `quantize`: every value by itself is nearest already, whatever its importance."""
        return self.quantize(w)

    def alternative(self, columns: int) -> str:
        return "every shape fits"
