"""Rounding in formats with an order of columns (formats/ordered.py): order first, then the method on the plain format.

The order is that of GPTQ's act-order, by falling diagonal of H = X^T X / n, so that groups are of columns of like importance and the
columns that matter most are rounded first; without statistics, by falling sum of squares. Source: IST-DASLab/gptq gptq.py (act_order).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from tersor.formats import Format, as_rows
from tersor.formats.ordered import OrderedFormat
from tersor.tensor import Array, InputStatistics, QuantizedTensor

Round = Callable[..., QuantizedTensor]


def in_order(method: Round) -> Round:
    """Returns the rounding method, made able to serve formats with an order of columns."""

    @wraps(method)
    def rounded(w: Array, format: Format, statistics: InputStatistics | None = None, options: Any = None) -> QuantizedTensor:
        if not isinstance(format, OrderedFormat):
            return method(w, format, statistics, options)
        format.check(w.shape)
        rows = as_rows(w)
        suits = statistics is not None and statistics.importance.shape == (rows.shape[1],)
        order = format.order_of(rows, statistics.importance if suits and statistics is not None else None)
        plain = method(np.ascontiguousarray(rows[:, order]), format.plain, reordered(statistics, order) if suits else statistics, options)
        return format.of(QuantizedTensor(plain.format, w.shape, plain.fields), order)

    return rounded


def reordered(statistics: InputStatistics | None, order: Array) -> InputStatistics | None:
    """Returns the statistics of the inputs with their columns in this order."""
    if statistics is None:
        return None
    square = np.ix_(order, order)
    return InputStatistics(
        statistics.tokens,
        statistics.mean_square[order],
        statistics.mean_abs[order],
        statistics.absmax[order],
        None if statistics.gram is None else statistics.gram[square],
        None if statistics.cross is None else statistics.cross[square],
        statistics.outputs,
    )
