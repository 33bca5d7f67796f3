"""fp8: one 8-bit float (E4M3) per weight and a float32 scale per row, per tensor, or per block of 128 x 128.

    fp8_c, fp8_t, fp8_b128    w = e4m3(q) * scale

    q = sign 1 | exponent 4, bias 7 | mantissa 3     no infinity; 0x7f and 0xff are NaN; largest 448, smallest 2^-9

Sources: Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433, table 1; torch calls it float8_e4m3fn); the
scales are those of vllm-project/compressed-tensors quantization/quant_scheme.py (FP8_DYNAMIC, FP8, FP8_BLOCK).
"""

from __future__ import annotations

from math import ceil, prod

import numpy as np

from tersor.formats.format import Format, as_rows, check_importance
from tersor.tensor import Array, Params, QuantizedTensor

EXAMPLES = ("fp8_c", "fp8_t", "fp8_b128")

LARGEST = np.float32(448)
BLOCK = 128  # rows and columns that share a scale in fp8_b128

# What `quantize_clipped` multiplies absmax / 448 by. Floats have the same relative precision at every size, so that clipping gains
# little; where in a binade the weights fall gains more.
_RATIOS = (1.0, *(2 ** (k / 8) for k in range(1, 8)), 0.97, 0.94, 0.91, 0.88)

_NAN = 0x7F
_SMALLEST_NORMAL = np.float32(2.0**-6)
_SUBNORMAL_STEPS = np.float32(2.0**9)


def parse(name: str) -> Format | None:
    """Returns the FP8 format of this name, or None when it is none."""
    return Fp8Format(name.removeprefix("fp8_")) if name in EXAMPLES else None


def _table() -> Array:
    """Returns the value of each of the 256 codes, float32."""
    magnitude = np.arange(128)
    exponent, mantissa = magnitude >> 3, magnitude & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    values[_NAN] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


E4M3 = _table()


def f32_from_e4m3(codes: Array) -> Array:
    """Returns the float32 values of raw E4M3 bits (uint8); exact."""
    values: Array = E4M3[codes]
    return values


def has_nan(codes: Array) -> bool:
    """Returns whether any of the raw E4M3 bits (uint8) is a NaN."""
    return bool(((codes & np.uint8(0x7F)) == _NAN).any())


def e4m3_from_f32(w: Array) -> Array:
    """Returns the raw E4M3 bits, uint8, nearest to w: float32, ties to even, beyond 448 the largest, -0 as +0, NaN as NaN.

    Normal values keep the upper bits of float32 down to the third of the mantissa, rounded as bfloat16 is, with the exponent's
    bias lowered from 127 to 7; below 2^-6 the codes count steps of 2^-9.
    """
    w = np.ascontiguousarray(w, dtype=np.float32)
    bits = w.view(np.uint32) & np.uint32(0x7FFFFFFF)
    magnitude = bits.view(np.float32)
    normal = (bits + (np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)).astype(np.int32) - (120 << 3)
    with np.errstate(invalid="ignore", over="ignore"):
        small = np.rint(np.minimum(magnitude, _SMALLEST_NORMAL) * _SUBNORMAL_STEPS)
        codes = np.where(magnitude < _SMALLEST_NORMAL, np.nan_to_num(small), np.minimum(normal, _NAN - 1)).astype(np.uint8)
    codes[np.isnan(w)] = _NAN
    signed: Array = codes | np.where((w < 0) & (codes > 0), np.uint8(0x80), np.uint8(0))
    return signed


class Fp8Format(Format):
    """E4M3 codes, uint8, and {"scale": float32}: (rows, 1) for `c`, (1, 1) for `t`, (ceil(rows/128), in/128) for `b128`."""

    bits = 8
    uses_importance = False

    def __init__(self, axis: str) -> None:
        self.name = f"fp8_{axis}"
        self.axis = axis
        self.group_size = {"c": 0, "t": -1, "b128": BLOCK}[axis]
        self.row_independent = axis == "c"

    def layout(self) -> str:
        scale = {"c": "(rows, 1)", "t": "(1, 1)", "b128": "(ceil(rows/128), in/128)  of 128 rows x 128 columns"}[self.axis]
        return (
            "codes: uint8 (rows, in)  q = sign 1 | exponent 4, bias 7 | mantissa 3; largest 448, smallest 2^-9, 0x7f and 0xff NaN\n"
            f"scale: float32 {scale}\nw = e4m3(q) * scale\n"
        )

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Returns the shape of the scales of a matrix."""
        return {"c": (rows, 1), "t": (1, 1), "b128": (ceil(rows / BLOCK), columns // BLOCK)}[self.axis]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) + 4 * prod(self.scale_shape(prod(shape[:-1]), shape[-1]))

    def alternative(self, columns: int) -> str:
        return "use fp8_c"

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns scale = max |w| / 448, float32; 0 where all are 0. Raises FormatError for any importance: absmax weighs nothing."""
        self.refuse_importance(importance)
        return {"scale": np.abs(self._units(w)).max(axis=(1, 3)) / LARGEST}

    def encode(self, w: Array, params: Params) -> Array:
        """Returns the codes nearest to w / scale, ties to even, saturated at 448; 0 where the scale is 0."""
        scale = self.expand(params["scale"], w.shape)
        with np.errstate(over="ignore"):
            return e4m3_from_f32(w / np.where(scale == 0, np.float32(np.inf), scale))

    def decode(self, codes: Array, params: Params) -> Array:
        w: Array = f32_from_e4m3(codes) * self.expand(params["scale"], codes.shape)
        return w

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        fields = {"codes": np.ascontiguousarray(codes), "scale": np.ascontiguousarray(params["scale"], dtype=np.float32)}
        return QuantizedTensor(self.name, codes.shape if shape is None else shape, fields)

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        return tensor.fields["codes"], {"scale": tensor.fields["scale"]}

    def quantize_clipped(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        """Returns w with each scale the best of _RATIOS times absmax / 448, by sum h (w - w_hat)^2 over what shares it."""
        self.check(w.shape)
        h = check_importance(importance, w.shape[-1], self.name)
        return self.by_parts(w, lambda rows: self._clipped(rows, h))

    def _clipped(self, rows: Array, h: Array | None) -> QuantizedTensor:
        absmax = self.fit(rows)["scale"]
        best, least = absmax, np.full(absmax.shape, np.inf)
        for ratio in _RATIOS:
            params = {"scale": absmax * np.float32(ratio)}
            error = np.square(rows - self.decode(self.encode(rows, params), params))
            total = self._units(error if h is None else error * h).sum(axis=(1, 3), dtype=np.float64)
            best, least = np.where(total < least, params["scale"], best), np.minimum(total, least)
        return self.pack(self.encode(rows, {"scale": best}), {"scale": best})

    def expand(self, scale: Array, shape: tuple[int, ...]) -> Array:
        """Returns the scale of every row and column, broadcastable to shape (rows, in)."""
        if self.axis != "b128":
            return scale
        expanded: Array = np.repeat(np.repeat(scale, BLOCK, axis=0)[: shape[0]], BLOCK, axis=1)
        return expanded

    def _units(self, w: Array) -> Array:
        """Returns w, (rows, in), as (R, height, C, width): what shares the scale (R, C), a last block of rows filled up with zeros."""
        rows, columns = as_rows(w), w.shape[-1]
        if self.axis != "b128":
            return rows.reshape(self.scale_shape(*rows.shape)[0], -1, 1, columns)
        padded = np.concatenate([rows, np.zeros((-len(rows) % BLOCK, columns), np.float32)])
        return padded.reshape(-1, BLOCK, columns // BLOCK, BLOCK)
