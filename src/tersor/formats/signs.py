"""Binary and ternary: signs times a scale per group, with the scale that has the least squared error.

    binary_g64    w = (2q - 1) * scale   q in 0..1: -scale, +scale          XNOR-Net, arXiv 1603.05279, equation 6
    ternary_g64   w = (q - 1) * scale    q in 0..2: -scale, 0, +scale       TWN, arXiv 1605.04711, equations 3 to 5

Both fits are exact: for binary scale = mean |w|; for ternary the best support is the k largest |w| for some k, since
for a support S the best scale is mean_S |w| and the error is sum w^2 - (sum_S |w|)^2 / |S|. (TWN approximates the
threshold by 0.7 mean |w|; sorting finds the best one.) With importance h, sums are weighted by h.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from math import prod

import numpy as np

from tersor import _native
from tersor.errors import FormatError
from tersor.formats.affine import check_group
from tersor.formats.format import Format, check_importance
from tersor.formats.packing import pack_bits, packed_bytes, unpack_bits
from tersor.tensor import Array, Params, QuantizedTensor

EXAMPLES = ("binary_g32", "binary_g64", "binary_g128", "ternary_g32", "ternary_g64", "ternary_g128")

_NAME = re.compile(r"(binary|ternary)_g([1-9][0-9]*)")


def parse(name: str) -> Format | None:
    """Returns the format of this name, or None; raises FormatError for a group that is not stored."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    check_group(name, int(match[2]))
    return (BinaryFormat if match[1] == "binary" else TernaryFormat)(int(match[2]))


class _SignFormat(Format):
    """What binary and ternary share: packed codes and one float16 scale per group. params: {"scale": (rows, groups)}."""

    family: str
    width: int

    def __init__(self, group_size: int) -> None:
        self.name = f"{self.family}_g{group_size}"
        self.bits = self.width
        self.group_size = group_size

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape[:-1]) * (packed_bytes(shape[-1], self.width) + 2 * self.groups(shape[-1]))

    def alternative(self, columns: int) -> str:
        divisors = [g for g in (256, 128, 64, 32, 16) if g < self.group_size and columns % g == 0]
        return f"use {self.family}_g{divisors[0]}" if divisors else "use int2_c"

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        fields = {"codes": pack_bits(codes, self.width), "scale": np.ascontiguousarray(params["scale"], dtype=np.float16)}
        return QuantizedTensor(self.name, codes.shape if shape is None else shape, fields)

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        return unpack_bits(tensor.fields["codes"], self.width, tensor.columns), {"scale": tensor.fields["scale"]}

    def stored_scale(self, scale: Array) -> Array:
        """Returns scale as the nearest float16. Raises FormatError for one that float16 cannot hold."""
        with np.errstate(over="ignore"):
            rounded = scale.astype(np.float16)
        if not np.isfinite(rounded).all():
            worst = scale[~np.isfinite(rounded)][0]
            raise FormatError(f"{self.name}: a group needs scale {worst:g}, beyond float16's 65504; use nf4 (float32 scales), bf16 or f32")
        return rounded

    def quantize_clipped(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        """Returns `quantize`: its scale has the least squared error already, so there is nothing to search."""
        return self.quantize(w, importance)

    def dequantize(self, tensor: QuantizedTensor) -> Array:
        scale, offset, minimum = self._as_affine(tensor.fields["scale"].astype(np.float32))
        codes = np.ascontiguousarray(tensor.fields["codes"])
        w: Array = _native.affine_decode(codes, scale, offset, tensor.columns, self.groups(tensor.columns), minimum, self.width)
        return w.reshape(tensor.shape)

    @abstractmethod
    def _as_affine(self, scale: Array) -> tuple[Array, Array, bool]:
        """Returns (scale, offset, minimum), float32, of the affine grid with the same values, for the native decoder."""

    def _blocks(self, w: Array) -> Array:
        return w.reshape(w.shape[0], self.groups(w.shape[1]), self.group_size)

    def _weights(self, importance: Array | None, columns: int) -> Array:
        """Returns the importance as float64 (1, groups, group_size); ones when there is none or a group's is all zero."""
        if importance is None:
            return np.ones((1, self.groups(columns), self.group_size))
        checked = check_importance(importance, columns, self.name)
        assert checked is not None
        h = checked.astype(np.float64).reshape(1, self.groups(columns), self.group_size)
        return np.where(h.sum(axis=-1, keepdims=True) > 0, h, 1.0)


class BinaryFormat(_SignFormat):
    """A sign bit per weight and a float16 scale per group; there is no zero: 0 encodes as +scale."""

    family = "binary"
    width = 1

    def layout(self) -> str:
        return (
            "codes: uint8 (rows, ceil(in/8))  q in 0..1, bit k of byte b is the sign of value 8b+k (1 = plus)\n"
            f"scale: float16 (rows, in/{self.group_size})\nw = (2q - 1) * scale\n"
        )

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns scale = sum h |w| / sum h per group, the least-squares scale of the signs; sums in float64."""
        h = self._weights(importance, w.shape[1])
        magnitude = np.abs(self._blocks(w).astype(np.float64))
        return {"scale": self.stored_scale((h * magnitude).sum(axis=-1) / h.sum(axis=-1))}

    def encode(self, w: Array, params: Params) -> Array:
        """Returns 1 where w >= 0 (also for -0.0), else 0."""
        return (w >= 0).astype(np.uint8)

    def decode(self, codes: Array, params: Params) -> Array:
        signs = self._blocks(codes).astype(np.float32) * np.float32(2) - np.float32(1)
        w: Array = (signs * params["scale"].astype(np.float32)[..., None]).reshape(codes.shape)
        return w

    def _as_affine(self, scale: Array) -> tuple[Array, Array, bool]:
        return scale * np.float32(2), -scale, True  # q * 2s - s, exact in float32


class TernaryFormat(_SignFormat):
    """-scale, 0 or +scale in two bits per weight, a float16 scale per group. Code 3 is not used."""

    family = "ternary"
    width = 2

    def layout(self) -> str:
        return (
            "codes: uint8 (rows, ceil(in/4))  q in 0..2, byte = q3<<6 | q2<<4 | q1<<2 | q0\n"
            f"scale: float16 (rows, in/{self.group_size})\nw = (q - 1) * scale\n"
        )

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns the scale of the least squared error per group: over the k largest |w| the k of largest (sum h|w|)^2 / sum h."""
        magnitude = np.abs(self._blocks(w))
        if importance is None:
            gain = np.cumsum(-np.sort(-magnitude, axis=-1), axis=-1, dtype=np.float64)
            mass = np.broadcast_to(np.arange(1.0, self.group_size + 1), gain.shape)
        else:
            order = np.argsort(-magnitude, axis=-1, kind="stable")
            h = np.take_along_axis(np.broadcast_to(self._weights(importance, w.shape[1]), magnitude.shape), order, axis=-1)
            gain = np.cumsum(h * np.take_along_axis(magnitude, order, axis=-1), axis=-1)
            mass = np.cumsum(h, axis=-1)
            mass[mass == 0] = 1.0
        best = np.argmax(gain * gain / mass, axis=-1)[..., None]
        scale = np.take_along_axis(gain, best, axis=-1) / np.take_along_axis(mass, best, axis=-1)
        return {"scale": self.stored_scale(scale[..., 0])}

    def encode(self, w: Array, params: Params) -> Array:
        """Returns clip(round(w / scale), -1, 1) + 1, half to even."""
        scale = params["scale"].astype(np.float32)
        blocks = self._blocks(w) / np.where(scale == 0, np.float32(np.inf), scale)[..., None]
        codes: Array = (np.clip(np.rint(blocks), -1, 1) + 1).astype(np.uint8).reshape(w.shape)
        return codes

    def decode(self, codes: Array, params: Params) -> Array:
        values = self._blocks(codes).astype(np.float32) - np.float32(1)
        w: Array = (values * params["scale"].astype(np.float32)[..., None]).reshape(codes.shape)
        return w

    def _as_affine(self, scale: Array) -> tuple[Array, Array, bool]:
        return scale, np.ones((1, 1), dtype=np.float32), False  # (q - 1) * s
