"""int8_row_xN: int8 rows except N columns, which are float16: the outlier columns of LLM.int8(), stored.

    codes      int8 (rows, in - N)   the other columns by rising number, as int8_row has them
    scb        float32 (rows, 1)     their absmax: the N columns set no row's scale
    outliers   int32 (N,)            the columns apart, rising
    outlier    float16 (rows, N)     their weights

    C = X[:, O] W[O, :] in floats  +  S * (Xq[:, rest] Wq[rest, :]) in integers     O: the outlier columns

The paper finds O when it runs, for which all weights have to be there in 16 bits or, as bitsandbytes stores them, none. Here O is
found by calibration, and its size is the format's, so that what a tensor weighs follows from its shape: the columns in which any token of
a calibration text reaches 6 may be most of them (SmolLM2's last down_proj). Sources: Dettmers et al., LLM.int8() (arXiv
2208.07339, section 3.2, equation 8); a fixed number of columns, those of the largest inputs: Ashkboos et al., QUIK (arXiv 2310.09259).
"""

from __future__ import annotations

import re
from math import prod

import numpy as np

from tersor.errors import FormatError
from tersor.formats import int8
from tersor.formats.format import Format, as_rows, check_importance
from tersor.tensor import Array, Params, QuantizedTensor

EXAMPLES = ("int8_row_x6", "int8_row_x16")
MOST = 1024  # columns apart; more of them are no exception

_NAME = re.compile(r"(int8_row)_x([1-9][0-9]*)")


def parse(name: str) -> Format | None:
    """Returns the format of this name, or None when it is no such name. Raises FormatError for more columns than MOST."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    if len(match[2]) > 4 or int(match[2]) > MOST:
        raise FormatError(f"{name[:40]}: {match[2][:20]} columns apart; need 1 to {MOST}")
    plain = int8.parse(match[1])
    assert plain is not None
    return OutlierFormat(plain, int(match[2]))


class OutlierFormat(Format):
    """Rows of another format, except some columns in float16.

    plain: the format of the other columns, one scale per row. count: N. codes are in the order of w's columns, those of the outlier
    columns 0. params: the plain format's, and {"outliers": int32 (N,), "outlier": float16 (rows, N)}.
    """

    row_independent = False
    uses_importance = False  # which columns are apart is a method's to decide; fit looks at the weights
    group_size = 0

    def __init__(self, plain: Format, count: int) -> None:
        self.plain = plain
        self.count = count
        self.name = f"{plain.name}_x{count}"
        self.bits = plain.bits

    def layout(self) -> str:
        return (
            "codes:    int8 (rows, in - N)  q in -127..127; the columns that are not apart, by rising number\n"
            "scb:      float32 (rows, 1)    absmax of these columns\n"
            "outliers: int32 (N,)           the columns apart, rising\n"
            "outlier:  float16 (rows, N)    their weights, as they are\n"
            "w = q * scb * (1/127), of the columns apart w = outlier\n"
        )

    def nbytes(self, shape: tuple[int, ...]) -> int:
        rest = (*shape[:-1], shape[-1] - self.count)
        return self.plain.nbytes(rest) + 2 * prod(shape[:-1]) * self.count + 4 * self.count

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape[-1] > self.count

    def check(self, shape: tuple[int, ...], where: str = "tensor") -> None:
        """Raises FormatError when a tensor of this shape has no more columns than are apart."""
        if prod(shape) > 0 and shape and not self.fits(shape):
            raise FormatError(f"{self.name}: {where} has {shape[-1]} columns, not more than the {self.count} apart; use f16")
        super().check(shape, where)

    def largest(self, measure: Array) -> Array:
        """Returns the N columns of the largest measure, (N,) int32, rising; of equal ones the first."""
        return np.sort(np.argsort(-measure, kind="stable")[: self.count]).astype(np.int32)

    def columns_of(self, w: Array) -> Array:
        """Returns the N columns of the largest sum of squares, which make the steps of their rows long."""
        return self.largest(np.square(w, dtype=np.float64).sum(axis=0))

    def rest_of(self, outliers: Array, columns: int) -> Array:
        """Returns the columns that are not apart, (columns - N,) int32, rising. Raises FormatError unless the others are, and in range."""
        if outliers.dtype != np.int32 or outliers.shape != (self.count,):
            raise FormatError(f"{self.name}: outliers are {outliers.dtype} {outliers.shape}; need int32 ({self.count},)")
        if outliers[0] < 0 or outliers[-1] >= columns or (np.diff(outliers.astype(np.int64)) <= 0).any():
            raise FormatError(f"{self.name}: outliers are {outliers[:8].tolist()}...; need rising columns in 0..{columns - 1}")
        return np.setdiff1d(np.arange(columns, dtype=np.int32), outliers, assume_unique=True)

    def of(self, plain: QuantizedTensor, w: Array, outliers: Array) -> QuantizedTensor:
        """Returns the tensor of w, (..., in) float32: `plain` are the other columns, and these are float16, rounded half to even."""
        return self._joined(plain, w.shape, outliers, _halves(as_rows(w)[:, outliers]))

    def split(self, tensor: QuantizedTensor) -> tuple[QuantizedTensor, QuantizedTensor, Array]:
        """Returns (the other columns in the plain format, the columns apart in f16, their places in w's columns one after the other).

        Raises FormatError when the fields do not fit each other.
        """
        rows, columns = tensor.rows, tensor.columns
        fields = dict(tensor.fields)
        outliers, outlier = fields.pop("outliers"), fields.pop("outlier")
        rest = self.rest_of(outliers, columns)
        if outlier.dtype != np.float16 or outlier.shape != (rows, self.count) or fields["codes"].shape != (rows, len(rest)):
            raise FormatError(
                f"{self.name}: outlier is {outlier.dtype} {outlier.shape}, codes {fields['codes'].shape}; need float16"
                f" {(rows, self.count)} and {(rows, len(rest))}"
            )
        plain = QuantizedTensor(self.plain.name, (rows, len(rest)), fields)
        return plain, QuantizedTensor("f16", outlier.shape, {"values": outlier}), np.concatenate([rest, outliers])

    def _joined(self, plain: QuantizedTensor, shape: tuple[int, ...], outliers: Array, outlier: Array) -> QuantizedTensor:
        apart = {"outliers": np.ascontiguousarray(outliers, dtype=np.int32), "outlier": np.ascontiguousarray(outlier)}
        return QuantizedTensor(self.name, shape, {**plain.fields, **apart})

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns the plain fit of all but the columns that columns_of names, and those. Raises FormatError for any importance."""
        self.refuse_importance(importance)
        outliers = self.columns_of(w)
        rest = self.rest_of(outliers, w.shape[1])
        return {**self.plain.fit(w[:, rest]), "outliers": outliers, "outlier": _halves(w[:, outliers])}

    def encode(self, w: Array, params: Params) -> Array:
        rest = self.rest_of(params["outliers"], w.shape[1])
        codes = np.zeros(w.shape, np.int8)
        codes[:, rest] = self.plain.encode(w[:, rest], params)
        return codes

    def decode(self, codes: Array, params: Params) -> Array:
        rest = self.rest_of(params["outliers"], codes.shape[1])
        w = np.empty(codes.shape, np.float32)
        w[:, rest] = self.plain.decode(codes[:, rest], params)
        w[:, params["outliers"]] = params["outlier"]
        return w

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        rest = self.rest_of(params["outliers"], codes.shape[1])
        plain = self.plain.pack(codes[:, rest], params)
        return self._joined(plain, shape or codes.shape, params["outliers"], params["outlier"])

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        plain, apart, places = self.split(tensor)
        stored, params = self.plain.unpack(plain)
        codes = np.zeros((tensor.rows, tensor.columns), np.int8)
        codes[:, places[: stored.shape[1]]] = stored
        return codes, {**params, "outliers": tensor.fields["outliers"], "outlier": apart.fields["values"]}

    def quantize_clipped(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        """Returns w with the columns of `fit` apart, the others on the plain format's searched grid."""
        self.check(w.shape)
        importance, rows = check_importance(importance, w.shape[-1], self.name), as_rows(w)
        outliers = self.columns_of(rows)
        rest = self.rest_of(outliers, rows.shape[1])
        plain = self.plain.quantize_clipped(np.ascontiguousarray(rows[:, rest]), None if importance is None else importance[rest])
        return self.of(plain, w, outliers)


def _halves(w: Array) -> Array:
    with np.errstate(over="ignore"):  # what float16 cannot hold is told of by whoever compares (slabs.py)
        return w.astype(np.float16)
