"""The statistics of inputs beside sums from their definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tersor import _native
from tersor.calibration.statistics import PANEL, StatisticsBuilder, check_statistics
from tersor.errors import ModelError
from tersor.tensor import Array


@pytest.mark.parametrize("columns", [1, 70, PANEL, 2 * PANEL + 33])
def test_sums_are_those_of_the_definition(columns: int) -> None:
    rng = np.random.default_rng(columns)
    batches = [rng.standard_normal((n, columns)).astype(np.float32) * 3 for n in (1, 130, 65)]
    builder, others = StatisticsBuilder(columns, gram=True, cross=True), [x + 1 for x in batches]
    for x, y in zip(batches, others):
        builder.add(x, y)
    found = builder.result()
    x, y = (np.concatenate(parts).astype(np.float64) for parts in (batches, others))
    assert found.tokens == len(x)
    for got, want in (
        (found.gram, x.T @ x / len(x)),
        (found.cross, y.T @ x / len(x)),
        (found.mean_square, (x * x).mean(axis=0)),
        (found.mean_abs, np.abs(x).mean(axis=0)),
    ):
        assert got is not None
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.absmax, np.abs(x).max(axis=0).astype(np.float32))


def test_nan_and_infinity_reach_their_columns_and_no_others() -> None:
    x = np.ones((200, 5), np.float32)
    x[3, 1], x[199, 2], x[100, 4] = np.nan, -np.inf, np.nan
    builder = StatisticsBuilder(5)
    builder.add(x)
    found = builder.result()
    np.testing.assert_array_equal(found.absmax, np.array([1, np.nan, np.inf, 1, np.nan], np.float32))
    np.testing.assert_array_equal(np.isfinite(found.mean_square), [True, False, False, True, False])
    with pytest.raises(ModelError, match="layer: an input is nan in column 1"):
        check_statistics(found, "layer", rounded=True)


def test_column_sums_refuse_what_does_not_fit() -> None:
    x, sums, largest = np.ones((2, 3), np.float32), np.zeros(3), np.zeros(3, np.float32)
    for wrong in ((np.zeros(2), sums, largest), (sums, np.zeros(4), largest), (sums, sums, largest[:2])):
        with pytest.raises(ValueError, match="one value per column"):
            _native.column_sums(x, *wrong)


@pytest.mark.parametrize("function", [_native.add_gram, _native.gram_product])
def test_gram_matrices_refuse_what_does_not_fit_and_a_cpu_without_tiles(function: Callable[[Array, Array], float | None]) -> None:
    x = np.ones((2, 3), np.float32)
    for shape in ((3, 4), (4, 3), (2, 2)):
        with pytest.raises(ValueError, match="need \\(columns, columns\\)" if _native.multiplies_by_tiles() else "has no tiles"):
            function(x, np.zeros(shape))
    _native.force_isa("scalar")
    try:
        with pytest.raises(ValueError, match="has no tiles"):
            function(x, np.zeros((3, 3)))
    finally:
        _native.force_isa("")


@pytest.mark.parametrize("columns", [1, 15, 16, 67])
def test_row_products(columns: int) -> None:
    x, y = np.random.default_rng(columns).standard_normal((2, 130, columns)).astype(np.float32)
    everywhere = []
    for isa in ("scalar", ""):
        _native.force_isa(isa)
        everywhere.append(np.empty(130))
        _native.row_products(x, y, everywhere[-1])
    np.testing.assert_allclose(everywhere[0], (x.astype(np.float64) * y).sum(axis=1), rtol=0, atol=1e-14 * columns)
    np.testing.assert_array_equal(everywhere[0], everywhere[1])


def test_row_products_refuse_what_does_not_fit() -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="need the shape of x"):
        _native.row_products(x, x[:1], np.empty(2))
    with pytest.raises(ValueError, match="one value per row"):
        _native.row_products(x, x, np.empty(3))


def test_a_token_that_counts_three_times_is_three_tokens() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 50, 70)).astype(np.float32)
    counts = rng.integers(0, 4, 50)
    weighed, repeated = (StatisticsBuilder(70, gram=True, cross=True) for _ in range(2))
    weighed.add(x, y, counts.astype(np.float32) * 50 / counts.sum())
    repeated.add(np.repeat(x, counts, axis=0), np.repeat(y, counts, axis=0))
    found, wanted = weighed.result(), repeated.result()
    np.testing.assert_allclose(found.gram, wanted.gram, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.cross, wanted.cross, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.mean_square, (x * x).mean(axis=0), rtol=1e-5)
