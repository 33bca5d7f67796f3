"""Choosing the next token from logits: the filters, in the order in which Hugging Face's generate applies them.

    repeat penalty -> temperature -> top-k -> top-p -> min-p -> draw

Probabilities are float64. The draw inverts the cumulative distribution with one number of a PCG64 generator, so equal
seeds give equal tokens on every machine. Nothing sorts the vocabulary, which would take longer than a small model does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tersor import _native
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
    """Draws tokens one after the other; its state is the random generator and the tokens that it has read."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
        self._known: set[int] = set()
        self._seen = np.empty(0, np.int64)  # the same
        self._scratch = np.empty(0)  # new memory of a vocabulary's size takes longer to get than to fill

    def read(self, tokens: Iterable[int]) -> None:
        """Takes note of tokens of the prompt or of the answer, for the repeat penalty."""
        if self._sampling.repeat_penalty == 1:
            return
        new = [token for token in dict.fromkeys(tokens) if token not in self._known]
        self._known.update(new)
        self._seen = np.append(self._seen, np.asarray(new, np.int64))

    def choose(self, logits: Array, top: int | None = None) -> int:
        """Returns the next token. logits: (vocab,) float32, left as they are; top: the first of the largest, if it is known.

        Without temperature the lowest of equally probable tokens is chosen.
        """
        s = self._sampling
        if top is not None and s.temperature == 0 and s.repeat_penalty == 1:
            return top
        if len(self._seen):
            logits = penalized(logits, self._seen, s.repeat_penalty)
        if s.temperature == 0:
            return int(np.argmax(logits))
        if len(self._scratch) < len(logits):
            self._scratch = np.empty(len(logits))
        tokens, probabilities = distribution(logits, s, self._scratch)
        drawn = inverse(probabilities, self._random.random())
        return drawn if tokens is None else int(tokens[drawn])


def penalized(logits: Array, seen: Array, penalty: float) -> Array:
    """Returns a copy of the logits with those of the seen tokens, (k,) different integers, divided by penalty, or multiplied
    when negative."""
    out: Array = logits.copy()
    chosen = out[seen]
    out[seen] = np.where(chosen > 0, chosen / np.float32(penalty), chosen * np.float32(penalty))
    return out


def distribution(logits: Array, sampling: Sampling, scratch: Array) -> tuple[Array | None, Array]:
    """Returns the tokens that are left by temperature, top-k, top-p and min-p, (k,) int64, None for all of them, and their
    probabilities, (k,) float64 that sum to 1. sampling.temperature > 0; scratch: (vocab,) float64, may be what is returned."""
    tokens = largest(logits, sampling.top_k) if 0 < sampling.top_k < len(logits) else None
    scores = logits if tokens is None else logits[tokens]
    weights = scratch[: len(scores)]
    total = _native.weigh(scores, sampling.temperature, weights)  # the largest is 1
    # Tokens below 1/n of what top-p leaves out are left out with it. min-p comes first, since it takes away the smallest as well.
    floor = max(sampling.min_p, (1 - sampling.top_p) * total / len(weights))
    if floor > 0:
        kept = np.flatnonzero(weights >= floor)
        tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
    if sampling.top_p < 1:
        kept = nucleus(weights, sampling.top_p * total)
        tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
    weights /= weights.sum()
    return tokens, weights


_ONE = np.float64(1).view(np.int64)  # bits of positive doubles are ordered as the doubles are
_BUCKET_BITS = 49  # of a double's 52 bits of fraction: eight buckets for each power of two
_BUCKETS = 512  # down to 2^-64


def nucleus(weights: Array, mass: float) -> Array:
    """Returns the indices of the fewest largest weights whose sum reaches mass; all when it is not reached. weights: in [0, 1].

    Weights are put into buckets by their size, and only the bucket in which the mass is reached is sorted.
    """
    buckets = _ONE - weights.view(np.int64)
    buckets >>= _BUCKET_BITS
    np.minimum(buckets, _BUCKETS - 1, out=buckets)
    sums = np.cumsum(np.bincount(buckets, weights))
    edge = int(np.searchsorted(sums, mass, side="left"))
    above, within = np.flatnonzero(buckets < edge), np.flatnonzero(buckets == edge)
    within = within[np.argsort(-weights[within], kind="stable")]
    rest = mass - (sums[edge - 1] if edge > 0 else 0.0)
    count = 1 + np.searchsorted(np.cumsum(weights[within])[:-1], rest, side="left")
    return np.concatenate([above, within[:count]])


def largest(values: Array, k: int, group: int = 16) -> Array:
    """Returns the indices of the k > 0 largest values in ascending order, and of all that equal the k-th.

    k groups have a value as large as the k-th largest of the groups' maxima; so only those that reach it are looked at.
    """
    if k >= len(values):
        return np.arange(len(values))
    groups = len(values) // group
    if k >= groups:
        return np.flatnonzero(values >= np.partition(values, len(values) - k)[len(values) - k])
    maxima = values[: groups * group].reshape(group, groups).max(axis=0)
    few = np.flatnonzero(values >= np.partition(maxima, groups - k)[groups - k])
    return few[largest(values[few], k, len(few))]


def inverse(probabilities: Array, x: float, block: int = 256) -> int:
    """Returns the first index whose cumulative probability is above x in [0, 1); block: values that are summed at once."""
    ends = np.cumsum(np.add.reduceat(probabilities, np.arange(0, len(probabilities), block)))
    at = min(int(np.searchsorted(ends, x, side="right")), len(ends) - 1)  # the sums may end a rounding below 1
    inner = np.cumsum(probabilities[at * block : (at + 1) * block])
    found = int(np.searchsorted(inner, x - (ends[at - 1] if at > 0 else 0.0), side="right"))
    return at * block + min(found, len(inner) - 1)
