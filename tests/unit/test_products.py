"""Products of float32 matrices, whatever the CPU multiplies them by, beside numpy's in float64."""

from __future__ import annotations

import numpy as np
import pytest

from tersor import _native
from tersor.products import product, write_product
from tersor.tensor import Array


def check(result: Array, a: Array, b: Array) -> None:
    """Compares with a b, within the roundings of sums of six products a term (native/methods/product.h)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    assert result.dtype == np.float32
    bound = (6 * a.shape[1] + 8) * 2.0**-24
    assert (np.abs(result - a @ b) <= bound * (np.abs(a) @ np.abs(b))).all()


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (17, 33, 65), (70, 20, 600), (3, 5, 0)])
@pytest.mark.parametrize("laid", ["rows", "columns", "parts of rows", "neither"])
def test_product_for_any_layout_of_the_left_factor(m: int, n: int, k: int, laid: str) -> None:
    rng = np.random.default_rng(0)
    b = rng.standard_normal((k, n)).astype(np.float32)
    a = {
        "rows": rng.standard_normal((m, k)).astype(np.float32),
        "columns": rng.standard_normal((k, m)).astype(np.float32).T,
        "parts of rows": rng.standard_normal((m, k + 5)).astype(np.float32)[:, 2 : k + 2],
        "neither": rng.standard_normal((2 * m, 2 * k)).astype(np.float32)[::2, ::2],
    }[laid]
    check(product(a, b), a, b)


def test_product_into_a_part_of_an_array_leaves_the_rest() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((30, 40)).astype(np.float32), rng.standard_normal((40, 50)).astype(np.float32)
    whole = np.full((30, 100), 7, np.float32)
    write_product(a, b, whole[:, 20:70])
    check(whole[:, 20:70], a, b)
    assert (whole[:, :20] == 7).all()
    assert (whole[:, 70:] == 7).all()


@pytest.mark.skipif(not _native.multiplies_by_tiles(), reason="this CPU has no tiles")
def test_the_tiles_refuse_what_they_cannot_read() -> None:
    a, b, out = np.zeros((4, 6), np.float32), np.zeros((6, 3), np.float32), np.zeros((4, 3), np.float32)
    for wrong in ((a[::2, ::2], b[:3], out[:2]), (a, b.T, out), (a, b[:5], out), (a, b, out[:3])):
        with pytest.raises(ValueError, match="need"):
            _native.multiply(*wrong)
