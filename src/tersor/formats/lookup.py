"""nf4 and fp4: four-bit codes into a table of 16 values, times the largest magnitude of each block of 64.

    nf4, fp4          w = table[q] * absmax          absmax is float32: 4.5 bits per weight
    nf4_dq, fp4_dq    absmax itself is 8-bit: 4.127 bits per weight (double quantization)

Sources: Dettmers et al., QLoRA (arXiv 2305.14314): NF4 in section 3 and appendix E, double quantization in section 3;
the dynamic 8-bit map is that of "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861, section 2.1); stored
as bitsandbytes does (`functional.py`: QuantState, create_dynamic_map, get_4bit_type; `backends/default/ops.py`).
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, prod

import numpy as np

from tersor import _native
from tersor.formats.format import Format, as_rows, check_importance
from tersor.tensor import Array, Params, QuantizedTensor

EXAMPLES = ("nf4", "fp4", "nf4_dq", "fp4_dq")

BLOCK = 64  # weights that share an absmax
NESTED_BLOCK = 256  # absmax values that share a nested absmax

# Quantiles of N(0, 1), scaled to [-1, 1], with an exact 0: 8 values from the negative half, 9 from the positive, 0 shared.
# tests/unit/test_lookup.py derives them from QLoRA's construction.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=np.float32,
)

# code = sign<<3 | exponent<<1 | mantissa; magnitudes 0, 1/16, 8, 12, 4, 6, 2, 3 over 12, in the order of the code.
_FP4_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / np.float32(12)
FP4 = np.concatenate([_FP4_MAGNITUDES, -_FP4_MAGNITUDES])

TABLES = {"nf4": NF4, "fp4": FP4}

_TINY = np.float32(1e-38)  # the least divisor, so that its reciprocal is finite


def parse(name: str) -> Format | None:
    """Returns the lookup format of this name, or None when it is none."""
    if name not in EXAMPLES:
        return None
    table = name.removesuffix("_dq")
    return DoubleLookupFormat(table) if name.endswith("_dq") else LookupFormat(table)


@lru_cache(maxsize=1)
def dynamic_map() -> Array:
    """Returns the 256 increasing float32 values of bitsandbytes' signed dynamic 8-bit type (`create_dynamic_map`).

    For i in 0..6, +-10^(i-6) times the 2^i midpoints of 2^i equal intervals of [0.1, 1]; and 0 and 1. The edges are
    float32, each rounded once from the float32 step and counted from the nearer end, as torch.linspace does on a CPU
    with fused multiply-add; so the values are bitsandbytes' to the last bit.
    """
    values = [0.0, 1.0]
    low = np.float32(0.1)
    for i in range(7):
        count = 2**i
        step = np.float64((np.float32(1) - low) / np.float32(count))
        k = np.arange(count + 1)
        edges = np.where(k < (count + 1) // 2, np.float64(low) + step * k, 1.0 - step * (count - k)).astype(np.float32)
        middles = np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*middles.tolist(), *(-middles).tolist()]
    return np.sort(np.array(values, dtype=np.float32))


def levels(table: Array) -> tuple[Array, Array]:
    """Returns (bounds, code_of_level) of rounding to a table, which may be in any order.

    The values in increasing order are the levels; bounds, one fewer, lie halfway between neighbours (float32). A value x
    has level = number of bounds < x, so halfway goes to the lower level. Of equal values the first code counts (fp4's 0 and -0: code 0).
    """
    values, first = np.unique(table, return_index=True)
    return (values[:-1] + values[1:]) / np.float32(2), first.astype(np.uint8)


def nearest(values: Array, table: Array) -> Array:
    """Returns the codes, uint8, of the table entries nearest to values (float32); halfway goes to the lower entry."""
    bounds, code_of_level = levels(table)
    codes: Array = code_of_level[np.searchsorted(bounds, values, side="left")]
    return codes


class LookupFormat(Format):
    """nf4 or fp4. codes are 0..15, params: {"absmax": float32 (rows, in/64)}."""

    bits = 4
    group_size = BLOCK
    uses_importance = False

    def __init__(self, table: str) -> None:
        self.name = table
        self.table = TABLES[table]

    def layout(self) -> str:
        return (
            "codes:  uint8 (rows, in/2)  byte = q0<<4 | q1: the first value is in the high nibble\n"
            f"absmax: float32 (rows, in/64)\nw = table[q] * absmax\n{self._drawn_table()}"
        )

    def _drawn_table(self) -> str:
        values = [f"{v:.7g}" for v in self.table]
        return f"table = {', '.join(values[:8])},\n        {', '.join(values[8:])}\n"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) // 2 + 4 * (prod(shape) // BLOCK)

    def alternative(self, columns: int) -> str:
        return "use int4_g32" if columns % 32 == 0 else "use int4_g16" if columns % 16 == 0 else "use int4_c"

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns absmax = max |w| of every block. Raises FormatError for any importance: absmax weighs nothing."""
        self.refuse_importance(importance)
        return {"absmax": self.absmax(w)}

    def encode(self, w: Array, params: Params) -> Array:
        """Returns the code nearest to w / absmax (times the float32 reciprocal, as bitsandbytes), halfway to the lower value."""
        return self.nearest_codes(w, params["absmax"])

    def decode(self, codes: Array, params: Params) -> Array:
        return self.table_values(codes, params["absmax"])

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        fields = {"codes": pack_nibbles(codes), "absmax": np.ascontiguousarray(params["absmax"], dtype=np.float32)}
        return QuantizedTensor(self.name, codes.shape if shape is None else shape, fields)

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        return unpack_nibbles(tensor.fields["codes"]), {"absmax": tensor.fields["absmax"]}

    def quantize(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        self.check(w.shape)
        self.refuse_importance(importance)
        return self._store(as_rows(w), self.absmax(as_rows(w)), w.shape)

    def dequantize(self, tensor: QuantizedTensor) -> Array:
        w: Array = _native.lookup_decode(np.ascontiguousarray(tensor.fields["codes"]), self._stored_absmax(tensor.fields), self.table)
        return w.reshape(tensor.shape)

    def _store(self, rows: Array, absmax: Array, shape: tuple[int, ...]) -> QuantizedTensor:
        """Returns rows encoded natively with these absmax (rows, in/64), as they are stored."""
        stored = self._absmax_fields(absmax)
        codes = _native.lookup_encode(rows, self._stored_absmax(stored), *levels(self.table))
        return QuantizedTensor(self.name, shape, {"codes": codes, **stored})

    def _absmax_fields(self, absmax: Array) -> Params:
        """Returns the fields that store absmax."""
        return {"absmax": absmax}

    def _stored_absmax(self, fields: Params) -> Array:
        """Returns the float32 absmax (rows, in/64) that the fields hold."""
        return np.ascontiguousarray(fields["absmax"])

    def absmax(self, w: Array) -> Array:
        """Returns max |w| of every block, float32 (rows, in/64)."""
        blocks = w.reshape(w.shape[0], -1, BLOCK)
        highest: Array = np.maximum(blocks.max(axis=-1), -blocks.min(axis=-1))
        return highest

    def nearest_codes(self, w: Array, absmax: Array) -> Array:
        """Returns the codes, uint8 like w, nearest to w on the table scaled by absmax (rows, in/64)."""
        inverse = np.float32(1) / np.where(np.abs(absmax) < _TINY, _TINY, absmax)
        scaled = np.clip(w.reshape(w.shape[0], -1, BLOCK) * inverse[..., None], np.float32(-1), np.float32(1))
        codes: Array = nearest(scaled, self.table).reshape(w.shape)
        return codes

    def table_values(self, codes: Array, absmax: Array) -> Array:
        """Returns table[codes] * absmax, float32."""
        blocks = self.table[codes].reshape(codes.shape[0], -1, BLOCK)
        w: Array = (blocks * absmax[..., None]).reshape(codes.shape)
        return w


class DoubleLookupFormat(LookupFormat):
    """nf4_dq or fp4_dq: absmax in 8 bits over the whole tensor, so rows are not independent.

    params: {"absmax": uint8 (rows, in/64), "nested_absmax": float32 (ceil(blocks/256),), "nested_offset": float32 (1,)}.
    Deviation from bitsandbytes: the weights are encoded with the absmax that is stored, not with the one before
    rounding, which lowers the error and decodes the same everywhere.
    """

    row_independent = False

    def __init__(self, table: str) -> None:
        super().__init__(table)
        self.name = f"{table}_dq"

    def layout(self) -> str:
        return (
            "codes:         uint8 (rows, in/2)  byte = q0<<4 | q1: the first value is in the high nibble\n"
            "absmax:        uint8 (rows, in/64)  a, index into the dynamic 8-bit map; block b = row * in/64 + column/64\n"
            "nested_absmax: float32 (ceil(blocks/256),)\n"
            "nested_offset: float32 (1,)  the mean absmax\n"
            "w = table[q] * (map[a] * nested_absmax[b // 256] + nested_offset)\n"
            f"{self._drawn_table()}"
        )

    def nbytes(self, shape: tuple[int, ...]) -> int:
        blocks = prod(shape) // BLOCK
        return prod(shape) // 2 + blocks + 4 * ceil(blocks / NESTED_BLOCK) + 4

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns the absmax of every block in 8 bits: offset = mean (in float64), then absmax - offset on the dynamic map."""
        self.refuse_importance(importance)
        return self.nest(self.absmax(w))

    def quantize_clipped(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        """Returns w with the absmax of every block chosen by the clip search before double quantization, then encoded anew."""
        self.check(w.shape)
        clipped = LookupFormat(self.name.removesuffix("_dq")).quantize_clipped(w, check_importance(importance, w.shape[-1], self.name))
        return self._store(as_rows(w), clipped.fields["absmax"], w.shape)

    def _absmax_fields(self, absmax: Array) -> Params:
        return self.nest(absmax)

    def _stored_absmax(self, fields: Params) -> Array:
        return self.unnest(fields)

    def nest(self, absmax: Array) -> Params:
        """Returns the params that store absmax, float32 (rows, in/64): blocks of 256 scaled by their own largest magnitude."""
        offset = np.float32(absmax.mean(dtype=np.float64))
        centred = (absmax - offset).ravel()
        count = ceil(centred.size / NESTED_BLOCK)
        padded = np.zeros(count * NESTED_BLOCK, dtype=np.float32)
        padded[: centred.size] = centred
        blocks = padded.reshape(count, NESTED_BLOCK)
        nested = np.abs(blocks).max(axis=1)
        inverse = np.float32(1) / np.maximum(nested, _TINY)
        codes = nearest(np.clip(blocks * inverse[:, None], np.float32(-1), np.float32(1)), dynamic_map())
        return {
            "absmax": codes.ravel()[: centred.size].reshape(absmax.shape),
            "nested_absmax": nested,
            "nested_offset": np.array([offset], dtype=np.float32),
        }

    def unnest(self, params: Params) -> Array:
        """Returns the float32 absmax (rows, in/64) that the params store: map[a] * nested_absmax + offset."""
        codes = params["absmax"]
        scale = np.repeat(params["nested_absmax"], NESTED_BLOCK)[: codes.size].reshape(codes.shape)
        absmax: Array = dynamic_map()[codes] * scale + params["nested_offset"]
        return absmax

    def single(self, tensor: QuantizedTensor) -> QuantizedTensor:
        """Returns the same weights with float32 absmax: nf4 or fp4."""
        fields = {"codes": tensor.fields["codes"], "absmax": self.unnest(tensor.fields)}
        return QuantizedTensor(self.name.removesuffix("_dq"), tensor.shape, fields)

    def encode(self, w: Array, params: Params) -> Array:
        """Returns the codes nearest to w on the table scaled by the absmax as it is stored."""
        return self.nearest_codes(w, self.unnest(params))

    def decode(self, codes: Array, params: Params) -> Array:
        return self.table_values(codes, self.unnest(params))

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        fields = {"codes": pack_nibbles(codes), **{name: np.ascontiguousarray(a) for name, a in params.items()}}
        return QuantizedTensor(self.name, codes.shape if shape is None else shape, fields)

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        params = {name: a for name, a in tensor.fields.items() if name != "codes"}
        return unpack_nibbles(tensor.fields["codes"]), params


def pack_nibbles(codes: Array) -> Array:
    """Returns (rows, n/2) uint8, byte = c[2i] << 4 | c[2i+1]. codes: (rows, n) uint8 in 0..15, n even."""
    packed: Array = codes[:, 0::2] << 4 | codes[:, 1::2]
    return packed


def unpack_nibbles(packed: Array) -> Array:
    """Returns the codes, (rows, n) uint8, of `pack_nibbles`."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), dtype=np.uint8)
    codes[:, 0::2] = packed >> 4
    codes[:, 1::2] = packed & 15
    return codes
