"""Perplexity with its error bar: exp of the mean negative log-likelihood of the tokens that count (text.py says which)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import exp, sqrt
from typing import Any

import numpy as np

from tersor import ops
from tersor.evaluation.model import LanguageModel, chunks
from tersor.evaluation.text import Protocol, Windows
from tersor.tensor import Array


@dataclass(frozen=True)
class Perplexity:
    """nll: mean negative log-likelihood in nats; error: standard error of the perplexity, perplexity * se(nll).

    se(nll) = sd / sqrt(n): it takes tokens as independent, as llama.cpp's error bar does, so it is a little too small.
    """

    perplexity: float
    error: float
    nll: float
    nll_error: float
    protocol: Protocol
    seconds: float

    def __str__(self) -> str:
        from tersor.report.table import format_error

        return f"perplexity  {format_error(self.perplexity, self.error)}\nprotocol    {self.protocol}"

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        return asdict(self)


def perplexity(model: LanguageModel, windows: Windows, progress: Callable[[int, int], None] | None = None) -> Perplexity:
    """Returns the perplexity of the model on the windows. progress: called with (windows done, windows in all)."""
    start = time.perf_counter()
    cache = model.new_cache(windows.protocol.window)
    parts = []
    if progress is not None:
        progress(0, len(windows.tokens))
    for i, (tokens, first) in enumerate(zip(windows.tokens, windows.first)):
        cache.truncate(0)
        hidden = model.forward(tokens, cache)
        for rows in chunks(first - 1, len(tokens) - 1, model.vocab_size):
            parts.append(ops.nll(model.head(hidden[rows]), tokens[rows.start + 1 : rows.stop + 1]))
        if progress is not None:
            progress(i + 1, len(windows.tokens))
    return from_nll(np.concatenate(parts), windows.protocol, time.perf_counter() - start)


def from_nll(nll: Array, protocol: Protocol, seconds: float) -> Perplexity:
    """Returns the record of these negative log-likelihoods, (tokens,) float64."""
    mean, error = mean_and_error(nll)
    value = exp(mean) if mean < 700 else float("inf")
    return Perplexity(value, value * error, mean, error, protocol, seconds)


def mean_and_error(x: Array) -> tuple[float, float]:
    """Returns the mean of x and its standard error sd / sqrt(n), sd with n - 1; the error of a single value is 0."""
    return float(x.mean()), float(x.std(ddof=1)) / sqrt(len(x)) if len(x) > 1 else 0.0
