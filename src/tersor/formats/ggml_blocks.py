"""The numpy reference of ggml's blocks: bytes <-> codes and parameters, and the grid that the parameters span.

Every type that tersor can encode stores w = step * level(code) + offset, with one step (and, for some, one offset)
per sub-block of 16, 32 or 256 values. A BlockType says where the bits of a code lie, which levels the codes stand for,
and how the parameters are stored. All arrays have leading axes (rows, blocks):

    bytes (rows, blocks, nbytes) uint8 <-> codes (rows, blocks, size) uint8, params {name: (rows, blocks[, subs])}

Layouts: ggml-org/ggml src/ggml-common.h; formulas: its src/ggml-quants.c, dequantize_row_*. Checked against gguf-py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tersor.tensor import Array, Params

# The sixteen levels of IQ4_NL and IQ4_XS (kvalues_iq4nl), and of MXFP4 and NVFP4 (E2M1, doubled, to be integers).
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

Grid = tuple[Array, Array | None]  # step and offset, (rows, blocks, subs) float32


@dataclass(frozen=True)
class Plane:
    """Where some bits of every code lie: `bits` bits per value, in the bytes of `field`.

    The field is cut into runs of `run` bytes; byte i of a run holds value i in its lowest bits, value run + i in the
    next ones, and so on. So run=16, bits=4 is `byte i = value(i+16) << 4 | value(i)`, and run=1 is a plain bit stream.
    """

    field: str
    bits: int
    run: int


@dataclass(frozen=True)
class BlockType:
    """One ggml block. size: values; fields: (name, bytes) in file order; planes: lowest bits of the code first.

    levels: float32, the integer that each code stands for, of which encoding uses those from `lowest` to `highest`;
    subs: sub-blocks with a step of their own; flip: the bits stored inverted.
    """

    size: int
    fields: tuple[tuple[str, int], ...]
    planes: tuple[Plane, ...]
    levels: Array
    subs: int
    read_params: Callable[[Mapping[str, Array]], dict[str, Array]]
    write_params: Callable[[Params], dict[str, Array]]
    grid: Callable[[Params], Grid]
    lowest: float = -np.inf
    highest: float = np.inf
    flip: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of one block."""
        return sum(n for _, n in self.fields)


def split(name: str, blocks: Array) -> dict[str, Array]:
    """Returns the fields of blocks (..., nbytes) uint8 by name, each (..., bytes of the field)."""
    fields, at = {}, 0
    for field, n in BLOCKS[name].fields:
        fields[field] = blocks[..., at : at + n]
        at += n
    return fields


def unpack(name: str, blocks: Array) -> tuple[Array, dict[str, Array]]:
    """Returns (codes, params) of blocks (rows, blocks, nbytes) uint8."""
    kind = BLOCKS[name]
    fields = split(name, blocks)
    if name == "tq1_0":
        return _trits_from_bytes(fields), kind.read_params(fields)
    codes, shift = np.zeros((*blocks.shape[:-1], kind.size), np.uint8), 0
    for plane in kind.planes:
        codes |= _values_from_plane(fields[plane.field], plane) << shift
        shift += plane.bits
    return codes ^ kind.flip, kind.read_params(fields)


def pack(name: str, codes: Array, params: Params) -> Array:
    """Returns the blocks (rows, blocks, nbytes) uint8 that hold these codes and parameters; inverse of unpack."""
    kind = BLOCKS[name]
    fields = kind.write_params(params)
    if name == "tq1_0":
        fields |= _bytes_from_trits(codes)
    shift = 0
    for plane in kind.planes:
        fields[plane.field] = _plane_from_values((codes ^ kind.flip) >> shift & ((1 << plane.bits) - 1), plane)
        shift += plane.bits
    return np.concatenate([fields[field] for field, _ in kind.fields], axis=-1)


def decode(name: str, codes: Array, params: Params) -> Array:
    """Returns step * level(code) + offset, float32, in the shape of codes."""
    kind = BLOCKS[name]
    step, offset = kind.grid(params)
    with np.errstate(over="ignore", invalid="ignore"):
        values: Array = kind.levels[codes].reshape(*step.shape, -1) * step[..., None]
        if offset is not None:
            values += offset[..., None]
    result: Array = values.reshape(codes.shape)
    return result


def encode(name: str, w: Array, params: Params) -> Array:
    """Returns the codes whose values are nearest to w (rows, blocks, size) float32 on the grid of params.

    t = (w - offset) * (1 / step), then the nearest level: halves go to the even integer on evenly spaced levels, to the
    lower level (of smaller magnitude for MXFP4) on the others. A step of 0 gives the code of level 0, or the nearest to it.
    """
    kind = BLOCKS[name]
    step, offset = kind.grid(params)
    x = w.reshape(*step.shape, -1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if name == "mxfp4":
            nearest = _nearest_fp4(x, step[..., None])
        else:
            inverse = np.where(step == 0, np.float32(0), np.float32(1) / step)[..., None]
            nearest = _nearest_level(kind, (x if offset is None else x - offset[..., None]) * inverse)
    codes: Array = nearest.reshape(w.shape)
    return codes


def _nearest_level(kind: BlockType, t: Array) -> Array:
    if kind.levels is _IQ4:
        return _count_below(t, list((_IQ4[1:] + _IQ4[:-1]) / 2))
    lowest, highest = np.float32(max(kind.levels[0], kind.lowest)), np.float32(min(kind.levels[-1], kind.highest))
    t = np.where(t > lowest, t, lowest)  # in this order a NaN becomes the lowest level
    t = np.where(t < highest, t, highest)
    codes: Array = (np.rint(t) - kind.levels[0]).astype(np.uint8)
    return codes


def _nearest_fp4(x: Array, step: Array) -> Array:
    magnitudes = _FP4[:8]
    nearest = _count_below(np.abs(x), [middle * step for middle in (magnitudes[1:] + magnitudes[:-1]) / 2])
    return nearest + 8 * ((x < 0) & (nearest > 0)).astype(np.uint8)


def _count_below(t: Array, borders: list[Array]) -> Array:
    """Returns how many of the borders lie below t, uint8."""
    count = np.zeros(t.shape, np.uint8)
    for border in borders:
        count += t > border
    return count


def _values_from_plane(field: Array, plane: Plane) -> Array:
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8)[:, None]
    runs = field.reshape(*field.shape[:-1], -1, 1, plane.run)
    values: Array = (runs >> shifts & ((1 << plane.bits) - 1)).reshape(*field.shape[:-1], -1)
    return values


def _plane_from_values(values: Array, plane: Plane) -> Array:
    shifts = np.arange(0, 8, plane.bits, dtype=np.uint8)[:, None]
    runs = values.reshape(*values.shape[:-1], -1, len(shifts), plane.run)
    field: Array = np.bitwise_or.reduce(runs << shifts, axis=-2).reshape(*values.shape[:-1], -1)
    return field


# TQ1_0: byte = ceil(256 * t / 243), t = sum of trit_k * 3^(4-k); trit k comes back as (byte * 3^k mod 256) * 3 >> 8.
# qs: 32 bytes of 5 x 32 values, then 16 bytes of 5 x 16 values; qh: 4 bytes of 4 x 4 values (their fifth trit is 0).
_TRIT_RUNS = ((0, 32, 5), (32, 16, 5), (48, 4, 4))  # (first byte, bytes, trits in each)


def _trits_from_bytes(fields: Mapping[str, Array]) -> Array:
    bytes_ = np.concatenate([fields["qs"], fields["qh"]], axis=-1)
    parts = []
    for first, n, trits in _TRIT_RUNS:
        run = bytes_[..., None, first : first + n]
        top = run * (3 ** np.arange(trits)).astype(np.uint8)[:, None]  # modulo 256
        parts.append((top.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(*run.shape[:-2], -1))
    return np.concatenate(parts, axis=-1)


def _bytes_from_trits(codes: Array) -> dict[str, Array]:
    parts, at = [], 0
    for _, n, trits in _TRIT_RUNS:
        run = codes[..., at : at + n * trits].reshape(*codes.shape[:-1], trits, n).astype(np.uint16)
        t = (run * (3 ** np.arange(4, 4 - trits, -1)).astype(np.uint16)[:, None]).sum(axis=-2)
        parts.append(((t * 256 + 242) // 243).astype(np.uint8))
        at += n * trits
    return {"qs": np.concatenate(parts[:2], axis=-1), "qh": parts[2]}


def _f16(field: Array) -> Array:
    """Returns the little-endian float16 of a two-byte field, without its last axis."""
    return np.ascontiguousarray(field).view("<f2")[..., 0]


def _f16_bytes(values: Array) -> Array:
    return np.ascontiguousarray(values, dtype="<f2")[..., None].view(np.uint8)


def _f32(params: Params, name: str) -> Array:
    return params[name].astype(np.float32)[..., None]


# One scale per block, perhaps with a minimum: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, TQ1_0, TQ2_0.


def _read_scale(f: Mapping[str, Array]) -> dict[str, Array]:
    return {"scale": _f16(f["d"])}


def _write_scale(p: Params) -> dict[str, Array]:
    return {"d": _f16_bytes(p["scale"])}


def _grid_scale(p: Params) -> Grid:
    return _f32(p, "scale"), None


def _read_scale_min(f: Mapping[str, Array]) -> dict[str, Array]:
    return {"scale": _f16(f["d"]), "min": _f16(f["m"])}


def _write_scale_min(p: Params) -> dict[str, Array]:
    return {"d": _f16_bytes(p["scale"]), "m": _f16_bytes(p["min"])}


def _grid_scale_min(p: Params) -> Grid:
    return _f32(p, "scale"), _f32(p, "min")


# A power of two per block: MXFP4. exponent e stands for 2^(e-128), since the levels are doubled.


def _read_exponent(f: Mapping[str, Array]) -> dict[str, Array]:
    return {"exponent": f["e"][..., 0]}


def _write_exponent(p: Params) -> dict[str, Array]:
    return {"e": p["exponent"][..., None]}


def _grid_exponent(p: Params) -> Grid:
    return np.ldexp(np.float32(1), p["exponent"].astype(np.int32) - 128)[..., None].astype(np.float32), None


# Super-blocks with scales and minima of sub-blocks: Q2_K, Q4_K, Q5_K. w = d * scale * code - dmin * min.


def _read_q2k(f: Mapping[str, Array]) -> dict[str, Array]:
    return {"d": _f16(f["d"]), "dmin": _f16(f["dmin"]), "scales": f["scales"] & 15, "mins": f["scales"] >> 4}


def _write_q2k(p: Params) -> dict[str, Array]:
    return {"d": _f16_bytes(p["d"]), "dmin": _f16_bytes(p["dmin"]), "scales": p["scales"] | p["mins"] << 4}


def _read_k(f: Mapping[str, Array]) -> dict[str, Array]:
    """12 bytes of eight 6-bit scales s and minima m, as drawn in the layout of Q4_K."""
    a, b, c = (f["scales"][..., i : i + 4] for i in (0, 4, 8))
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=-1)
    mins = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=-1)
    return {"d": _f16(f["d"]), "dmin": _f16(f["dmin"]), "scales": scales, "mins": mins}


def _write_k(p: Params) -> dict[str, Array]:
    s, m = p["scales"], p["mins"]
    a = s[..., :4] | s[..., 4:] >> 4 << 6
    b = m[..., :4] | m[..., 4:] >> 4 << 6
    c = s[..., 4:] & 15 | (m[..., 4:] & 15) << 4
    return {"d": _f16_bytes(p["d"]), "dmin": _f16_bytes(p["dmin"]), "scales": np.concatenate([a, b, c], axis=-1)}


def _grid_k(p: Params) -> Grid:
    with np.errstate(over="ignore", invalid="ignore"):
        return _f32(p, "d") * p["scales"].astype(np.float32), -(_f32(p, "dmin") * p["mins"].astype(np.float32))


# Super-blocks with signed scales of sub-blocks: Q3_K, Q6_K, IQ4_XS. w = d * scale * level.


def _read_q3k(f: Mapping[str, Array]) -> dict[str, Array]:
    """Sixteen 6-bit scales: low nibbles of 0..7 and (high half) 8..15 in bytes 0..7, upper bits in bytes 8..11."""
    low = _values_from_plane(f["scales"][..., :8], Plane("scales", 4, 8))
    high = _values_from_plane(f["scales"][..., 8:], Plane("scales", 2, 4))
    return {"d": _f16(f["d"]), "scales": (low | high << 4).astype(np.int8) - np.int8(32)}


def _write_q3k(p: Params) -> dict[str, Array]:
    scales = (p["scales"] + np.int8(32)).astype(np.uint8)
    low = _plane_from_values(scales & 15, Plane("scales", 4, 8))
    high = _plane_from_values(scales >> 4, Plane("scales", 2, 4))
    return {"d": _f16_bytes(p["d"]), "scales": np.concatenate([low, high], axis=-1)}


def _read_q6k(f: Mapping[str, Array]) -> dict[str, Array]:
    return {"d": _f16(f["d"]), "scales": f["scales"].view(np.int8)}


def _write_q6k(p: Params) -> dict[str, Array]:
    return {"d": _f16_bytes(p["d"]), "scales": p["scales"].view(np.uint8)}


def _read_iq4xs(f: Mapping[str, Array]) -> dict[str, Array]:
    low = _values_from_plane(f["scales_l"], Plane("scales_l", 4, 1))
    high = _values_from_plane(f["scales_h"], Plane("scales_h", 2, 1))
    return {"d": _f16(f["d"]), "scales": (low | high << 4).astype(np.int8) - np.int8(32)}


def _write_iq4xs(p: Params) -> dict[str, Array]:
    scales = (p["scales"] + np.int8(32)).astype(np.uint8)
    low = _plane_from_values(scales & 15, Plane("scales_l", 4, 1))
    high = _plane_from_values(scales >> 4, Plane("scales_h", 2, 1))
    return {"d": _f16_bytes(p["d"]), "scales_l": low, "scales_h": high}


def _grid_signed(p: Params) -> Grid:
    with np.errstate(over="ignore", invalid="ignore"):
        return _f32(p, "d") * p["scales"].astype(np.float32), None


def _integers(lowest: int, count: int) -> Array:
    return np.arange(lowest, lowest + count, dtype=np.float32)


_IQ4 = np.array(IQ4_LEVELS, np.float32)
_FP4 = np.array(FP4_LEVELS, np.float32)
_ONE = (_read_scale, _write_scale, _grid_scale)
_TWO = (_read_scale_min, _write_scale_min, _grid_scale_min)
_NIBBLES = (Plane("qs", 4, 16),)
_FIVE = (Plane("qs", 4, 16), Plane("qh", 1, 1))

BLOCKS: dict[str, BlockType] = {
    "q4_0": BlockType(32, (("d", 2), ("qs", 16)), _NIBBLES, _integers(-8, 16), 1, *_ONE),
    "q4_1": BlockType(32, (("d", 2), ("m", 2), ("qs", 16)), _NIBBLES, _integers(0, 16), 1, *_TWO),
    "q5_0": BlockType(32, (("d", 2), ("qh", 4), ("qs", 16)), _FIVE, _integers(-16, 32), 1, *_ONE),
    "q5_1": BlockType(32, (("d", 2), ("m", 2), ("qh", 4), ("qs", 16)), _FIVE, _integers(0, 32), 1, *_TWO),
    "q8_0": BlockType(32, (("d", 2), ("qs", 32)), (Plane("qs", 8, 32),), _integers(-128, 256), 1, *_ONE, lowest=-127, flip=128),
    "q2_k": BlockType(
        256,
        (("scales", 16), ("qs", 64), ("d", 2), ("dmin", 2)),
        (Plane("qs", 2, 32),),
        _integers(0, 4),
        16,
        _read_q2k,
        _write_q2k,
        _grid_k,
    ),
    "q3_k": BlockType(
        256,
        (("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2)),
        (Plane("qs", 2, 32), Plane("hmask", 1, 32)),
        _integers(-4, 8),
        16,
        _read_q3k,
        _write_q3k,
        _grid_signed,
    ),
    "q4_k": BlockType(
        256,
        (("d", 2), ("dmin", 2), ("scales", 12), ("qs", 128)),
        (Plane("qs", 4, 32),),
        _integers(0, 16),
        8,
        _read_k,
        _write_k,
        _grid_k,
    ),
    "q5_k": BlockType(
        256,
        (("d", 2), ("dmin", 2), ("scales", 12), ("qh", 32), ("qs", 128)),
        (Plane("qs", 4, 32), Plane("qh", 1, 32)),
        _integers(0, 32),
        8,
        _read_k,
        _write_k,
        _grid_k,
    ),
    "q6_k": BlockType(
        256,
        (("ql", 128), ("qh", 64), ("scales", 16), ("d", 2)),
        (Plane("ql", 4, 64), Plane("qh", 2, 32)),
        _integers(-32, 64),
        16,
        _read_q6k,
        _write_q6k,
        _grid_signed,
    ),
    "iq4_nl": BlockType(32, (("d", 2), ("qs", 16)), _NIBBLES, _IQ4, 1, *_ONE),
    "iq4_xs": BlockType(
        256,
        (("d", 2), ("scales_h", 2), ("scales_l", 4), ("qs", 128)),
        _NIBBLES,
        _IQ4,
        8,
        _read_iq4xs,
        _write_iq4xs,
        _grid_signed,
    ),
    "tq1_0": BlockType(256, (("qs", 48), ("qh", 4), ("d", 2)), (), _integers(-1, 3), 1, *_ONE),
    "tq2_0": BlockType(256, (("qs", 64), ("d", 2)), (Plane("qs", 2, 32),), _integers(-1, 4), 1, *_ONE, highest=1),
    "mxfp4": BlockType(
        32,
        (("e", 1), ("qs", 16)),
        _NIBBLES,
        _FP4,
        1,
        _read_exponent,
        _write_exponent,
        _grid_exponent,
    ),
}
