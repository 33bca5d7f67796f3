"""awq against slow loops over the samples themselves, on affine, table and k-quant formats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.oracles import scale_loops

from tersor.errors import FormatError, RecipeError
from tersor.formats import FORMATS, get_format
from tersor.methods.awq import AwqOptions, awq
from tersor.tensor import InputStatistics


def statistics(x: np.ndarray) -> InputStatistics:
    x = x.astype(np.float64)
    small = [v.astype(np.float32) for v in ((x**2).mean(0), np.abs(x).mean(0), np.abs(x).max(0))]
    return InputStatistics(len(x), *small, gram=x.T @ x / len(x))


def draw(n: int = 12, columns: int = 64, rows: tuple[int, ...] = (3, 5), seed: int = 0) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, columns)) * np.exp(1.2 * rng.standard_normal(columns))
    return x.astype(np.float32), [rng.standard_normal((r, columns)).astype(np.float32) for r in rows]


def error(x: np.ndarray, weights: list[np.ndarray], s: np.ndarray, name: str, clip: bool = False) -> float:
    """Returns the loops' error of scales, round-to-nearest or clipped."""
    fmt = get_format(name)
    importance = ((x.astype(np.float64) ** 2).mean(0) / s.astype(np.float64) ** 2).astype(np.float32)

    def quantize(w):
        values = np.array(w, np.float32)
        return fmt.dequantize(fmt.quantize_clipped(values, importance) if clip else fmt.quantize(values)).astype(float).tolist()

    return scale_loops.output_error(x.tolist(), [w.tolist() for w in weights], s.tolist(), quantize)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("name", "clip"), [("int3_g32", False), ("int3_g32", True), ("nf4", False)])
def test_the_best_of_the_loops_is_found(name, clip, shared):
    x, weights = draw()
    sources = np.arange(64) // 32 * 16 + np.arange(64) % 16 if shared else np.arange(64)
    got = awq(weights, [get_format(name)] * 2, statistics(x), AwqOptions(4, clip), sources if shared else None)
    candidates = scale_loops.awq_factors(x.tolist(), [w.tolist() for w in weights], sources.tolist(), 4)
    errors = [error(x, weights, np.array(s), name, clip) for s in candidates]
    assert len(candidates) == 9 and min(errors) < 0.97 * errors[0]  # scaling pays here, or the test says nothing
    np.testing.assert_allclose(got, candidates[int(np.argmin(errors))], rtol=1e-5)
    assert got.dtype == np.float32


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.can_encode])
def test_never_worse_than_no_scaling_in_any_format(name):
    x, weights = draw(columns=768, rows=(4,))
    fmt, seen = get_format(name), statistics(x)
    s = awq(weights, [fmt], seen, AwqOptions(5))
    assert s.shape == (768,) and np.isfinite(s).all() and (s > 0).all()
    losses = []
    for scale in (s, np.ones_like(s)):
        w = weights[0] * scale
        stored = fmt.quantize(w, seen.mean_square / scale**2 if fmt.uses_importance else None)
        difference = (fmt.dequantize(stored) / scale - weights[0]).astype(np.float64)
        losses.append(float(np.sum(difference @ seen.gram * difference)))
    assert losses[0] <= losses[1] * (1 + 1e-5)


def test_rows_may_differ_in_format_and_nothing_is_written_to():
    x, weights = draw()
    kept = [w.copy() for w in weights]
    one = awq(weights, [get_format("int3_g32"), get_format("int8_g32")], statistics(x))
    assert not np.array_equal(one, awq(weights, [get_format("int8_g32"), get_format("int3_g32")], statistics(x)))
    assert all(np.array_equal(a, b) for a, b in zip(weights, kept, strict=True))


def test_a_rescaled_checkpoint_gets_the_same_weights():
    x, weights = draw(seed=3)
    scaled = []
    for seed in (4, 5):
        c = np.exp(2 * np.random.default_rng(seed).standard_normal(64)).astype(np.float32)
        scaled.append(awq([w * c for w in weights], [get_format("int4_g32")] * 2, statistics(x / c), AwqOptions(8)) * c)
    ratio = scaled[0] / scaled[1]  # of W diag(s); one constant for all channels is what the normalization leaves
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)


def test_a_search_on_some_rows_is_checked_on_all():
    x, weights = draw(rows=(40,))
    fmt = [get_format("int3_g32")]
    some, every = (awq(weights, fmt, statistics(x), AwqOptions(20, rows=rows)) for rows in (4, 40))
    plain = error(x, weights, np.ones(64, np.float32), "int3_g32")
    assert error(x, weights, every, "int3_g32") <= error(x, weights, some, "int3_g32") < plain
    assert not np.array_equal(some, every)
    unseen = np.arange(40) % 10 > 0
    weights[0][unseen] = np.random.default_rng(1).integers(-3, 5, (36, 64))  # on the grid as they are, when both ends occur
    weights[0][unseen, ::32], weights[0][unseen, 1::32] = -3, 4
    assert (awq(weights, fmt, statistics(x), AwqOptions(20, rows=4)) == 1).all()


def test_rows_that_are_looked_at_stand_for_the_others():
    x, (first, second) = draw(rows=(4, 4), seed=1)
    weights, fmt = [np.repeat(first, 10, axis=0), second * 2], [get_format("int3_g32")] * 2  # rows 0, 10, 20, 30 are `first`
    every = awq(weights, fmt, statistics(x))
    assert np.array_equal(awq(weights, fmt, statistics(x), AwqOptions(rows=4)), every)
    assert not np.array_equal(awq([first, weights[1]], fmt, statistics(x)), every)


def test_inputs_of_zero():
    x, weights = draw()
    x[:, 5] = 0
    s = awq(weights, [get_format("int4_g32")] * 2, statistics(x))
    assert np.isfinite(s).all() and (s > 0).all()
    assert (awq(weights, [get_format("int4_g32")] * 2, statistics(np.zeros_like(x))) == 1).all()


def test_refusals():
    x, weights = draw()
    fmt = [get_format("int4_g32")] * 2
    with pytest.raises(RecipeError, match="awq: the statistics hold no Gram matrix"):
        awq(weights, fmt, replace(statistics(x), gram=None))
    with pytest.raises(RecipeError, match="awq: grid is 0; need at least 1 step"):
        awq(weights, fmt, statistics(x), AwqOptions(0))
    with pytest.raises(RecipeError, match="awq: rows is 0; need at least 1 row"):
        awq(weights, fmt, statistics(x), AwqOptions(rows=0))
    with pytest.raises(FormatError, match="awq:iq2_s: iq2_s can be decoded but not encoded"):
        awq(weights, [get_format("iq2_s")] * 2, statistics(x))
