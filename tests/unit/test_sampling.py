"""Sampling against transformers' logits processors, and the draw against the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tersor import _native
from tersor.engine.sampling import Sampler, Sampling, distribution, inverse, largest, nucleus, penalized
from tersor.errors import RecipeError


def oracle(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """Returns transformers' probabilities of every token after all filters, (vocab,)."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(s.temperature)])
    if s.top_k:
        steps.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        steps.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        steps.append(MinPLogitsWarper(s.min_p))
    scores = steps(torch.zeros(1, 1, dtype=torch.long), torch.tensor(logits)[None].double())
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.4),
        Sampling(temperature=1.0, top_k=7),
        Sampling(temperature=1.0, top_k=1000),
        Sampling(temperature=1.5, top_p=0.8),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=2.0, min_p=0.1),
        Sampling(temperature=1.0, min_p=1.0),
        Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.05),
        Sampling(temperature=3.0, top_k=5, top_p=0.5),
        Sampling(temperature=3.0, top_p=0.95),
        Sampling(temperature=1.5, top_p=0.7, min_p=0.2),
        Sampling(temperature=1.5, top_p=0.99, min_p=0.001),
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(sampling: Sampling) -> None:
    for seed in range(20):
        size = 300 if seed % 2 else 3000  # more than are sorted at first
        logits = (np.random.default_rng(seed).standard_normal(size) * (1 + seed % 3)).astype(np.float32)
        tokens, probabilities = distribution(logits, sampling, np.empty(size))
        got = np.zeros(size)
        got[slice(None) if tokens is None else tokens] = probabilities
        np.testing.assert_allclose(got, oracle(logits, sampling), rtol=1e-9, atol=1e-12)


def test_ties_with_the_last_of_top_k_stay() -> None:
    logits = np.array([1, 5, 3, 3, 3, 0], np.float32)
    tokens, _ = distribution(logits, Sampling(temperature=1.0, top_k=2), np.empty(6))
    assert tokens is not None and sorted(tokens.tolist()) == [1, 2, 3, 4]


def test_top_p_stops_when_it_is_reached() -> None:
    tokens, _ = distribution(np.zeros(4, np.float32), Sampling(temperature=1.0, top_p=0.5), np.empty(4))
    assert tokens is not None and sorted(tokens.tolist()) == [0, 1]


@pytest.mark.parametrize("size", [1, 5, 16, 40, 1000, 1013])
def test_the_largest_are_found_in_groups(size: int) -> None:
    rng = np.random.default_rng(size)
    for values in (rng.standard_normal(size), rng.integers(0, 5, size).astype(float), np.zeros(size)):
        for k in {1, 2, size // 20 + 1, size // 2 + 1, size, size + 3}:
            threshold = np.sort(values)[max(0, size - k)]
            assert largest(values, k).tolist() == [i for i, x in enumerate(values) if x >= threshold]


@pytest.mark.parametrize("mass", [0.0, 1e-9, 0.3, 0.5, 0.999999, 2.0])
def test_the_nucleus_is_that_of_sorting(mass: float) -> None:
    rng = np.random.default_rng(7)
    for weights in (rng.random(500), np.exp(rng.standard_normal(3000) * 8), np.ones(10), np.array([1.0, 2.0**-70, 2.0**-80, 0.0])):
        weights = weights / weights.max()
        want = mass * weights.sum() * (1 - 1e-12)  # sums in another order
        chosen = nucleus(weights, want)
        ordered = np.sort(weights)[::-1]
        count = 1 + int(np.searchsorted(np.cumsum(ordered)[:-1], want))
        np.testing.assert_array_equal(np.sort(weights[chosen])[::-1], ordered[:count])
        assert len(set(chosen.tolist())) == count
    assert len(nucleus(np.array([0.5, 1.0, 0.25]), 9.0)) == 3


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("temperature", [1e-320, 1e-3, 0.7, 1.0, 30.0])
def test_weights_are_those_of_numpy(isa: str, temperature: float) -> None:
    _native.force_isa(isa)
    try:
        for n in (1, 2, 7, 64, 2047, 2048, 2049, 10_000):
            x = (np.random.default_rng(n).standard_normal(n) * 20).astype(np.float32)
            out = np.full(n, np.nan)
            total = _native.weigh(x, temperature, out)
            with np.errstate(over="ignore", under="ignore"):
                want = np.exp((x.astype(np.float64) - x.max()) / temperature)
            # rounding the exponent, of at most 700, by 2 units of 2^-53 changes the weight by 1.6e-13
            np.testing.assert_allclose(out, np.where(want < 1e-304, 0, want), rtol=3e-13, atol=1e-303)
            assert total == pytest.approx(want.sum(), rel=1e-12) and out.max() == 1.0
    finally:
        _native.force_isa("")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.empty(0, np.float32), 1.0, np.empty(0)), "weigh: no logits"),
        ((np.zeros(3, np.float32), 0.0, np.empty(3)), "weigh: temperature must be positive"),
        ((np.zeros(3, np.float32), 1.0, np.empty(4)), "weigh: values of out: got 4, need 3"),
    ],
)
def test_weights_of_nothing_are_refused(arguments: tuple[np.ndarray, float, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.weigh(*arguments)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
def test_the_draw_inverts_the_cumulative_distribution(size: int) -> None:
    rng = np.random.default_rng(size)
    p = rng.integers(0, 9, size) + (np.arange(size) == 0)
    p = p / p.sum()
    edges = np.cumsum(p)
    for x in [0.0, 1 - 2**-53, *rng.random(300)]:
        if np.abs(edges - x).min() > 1e-12:
            assert inverse(p, x) == min(int((edges <= x).sum()), size - 1)
    assert p[inverse(p, 1 - 2**-53)] >= 0


def test_repeat_penalty_is_that_of_transformers() -> None:
    logits = np.random.default_rng(3).standard_normal(50).astype(np.float32)
    seen = [4, 4, 7, 49, 0]
    want = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), torch.tensor(logits)[None])[0].numpy()
    before = logits.copy()
    np.testing.assert_allclose(penalized(logits, np.unique(seen), 1.3), want, rtol=1e-6)
    np.testing.assert_array_equal(logits, before)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.1, 0.025], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=11))
    draws = 20_000
    counts = np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=5)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    assert (np.abs(counts - draws * p) < 4.5 * np.sqrt(draws * p * (1 - p))).all()  # 4.5 sigma: 1 in 150,000 by chance


def test_equal_seeds_draw_equal_tokens() -> None:
    logits = np.random.default_rng(5).standard_normal(1000).astype(np.float32)

    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.choose(logits) for _ in range(20)]

    assert draws(1) == draws(1) != draws(2)


def test_without_temperature_the_first_of_the_largest() -> None:
    logits = np.array([0, 2, 1, 2], np.float32)
    assert Sampler(Sampling()).choose(logits) == 1
    sampler = Sampler(Sampling(repeat_penalty=1.5))
    sampler.read([1, 1])
    assert sampler.choose(logits) == 3
    sampler.read([3, 1])
    assert sampler.choose(logits) == 1  # both are penalized, once


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repeat_penalty": 0.0},
        {"seed": -1},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=f"^{next(iter(wrong))} is "):
        Sampling(**wrong)  # type: ignore[arg-type]
