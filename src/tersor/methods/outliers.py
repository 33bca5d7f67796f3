"""Rounding in formats with columns apart (formats/outliers.py): the columns first, then the method on the others alone.

Which columns: those whose calibrated |x| is largest, LLM.int8()'s magnitude (arXiv 2208.07339, section 3.2) and QUIK's choice (arXiv
2310.09259). The columns apart keep their weights, so the loss tr(E H E^T) has only the others' part of H = X^T X / n.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np

from tersor.formats import Format, as_rows
from tersor.formats.outliers import OutlierFormat
from tersor.methods.ordered import Round, reordered
from tersor.tensor import Array, InputStatistics, QuantizedTensor


def beside_outliers(method: Round) -> Round:
    """Returns the rounding method, made able to serve formats with columns apart; without statistics the weights choose the columns."""

    @wraps(method)
    def rounded(w: Array, format: Format, statistics: InputStatistics | None = None, options: Any = None) -> QuantizedTensor:
        if not isinstance(format, OutlierFormat):
            return method(w, format, statistics, options)
        format.check(w.shape)
        rows = as_rows(w)
        suits = statistics is not None and statistics.absmax.shape == (rows.shape[1],)
        outliers = format.largest(statistics.absmax) if suits and statistics is not None else format.columns_of(rows)
        rest = format.rest_of(outliers, rows.shape[1])
        plain = method(np.ascontiguousarray(rows[:, rest]), format.plain, reordered(statistics, rest) if suits else statistics, options)
        return format.of(plain, w, outliers)

    return rounded
