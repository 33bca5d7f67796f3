"""Error feedback: one pass over the columns, each rounded to what the errors of the columns before it have left to be made up.

    w_hat_k = nearest(w_k + sum_{j<k} (w_j - w_hat_j) U_jk),   H = U D U^T        (LDLQ; hessian.py)

Products of all rows at once bring in the errors of earlier columns; only the columns of a tile are done one by one,
natively (native/methods/feedback.h).
"""

from __future__ import annotations

import numpy as np

from tersor import _native
from tersor.formats import Format
from tersor.formats.grid import Grid, grid_of
from tersor.methods.hessian import Factor
from tersor.tensor import Array, Params

TILE = 64  # columns rounded natively between two matrix products


def fit(format: Format, w: Array, importance: Array, search: bool) -> Params:
    """Returns the parameters of w (rows, n) with the least error, weighted by importance (n,).

    Without search they are those of `format.fit`: min-max where the format has that.
    """
    h = (importance / max(float(importance.max()), 1e-300)).astype(np.float32)
    if search:
        return format.fit_clipped(w, h)
    return format.fit(w, h if format.uses_importance else None)


def feed_back(w: Array, format: Format, factor: Factor, params: Params | None, search: bool) -> tuple[Array, Params]:
    """Returns (codes, params) of one pass over w, (rows, n) float32, in the factor's order.

    params: those of the whole w, which stay as they are; or None, to fit those of a group when its first column is
    reached, from what its weights would best be after the errors so far. That needs the columns in stored order.
    """
    columns = w.shape[1]
    sweep = _Pass(np.ascontiguousarray(w if factor.in_order else w[:, factor.order]), factor)
    if params is None and format.group_size <= 0:
        params = fit(format, w, factor.diagonal[np.argsort(factor.order)], search)
    if params is not None:
        return sweep.round(0, columns, sweep.w, format, params), params
    codes, fitted = [], []
    for first in range(0, columns, format.group_size):
        last = first + format.group_size
        made_up = sweep.made_up(first, last)
        expected = w[:, first:last] + factor.expected(made_up, slice(first, last))
        fitted.append(fit(format, expected, factor.diagonal[first:last], search))
        codes.append(sweep.round(first, last, w[:, first:last] + made_up, format, fitted[-1]))
    return np.concatenate(codes, axis=1), {name: np.concatenate([p[name] for p in fitted], axis=1) for name in fitted[0]}


class _Pass:
    """The state of one pass. w: (rows, n) float32 in the factor's order; errors: w - w_hat of the columns that are done."""

    def __init__(self, w: Array, factor: Factor) -> None:
        self.w, self.factor = w, factor
        self.errors = np.zeros_like(w)

    def made_up(self, first: int, last: int) -> Array:
        """Returns what the errors of the columns before `first` add to the targets of the columns [first, last), (rows, last - first)."""
        return self.errors[:, :first] @ self.factor.feedback(slice(0, first), slice(first, last))

    def round(self, first: int, last: int, target: Array, format: Format, params: Params) -> Array:
        """Returns the codes (rows, last - first), as they are stored, of the columns [first, last), whose params these are."""
        stored_at = self.factor.order[first:last] - first
        grid = grid_of(format, params, len(self.w))
        if grid is None:
            return self._round_any(first, target, format, params, stored_at)
        indices = np.empty(target.shape, dtype=np.uint8)
        group_of = (stored_at // ((last - first) // grid.step.shape[1])).astype(np.int32)
        for begin in range(0, last - first, TILE):
            end = min(begin + TILE, last - first)
            tile = slice(first + begin, first + end)
            aim = target[:, begin:end]
            if begin > 0:
                aim = aim + self.errors[:, first : first + begin] @ self.factor.feedback(slice(first, first + begin), tile)
            self._round_tile(tile, np.ascontiguousarray(aim), grid, group_of[begin:end], indices[:, begin:end])
        chosen = grid.chosen(indices)
        if self.factor.in_order:
            return chosen
        codes = np.empty_like(chosen)
        codes[:, stored_at] = chosen
        return codes

    def _round_tile(self, tile: slice, target: Array, grid: Grid, group_of: Array, indices: Array) -> None:
        """Rounds the columns of a tile; target: (rows, len); writes indices of levels and errors."""
        rounded = np.empty(target.shape, dtype=np.uint8)
        w = np.ascontiguousarray(self.w[:, tile])
        errors = np.empty_like(w)
        feedback = np.ascontiguousarray(self.factor.feedback(tile, tile))
        _native.feed_back(w, feedback, grid.step, grid.offset, group_of, grid.levels, target, rounded, errors)
        indices[:], self.errors[:, tile] = rounded, errors

    def _round_any(self, first: int, target: Array, format: Format, params: Params, stored_at: Array) -> Array:
        """Returns the same as `round` through the format's own encode and decode, for a format without a grid: slow."""
        whole = np.empty_like(target)  # as it is stored
        whole[:, stored_at] = target
        for k, at in enumerate(stored_at):
            codes = format.encode(whole, params)
            self.errors[:, first + k] = self.w[:, first + k] - format.decode(codes, params)[:, at]
            later = slice(first + k + 1, first + len(stored_at))
            feedback = self.factor.feedback(slice(first + k, first + k + 1), later)
            whole[:, stored_at[k + 1 :]] += self.errors[:, first + k : first + k + 1] @ feedback
        return format.encode(whole, params)
