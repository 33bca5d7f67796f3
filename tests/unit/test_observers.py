"""Observers of activations: thresholds against slow loops and the values themselves, bounded memory, refusals."""

import numpy as np
import pytest

from oracles.entropy_loops import threshold_in_bins
from tersor.calibration.observers import BINS, ENTROPY_BINS, OBSERVERS, MagnitudeHistogram
from tersor.errors import ModelError, RecipeError


def inputs(n: int = 20000, seed: int = 0) -> np.ndarray:
    """Mostly normal values, and a few far out."""
    x = np.random.default_rng(seed).standard_normal(n).astype(np.float32)
    x[:: n // 10] *= 12
    return x


def counted(*parts: np.ndarray) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram("layer")
    for part in parts:
        histogram.add(part)
    return histogram


def test_counts_do_not_depend_on_the_pieces() -> None:
    x = inputs() * np.float32(3)
    whole = counted(x)
    pieces = counted(*np.split(np.sort(np.abs(x)).reshape(100, -1), 20))  # the range grows again and again
    np.testing.assert_array_equal(whole.counts, pieces.counts)
    assert (whole.limit, whole.largest) == (pieces.limit, pieces.largest) and len(whole.counts) == BINS
    assert whole.counts.sum() == x.size and whole.limit / 2 <= whole.largest < whole.limit
    exact, _ = np.histogram(np.abs(x).astype(np.float64), bins=BINS, range=(0, whole.limit))
    np.testing.assert_array_equal(whole.counts, exact)


def test_zeros_come_before_the_rest() -> None:
    histogram = counted(np.zeros(5, np.float32), np.array([1e-35, 0.75], np.float32), np.zeros((0, 3), np.float32))
    assert histogram.counts[0] == 6 and histogram.counts.sum() == 7 and histogram.limit == 1


def test_minmax() -> None:
    x = inputs()
    assert counted(x).scale("minmax") == pytest.approx(float(np.abs(x).max()) / 127, rel=1e-7)


@pytest.mark.parametrize("percentile", [50, 99, 99.9, 100])
def test_percentile(percentile: float) -> None:
    x = inputs()
    histogram = counted(x)
    exact = np.quantile(np.abs(x), percentile / 100, method="inverted_cdf")
    assert 0 <= histogram.scale("percentile", percentile) * 127 - exact * (1 - 1e-6) <= histogram.limit / BINS


def test_mse_is_the_least_error_of_the_values_themselves() -> None:
    x = inputs(4000)
    x[:10] = 40
    largest = float(np.abs(x).max())
    errors = {}
    for step in range(1, 257):
        t = largest * step / 256
        errors[t] = sum((min(round(abs(float(v)) / (t / 127)), 127) * (t / 127) - abs(float(v))) ** 2 for v in x)
    found = counted(x).scale("mse") * 127
    assert errors[min(errors, key=lambda t: abs(t - found))] <= 1.002 * min(errors.values())
    assert largest / 127 / 4 < found / 127 <= largest / 127


def test_entropy_against_the_slow_loops() -> None:
    x = np.abs(inputs(3000))
    x = x[x < 4.8]  # 600 of the 2,048 bins over [0, 16.4), so that the loops end
    small = np.histogram(x, bins=600, range=(0, 4.8))[0]
    histogram = MagnitudeHistogram("layer")
    histogram.limit, histogram.largest = 4.8 * ENTROPY_BINS / 600, 4.8
    histogram.counts[:1200:2] = small  # bins are joined by two
    want = threshold_in_bins(small.astype(float).tolist()) * 4.8 / 600
    assert histogram.scale("entropy") * 127 == pytest.approx(min(want, 4.8), rel=1e-12) and want < 4.75


def test_entropy_cuts_far_outliers_and_keeps_what_is_even() -> None:
    x = inputs(200_000)
    x[0] = 300
    assert counted(x).scale("entropy") * 127 < 100
    even = np.random.default_rng(1).uniform(-1, 1, 200_000).astype(np.float32)
    assert counted(even).scale("entropy") * 127 > 0.95


@pytest.mark.parametrize("observer", OBSERVERS)
def test_no_observer_exceeds_the_largest(observer: str) -> None:
    for x in (inputs(), np.array([0.3], np.float32), np.full(7, -2.0, np.float32)):
        scale = counted(x).scale(observer)
        assert 0 < scale <= float(np.abs(x).max()) / 127


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_inputs_name_the_layer(bad: float) -> None:
    with pytest.raises(ModelError, match=r"layers\.3\.mlp: an input is NaN or infinite"):
        MagnitudeHistogram("layers.3.mlp").add(np.array([1, bad], np.float32))


def test_refusals() -> None:
    with pytest.raises(ModelError, match="layer: no input but zeros in the calibration text"):
        counted(np.zeros(9, np.float32)).scale("minmax")
    with pytest.raises(RecipeError, match="unknown observer 'max'; known: entropy, minmax, mse, percentile"):
        counted(inputs()).scale("max")
    for percentile in (0, 101):
        with pytest.raises(RecipeError, match=r"percentile \d+; need more than 0"):
            counted(inputs()).scale("percentile", percentile)
