"""awq: channels whose inputs are large get finer weights, by a factor that moves into what produces the inputs.

    y = W x = (W diag(s)) (diag(1/s) x)      E(s) = Q(W diag(s)) diag(1/s) - W      L(s) = sum over the weights of tr(E H E^T)
    s = a^alpha (single)   or   a^alpha / m^(1 - alpha) (duo)                       alpha in 0, 1/n, .., 1

a: mean |x| of the channel; m: mean |w| of its column; H = X^T X / n, so that L is the mean squared error of the outputs, exactly, where the
authors run the layers. The best s of both families and of s = 1 is returned, so L never exceeds that without scaling. Sources: AWQ
(arXiv 2306.00978, equations 4 and 5: single) and the search of its code, which also divides by sqrt(max s * min s). Duo is AutoAWQ's
`duo_scaling` without its normalization of |w| by group: W diag(s) is then the same however a checkpoint's channels were scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tersor.errors import RecipeError
from tersor.formats import Format
from tersor.methods.rtn import require_encoder
from tersor.tensor import Array, InputStatistics

_LEAST = 1e-6  # of the largest: a channel that calibration hardly saw still gets a positive factor


@dataclass(frozen=True)
class AwqOptions:
    """grid: steps of alpha from 0 to 1, n. clip: L is that of the searched ranges that `clip` finds, not of round-to-nearest.
    rows: of each weight that the search looks at, at most, evenly spaced; whether the best beats s = 1 is asked of all rows."""

    grid: int = 20
    clip: bool = False
    rows: int = 1024


def awq(
    weights: Sequence[Array],
    formats: Sequence[Format],
    statistics: InputStatistics,
    options: AwqOptions | None = None,
    sources: Array | None = None,
) -> Array:
    """Returns the factor of every input channel, (in,) float32 > 0: columns of the weights times it, what produces them divided by it.

    weights: (out, in) float32 each, those that read the same input; formats: what each will be stored in. statistics: of that input,
    with its gram. sources: (in,) int, the producer's output that feeds each channel (Fold.sources); channels of one source get one
    factor, from the mean of their a and of their m. None: every channel has its own.
    Raises RecipeError without a gram or for a grid below 1, FormatError when a format can only be decoded or does not fit.
    """
    chosen = options or AwqOptions()
    if chosen.grid < 1:
        raise RecipeError(f"awq: grid is {chosen.grid}; need at least 1 step")
    if chosen.rows < 1:
        raise RecipeError(f"awq: rows is {chosen.rows}; need at least 1 row")
    if statistics.gram is None:
        raise RecipeError("awq: the statistics hold no Gram matrix, from which it computes the error of the outputs; collect them with it")
    for format in formats:
        require_encoder(format, "awq")
    gram = statistics.gram.astype(np.float32)

    def loss(s: Array, rows: int) -> float:
        importance = statistics.mean_square / np.square(s)
        total = 0.0
        for w, format in zip(weights, formats, strict=True):
            part = w[:: -(-len(w) // rows)]
            total += _output_error(part, format, s, gram, importance, chosen.clip) * len(w) / len(part)
        return total

    ones = np.ones(gram.shape[0], np.float32)
    best = min((ones, *_candidates(weights, statistics.mean_abs, sources, chosen.grid)), key=lambda s: loss(s, chosen.rows))
    most = max(len(w) for w in weights)
    return best if most <= chosen.rows or loss(best, most) < loss(ones, most) else ones


def _candidates(weights: Sequence[Array], mean_abs: Array, sources: Array | None, grid: int) -> list[Array]:
    """Returns the factors to try, without s = 1."""
    rows = sum(len(w) for w in weights)
    columns = sum(np.abs(w).sum(axis=0, dtype=np.float64) for w in weights) / rows
    a, m = (_floored(_pooled(v.astype(np.float64), sources)) for v in (mean_abs, np.asarray(columns)))
    alphas = [k / grid for k in range(grid + 1)]
    single = [a**alpha for alpha in alphas[1:]]
    duo = [a**alpha / m ** (1 - alpha) for alpha in alphas[:-1]]  # at 1 it is single's
    return [(s / np.sqrt(s.max() * s.min())).astype(np.float32) for s in single + duo]


def _pooled(values: Array, sources: Array | None) -> Array:
    """Returns values, (in,), with the mean over the channels of one source in place of each."""
    if sources is None:
        return values
    pooled: Array = (np.bincount(sources, values) / np.bincount(sources))[sources]
    return pooled


def _floored(values: Array) -> Array:
    """Returns values >= 0 with the smallest raised to _LEAST of the largest; all ones when there is nothing but zeros."""
    top = values.max()
    floored: Array = np.maximum(values, _LEAST * top) if top > 0 else np.ones_like(values)
    return floored


def _output_error(w: Array, format: Format, s: Array, gram: Array, importance: Array, clip: bool) -> float:
    """Returns tr(E H E^T) of one weight, (out, in), by float32 products summed in float64."""
    scaled = w * s
    if clip:
        stored = format.quantize_clipped(scaled, importance)
    else:
        stored = format.quantize(scaled, importance if format.uses_importance else None)
    error = format.dequantize(stored) / s - w
    return float(np.einsum("ij,ij->", error @ gram, error, dtype=np.float64))
