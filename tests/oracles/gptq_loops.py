"""GPTQ one number at a time, from the paper: Algorithm 1 of arXiv 2210.17323 with the Cholesky factor of the inverse Hessian.

Everything in float64. Imports nothing of tersor: the caller says how a group's values come about, as functions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Values = Callable[[int], np.ndarray]  # column inside the group -> (codes, rows): what each code decodes to


def gptq(
    w: np.ndarray,
    hessian: np.ndarray,
    damp: float,
    group: int,
    fit: Callable[[np.ndarray, np.ndarray], Values],
    order: np.ndarray | None = None,
) -> np.ndarray:
    """Codes (rows, n): indices into the first axis of Values. fit(weights of the group, their importance) -> Values.

    With an order, columns are taken in it and `group` must be n: the parameters are fitted before.
    """
    n = w.shape[1]
    order = np.arange(n) if order is None else order
    w = w[:, order].astype(np.float64).copy()
    h = hessian[np.ix_(order, order)].astype(np.float64).copy()
    for i in range(n):
        h[i, i] += damp * np.trace(hessian) / n
    upper = np.linalg.cholesky(np.linalg.inv(h)).T  # H^-1 = upper^T upper
    codes = np.zeros(w.shape, dtype=int)
    for j in range(n):
        if j % group == 0:
            importance = 1 / np.diag(upper)[j : j + group] ** 2
            if group == n:  # as the columns are stored
                stored = np.empty_like(w)
                stored[:, order] = w
                weights = np.empty(n)
                weights[order] = importance
                values = fit(stored, weights)
            else:
                values = fit(w[:, j : j + group].copy(), importance)
        choices = values(int(order[j]) if group == n else j % group)
        codes[:, j] = np.abs(choices - w[:, j]).argmin(axis=0)
        for row in range(len(w)):
            error = (w[row, j] - choices[codes[row, j], row]) / upper[j, j]
            for k in range(j, n):
                w[row, k] -= error * upper[j, k]
    result = np.empty_like(codes)
    result[:, order] = codes
    return result


def descend(w: np.ndarray, hessian: np.ndarray, values: Values, codes: np.ndarray) -> np.ndarray:
    """One sweep of coordinate descent: every column in turn takes the code of the least objective, all others as they are."""
    codes = codes.copy()
    columns = range(w.shape[1])
    tables = [values(k) for k in columns]
    for row in range(len(w)):
        for k in columns:
            costs = []
            for code in range(len(tables[k])):
                tried = codes[row].copy()
                tried[k] = code
                error = np.array([tables[c][tried[c], row] for c in columns], dtype=np.float64) - w[row]
                costs.append(error @ hessian @ error)
            codes[row, k] = int(np.argmin(costs))
    return codes
