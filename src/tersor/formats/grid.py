"""The grid behind a format's codes: what every code of every column stands for, for methods that choose codes one by one.

    value = step * level + offset      level: one of an increasing table; step and offset: per row and group of columns

Every format with codes has this form; the stored floats (scale, min, d, dmin, absmax, scb) enter linearly:

    value = sum over names p of theta_p * basis_p(code)       theta_p: per row and unit of columns

so that for given codes the best of them are the solution of a linear least-squares problem.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tersor.formats import ggml_blocks
from tersor.formats.affine import AffineFormat
from tersor.formats.float_zero import FloatZeroFormat
from tersor.formats.format import Format
from tersor.formats.fp8 import BLOCK, E4M3, Fp8Format
from tersor.formats.ggml import GgmlFormat
from tersor.formats.int8 import Int8RowFormat
from tersor.formats.lookup import DoubleLookupFormat, LookupFormat
from tersor.formats.nvfp4 import E2M1, Nvfp4Format
from tersor.formats.signs import BinaryFormat, TernaryFormat
from tersor.tensor import Array, Params


@dataclass(frozen=True)
class Grid:
    """step, offset: (rows, groups) float32, a group being columns / groups neighbours; levels: (n,) float32, increasing;
    codes: (n,), the code of each level, in the format's dtype."""

    step: Array
    offset: Array
    levels: Array
    codes: Array

    def chosen(self, indices: Array) -> Array:
        """Returns the codes of levels, in the shape of their indices, uint8; those themselves where they are the codes."""
        codes: Array = indices if self._counts else np.take(self.codes, indices)
        return codes

    def indices(self, codes: Array) -> Array:
        """Returns the index of the level of every code, uint8; an array of its own."""
        own = codes.view(np.uint8)
        if self._counts:
            copy: Array = own.copy()
            return copy
        table = np.zeros(256, dtype=np.uint8)
        table[self.codes.view(np.uint8)] = np.arange(len(self.codes), dtype=np.uint8)
        found: Array = np.take(table, own)
        return found

    @property
    def _counts(self) -> bool:
        """Whether codes are 0, 1, ..., the indices themselves."""
        return bool(self.codes.dtype == np.uint8 and (self.codes == np.arange(len(self.codes))).all())


def grid_of(format: Format, params: Params, rows: int) -> Grid | None:
    """Returns the grid that the params (leading axes (rows, groups of the format)) span, or None for a format without one.

    step * level + offset equals `format.decode` bit for bit, in float32 with every operation rounded; with a float zero below 2^-4
    (code - zero has more than 24 bits), float32 scales beside zeros, and in int8_row (which is decoded in bitsandbytes' order), it
    may be a neighbouring float32.
    """
    if isinstance(format, AffineFormat):
        step = _wide(params["scale"], rows)
        if format.kind == "m":
            offset = _wide(params["min"], rows)
        else:
            zero = np.float32(format.middle) if format.kind == "s" else _wide(params["zero"], rows)
            offset = -(step * zero)  # exact: 11 bits times 8, but for float32 scales
        return _integers(step, offset, 0, format.max_code, np.uint8, 0)
    if isinstance(format, FloatZeroFormat):
        step = _wide(params["scale"], rows)
        return _integers(step, -(step * _wide(params["zero"], rows)), 0, format.max_code, np.uint8, 0)  # exact: 11 bits times 11
    if isinstance(format, GgmlFormat):
        kind = ggml_blocks.BLOCKS[format.name]
        step, maybe = kind.grid(params)
        step = step.reshape(rows, -1)
        levels = kind.levels[(kind.levels >= kind.lowest) & (kind.levels <= kind.highest)]
        levels, first = np.unique(levels, return_index=True)
        codes = (first + int(np.searchsorted(kind.levels, levels[0])) if format.name != "mxfp4" else first).astype(np.uint8)
        return Grid(step, np.zeros_like(step) if maybe is None else maybe.reshape(rows, -1), levels, codes)
    if isinstance(format, Int8RowFormat):
        step = _wide(params["scb"], rows) / np.float32(127)
        return _integers(step, np.zeros_like(step), -127, 127, np.int8, -127)
    if isinstance(format, DoubleLookupFormat | LookupFormat):
        step = _wide(format.unnest(params) if isinstance(format, DoubleLookupFormat) else params["absmax"], rows)
        levels, first = np.unique(format.table, return_index=True)
        return Grid(step, np.zeros_like(step), levels, first.astype(np.uint8))
    if isinstance(format, BinaryFormat | TernaryFormat):
        step = _wide(params["scale"], rows)
        levels = np.array([-1, 1] if isinstance(format, BinaryFormat) else [-1, 0, 1], dtype=np.float32)
        return Grid(step, np.zeros_like(step), levels, np.arange(len(levels), dtype=np.uint8))
    if isinstance(format, Fp8Format | Nvfp4Format):
        return _eight_and_four_bit_floats(format, params, rows)
    return None


def _eight_and_four_bit_floats(format: Fp8Format | Nvfp4Format, params: Params, rows: int) -> Grid:
    if isinstance(format, Nvfp4Format):
        step, table = _wide(format.steps(params), rows), E2M1
    else:
        scale = params["scale"]
        step, table = _wide(np.repeat(scale, BLOCK, axis=0)[:rows] if format.axis == "b128" else scale, rows), E4M3
    finite = np.flatnonzero(np.isfinite(table))
    levels, first = np.unique(table[finite], return_index=True)
    return Grid(step, np.zeros_like(step), levels, finite[first].astype(np.uint8))


def free_parameters(format: Format) -> tuple[str, ...]:
    """Returns the names of the stored floats that enter the values linearly and may each be chosen freely."""
    if isinstance(format, AffineFormat):
        return ("scale", "min") if format.kind == "m" else ("scale",)
    if isinstance(format, GgmlFormat):
        if format.name == "mxfp4":
            return ()  # a power of two
        if format.group_size == 32 or format.name in ("tq1_0", "tq2_0"):
            return ("scale", "min") if format.name in ("q4_1", "q5_1") else ("scale",)
        return ("d", "dmin") if format.name in ("q2_k", "q4_k", "q5_k") else ("d",)
    if isinstance(format, Int8RowFormat):
        return ("scb",)
    if isinstance(format, DoubleLookupFormat):
        return ()  # in 8 bits on a map of all rows
    if isinstance(format, LookupFormat):
        return ("absmax",)
    if isinstance(format, Fp8Format):
        return () if format.axis == "b128" else ("scale",)  # a block is of many rows, but not of all
    return ("scale",) if isinstance(format, BinaryFormat | TernaryFormat | FloatZeroFormat) else ()


def basis(format: Format, codes: Array, params: Params) -> list[Array]:
    """Returns basis_p for every name of `free_parameters`, float32 like codes (rows, in): the values at theta_p = 1, the others 0."""
    ones = {}
    names = free_parameters(format)
    for name in names:
        ones[name] = [np.full_like(params[p], p == name) if p in names else params[p] for p in params]
    return [format.decode(codes, dict(zip(params, ones[name]))) for name in names]


def _integers(step: Array, offset: Array, low: int, high: int, dtype: type, first: int) -> Grid:
    levels = np.arange(low, high + 1, dtype=np.float32)
    return Grid(step, offset, levels, np.arange(first, first + len(levels)).astype(dtype))


def _wide(values: Array, rows: int) -> Array:
    """Returns values, (rows, groups) or (1, 1), as (rows, groups) float32."""
    wide = values.astype(np.float32)
    return np.ascontiguousarray(np.broadcast_to(wide, (rows, wide.shape[1])))
