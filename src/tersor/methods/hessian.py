"""The factor of a Hessian that error feedback needs, with damping that adapts.

H = U D U^T with U unit upper triangular: the reversed Cholesky factorization, made in place in one float64 copy of H.
Then for a row of errors e = w - w_hat

    e H e^T = sum_k D_k (w_k + sum_{j<k} e_j U_jk - w_hat_k)^2,

so column k, rounded after the columns before it, aims at w_k + sum_{j<k} e_j U_jk, and D_k weighs what it misses.
Source: LDLQ, QuIP (arXiv 2307.13304, section 3 and Theorem 6), which shows that this is what GPTQ (arXiv 2210.17323,
Algorithm 1) computes through the inverse Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg.lapack import dpotrf, dpotrs, dtrtri

from tersor.errors import ModelError
from tersor.tensor import Array, InputStatistics
from tersor.threads import each

LARGEST_DAMP = 1.0
KEPT_BYTES = 64 << 20  # of a matrix in float32 that is made once for all rows; of a larger one each part is made where it is needed
_PANEL = 64  # rows made at a time, so that the float64 between stay in the cache


@dataclass(frozen=True)
class Factor:
    """U D U^T = H[order][:, order] + damping * I, damping = damp * mean(diag H). reversed_lower: (n, n) float64, see `factorize`."""

    reversed_lower: Array
    order: Array
    damp: float
    damping: float

    @cached_property
    def diagonal(self) -> Array:
        """D, (n,) float64, > 0, in the order of the factor."""
        d: Array = np.square(np.diagonal(self.reversed_lower)[::-1])
        return d

    @cached_property
    def in_order(self) -> bool:
        """Whether the columns are as they are stored."""
        return np.array_equal(self.order, np.arange(len(self.order)))

    def feedback(self, above: slice, columns: slice) -> Array:
        """Returns U[above, columns], (len, len) float32, not to be written to. Entries below U's diagonal are not defined."""
        if self._upper is not None:
            return self._upper[above, columns]
        upper = self.reversed_lower[::-1, ::-1]
        block = upper[above, columns] / np.diagonal(upper)[columns]
        return np.ascontiguousarray(block, dtype=np.float32)

    @cached_property
    def _upper(self) -> Array | None:
        """U, (n, n) float32, or None where that is large."""
        n = len(self.order)
        if not is_kept(n):
            return None
        lower, made = self.reversed_lower.T[::-1, ::-1], np.empty((n, n), np.float32)
        for begin in range(0, n, _PANEL):
            end = min(begin + _PANEL, n)
            made[:end, begin:end] = (lower[begin:end, :end] / np.diagonal(lower)[begin:end, None]).astype(np.float32).T
        return made

    def expected(self, made_up: Array, group: slice) -> Array:
        """Returns made_up (rows, len) times the inverse of U[group, group], float32.

        made_up = e_P U[P, group], with e_P the errors of all columns P before the group. With R the columns not yet rounded, the
        objective is least where they change by e_P H_PR H_RR^-1 = e_P U_PR U_RR^-1, whose part in the group is this: what
        GPTQ's weights are when it reaches the group. (A column's own target also has the errors to come inside the group.)
        """
        key = group.start, group.stop
        if key not in self._inverses:
            upper = self.reversed_lower[::-1, ::-1][group, group]
            inverse, _ = dtrtri(np.asfortranarray(upper / np.diagonal(upper)), lower=0, unitdiag=1)
            np.fill_diagonal(inverse, 1.0)
            self._inverses[key] = np.triu(inverse).astype(np.float32)
        expected: Array = made_up @ self._inverses[key]
        return expected

    @cached_property
    def _inverses(self) -> dict[tuple[int, int], Array]:
        """The inverses that `expected` has made, (len, len) float32, by group."""
        return {}

    def solve(self, rows: Array) -> Array:
        """Returns rows (r, n) float64, in the original order of columns, times the inverse of the damped H."""
        reversed_order = self.order[::-1]
        solution, _ = dpotrs(self.reversed_lower, np.asfortranarray(rows[:, reversed_order].T), lower=1)
        result = np.empty_like(rows)
        result[:, reversed_order] = solution.T
        return result


class Damped:
    """H + damping * I in float32. hessian: H, (n, n) float64, symmetric."""

    def __init__(self, hessian: Array, damping: float) -> None:
        self._hessian, self._damping = hessian, damping
        self._kept = self._made(slice(0, len(hessian))) if is_kept(len(hessian)) else None

    def rows(self, part: slice) -> Array:
        """Returns some rows, (len, n) float32, not to be written to."""
        return self._made(part) if self._kept is None else self._kept[part]

    def _made(self, part: slice) -> Array:
        rows = self._hessian[part].astype(np.float32)
        own = np.arange(part.start, part.start + len(rows))
        rows[np.arange(len(rows)), own] += np.float32(self._damping)
        return rows


def is_kept(columns: int) -> bool:
    """Returns whether a matrix of so many columns and rows is kept in float32."""
    return 4 * columns**2 <= KEPT_BYTES


def checked_gram(statistics: InputStatistics | None, columns: int, where: str) -> Array:
    """Returns H of the statistics. Raises ModelError when there is none, or it has another size, is not finite, or is all zero."""
    gram = statistics.gram if statistics is not None else None
    if gram is None:
        raise ModelError(f"{where}: no Hessian; it needs the statistics of a calibration with gram")
    if gram.shape != (columns, columns):
        raise ModelError(f"{where}: the Hessian has shape {gram.shape}; need ({columns}, {columns}), one row per column of the weights")
    diagonal = np.diagonal(gram)
    if not np.isfinite(gram).all():
        raise ModelError(f"{where}: the Hessian is not finite; the layer's inputs hold NaN or overflow during calibration")
    if not (diagonal >= 0).all():
        raise ModelError(f"{where}: the Hessian is not positive definite: its diagonal holds {diagonal.min():g}; it must be X^T X / n")
    if not diagonal.any():
        raise ModelError(f"{where}: the Hessian is zero; the layer saw only zeros in {statistics.tokens if statistics else 0} tokens")
    return gram


def _turned(gram: Array) -> Array:
    """Returns a copy with rows and columns in reverse."""
    n = len(gram)
    turned = np.empty_like(gram)

    def copy(rows: slice) -> None:
        turned[rows] = gram[n - rows.stop : n - rows.start][::-1, ::-1]

    each(copy, [slice(0, n // 2), slice(n // 2, n)])
    return turned


def factorize(gram: Array, order: Array, damp: float, where: str) -> Factor:
    """Returns the factor of H with its columns in this order. gram: (n, n) float64, symmetric, finite; it is not changed.

    damp is the share of the mean diagonal that is added to the diagonal; it grows tenfold until the factorization
    succeeds, up to 1. Raises ModelError when it does not succeed even then.
    """
    mean = float(np.mean(np.diagonal(gram)))
    backwards, moved = order[::-1], not np.array_equal(order, np.arange(len(order)))
    tries = [damp * 10.0**k for k in range(64) if damp * 10.0**k < LARGEST_DAMP] if damp > 0 else [0.0]
    for share in (*tries, max(damp, LARGEST_DAMP)):
        work = gram[np.ix_(backwards, backwards)] if moved else _turned(gram)
        work[np.diag_indices_from(work)] += share * mean
        # The transposed view of a symmetric matrix is the same matrix in Fortran order, so LAPACK works in place.
        lower, info = dpotrf(work.T, lower=1, clean=0, overwrite_a=1)
        if info == 0 and np.isfinite(np.diagonal(lower)).all():
            return Factor(lower, order, share, share * mean)
        del work, lower
    raise ModelError(
        f"{where}: the Hessian is not positive definite, even with {LARGEST_DAMP:g} times its mean diagonal added; "
        "it must be X^T X / n of the layer's inputs"
    )
