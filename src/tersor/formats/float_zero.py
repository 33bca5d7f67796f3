"""intB_gNz and intB_cz: equally spaced levels whose zero is a float16 of its own, not one of the levels: the form of HQQ.

    int4_g64z   w = (q - zero) * scale     q in 0..15; scale and zero float16 per group of 64
    int4_g64zf  scale and zero float32

B is 1, 2, 3, 4, 5, 6 or 8. Sources: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023);
mobiusml/hqq hqq/core/quantize.py (Quantizer.dequantize), which computes the same in its own compute type.
"""

from __future__ import annotations

import re

import numpy as np

from tersor.errors import FormatError
from tersor.formats.affine import BITS, AffineFormat, check_group
from tersor.formats.format import Format
from tersor.formats.packing import pack_bits, unpack_bits
from tersor.tensor import Array, Params, QuantizedTensor

EXAMPLES = ("int1_g32z", "int2_g32z", "int3_g64z", "int4_g64z", "int8_g64z", "int8_cz", "int4_g64zf")

_NAME = re.compile(r"int([1-9][0-9]*)_(?:g([1-9][0-9]*)|c)z(f?)")


def parse(name: str) -> Format | None:
    """Returns the format of this name, or None when it is no such name. Raises FormatError for bits or groups that are not stored."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    bits = int(match[1])
    if bits not in BITS:
        raise FormatError(f"{name}: {bits}-bit codes; need one of {BITS}")
    if match[2] is not None:
        check_group(name, int(match[2]))
    return FloatZeroFormat(bits, int(match[2] or 0), match[3] == "f")


class FloatZeroFormat(Format):
    """B-bit integers with a scale and a zero per group, float16, or float32 when wide. params: {"scale", "zero"}, each (rows, groups)."""

    uses_importance = False

    def __init__(self, bits: int, group_size: int, wide: bool = False) -> None:
        self._plain = AffineFormat(bits, group_size, "m", wide)  # the same numbers of the same size, but for what the second one means
        self.name = self._plain.name = self._plain.name.replace("m", "z")  # its errors name this format
        self.bits = bits
        self.width = bits
        self.group_size = group_size
        self.wide = wide
        self.float_type = self._plain.float_type
        self.max_code = 2**bits - 1

    def layout(self) -> str:
        groups = f"in/{self.group_size}" if self.group_size > 0 else "1"
        return (
            f"codes: uint8 (rows, ceil(in*{self.width}/8))  q in 0..{self.max_code}, dense, LSB first\n"
            f"scale: {self.float_type} (rows, {groups})\nzero:  {self.float_type} (rows, {groups})\nw = (q - zero) * scale\n"
        )

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return self._plain.nbytes(shape)

    def alternative(self, columns: int) -> str:
        return self._plain.alternative(columns).replace("m", "z")

    def of_floats(self, wide: bool) -> FloatZeroFormat:
        """Returns the format that differs in the type of scales and zeros only."""
        return FloatZeroFormat(self.width, self.group_size, wide)

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns scale = (max(w, 0) - min(w, 0)) / (2^B - 1) and zero = -min(w, 0) / scale of every group, both rounded to what is stored.

        zero is computed with the stored scale. Raises FormatError for a scale that is too large, or for any importance.
        """
        self.refuse_importance(importance)
        blocks = w.reshape(w.shape[0], self.groups(w.shape[1]), -1)
        low, high = np.minimum(blocks.min(axis=-1), np.float32(0)), np.maximum(blocks.max(axis=-1), np.float32(0))
        with np.errstate(over="ignore"):
            scale = self._plain.stored_scale((high - low) / np.float32(self.max_code))
        return {"scale": scale, "zero": (-low / _divisor(scale)).astype(self.float_type)}

    def encode(self, w: Array, params: Params) -> Array:
        """Returns q = clip(round(w / scale + zero), 0, 2^B - 1), half to even."""
        blocks = w.reshape(len(w), self.groups(w.shape[1]), -1)
        with np.errstate(over="ignore"):
            q = np.rint(blocks / _divisor(params["scale"])[..., None] + params["zero"].astype(np.float32)[..., None])
        codes: Array = np.clip(q, 0, self.max_code).astype(np.uint8).reshape(w.shape)
        return codes

    def decode(self, codes: Array, params: Params) -> Array:
        q = codes.reshape(len(codes), self.groups(codes.shape[1]), -1).astype(np.float32)
        w: Array = (q - params["zero"].astype(np.float32)[..., None]) * params["scale"].astype(np.float32)[..., None]
        decoded: Array = w.reshape(codes.shape)
        return decoded

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        fields = {name: np.ascontiguousarray(params[name], dtype=self.float_type) for name in ("scale", "zero")}
        return QuantizedTensor(self.name, codes.shape if shape is None else shape, {"codes": pack_bits(codes, self.width), **fields})

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        codes = unpack_bits(tensor.fields["codes"], self.width, tensor.columns)
        return codes, {name: tensor.fields[name] for name in ("scale", "zero")}


def _divisor(scale: Array) -> Array:
    """Returns scale as float32 with 1 for 0, which all-zero groups have."""
    wide = scale.astype(np.float32)
    return np.where(wide == 0, np.float32(1), wide)
