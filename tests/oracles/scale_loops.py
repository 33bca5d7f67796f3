"""AWQ's search and SmoothQuant's factor in slow loops over samples, rows and channels, from the papers (2306.00978, 2211.10438)."""

from __future__ import annotations

from collections.abc import Callable

Matrix = list[list[float]]


def output_error(samples: Matrix, weights: list[Matrix], s: list[float], quantize: Callable[[Matrix], Matrix]) -> float:
    """Returns the mean over samples of |Q(W diag(s)) (x / s) - W x|^2, summed over the weights (AWQ, equation 4)."""
    total = 0.0
    for w in weights:
        stored = quantize([[value * s[j] for j, value in enumerate(row)] for row in w])
        for x in samples:
            for row, kept in zip(w, stored, strict=True):
                y = sum(a * b for a, b in zip(row, x, strict=True))
                got = sum(a * (b / s[j]) for j, (a, b) in enumerate(zip(kept, x, strict=True)))
                total += (got - y) ** 2
    return total / len(samples)


def awq_factors(samples: Matrix, weights: list[Matrix], sources: list[int], grid: int) -> list[list[float]]:
    """Returns s for alpha = 1/grid .. 1 of a^alpha and 0 .. 1 - 1/grid of a^alpha / m^(1 - alpha), over sqrt(max * min), after all ones."""
    channels = range(len(samples[0]))
    a, m = [], []
    for j in channels:
        together = [i for i in channels if sources[i] == sources[j]]
        inputs = [abs(x[i]) for x in samples for i in together]
        column = [abs(row[i]) for w in weights for row in w for i in together]
        a.append(sum(inputs) / len(inputs))
        m.append(sum(column) / len(column))
    a, m = ([max(v, 1e-6 * max(values)) for v in values] for values in (a, m))
    found = [[1.0 for _ in channels]]
    for k in range(1, grid + 1):
        found.append([a[j] ** (k / grid) for j in channels])
    for k in range(grid):
        found.append([a[j] ** (k / grid) / m[j] ** (1 - k / grid) for j in channels])
    return [[v / (max(s) * min(s)) ** 0.5 for v in s] for s in found]


def smooth_factors(samples: Matrix, weights: list[Matrix], sources: list[int], alpha: float) -> list[float]:
    """Returns SmoothQuant's equation 4, maxima over the channels of a source and at least 1e-5."""
    channels = range(len(samples[0]))
    factors = []
    for j in channels:
        together = [i for i in channels if sources[i] == sources[j]]
        x = max([1e-5] + [abs(row[i]) for row in samples for i in together])
        w = max([1e-5] + [abs(row[i]) for weight in weights for row in weight for i in together])
        factors.append(x**alpha / w ** (1 - alpha))
    return factors
