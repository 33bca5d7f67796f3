"""Observers: one static scale for the inputs of a linear layer, from a histogram of their magnitudes over calibration tokens.

Symmetric 8-bit integers: x ~ clip(round(x / scale), -127, 127) * scale with scale = t / 127. An observer chooses the threshold t,
beyond which values are cut off:

    minmax      t = max |x|: nothing is cut off (Krishnamoorthi 2018, arXiv 1806.08342, section 2)
    percentile  t = the magnitude that this share of the values does not exceed (Wu et al. 2020, arXiv 2004.09602, section 3.3)
    mse         t with the least sum of squared errors of rounding and cutting (Banner et al. 2019, arXiv 1810.05723, section 3, here
                over what was counted instead of a Laplace distribution)
    entropy     t with the least KL divergence of the rounded from the full distribution (Migacz 2017, "8-bit Inference with
                TensorRT", GTC 2017, "Calibration"; the same in arXiv 2004.09602, section 3.3)

Memory is bounded: a histogram has BINS counts whatever the number of tokens. When a larger value comes, its range doubles and
neighbours are added together, so that the counts stay exact.
"""

from __future__ import annotations

from collections.abc import Callable
from math import frexp

import numpy as np

from tersor.errors import ModelError, RecipeError, unknown
from tersor.tensor import Array

BINS = 4096  # counts of a histogram: 32 KiB; at least half of them lie below the largest magnitude
LEVELS = 127  # magnitudes of an 8-bit code above 0
CANDIDATES = 256  # thresholds that `mse` tries
ENTROPY_BINS = 2048  # of `entropy`, as Migacz: bins are joined to so many
ENTROPY_LEVELS = 128  # of `entropy`: what bins are quantized to
TINY = 1e-30  # smaller inputs count as zeros
PERCENTILE = 99.99  # of `percentile`: in per cent


class MagnitudeHistogram:
    """Counts of |x| in BINS equal bins over [0, limit), limit a power of two; and the largest magnitude itself."""

    def __init__(self, where: str) -> None:
        """where: the layer's name, for messages."""
        self.where = where
        self.counts = np.zeros(BINS, np.int64)
        self.limit = 0.0
        self.largest = 0.0

    def add(self, x: Array) -> None:
        """Counts all values of x, float32 of any shape. Raises ModelError for NaN or infinity, with the layer's name."""
        if x.size == 0:
            return
        magnitudes = np.abs(x).reshape(-1)
        largest = float(magnitudes.max())
        if not np.isfinite(largest):
            raise ModelError(f"{self.where}: an input is NaN or infinite; the model or the calibration text is broken")
        self.largest = max(self.largest, largest)
        if largest >= max(self.limit, TINY):
            self._widen(2.0 ** frexp(largest)[1])
        if self.limit == 0:
            self.counts[0] += magnitudes.size
            return
        bins = (magnitudes * np.float32(BINS / self.limit)).astype(np.int32)  # exact: a power of two
        self.counts += np.bincount(bins, minlength=BINS)

    def _widen(self, limit: float) -> None:
        """Makes the range [0, limit), limit a power of two above the present one, by adding neighbours."""
        if self.limit > 0:
            joined = int(min(BINS, limit / self.limit))
            sums = self.counts.reshape(-1, joined).sum(axis=1)
            self.counts = np.concatenate([sums, np.zeros(BINS - len(sums), np.int64)])
        self.limit = limit

    def scale(self, observer: str, percentile: float = PERCENTILE) -> float:
        """Returns threshold / 127 of an observer of OBSERVERS. percentile: in (0, 100], of `percentile` only.

        Raises RecipeError for an unknown observer or percentile, ModelError when nothing but zeros was counted.
        """
        if observer not in OBSERVERS:
            raise RecipeError(unknown("observer", observer, OBSERVERS))
        if not 0 < percentile <= 100:
            raise RecipeError(f"percentile {percentile}; need more than 0 and at most 100")
        if self.limit == 0:
            raise ModelError(f"{self.where}: no input but zeros in the calibration text; use more or other text, or int8_token")
        threshold = _percentile(self, percentile) if observer == "percentile" else OBSERVERS[observer](self)
        return min(threshold, self.largest) / LEVELS


def _minmax(h: MagnitudeHistogram) -> float:
    return h.largest


def _percentile(h: MagnitudeHistogram, percentile: float = PERCENTILE) -> float:
    """Returns the upper edge of the first bin up to which at least this share of the values lie."""
    below = np.cumsum(h.counts)
    return float(np.searchsorted(below, below[-1] * (percentile / 100)) + 1) * h.limit / BINS


def _mse(h: MagnitudeHistogram) -> float:
    """Returns the best of CANDIDATES equal parts of the range up to the largest magnitude; a bin's values are at its middle."""
    used = np.flatnonzero(h.counts)
    values, counts = (used + 0.5) * (h.limit / BINS), h.counts[used].astype(np.float64)
    thresholds = h.largest * np.arange(1, CANDIDATES + 1) / CANDIDATES
    errors = []
    for step in thresholds / LEVELS:
        rounded = np.minimum(np.rint(values / step), LEVELS) * step
        errors.append(float(counts @ np.square(values - rounded)))
    return float(thresholds[int(np.argmin(errors))])


def _entropy(h: MagnitudeHistogram) -> float:
    """Returns (i + 1/2) bins for the i in 128 .. 2048 that loses the least information.

    P: the first i bins, what lies beyond added to the last that is not empty (Migacz: to the last, but where that is empty Q is 0
    and the divergence infinite, so that a lone outlier would decide). Q: the first i bins as ENTROPY_LEVELS levels, each level's
    count spread evenly over those of its bins that are not empty. Both are made to sum to 1; least sum P ln(P / Q).
    """
    counts = h.counts.reshape(ENTROPY_BINS, -1).sum(axis=1).astype(np.float64)
    total, best, threshold = counts.sum(), np.inf, ENTROPY_BINS
    last = int(np.flatnonzero(counts)[-1]) + 1
    for i in range(ENTROPY_LEVELS, max(last, ENTROPY_LEVELS) + 1):
        first = counts[:i]
        filled = np.flatnonzero(first)
        if filled.size == 0:
            continue
        level = filled * ENTROPY_LEVELS // i
        p = first[filled]
        sums, share = np.bincount(level, p, ENTROPY_LEVELS), np.bincount(level, minlength=ENTROPY_LEVELS)
        q = sums[level] / share[level]
        p[-1] += total - p.sum()
        divergence = float(p @ np.log(p / q * (q.sum() / total))) / total
        if divergence < best:
            best, threshold = divergence, i
    return (threshold + 0.5) * h.limit / ENTROPY_BINS


OBSERVERS: dict[str, Callable[[MagnitudeHistogram], float]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
