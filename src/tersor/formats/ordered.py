"""intB_gNo and intB_gNso: affine integers whose groups are of any columns, not of neighbours: GPTQ's act-order.

    int4_g128o   as int4_g128, on the columns in the stored order
    order        int32 (in,): order[j] is the column stored at place j; group g has the places g*N .. g*N + N - 1

A GPTQ or compressed-tensors file says the same by `g_idx`, the group of every column: order = argsort(g_idx), stable, so the columns of
a group are stored by rising number. Sources: Frantar et al., GPTQ (arXiv 2210.17323; act-order came with its code, IST-DASLab/gptq);
ModelCloud/GPTQModel gptqmodel/nn_modules/qlinear/__init__.py.
"""

from __future__ import annotations

import re
from math import prod

import numpy as np

from tersor.formats import affine
from tersor.formats.affine import AffineFormat
from tersor.formats.format import Format, as_rows, check_importance
from tersor.tensor import Array, Params, QuantizedTensor

EXAMPLES = ("int2_g32o", "int3_g64o", "int4_g128o", "int4_g64so", "int8_g128so", "int4_g128sfo")

_NAME = re.compile(r"int[1-9][0-9]*_g[1-9][0-9]*s?f?o")


def parse(name: str) -> Format | None:
    """Returns the format of this name, or None when it is no such name. Raises FormatError for bits or groups that are not stored."""
    if not _NAME.fullmatch(name):
        return None
    plain = affine.parse(name.removesuffix("o"))
    assert isinstance(plain, AffineFormat)
    return OrderedFormat(plain)


class OrderedFormat(Format):
    """Affine integers with an order of columns. Codes are in the order of w's columns; they are stored in `order`.

    plain: the format of the columns in stored order. params: the plain format's, and {"order": int32 (in,)}.
    """

    row_independent = False
    uses_importance = False

    def __init__(self, plain: AffineFormat) -> None:
        self.plain = plain
        self.name = f"{plain.name}o"
        self.bits = plain.bits
        self.width = plain.width
        self.group_size = plain.group_size
        self.kind = plain.kind
        self.max_code = plain.max_code

    def layout(self) -> str:
        *fields, formula = self.plain.layout().splitlines()
        order = "order: int32 (in,)  the column stored at each place"
        return "\n".join([*fields, order, f"{formula}, of the columns in this order"]) + "\n"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return self.plain.nbytes(shape) + 4 * shape[-1]

    def alternative(self, columns: int) -> str:
        word = self.plain.alternative(columns)
        return word if word.rpartition("_")[2].startswith("c") else f"{word}o"

    def order_of(self, w: Array, importance: Array | None = None) -> Array:
        """Returns the order, (in,) int32, that puts columns of like importance into a group, falling; by default their sum of squares."""
        weight = np.square(w, dtype=np.float64).sum(axis=0) if importance is None else importance
        return self.sorted_groups(np.argsort(-weight, kind="stable"))

    def sorted_groups(self, order: Array) -> Array:
        """Returns the order with the columns of each group by rising number, which is how files have it."""
        return np.sort(order.reshape(-1, self.group_size), axis=1).reshape(-1).astype(np.int32)

    def of(self, plain: QuantizedTensor, order: Array) -> QuantizedTensor:
        """Returns the tensor whose columns, in this order, the plain one holds. order: as sorted_groups gives it."""
        return QuantizedTensor(self.name, plain.shape, {**plain.fields, "order": np.ascontiguousarray(order, dtype=np.int32)})

    def split(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, Array]:
        """Returns (the plain tensor of the columns in stored order, order)."""
        fields = {name: field for name, field in tensor.fields.items() if name != "order"}
        return QuantizedTensor(self.plain.name, tensor.shape, fields), tensor.fields["order"]

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        self.refuse_importance(importance)
        order = self.order_of(w)
        return {**self.plain.fit(w[:, order]), "order": order}

    def encode(self, w: Array, params: Params) -> Array:
        order = params["order"]
        codes = np.empty(w.shape, np.uint8)
        codes[:, order] = self.plain.encode(w[:, order], _without_order(params))
        return codes

    def decode(self, codes: Array, params: Params) -> Array:
        order = params["order"]
        w = np.empty(codes.shape, np.float32)
        w[:, order] = self.plain.decode(codes[:, order], _without_order(params))
        return w

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        plain = self.plain.pack(np.ascontiguousarray(codes[:, params["order"]]), _without_order(params), shape or codes.shape)
        return self.of(plain, params["order"])

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        plain, order = self.split(tensor)
        stored, params = self.plain.unpack(plain)
        codes = np.empty_like(stored)
        codes[:, order] = stored
        return codes, {**params, "order": order}

    def quantize_clipped(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        """Returns w on the plain format's searched grid, the columns ordered by their sum of squares: groups of like range."""
        self.check(w.shape)
        importance = check_importance(importance, w.shape[-1], self.name)
        rows = as_rows(w)
        order = self.order_of(rows)
        plain = self.plain.quantize_clipped(np.ascontiguousarray(rows[:, order]), None if importance is None else importance[order])
        return self.of(QuantizedTensor(plain.format, w.shape, plain.fields), order)

    def dequantize(self, tensor: QuantizedTensor) -> Array:
        plain, order = self.split(tensor)
        stored = self.plain.dequantize(plain).reshape(prod(tensor.shape[:-1]), tensor.columns)
        w = np.empty_like(stored)
        w[:, order] = stored
        return w.reshape(tensor.shape)


def _without_order(params: Params) -> Params:
    return {name: values for name, values in params.items() if name != "order"}
