"""Kullback-Leibler divergence of a model from the original, streaming: no logits file, two chunks of logits in memory.

For every token that counts, with p = softmax(base) and q = softmax(model): KL(p || q) = sum p ln(p / q) in nats; whether the
likeliest token is the same; and the change q - p of the probability of the token that really came.
The base's hidden states (not its logits) may be kept, so that several models are judged against it for one pass of the base.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import exp, sqrt
from typing import Any

import numpy as np

from tersor import ops
from tersor.errors import ModelError
from tersor.evaluation.model import LanguageModel, chunks
from tersor.evaluation.perplexity import Perplexity, from_nll, mean_and_error
from tersor.evaluation.text import Protocol, Windows
from tersor.tensor import Array


@dataclass(frozen=True)
class Divergence:
    """A model beside its base. `_error`: standard errors, tokens taken as independent.

    kl_*: nats. top1: share of tokens whose likeliest prediction is the base's, in [0, 1]. rms_change: root mean square of the
    change of the true token's probability, in [0, 1]; mean_change: its mean. ratio: perplexity / base perplexity, its error from the
    paired differences of the log-likelihoods.
    """

    perplexity: Perplexity
    base: Perplexity
    ratio: float
    ratio_error: float
    kl_mean: float
    kl_error: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1: float
    top1_error: float
    rms_change: float
    rms_change_error: float
    mean_change: float
    protocol: Protocol
    seconds: float

    def __str__(self) -> str:
        from tersor.report.table import format_error, format_number

        lines = (
            f"perplexity            {format_error(self.perplexity.perplexity, self.perplexity.error)}",
            f"perplexity of base    {format_error(self.base.perplexity, self.base.error)}",
            f"perplexity ratio      {format_error(self.ratio, self.ratio_error)}",
            f"KL divergence, mean   {format_error(self.kl_mean, self.kl_error)} nats",
            f"  median, 99 %, max   {format_number(self.kl_median)}, {format_number(self.kl_p99)}, {format_number(self.kl_max)}",
            f"same top-1            {format_error(100 * self.top1, 100 * self.top1_error)} %",
            f"RMS change of the true token's probability  {format_error(100 * self.rms_change, 100 * self.rms_change_error)} %",
            f"protocol              {self.protocol}",
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        return asdict(self)


class Base:
    """The original, run window by window. keep: remember its hidden states, 4 * hidden bytes a token, for the next model."""

    def __init__(self, model: LanguageModel, windows: Windows, keep: bool = False) -> None:
        self.model = model
        self.windows = windows
        self._cache = model.new_cache(windows.protocol.window)
        self._kept: dict[int, Array] | None = {} if keep else None

    def hidden(self, i: int) -> Array:
        """Returns the hidden states of window i, (window, d) float32."""
        if self._kept is not None and i in self._kept:
            return self._kept[i]
        self._cache.truncate(0)
        states = self.model.forward(self.windows.tokens[i], self._cache)
        if self._kept is not None:
            self._kept[i] = states.copy()
        return states


def divergence(model: LanguageModel, base: Base, progress: Callable[[int, int], None] | None = None) -> Divergence:
    """Returns how far the model is from the base on the base's windows. Raises ModelError when the two do not share a vocabulary."""
    check_same_vocabulary(model, base.model)
    start = time.perf_counter()
    windows = base.windows
    cache = model.new_cache(windows.protocol.window)
    parts = []
    if progress is not None:
        progress(0, len(windows.tokens))
    for i, (tokens, first) in enumerate(zip(windows.tokens, windows.first)):
        cache.truncate(0)
        p_hidden, q_hidden = base.hidden(i), model.forward(tokens, cache)
        for rows in chunks(first - 1, len(tokens) - 1, model.vocab_size):
            targets = tokens[rows.start + 1 : rows.stop + 1]
            parts.append(ops.compare_logits(base.model.head(p_hidden[rows]), model.head(q_hidden[rows]), targets))
        if progress is not None:
            progress(i + 1, len(windows.tokens))
    return from_comparison(np.concatenate(parts), windows.protocol, time.perf_counter() - start)


def from_comparison(columns: Array, protocol: Protocol, seconds: float) -> Divergence:
    """Returns the record of ops.compare_logits' columns, (tokens, 5) float64."""
    nll_base, nll, kl, same, change = columns.T
    kl = np.maximum(kl, 0.0)  # rounding may leave -1e-9
    kl_mean, kl_error = mean_and_error(kl)
    top1, top1_error = mean_and_error(same)
    square, square_error = mean_and_error(change**2)
    log_ratio, log_ratio_error = mean_and_error(nll - nll_base)
    ratio = exp(log_ratio) if log_ratio < 700 else float("inf")
    rms = sqrt(square)
    return Divergence(
        perplexity=from_nll(nll, protocol, seconds),
        base=from_nll(nll_base, protocol, seconds),
        ratio=ratio,
        ratio_error=ratio * log_ratio_error,
        kl_mean=kl_mean,
        kl_error=kl_error,
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1=top1,
        top1_error=top1_error,
        rms_change=rms,
        rms_change_error=square_error / (2 * rms) if rms else 0.0,  # d sqrt(x) = dx / (2 sqrt(x))
        mean_change=float(change.mean()),
        protocol=protocol,
        seconds=seconds,
    )


def check_same_vocabulary(model: LanguageModel, base: LanguageModel) -> None:
    """Raises ModelError unless both models have as many tokens and cut a probe text into the same ones."""
    if model.vocab_size != base.vocab_size:
        raise ModelError(f"the model has {model.vocab_size} tokens, the base {base.vocab_size}; compare models of one vocabulary")
    probe = "The quick brown fox, 0123456789 times; naïve café 你好 def f(x): return x\n"
    if model.tokenizer.encode(probe, bos=False) != base.tokenizer.encode(probe, bos=False):
        raise ModelError("the model and the base cut the same text into different tokens; compare models of one tokenizer")
