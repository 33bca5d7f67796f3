"""Affine integers: equally spaced levels, one float scale per group, with an integer zero, a fixed zero or a float minimum.

    int4_g64    asymmetric   w = (q - zero) * scale     zero is a packed integer; the grid holds 0 exactly
    int4_g64s   symmetric    w = (q - 2^(B-1)) * scale  no zero is stored
    int4_g64m   minimum      w = q * scale + min        min is float16; the form of Q4_1 and MLX
    int4_c, int4_t           one scale per row (output channel), one scale per tensor
    int4_g64f, sf, mf        scales and minima are float32: what tools store that quantize a float32 model

B is 1, 2, 3, 4, 5, 6 or 8; groups of N = 16..256 values along the input dimension. Sources: Jacob et al.,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (arXiv 1712.05877,
section 2.1, equation 1) for the integer zero; Frantar et al., GPTQ (arXiv 2210.17323) for groups along the input; the
symmetric step 2 max|w| / (2^B - 1) is that of the GPTQ code and of compressed-tensors. Beside them: float_zero.py (`z`), ordered.py (`o`).
"""

from __future__ import annotations

import re
from math import prod

import numpy as np

from tersor import _native
from tersor.errors import FormatError
from tersor.formats.format import Format, as_rows, check_importance
from tersor.formats.packing import pack_bits, packed_bytes, unpack_bits
from tersor.tensor import Array, Params, QuantizedTensor

BITS = (1, 2, 3, 4, 5, 6, 8)

EXAMPLES = (
    *("int1_g32", "int1_g32m", "int2_g16", "int2_g32m", "int2_g64s", "int3_g32", "int3_g64m", "int3_g128s"),
    *(
        "int4_g32",
        "int4_g64",
        "int4_g128",
        "int4_g256",
        "int4_g96",
        "int4_g32s",
        "int4_g64s",
        "int4_g128s",
        "int4_g64m",
        "int4_c",
        "int4_cs",
        "int4_t",
    ),
    *("int5_g64", "int5_g64s", "int5_g32m", "int6_g64", "int6_g128s", "int6_g64m"),
    *("int8_g64", "int8_g128s", "int8_g32m", "int8_c", "int8_cs", "int8_cm", "int8_t", "int8_ts", "int8_tm"),
    *("int4_g64f", "int4_g64sf", "int4_g64mf", "int3_g32f", "int8_csf", "int8_cmf"),
)

_NAME = re.compile(r"int([1-9][0-9]*)_(?:g([1-9][0-9]*)|([ct]))([sm]?)(f?)")

_PER_ROW = 0  # group_size of `_c`
_PER_TENSOR = -1  # group_size of `_t`

_KINDS = {"": "asymmetric", "s": "symmetric", "m": "minimum"}  # as the native functions call them

_F16_NORMAL = np.float32(2.0**-14)  # smallest normal float16


def parse(name: str) -> Format | None:
    """Returns the affine format of this name, or None when it is no affine name.

    Raises FormatError for an affine name whose bits or group are not stored; names an alternative.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    bits, group, axis, kind, wide = int(match[1]), match[2], match[3], match[4], match[5] == "f"
    if bits not in BITS:
        nearest = min(BITS, key=lambda b: (abs(b - bits), -b))
        raise FormatError(f"{name}: {bits}-bit codes; need one of {BITS}; use {name.replace(f'int{bits}', f'int{nearest}')}")
    if bits == 1 and kind == "s":
        raise FormatError(f"{name}: one symmetric bit is a sign; use binary_g{group or 64}")
    if group is None:
        return AffineFormat(bits, _PER_ROW if axis == "c" else _PER_TENSOR, kind, wide)
    check_group(name, int(group))
    return AffineFormat(bits, int(group), kind, wide)


def check_group(name: str, group: int) -> None:
    """Raises FormatError unless group is a multiple of 16 in 16..256."""
    if group % 16 or not 16 <= group <= 256:
        nearest = min(256, max(16, group // 16 * 16))
        raise FormatError(f"{name}: group of {group}; need a multiple of 16 in 16..256; use {name.replace(f'g{group}', f'g{nearest}')}")


class AffineFormat(Format):
    """B-bit integers with a float scale per group. kind: "" (integer zero), "s" (symmetric) or "m" (float minimum).

    params: {"scale": float} and {"zero": uint8} or {"min": float}, each (rows, groups); (1, 1) for `_t`. Floats are of `float_type`:
    float16, or float32 when wide.
    """

    uses_importance = False

    def __init__(self, bits: int, group_size: int, kind: str, wide: bool = False) -> None:
        axis = {_PER_ROW: "c", _PER_TENSOR: "t"}.get(group_size, f"g{group_size}")
        self.name = f"int{bits}_{axis}{kind}{'f' * wide}"
        self.bits = bits
        self.width = bits
        self.group_size = group_size
        self.kind = kind
        self.wide = wide
        self.float_type = np.dtype(np.float32 if wide else np.float16)
        self.row_independent = group_size != _PER_TENSOR
        self.max_code = 2**bits - 1

    def layout(self) -> str:
        groups = f"in/{self.group_size}" if self.group_size > 0 else "1"
        rows = "1" if self.group_size == _PER_TENSOR else "rows"
        lines = [
            f"codes: uint8 (rows, ceil(in*{self.width}/8))  q in 0..{self.max_code}, dense, LSB first",
            f"scale: {self.float_type} ({rows}, {groups})",
        ]
        if self.kind == "":
            lines.append(f"zero:  uint8 ({rows}, ceil({groups}*{self.width}/8))  z in 0..{self.max_code}, dense, LSB first")
            lines.append("w = (q - z) * scale")
        elif self.kind == "s":
            lines.append(f"w = (q - {self.middle}) * scale")
        else:
            lines.append(f"min:   {self.float_type} ({rows}, {groups})")
            lines.append("w = q * scale + min")
        return "\n".join(lines) + "\n"

    @property
    def middle(self) -> int:
        """The code of 0 in the symmetric form, 2^(B-1)."""
        return int(2 ** (self.width - 1))

    def nbytes(self, shape: tuple[int, ...]) -> int:
        rows, columns = prod(shape[:-1]), shape[-1]
        groups = self.groups(columns)
        floats = self.float_type.itemsize * groups
        per_row = floats + {"": packed_bytes(groups, self.width), "s": 0, "m": floats}[self.kind]
        return rows * packed_bytes(columns, self.width) + (per_row if self.group_size == _PER_TENSOR else rows * per_row)

    def alternative(self, columns: int) -> str:
        divisors = [g for g in (256, 128, 64, 32, 16) if g < max(self.group_size, 17) and columns % g == 0]
        return f"use int{self.width}_{f'g{divisors[0]}' if divisors else 'c'}{self.kind}{'f' * self.wide}"

    def of_floats(self, wide: bool) -> AffineFormat:
        """Returns the format that differs in the type of scales and minima only."""
        return AffineFormat(self.width, self.group_size, self.kind, wide)

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns the min-max grid of every group, stored precision included; arithmetic in float32.

        ""   lo = min(w, 0), hi = max(w, 0); scale = (hi - lo) / (2^B - 1); zero = round(-lo / scale)
        "s"  scale = 2 max|w| / (2^B - 1)
        "m"  min = float(min w); scale = (max w - min) / (2^B - 1), at least 0

        A scale is rounded to the nearest float of the format, a subnormal float16 upwards so that its group is never clipped;
        an all-zero group has scale 0 and decodes to 0. zero is computed with the stored scale, half to even.
        Raises FormatError when a scale or minimum is too large to be stored, or for any importance: min-max weighs nothing.
        """
        self.refuse_importance(importance)
        blocks = w.reshape(1, 1, -1) if self.group_size == _PER_TENSOR else w.reshape(w.shape[0], self.groups(w.shape[1]), -1)
        low, high = blocks.min(axis=-1), blocks.max(axis=-1)
        steps = np.float32(self.max_code)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.kind == "s":
                return {"scale": self.stored_scale(np.maximum(-low, high) * np.float32(2) / steps)}
            if self.kind == "m":
                minimum = self.stored_minimum(low)
                return {"scale": self.stored_scale(np.maximum(high - minimum.astype(np.float32), np.float32(0)) / steps), "min": minimum}
            low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
            scale = self.stored_scale((high - low) / steps)
            zero = np.clip(np.rint(-low / _divisor(scale)), 0, self.max_code).astype(np.uint8)
        return {"scale": scale, "zero": zero}

    def encode(self, w: Array, params: Params) -> Array:
        """Returns q = clip(round(w / scale) + zero, 0, 2^B - 1), or clip(round((w - min) / scale), ...) for "m". Half to even."""
        rows, columns = w.shape
        blocks = w.reshape(rows, self.groups(columns), -1)
        scale = _divisor(params["scale"])[..., None]
        with np.errstate(over="ignore"):
            if self.kind == "m":
                q = np.rint((blocks - params["min"].astype(np.float32)[..., None]) / scale)
            else:
                q = np.rint(blocks / scale) + self._zeros(params)
        return np.clip(q, 0, self.max_code).astype(np.uint8).reshape(rows, columns)

    def decode(self, codes: Array, params: Params) -> Array:
        rows, columns = codes.shape
        q = codes.reshape(rows, self.groups(columns), -1).astype(np.float32)
        scale = params["scale"].astype(np.float32)[..., None]
        if self.kind == "m":
            w = q * scale + params["min"].astype(np.float32)[..., None]
        else:
            w = (q - self._zeros(params)) * scale
        return w.reshape(rows, columns)

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        fields = {"codes": pack_bits(codes, self.width), "scale": np.ascontiguousarray(params["scale"], dtype=self.float_type)}
        if self.kind == "":
            fields["zero"] = pack_bits(params["zero"], self.width)
        elif self.kind == "m":
            fields["min"] = np.ascontiguousarray(params["min"], dtype=self.float_type)
        return QuantizedTensor(self.name, codes.shape if shape is None else shape, fields)

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        fields = tensor.fields
        params = {"scale": fields["scale"]}
        if self.kind == "":
            params["zero"] = unpack_bits(fields["zero"], self.width, self.groups(tensor.columns))
        elif self.kind == "m":
            params["min"] = fields["min"]
        return unpack_bits(fields["codes"], self.width, tensor.columns), params

    def quantize(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        self.check(w.shape)
        self.refuse_importance(importance)
        return self._quantize(w, None, search=False)

    def quantize_clipped(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        """Returns w on the grid of the least squared error per group, over both ends of the range and then by least squares.

        The objective is sum h (w - w_hat)^2 with what is stored: the rounded scale and minimum, the integer zero. The
        search is described in native/formats/affine_search.inc. The min-max grid is its start, so it is never worse.
        The symmetric form's scale may come out negative, since its levels reach one step further on one side.
        """
        self.check(w.shape)
        return self._quantize(w, check_importance(importance, w.shape[-1], self.name), search=True)

    def dequantize(self, tensor: QuantizedTensor) -> Array:
        scale, offset = self._wide(tensor)
        codes, columns = np.ascontiguousarray(tensor.fields["codes"]), tensor.columns
        w: Array = _native.affine_decode(codes, scale, offset, columns, self.groups(columns), self.kind == "m", self.width)
        return w.reshape(tensor.shape)

    def _quantize(self, w: Array, importance: Array | None, search: bool) -> QuantizedTensor:
        """Returns w fitted, encoded and packed natively."""
        rows = as_rows(w)
        scale, offset, params = self._fit(rows, importance, search)
        if self.kind == "":
            params |= {"zero": pack_bits(params["zero"], self.width)}
        codes = _native.affine_encode(rows, scale, offset, self.groups(rows.shape[1]), self.kind == "m", self.width, self.max_code)
        return QuantizedTensor(self.name, w.shape, {"codes": codes, **params})

    def fit_clipped(self, w: Array, importance: Array | None = None) -> Params:
        self.check(w.shape)
        return self._fit(w, check_importance(importance, w.shape[-1], self.name), search=True)[2]

    def _fit(self, rows: Array, importance: Array | None, search: bool) -> tuple[Array, Array, dict[str, Array]]:
        """Returns (scale, offset) as the native functions take them, and the params."""
        group = {_PER_ROW: rows.shape[1], _PER_TENSOR: 0}.get(self.group_size, self.group_size)
        scale, offset = _native.affine_fit(rows, group, _KINDS[self.kind], self.max_code, importance, search, self.wide)
        second: dict[str, Array] = {}
        if self.kind == "":
            second["zero"] = offset.astype(np.uint8)
        elif self.kind == "m":
            second["min"] = self.stored_minimum(offset)
        return scale, offset, {"scale": self.stored_scale(scale), **second}

    def _wide(self, tensor: QuantizedTensor) -> tuple[Array, Array]:
        """Returns (scale, offset) as the native functions take them: float32, (rows, groups) or (1, 1)."""
        scale = tensor.fields["scale"].astype(np.float32)
        if self.kind == "s":
            return scale, np.full((1, 1), self.middle, dtype=np.float32)
        if self.kind == "m":
            return scale, tensor.fields["min"].astype(np.float32)
        return scale, unpack_bits(tensor.fields["zero"], self.width, scale.shape[1]).astype(np.float32)

    def stored_scale(self, scale: Array) -> Array:
        """Returns scale, float32, as stored; a subnormal float16 away from zero. Raises FormatError for one that is too large."""
        with np.errstate(over="ignore"):
            rounded = scale.astype(self.float_type)
        if not np.isfinite(rounded).all():
            raise FormatError(f"{self.name}: a group's scale is beyond {self._largest()}")
        if self.wide:
            positive: Array = rounded + np.float32(0)  # -0 becomes 0
            return positive
        too_small = (np.abs(scale) < _F16_NORMAL) & (np.abs(rounded.astype(np.float32)) < np.abs(scale))
        rounded.view(np.uint16)[too_small] += 1  # the next float16 away from zero
        return rounded

    def stored_minimum(self, minimum: Array) -> Array:
        """Returns minimum, float32, as the nearest float that can be stored. Raises FormatError for one that is too large."""
        with np.errstate(over="ignore"):
            rounded: Array = minimum.astype(self.float_type) + self.float_type.type(0)  # -0 becomes 0
        if not np.isfinite(rounded).all():
            raise FormatError(f"{self.name}: a group's minimum is beyond -{self._largest()}")
        return rounded

    def _largest(self) -> str:
        """Returns the end of an error about numbers that are too large."""
        most = f"{float(np.finfo(self.float_type).max):g}, the largest {self.float_type}"
        return f"{most}; use {'f32' if self.wide else f'{self.name}f (float32 scales), bf16 or f32'}"

    def _zeros(self, params: Params) -> Array:
        """Returns the code of 0 for every group, float32, broadcastable to (rows, groups, group_size)."""
        if self.kind == "s":
            return np.full((1, 1, 1), self.middle, dtype=np.float32)
        return params["zero"].astype(np.float32)[..., None]


def _divisor(scale: Array) -> Array:
    """Returns scale as float32 with 1 for 0: the group holds only zeros, and 0 / 1 encodes them."""
    wide = scale.astype(np.float32)
    return np.where(wide == 0, np.float32(1), wide)


def quantize_range(w: Array | float, low: float, high: float, bits: int) -> tuple[Array, float]:
    """Returns (codes uint8 in [0, 2^bits), scale) of w on the 2^bits equally spaced levels from low to high, both included.

    scale = (high - low) / (2^bits - 1);  q = round((w - low) / scale), half to even; w outside [low, high] is clipped.
    In float64: 0.12345678 in [-0.5, 0.5] at 8 bits gives 159 with scale 1/255. bits in 1..8.
    Raises FormatError for an empty or infinite range, or other bits.
    """
    if not 1 <= bits <= 8:
        raise FormatError(f"quantize_range: {bits} bits; need 1..8")
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise FormatError(f"quantize_range: range [{low}, {high}]; need finite low < high")
    scale = (float(high) - float(low)) / (2**bits - 1)
    inside = np.clip(np.asarray(w, dtype=np.float64), low, high)
    return np.rint((inside - low) / scale).astype(np.uint8), scale


def dequantize_range(codes: Array, low: float, scale: float) -> Array:
    """Returns w ~ codes * scale + low, float64: the inverse of `quantize_range` within half a scale."""
    return np.asarray(codes, dtype=np.float64) * scale + low
