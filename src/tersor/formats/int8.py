"""int8_row: one signed byte per weight and one float32 absmax per row, the vector-wise weights of LLM.int8().

Source: Dettmers et al., LLM.int8() (arXiv 2208.07339, section 3.1); bitsandbytes `nn/modules.py`, tensors `weight` and `SCB`.
"""

from __future__ import annotations

from math import prod

import numpy as np

from tersor.formats.format import Format
from tersor.tensor import Array, Params, QuantizedTensor

EXAMPLES = ("int8_row",)

_STEPS = np.float32(127)
_STEP = np.float32(1 / 127)  # bitsandbytes multiplies by it last, rounded to float32; so do we, for the same bits


def parse(name: str) -> Format | None:
    """Returns the format when the name is int8_row, else None."""
    return Int8RowFormat() if name == "int8_row" else None


class Int8RowFormat(Format):
    """w = (q * scb) * (1/127) in float32, q in -127..127, scb = max |w| of the row. codes: int8; params: {"scb": float32 (rows, 1)}."""

    name = "int8_row"
    bits = 8
    group_size = 0
    uses_importance = False

    def layout(self) -> str:
        return "codes: int8 (rows, in)  q in -127..127\nscb:   float32 (rows, 1)  the row's absmax\nw = q * scb * (1/127)\n"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) + 4 * prod(shape[:-1])

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns scb = max |w| per row. Raises FormatError for any importance: absmax weighs nothing."""
        self.refuse_importance(importance)
        return {"scb": np.maximum(w.max(axis=1, keepdims=True), -w.min(axis=1, keepdims=True))}

    def encode(self, w: Array, params: Params) -> Array:
        """Returns q = clip(round(w / scb * 127), -127, 127), int8, half to even; a row of zeros encodes as zeros."""
        divisor = np.where(params["scb"] == 0, np.float32(1), params["scb"])
        codes: Array = np.clip(np.rint(w / divisor * _STEPS), -_STEPS, _STEPS).astype(np.int8)
        return codes

    def decode(self, codes: Array, params: Params) -> Array:
        w: Array = codes.astype(np.float32) * params["scb"] * _STEP
        return w

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        fields = {"codes": np.ascontiguousarray(codes), "scb": np.ascontiguousarray(params["scb"], dtype=np.float32)}
        return QuantizedTensor(self.name, codes.shape if shape is None else shape, fields)

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        return tensor.fields["codes"], {"scb": tensor.fields["scb"]}
