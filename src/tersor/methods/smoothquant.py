"""smoothquant: outliers of the inputs move into the weights, so that both can be rounded to 8 bits.

    s_j = max |x_j|^alpha / max |w_j|^(1 - alpha)        Y = (X diag(1/s)) (diag(s) W^T)

The weights' columns are multiplied by s and what produces their inputs is divided by it. alpha = 0.5 makes the largest input and the
largest weight of every channel equal; larger values move more into the weights. max |w_j| is over the rows of all weights that read
the channel. Source: SmoothQuant (arXiv 2211.10438, equation 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tersor.errors import RecipeError
from tersor.formats import Format
from tersor.tensor import Array, InputStatistics

_LEAST = 1e-5  # what a maximum is at least, as in the authors' code: a channel of zeros still gets a positive factor


@dataclass(frozen=True)
class SmoothQuantOptions:
    """alpha: share of the inputs' range that moves into the weights, in [0, 1]."""

    alpha: float = 0.5


def smoothquant(
    weights: Sequence[Array],
    formats: Sequence[Format],
    statistics: InputStatistics,
    options: SmoothQuantOptions | None = None,
    sources: Array | None = None,
) -> Array:
    """Returns the factor of every input channel, (in,) float32 > 0.

    weights: (out, in) float32 each, those that read the same input; formats: not looked at. sources: (in,) int, the producer's output
    that feeds each channel (Fold.sources); channels of one source get one factor, from the maxima over all of them. None: each its own.
    Raises RecipeError for alpha outside [0, 1].
    """
    alpha = (options or SmoothQuantOptions()).alpha
    if not 0 <= alpha <= 1:
        raise RecipeError(f"smoothquant: alpha is {alpha}; need a number in 0..1")
    columns = np.max([np.abs(w).max(axis=0) for w in weights], axis=0)
    x, w = (np.maximum(_largest(v.astype(np.float64), sources), _LEAST) for v in (statistics.absmax, columns))
    return (x**alpha / w ** (1 - alpha)).astype(np.float32)


def _largest(values: Array, sources: Array | None) -> Array:
    """Returns values >= 0, (in,), with the largest of the channels of one source in place of each."""
    if sources is None:
        return values
    largest = np.zeros(int(sources.max()) + 1)
    np.maximum.at(largest, sources, values)
    return largest[sources]
