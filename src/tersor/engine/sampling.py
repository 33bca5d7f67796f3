"""Choosing the next token from logits: the filters, in the order in which Hugging Face's generate applies them.

    repeat penalty -> temperature -> top-k -> top-p -> min-p -> draw

Probabilities are float64. The draw inverts the cumulative distribution with one number of a PCG64 generator, so equal
seeds give equal tokens on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tersor.errors import RecipeError
from tersor.tensor import Array


@dataclass(frozen=True)
class Sampling:
    """How to choose. Raises RecipeError for values out of range.

    temperature: logits are divided by it; 0 = the most probable token, always (the filters then change nothing).
    top_k: the k largest logits stay (and those equal to the k-th); 0 = all.
    top_p: the fewest most probable tokens that together reach p stay, at least one; 1 = all (Holtzman et al., 2020).
    min_p: tokens with less than min_p of the largest probability go; 0 = none (Nguyen et al., 2024).
    repeat_penalty: logits of every token seen so far, the prompt's too, are divided by it when positive and multiplied
        when not; 1 = none (Keskar et al., 2019).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = (
            ("temperature", 0 <= self.temperature < float("inf"), "a number >= 0"),
            ("top_k", self.top_k >= 0, "an integer >= 0"),
            ("top_p", 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "a number in [0, 1]"),
            ("repeat_penalty", 0 < self.repeat_penalty < float("inf"), "a number > 0"),
            ("seed", self.seed >= 0, "an integer >= 0"),
        )
        for name, valid, need in ranges:
            if not valid:
                raise RecipeError(f"{name} is {getattr(self, name)}; need {need}")


class Sampler:
    """Draws tokens one after the other; its only state is the random generator."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def choose(self, logits: Array, seen: Sequence[int]) -> int:
        """Returns the next token. logits: (vocab,) float32, left as they are; seen: the tokens so far.

        Without temperature the lowest of equally probable tokens is chosen.
        """
        s = self._sampling
        if s.repeat_penalty != 1 and seen:
            logits = penalized(logits, seen, s.repeat_penalty)
        if s.temperature == 0:
            return int(np.argmax(logits))
        tokens, probabilities = distribution(logits, s)
        drawn = int(np.searchsorted(np.cumsum(probabilities), self._random.random(), side="right"))
        return int(tokens[min(drawn, len(tokens) - 1)])  # the sums may end a rounding below 1


def penalized(logits: Array, seen: Sequence[int], penalty: float) -> Array:
    """Returns a copy of the logits with those of the seen tokens divided by penalty, or multiplied when negative."""
    out: Array = logits.copy()
    tokens = np.unique(np.asarray(seen))
    out[tokens] = np.where(out[tokens] > 0, out[tokens] / np.float32(penalty), out[tokens] * np.float32(penalty))
    return out


def distribution(logits: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Returns the tokens that are left by temperature, top-k, top-p and min-p, (k,) int64, and their probabilities,
    (k,) float64 that sum to 1. sampling.temperature > 0."""
    tokens = largest(logits, sampling.top_k)
    scores = logits[tokens].astype(np.float64)
    weights = np.exp((scores - scores.max()) / sampling.temperature)  # the largest is 1
    mass = sampling.top_p * weights.sum()
    if sampling.min_p > 0:  # before top-p, whose mass is known already: fewer to sort, and the same are left
        kept = np.flatnonzero(weights >= sampling.min_p)
        tokens, weights = tokens[kept], weights[kept]
    if sampling.top_p < 1:
        kept = nucleus(weights, mass)
        tokens, weights = tokens[kept], weights[kept]
    return tokens, weights / weights.sum()


def nucleus(weights: Array, mass: float, count: int = 256) -> Array:
    """Returns the indices of the fewest largest weights whose sum reaches mass, largest first; all when it is not reached.

    Sorting a vocabulary takes longer than a small model; so the `count` largest are tried first, then four times as many.
    """
    few = count < len(weights)
    order = np.flatnonzero(weights >= np.partition(weights, len(weights) - count)[len(weights) - count]) if few else np.arange(len(weights))
    order = order[np.argsort(-weights[order], kind="stable")]
    sums = np.cumsum(weights[order])
    if few and sums[-1] < mass:
        return nucleus(weights, mass, 4 * count)
    return np.asarray(order[: 1 + np.searchsorted(sums[:-1], mass, side="left")])


def largest(logits: Array, k: int) -> Array:
    """Returns the tokens of the k largest logits in ascending order, and of all that equal the k-th; k = 0: all."""
    if k == 0 or k >= len(logits):
        return np.arange(len(logits))
    return np.flatnonzero(logits >= np.partition(logits, len(logits) - k)[len(logits) - k])
