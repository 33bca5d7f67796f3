"""Refinement of codes and stored floats after error feedback, under the same objective, which it never raises.

    least  e H e^T,  e = w_hat - w, for every row by itself; H with the damping of the pass, which also judges better on
                     inputs that calibration has not seen

Rounds of two steps, kept row by row when the objective falls:
- coordinate descent: column k moves to the level nearest to w_hat_k - (e H)_k / H_kk, its minimum with all others as they
  are; e H is kept up to date (natively within a tile of columns, by a matrix product beyond it), so it is not computed anew;
- least squares: for given codes w_hat = sum_p theta_p b_p (formats/grid.py), with one theta_p for each unit of columns,
  so the best thetas (scales, minima, d, dmin, absmax, ...) solve (B H B^T) delta = -B H e^T, a small system a row, and are
  rounded to how they are stored.

Sources: the coordinate descent of "Quantease" (arXiv 2309.01885, section 3, here on stored grids), and ggml's
make_qkx2_quants for least squares with given codes, here with the whole H instead of its diagonal.
"""

from __future__ import annotations

import numpy as np

from tersor import _native
from tersor.formats import Format
from tersor.formats.grid import basis, free_parameters, grid_of
from tersor.methods.hessian import Damped
from tersor.tensor import Array, Params

TILE = 64  # columns that descend natively between two matrix products
SYSTEM_BYTES = 64 << 20  # of the systems that a thread solves at once
_RIDGE = 1e-9  # of the mean diagonal, added to the systems: units whose codes are all 0 leave them singular


def refine(w: Array, format: Format, codes: Array, params: Params, hessian: Damped, rounds: int) -> tuple[Array, Params]:
    """Returns (codes, params) of w, (rows, n) float32, with an objective under the damped hessian that is no larger in any row.

    Where rows share parameters it is the sum over all rows that is no larger. A format
    without a grid stays as it is.
    """
    if rounds == 0 or grid_of(format, params, len(w)) is None:
        return codes, params
    state = _State(w, format, codes, params, hessian)
    for _ in range(rounds):
        before = state.objective.sum()
        state.descend()
        if free_parameters(format):
            state.solve()
        if not state.objective.sum() < before * (1 - 1e-3):
            break
    return state.codes, state.params


class _State:
    """The best so far: codes (rows, n), params and the objective (rows,) float64."""

    def __init__(self, w: Array, format: Format, codes: Array, params: Params, hessian: Damped) -> None:
        self.w, self.format, self.hessian = w, format, hessian
        self.codes, self.params = codes, params
        self._gradient, self.objective = self._measure(codes, params)
        self._stale = False  # the gradient is of other params

    @property
    def gradient(self) -> Array:
        """e H of the best so far, (rows, n) float32."""
        if self._stale:
            self._gradient, self.objective = self._measure(self.codes, self.params)
            self._stale = False
        return self._gradient

    def _measure(self, codes: Array, params: Params) -> tuple[Array, Array]:
        errors = self.format.decode(codes, params) - self.w
        gradient = np.empty_like(errors)
        for begin in range(0, errors.shape[1], 4 * TILE):
            part = slice(begin, begin + 4 * TILE)
            np.matmul(errors, self.hessian.rows(part).T, out=gradient[:, part])
        return gradient, _inner(gradient, errors)

    def _better(self, objective: Array) -> Array:
        """Returns the rows whose objective is smaller, (rows,); all or none when they share params."""
        if self.format.row_independent:
            return np.asarray(objective < self.objective)
        return np.full(len(objective), objective.sum() < self.objective.sum())

    def descend(self) -> None:
        """Takes the codes after one sweep of coordinate descent, in the rows that it makes better."""
        codes, gradient = self.descended()
        objective = _inner(gradient, self.format.decode(codes, self.params) - self.w)
        better = self._better(objective)
        self.codes = np.where(better[:, None], codes, self.codes)
        self._gradient = np.where(better[:, None], gradient, self.gradient)
        self.objective = np.where(better, objective, self.objective)

    def solve(self) -> None:
        """Takes the least-squares params, in the rows that they make better."""
        params, change = self.solved()
        better = self._better(self.objective + change)
        if self.format.row_independent:
            of_row = {name: better.reshape(-1, *[1] * (value.ndim - 1)) for name, value in params.items()}
            self.params = {name: np.where(of_row[name], params[name], value) for name, value in self.params.items()}
        elif better[0]:
            self.params = params
        self.objective = self.objective + np.where(better, change, 0.0)
        self._stale = True

    def descended(self) -> tuple[Array, Array]:
        """Returns the codes after one sweep of coordinate descent over all columns, and their gradient."""
        grid = grid_of(self.format, self.params, len(self.w))
        assert grid is not None
        columns = self.w.shape[1]
        indices = grid.indices(self.codes)
        group_of = (np.arange(columns) // (columns // grid.step.shape[1])).astype(np.int32)
        gradient, changes = np.empty(self.w.shape, np.float32), np.empty(self.w.shape, np.float32)
        tiles = [slice(begin, min(begin + TILE, columns)) for begin in range(0, columns, TILE)]
        for tile in tiles:
            hessian = self.hessian.rows(tile)
            gradient[:, tile] = self.gradient[:, tile] + changes[:, : tile.start] @ hessian[:, : tile.start].T
            chosen, slopes = np.ascontiguousarray(indices[:, tile]), gradient[:, tile].copy()  # within the tile only for columns to come
            own, within = np.empty_like(slopes), np.ascontiguousarray(hessian[:, tile])
            _native.descend(within, grid.step, grid.offset, group_of[tile], grid.levels, slopes, chosen, own)
            indices[:, tile], changes[:, tile] = chosen, own
        for tile in tiles:  # and what its own columns and those after it have changed
            gradient[:, tile] += changes[:, tile.start :] @ self.hessian.rows(tile)[:, tile.start :].T
        return grid.chosen(indices), gradient

    def solved(self) -> tuple[Params, Array]:
        """Returns params with the floats that are the least-squares solution for the codes, as they are stored, and by how much they
        change the objective, (rows,) float64: 2 delta B H e^T + delta B H B^T delta^T."""
        names = free_parameters(self.format)
        n_units = self.params[names[0]].shape[1]
        spans = basis(self.format, self.codes, self.params)
        n_rows, n = self.w.shape[0], len(names) * n_units
        step = max(1, SYSTEM_BYTES // (8 * n * n)) if self.format.row_independent else n_rows
        params = {name: value.copy() if name in names else value for name, value in self.params.items()}
        changes = []
        for begin in range(0, n_rows, step):
            rows = slice(begin, min(begin + step, n_rows)) if self.format.row_independent else slice(0, 1)
            system, wish = self._system([span[begin : begin + step] for span in spans], self.gradient[begin : begin + step], n_units)
            if not self.format.row_independent:
                system, wish = system.sum(axis=0, keepdims=True), wish.sum(axis=0, keepdims=True)
            ridge = _RIDGE * np.trace(system, axis1=1, axis2=2)[:, None] / n + 1e-300
            delta = _solution(system, ridge, -wish).reshape(-1, len(names), n_units)
            for p, name in enumerate(names):
                old = self.params[name][rows]
                params[name][rows] = _stored(old, delta[:, p].reshape(old.shape))
                delta[:, p] = (params[name][rows].astype(np.float64) - old).reshape(-1, n_units)
            moved = delta.reshape(-1, n)
            changes.append(2 * np.einsum("ri,ri->r", moved, wish) + np.einsum("ri,rij,rj->r", moved, system, moved, optimize=True))
        change = np.concatenate(changes)
        return params, change if self.format.row_independent else np.full(n_rows, change[0] / n_rows)

    def _system(self, spans: list[Array], gradient: Array, units: int) -> tuple[Array, Array]:
        """Returns B H B^T, (rows, n, n) float64, and B H e^T, (rows, n), of some rows; n = parameters * units.

        spans: b_p of each parameter, (rows, columns), whose part in a unit of columns is one row of B.
        """
        n_rows, columns = gradient.shape
        size, n = columns // units, len(spans) * units
        system = np.empty((n_rows, len(spans), units, len(spans), units))
        for unit in range(units):
            hessian = self.hessian.rows(slice(unit * size, (unit + 1) * size))[:, : (unit + 1) * size]
            for q, span in enumerate(spans):
                swept = span[:, unit * size : (unit + 1) * size] @ hessian
                for p, other in enumerate(spans):
                    shape = n_rows, unit + 1, size
                    sums = np.einsum("rus,rus->ru", swept.reshape(shape), other[:, : (unit + 1) * size].reshape(shape))
                    system[:, p, : unit + 1, q, unit] = sums
                    system[:, q, unit, p, : unit + 1] = sums
        wish = np.stack([(gradient * span).reshape(n_rows, units, size).sum(axis=2, dtype=np.float64) for span in spans], axis=1)
        return system.reshape(n_rows, n, n), wish.reshape(n_rows, n)


def _solution(systems: Array, ridge: Array, wishes: Array) -> Array:
    """Returns (systems + ridge I)^-1 wishes, (rows, n) float64. systems: (rows, n, n), without another array of their size."""
    diagonal = np.einsum("rii->ri", systems)
    before = diagonal.copy()
    diagonal += ridge
    solved: Array = np.linalg.solve(systems, wishes[..., None])[..., 0]
    diagonal[:] = before
    return solved


def _inner(x: Array, y: Array) -> Array:
    """Returns the inner product of every row of x with that of y, float64."""
    products = np.empty(len(x), np.float64)
    _native.row_products(x, y, products)
    return products


def _stored(old: Array, delta: Array) -> Array:
    """Returns old + delta in old's dtype, or old where that is not finite."""
    with np.errstate(over="ignore"):
        new = (old.astype(np.float64) + delta).astype(old.dtype)
    kept: Array = np.where(np.isfinite(new), new, old)
    return kept
