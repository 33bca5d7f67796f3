"""The block formats of ggml, as GGUF files hold them: one field `blocks`, uint8 (rows, row_bytes), exactly ggml's bytes.

`quantize` and `dequantize` run natively. Without importance Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0 and MXFP4 get the
bytes of gguf-py's quantizers (scale from the extremes); everything else is our own search for the least squared error
(native/formats/ggml_search.h). `fit` returns the parameters that `quantize` would store, for a caller who rounds by itself.
"""

from __future__ import annotations

from math import prod

import numpy as np

from tersor import _native
from tersor.errors import FormatError
from tersor.formats import ggml_blocks, ggml_layouts
from tersor.formats.format import Format, as_rows, check_importance
from tersor.tensor import Array, Params, QuantizedTensor

# Decode-only types: (values, bytes) of a block, and the formats of about the same size that can be written.
_DECODE_ONLY = {
    "iq1_s": (256, 50, "tq1_0 or q2_k"),
    "iq1_m": (256, 56, "tq1_0 or q2_k"),
    "iq2_xxs": (256, 66, "tq2_0 or q2_k"),
    "iq2_xs": (256, 74, "q2_k"),
    "iq2_s": (256, 82, "q2_k"),
    "iq3_xxs": (256, 98, "q2_k or q3_k"),
    "iq3_s": (256, 110, "q3_k"),
    "nvfp4": (64, 36, "mxfp4 or iq4_nl"),
    "q1_0": (128, 18, "binary_g128"),
    "q2_0": (64, 18, "ternary_g64"),
}

# What to use when blocks of 256 do not divide the columns and blocks of 32 do.
_BLOCKS_OF_32 = {
    "q2_k": "iq4_nl or int2_g32",
    "q3_k": "iq4_nl or int3_g32",
    "q4_k": "q4_1 or q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq4_xs": "iq4_nl",
    "tq1_0": "ternary_g32",
    "tq2_0": "ternary_g32",
}

_LARGEST = 65504  # of float16, in which scales and minima are stored; MXFP4 stores powers of two up to 2^127

EXAMPLES = (*ggml_blocks.BLOCKS, *_DECODE_ONLY)


def parse(name: str) -> Format | None:
    """Returns the ggml format of this name, or None when it is no ggml type."""
    if name in ggml_blocks.BLOCKS:
        return GgmlFormat(name)
    return DecodeOnlyFormat(name) if name in _DECODE_ONLY else None


class _Blocks(Format):
    """What encodable and decode-only types share: rows are whole blocks, decoded natively."""

    def __init__(self, name: str, size: int, block_bytes: int) -> None:
        self.name = name
        self.group_size = size
        self.block_bytes = block_bytes

    def layout(self) -> str:
        return ggml_layouts.LAYOUTS[self.name]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape[:-1]) * self.row_bytes(shape[-1])

    def row_bytes(self, columns: int) -> int:
        """Returns the bytes of one row of this many columns."""
        return columns // self.group_size * self.block_bytes

    def dequantize(self, tensor: QuantizedTensor) -> Array:
        blocks = np.ascontiguousarray(tensor.fields["blocks"]).reshape(tensor.rows, -1)
        w: Array = _native.ggml_decode(self.name, blocks, tensor.columns).reshape(tensor.shape)
        return w

    def alternative(self, columns: int) -> str:
        if columns % 32 == 0:
            return f"use {_BLOCKS_OF_32.get(self.name, 'iq4_nl or q8_0')} (blocks of 32)"
        return "use f16 or bf16" if columns % 16 else "use an integer format with groups of 16, such as int8_g16"


class GgmlFormat(_Blocks):
    """A ggml type that can be encoded. Parameters and codes are those of ggml_blocks, (rows, blocks, ...) and (rows, in)."""

    def __init__(self, name: str) -> None:
        kind = ggml_blocks.BLOCKS[name]
        super().__init__(name, kind.size, kind.nbytes)
        self.bits = float(np.log2(3)) if name in ("tq1_0", "tq2_0") else float(np.log2(len(kind.levels)))

    def quantize(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        """Returns w stored in this type; importance, (in,) >= 0, weights the squared error of each column."""
        self.check(w.shape)
        return QuantizedTensor(self.name, w.shape, {"blocks": self._encode_rows(as_rows(w), importance)})

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns the parameters that `quantize` stores for w: (rows, in) float32."""
        self.check(w.shape)
        return ggml_blocks.unpack(self.name, self._in_blocks(self._encode_rows(as_rows(w), importance)))[1]

    def encode(self, w: Array, params: Params) -> Array:
        self.check(w.shape)
        blocks = as_rows(w).reshape(w.shape[0], -1, self.group_size)
        codes: Array = ggml_blocks.encode(self.name, blocks, params).reshape(w.shape)
        return codes

    def decode(self, codes: Array, params: Params) -> Array:
        blocks = codes.reshape(codes.shape[0], -1, self.group_size)
        w: Array = ggml_blocks.decode(self.name, blocks, params).reshape(codes.shape)
        return w

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        blocks = ggml_blocks.pack(self.name, codes.reshape(codes.shape[0], -1, self.group_size), params)
        return QuantizedTensor(self.name, codes.shape if shape is None else shape, {"blocks": blocks.reshape(len(codes), -1)})

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        codes, params = ggml_blocks.unpack(self.name, self._in_blocks(tensor.fields["blocks"]))
        return codes.reshape(tensor.rows, tensor.columns), params

    def _in_blocks(self, packed: Array) -> Array:
        return packed.reshape(len(packed), -1, self.block_bytes)

    def _encode_rows(self, w: Array, importance: Array | None) -> Array:
        importance = check_importance(importance, w.shape[1], self.name)
        largest = _native.largest_magnitude(w.reshape(-1))
        if np.isfinite(largest) and largest > _LARGEST and self.name != "mxfp4":
            raise FormatError(f"{self.name}: tensor holds {largest:g}, beyond the {_LARGEST} of float16 scales; use bf16 or f32")
        blocks: Array = _native.ggml_encode(self.name, w, importance)
        return blocks


class DecodeOnlyFormat(_Blocks):
    """A ggml type that can be read and run, not written: everything but `dequantize` raises FormatError."""

    can_encode = False

    def __init__(self, name: str) -> None:
        size, block_bytes, self._instead = _DECODE_ONLY[name]
        super().__init__(name, size, block_bytes)
        self.bits = 8.0 * block_bytes / size

    def _refuse(self) -> FormatError:
        return FormatError(f"{self.name}: can only be decoded; to write a file of about this size use {self._instead}")

    def quantize(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        raise self._refuse()

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        raise self._refuse()

    def encode(self, w: Array, params: Params) -> Array:
        raise self._refuse()

    def decode(self, codes: Array, params: Params) -> Array:
        raise self._refuse()

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        raise self._refuse()

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        raise self._refuse()
