"""smoothquant against slow loops over the samples."""

from __future__ import annotations

import numpy as np
import pytest
from tests.oracles import scale_loops
from tests.unit.test_awq import draw, statistics

from tersor.errors import RecipeError
from tersor.formats import get_format
from tersor.methods.smoothquant import SmoothQuantOptions, smoothquant

FORMATS = [get_format("int8_row")] * 2


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_factors_are_those_of_the_loops(alpha, shared):
    x, weights = draw()
    x[:, 7] = 0
    weights = [w * (np.arange(64) != 9).astype(np.float32) for w in weights]
    sources = np.arange(64) // 32 * 16 + np.arange(64) % 16 if shared else np.arange(64)
    got = smoothquant(weights, FORMATS, statistics(x), SmoothQuantOptions(alpha), sources if shared else None)
    want = scale_loops.smooth_factors(x.tolist(), [w.tolist() for w in weights], sources.tolist(), alpha)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_half_makes_inputs_and_weights_equal():
    x, weights = draw()
    s = smoothquant(weights, FORMATS, statistics(x))
    largest = np.max([np.abs(w * s).max(axis=0) for w in weights], axis=0)
    np.testing.assert_allclose(np.abs(x / s).max(axis=0), largest, rtol=1e-5)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_out_of_range(alpha):
    x, weights = draw()
    with pytest.raises(RecipeError, match=r"smoothquant: alpha is .*; need a number in 0\.\.1"):
        smoothquant(weights, FORMATS, statistics(x), SmoothQuantOptions(alpha))
