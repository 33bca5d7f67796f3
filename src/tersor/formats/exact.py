"""The same numbers in another format: codes and parameters change places, nothing is rounded again.

Formats of evenly spaced levels meet in one form,

    w = (q - zero) * scale    or    w = q * scale + min        q in [0, 2^B); scale, zero, min of a group of N columns

so that int4_g128s becomes Q4_0 (a scale of 128 columns is four equal ones of 32), int4_g64 becomes int4_g64z, ternary becomes int2_g64s,
a group whose zeros all lie in the middle becomes symmetric, and float32 scales that float16 has too become those. What comes out is
decoded and compared: same bits or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tersor.errors import FormatError
from tersor.formats import get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.float_zero import FloatZeroFormat
from tersor.formats.floats import is_half
from tersor.formats.format import Format
from tersor.formats.ggml import GgmlFormat
from tersor.formats.ordered import OrderedFormat
from tersor.formats.signs import BinaryFormat, TernaryFormat
from tersor.tensor import Array, Params, QuantizedTensor

_GGML = {"q4_0": (4, "s"), "q4_1": (4, "m"), "q5_0": (5, "s"), "q5_1": (5, "m"), "q8_0": (8, "s")}  # bits and kind, groups of 32
_KINDS = {"s": ("s", "", "z", "m"), "": ("", "s", "z", "m"), "z": ("z", "", "s", "m"), "m": ("m", "z", "", "s")}  # nearest first


@dataclass(frozen=True)
class _Levels:
    """A tensor of evenly spaced levels. codes: (rows, in) uint8; scale: float32 (rows, groups); second: zeros or minima, likewise;
    order: of the columns that codes hold, or None."""

    bits: int
    kind: str  # as AffineFormat's, or z
    codes: Array
    scale: Array
    second: Array
    order: Array | None = None


def alternatives(format: str) -> Iterator[str]:
    """Yields names of formats that may hold exactly the numbers of this one, the likeliest and smallest first."""
    found = get_format(format)
    form = _form(found)
    if form is None:
        return
    bits, kind, group, wide = form
    sizes = [group, *([0] if group < 0 else []), *(g for g in (128, 64, 32, 16) if g < group or group <= 0)]
    for other, f in [(other, f) for f in ("", "f") for other in _KINDS[kind] if wide or not f or other != kind]:
        for size in sizes:
            axis = {0: "c", -1: "t"}.get(size, f"g{size}")
            name = f"int{bits}_{axis}{other}{f}"
            if not (other == "z" and size < 0) and not (bits == 1 and other == "s"):
                orders = ("o", "") if isinstance(found, OrderedFormat) and other in ("", "s") else ("",)
                yield from (f"{name}{o}" for o in orders if f"{name}{o}" != format)
        if not f and (group <= 0 or group % 32 == 0):
            yield from (name for name, (b, k) in _GGML.items() if (b, k) == (bits, other) and name != format)


def exactly(tensor: QuantizedTensor, format: str) -> QuantizedTensor | None:
    """Returns the tensor in another format with the same values to the bit, or None when that format cannot have them."""
    source, target = get_format(tensor.format), get_format(format)
    if source == target:
        return tensor
    if _form(source) is None or _form(target) is None or not target.fits(tensor.shape):
        return None
    moved = _in_kind(_levels(source, tensor), target)
    if moved is None:
        return None
    try:
        made = _stored(target, moved, tensor.shape)
    except FormatError:
        return None
    return made if np.array_equal(target.dequantize(made), source.dequantize(tensor)) else None


def _form(format: Format) -> tuple[int, str, int, bool] | None:
    """Returns (bits, kind, columns of a group, whether its floats are float32) of a format of evenly spaced levels, None of others."""
    if isinstance(format, OrderedFormat):
        format = format.plain
    if isinstance(format, AffineFormat):
        return format.width, format.kind, format.group_size, format.wide
    if isinstance(format, FloatZeroFormat):
        return format.width, "z", format.group_size, format.wide
    if isinstance(format, GgmlFormat) and format.name in _GGML:
        return *_GGML[format.name], 32, False
    if isinstance(format, TernaryFormat):
        return 2, "s", format.group_size, False
    return (1, "m", format.group_size, False) if isinstance(format, BinaryFormat) else None


def _levels(format: Format, tensor: QuantizedTensor) -> _Levels:
    """Returns the tensor in the common form."""
    order = None
    if isinstance(format, OrderedFormat):
        tensor, order = format.split(tensor)
        format = format.plain
    codes, params = format.unpack(tensor)
    form = _form(format)
    assert form is not None
    bits, kind, _, _ = form
    scale = params["scale"].astype(np.float32)
    if isinstance(format, TernaryFormat):
        codes = codes + np.uint8(1)  # 0, 1, 2 for -1, 0, 1
    if isinstance(format, BinaryFormat):
        return _Levels(bits, kind, codes, scale * np.float32(2), -scale, order)
    if kind == "m":
        return _Levels(bits, kind, codes, scale, params["min"].astype(np.float32), order)
    zero = params["zero"].astype(np.float32) if "zero" in params else np.full(scale.shape, 2.0 ** (bits - 1), np.float32)
    return _Levels(bits, kind, codes, scale, zero, order)


def _in_kind(levels: _Levels, target: Format) -> _Levels | None:
    """Returns the levels in the target's kind and groups, None when its parameters have no room for them."""
    form = _form(target)
    assert form is not None
    bits, kind, _, wide = form
    if bits != levels.bits or isinstance(target, TernaryFormat | BinaryFormat) or not (wide or is_half(levels.scale)):
        return None
    second = levels.second
    if levels.kind == "m" and kind != "m":
        with np.errstate(divide="ignore", invalid="ignore"):
            second = np.where(levels.scale == 0, np.float32(0), -second / levels.scale)
    elif levels.kind != "m" and kind == "m":
        second = -(levels.scale * second)
    if kind == "s" and not ((second == 2 ** (bits - 1)) | (levels.scale == 0)).all():
        return None
    if kind == "" and not ((second == np.rint(second)) & (second >= 0) & (second < 2**bits)).all():
        return None
    if levels.order is not None and not isinstance(target, OrderedFormat):
        codes = np.empty_like(levels.codes)
        codes[:, levels.order] = levels.codes
        if levels.scale.shape[1] > 1 and not np.array_equal(levels.order, np.arange(len(levels.order))):
            return None
        levels = replace(levels, codes=codes, order=None)
    return replace(levels, kind=kind, second=second)


def _stored(target: Format, levels: _Levels, shape: tuple[int, ...]) -> QuantizedTensor:
    """Returns the levels as the target stores them. Raises FormatError when its groups are not parts of theirs."""
    rows, columns = levels.codes.shape
    groups = (1 if target.group_size < 0 else rows, target.groups(columns))
    if groups[0] < len(levels.scale) or groups[1] % levels.scale.shape[1]:
        raise FormatError(f"{target.name}: groups of {columns // levels.scale.shape[1]} columns are no sums of its groups")
    repeat = groups[1] // levels.scale.shape[1]

    def spread(values: Array) -> Array:
        return np.repeat(np.broadcast_to(values, (groups[0], values.shape[1])), repeat, axis=1)

    form = _form(target)
    floats = np.float32 if form is not None and form[3] else np.float16
    with np.errstate(over="ignore"):  # what float16 does not hold is not equal in the end
        params: dict[str, Array] = {"scale": spread(levels.scale).astype(floats)}
        if levels.kind in ("m", "z"):
            params["min" if levels.kind == "m" else "zero"] = spread(levels.second).astype(floats)
    if levels.kind == "":
        params["zero"] = spread(levels.second).astype(np.uint8)
    if isinstance(target, OrderedFormat):
        return _ordered(target, levels, params, shape)
    return target.pack(levels.codes, params, shape)


def _ordered(target: OrderedFormat, levels: _Levels, params: Params, shape: tuple[int, ...]) -> QuantizedTensor:
    order = np.arange(levels.codes.shape[1]) if levels.order is None else levels.order
    if not np.array_equal(target.sorted_groups(order), order):
        raise FormatError(f"{target.name}: the columns of its smaller groups are not sorted")
    return target.of(target.plain.pack(levels.codes, params, shape), order)
