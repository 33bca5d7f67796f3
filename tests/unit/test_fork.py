"""Forked caches: attention reads what is shared where it lies, to the same bits, and nothing shared can be lost."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from tersor import ops
from tersor.tensor import Array

HEADS, KV_HEADS, DIM = 4, 2, 24
TYPES = ("f32", "f16", "int8")


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def append(cache: ops.KVCache, seed: int, n: int) -> None:
    """Appends n random positions, the same ones for the same seed."""
    ops.append(cache, 0, normal(seed, n, KV_HEADS, DIM), normal(seed + 1000, n, KV_HEADS, DIM))
    cache.advance(n)


def filled(dtype: str, *parts: tuple[int, int], capacity: int = 1300) -> ops.KVCache:
    """Returns a cache that holds these (seed, n)."""
    cache = ops.KVCache(1, KV_HEADS, DIM, capacity, dtype)
    for seed, n in parts:
        append(cache, seed, n)
    return cache


def attended(cache: ops.KVCache, rows: int, window: int = 0) -> Array:
    """Returns what the last rows attend to."""
    cache.truncate(cache.length - rows)
    out = ops.attention(normal(7, rows, HEADS, DIM), cache, 0, 0.2, 0.0, window)
    cache.advance(rows)
    return out


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shared", [0, 64, 448, 512, 576, 640])
@pytest.mark.parametrize("window", [0, 30, 600])
def test_attention_gives_the_bits_of_a_cache_of_its_own(dtype: str, shared: int, window: int) -> None:
    origin = filled(dtype, (1, 700))
    fork, whole = origin.fork(shared), filled(dtype, (1, 700))
    whole.truncate(shared)
    for n in (1, 3, 40, 600):
        for cache in (fork, whole):
            append(cache, n, n)
        for rows in {1, min(n, 20)}:
            np.testing.assert_array_equal(attended(fork, rows, window), attended(whole, rows, window))
    np.testing.assert_array_equal(attended(origin, 5), attended(filled(dtype, (1, 700)), 5))


def test_forks_of_forks() -> None:
    root = filled("f16", (1, 200))
    middle = root.fork(128)
    append(middle, 2, 200)
    leaf = middle.fork(256)
    append(leaf, 3, 50)
    whole = filled("f16", (1, 200))
    whole.truncate(128)
    append(whole, 2, 200)
    whole.truncate(256)
    append(whole, 3, 50)
    del root, middle
    gc.collect()
    others = [filled("f16", (9, 300)) for _ in range(20)]  # would land in freed memory
    np.testing.assert_array_equal(attended(leaf, 20), attended(whole, 20))
    assert len(others) == 20 and leaf.length == 306 and leaf.capacity == 1300


def test_what_is_shared_stays() -> None:
    origin = filled("f16", (1, 200))
    fork = origin.fork(128)
    assert (fork.length, origin.length) == (128, 200)
    for cache in (origin, fork):
        with pytest.raises(ValueError, match=r"truncate: 127, need 128 to \d+"):
            cache.truncate(127)
        cache.truncate(128)


@pytest.mark.parametrize("n", [-64, 1, 63, 65, 256])
def test_positions_that_cannot_be_shared(n: int) -> None:
    with pytest.raises(ValueError, match=f"fork: {n}, need a multiple of 64 up to 200"):
        filled("f16", (1, 200)).fork(n)
