"""The ops besides `linear`, native against reference.py: every instruction set of this CPU, ragged sizes, 1 to 3 threads.

The reference sums in float64 and rounds once. Natively a sum of d terms over 16 lanes is rounded about d / 16 + 4 times, and
exp and tanh have relative errors of a few 2^-23.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tersor import _native, ops
from tersor.formats import get_format
from tersor.ops import reference

EPS = 2.0**-23
LENGTHS = (*range(1, 34), 64, 576, 1000)


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU in turn."""
    _native.force_isa(request.param)
    yield request.param
    _native.force_isa("")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = _native.threads()
    _native.set_threads(2)
    yield
    _native.set_threads(before)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Random float32 values that start four bytes after any alignment."""
    values = np.random.default_rng(seed).standard_normal((int(np.prod(shape)) + 1,)).astype(np.float32)
    return values[1:].reshape(shape)


def same_for_any_threads(f: Callable[[], np.ndarray]) -> np.ndarray:
    """f's result, after checking that 1, 2 and 3 threads give the same bits."""
    results = []
    for threads in (1, 2, 3):
        _native.set_threads(threads)
        results.append(f())
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    return results[0]


def changed(f: Callable[[np.ndarray], None], x: np.ndarray) -> np.ndarray:
    """A copy of x after the in-place op f."""
    y = np.empty(x.size + 1, np.float32)[1:].reshape(x.shape)
    y[...] = x
    f(y)
    return y


def test_rms_norm(isa: str) -> None:
    for d in LENGTHS:
        x, weight = normal(d, 2, 3, d), normal(d + 1, d)
        got = ops.rms_norm(x, weight, 1e-5)
        np.testing.assert_allclose(got, reference.rms_norm(x, weight, 1e-5), rtol=(d / 16 + 6) * EPS)
    x, weight = normal(1, 300, 200), normal(2, 200)
    got = same_for_any_threads(lambda: ops.rms_norm(x, weight, 1e-6))
    np.testing.assert_allclose(got, reference.rms_norm(x, weight, 1e-6), rtol=20 * EPS)


def test_rms_norm_of_zeros(isa: str) -> None:
    assert not ops.rms_norm(np.zeros((1, 40), np.float32), np.ones(40, np.float32), 1e-6).any()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(activation: str, isa: str) -> None:
    for f in LENGTHS:
        x = normal(f, 3, 2 * f) * np.float32(4)
        np.testing.assert_allclose(ops.gated(x, activation), reference.gated(x, activation), rtol=64 * EPS, atol=1e-14)
    x = normal(9, 40, 2 * 900)
    got = same_for_any_threads(lambda: ops.gated(x, activation))
    np.testing.assert_allclose(got, reference.gated(x, activation), rtol=64 * EPS, atol=1e-14)


def test_exp_over_all_magnitudes(isa: str) -> None:
    """silu(-x) / -x = 1 / (1 + e^x): for x > 20 its relative error is that of exp, but for two roundings."""
    x = np.linspace(20, 87.2, 20000).astype(np.float32)
    ones = np.ones_like(x)
    got = ops.gated(np.concatenate([-x, ones])[None], "silu")[0]
    wide = x.astype(np.float64)
    error = np.abs(got / (-wide / (1 + np.exp(wide))) - 1).max()
    assert error < 2e-7 + 1.5 * EPS, error
    # the far ends: e^-x overflows to its bound, and is 0 below -87.3
    ends = np.array([[-1000, -89, 88, 1000, 1, 1, 1, 1]], np.float32)
    np.testing.assert_allclose(ops.gated(ends, "silu"), [[0, 0, 88, 1000]], rtol=EPS, atol=1e-34)


def test_nan_stays_nan(isa: str) -> None:
    x = np.full((1, 40), np.nan, np.float32)
    assert np.isnan(ops.gated(x, "silu")).all() and np.isnan(ops.gated(x, "gelu_tanh")).all()
    assert np.isnan(ops.rms_norm(x, np.ones(40, np.float32), 1e-5)).all()
    ops.softcap(x, 3.0)
    assert np.isnan(x).all()


def test_add(isa: str) -> None:
    for n in LENGTHS:
        x, y = normal(n, 1, n), normal(n + 1, 1, n)
        np.testing.assert_array_equal(changed(lambda z, y=y: ops.add(z, y), x), x + y)
    x, y = normal(1, 300, 177), normal(2, 300, 177)
    np.testing.assert_array_equal(same_for_any_threads(lambda: changed(lambda z: ops.add(z, y), x)), x + y)


def test_softcap(isa: str) -> None:
    for n in LENGTHS:
        x = normal(n, 2, n) * np.float32(20)
        x[0, 0] = 0
        want = changed(lambda z: reference.softcap(z, 15.0), x)
        np.testing.assert_allclose(changed(lambda z: ops.softcap(z, 15.0), x), want, rtol=8 * EPS)
    x = np.array([[-3e38, 3e38, 1e-30, -1e-6]], np.float32)
    np.testing.assert_allclose(changed(lambda z: ops.softcap(z, 2.0), x), [[-2, 2, 1e-30, -1e-6]], rtol=8 * EPS)
    big = normal(3, 200, 333)
    same_for_any_threads(lambda: changed(lambda z: ops.softcap(z, 1.0), big))


def test_rope(isa: str) -> None:
    for head_dim in (2, 6, 16, 30, 32, 34, 64, 80, 128):
        inv_freq = (10000.0 ** -(np.arange(head_dim // 2) * 2 / head_dim)).astype(np.float32)
        for start, n in ((0, 1), (1, 3), (4000, 2)):
            x = normal(head_dim, n, 3, head_dim)
            want = changed(lambda z, s=start, f=inv_freq: reference.rope(z, s, f, 1.25), x)
            got = changed(lambda z, s=start, f=inv_freq: ops.rope(z, s, f, 1.25), x)
            np.testing.assert_allclose(got, want, rtol=0, atol=4 * EPS * 1.25 * np.abs(x).max())
    x = normal(5, 300, 4, 64)
    same_for_any_threads(lambda: changed(lambda z: ops.rope(z, 7, normal(6, 32)), x))


def test_rope_forgets_nothing(isa: str) -> None:
    """The angles are kept between calls: any change of position, frequency, scale or length must be seen."""
    frequencies = [np.full(4, f, np.float32) for f in (0.5, 0.25)]
    for start, which, scale, n in ((3, 0, 1.0, 1), (3, 1, 1.0, 1), (3, 1, 2.0, 1), (4, 1, 2.0, 1), (4, 1, 2.0, 2), (3, 0, 1.0, 1)):
        x = normal(1, n, 1, 8)
        want = changed(lambda z, a=start, b=which, c=scale: reference.rope(z, a, frequencies[b], c), x)
        got = changed(lambda z, a=start, b=which, c=scale: ops.rope(z, a, frequencies[b], c), x)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


# Scores up to 10 with relative errors of some EPS become errors of the weights; outputs are about 1. Beside an int8 cache
# queries are int16: steps of 3.5 / 32767, with sigma 3.5 / 32767 / sqrt(12) = 3e-5, times sqrt(80) keys of about 1 and the
# scale 0.3 give a score sigma 8e-5; six of them. Weights of int16 add less. In an int4 cache they meet differences of keys.
ATTENTION_ERROR = {"f16": 1e-5, "f32": 1e-5, "int8": 5e-4, "int4": 1e-3}
# Matrix tiles leave out 2^-15 of the sum of a score's magnitudes, at most 80 * 0.64 * 0.3 on average: 5e-4, as above.
TILE_ERROR = 5e-4
DTYPES = tuple(ATTENTION_ERROR)


def tiles(isa: str, dtype: str, n: int) -> bool:
    """Whether n queries are multiplied by matrix tiles."""
    return isa == "amx" and dtype == "f16" and n > 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1), (70, 1)])
def test_attention(heads: tuple[int, int], dtype: str, isa: str) -> None:
    """A cache filled in uneven steps, then rolled back, seen by batches of queries, with caps and windows."""
    h, kv = heads
    for head_dim in (2, 24, 64, 80) if isa != "scalar" and h < 70 else (24,):
        caches = [module.KVCache(2, kv, head_dim, 700, dtype) for module in (ops, reference)]
        assert caches[0].nbytes >= caches[1].nbytes
        for step, n in enumerate((5, 40, 1, 1, 560, 9, 1)):
            q, k, v = normal(step, n, h, head_dim), normal(step + 50, n, kv, head_dim), normal(step + 90, n, kv, head_dim)
            for cache in caches:
                cache.append(0, v, k)
                cache.append(1, k, v)
            for cap, window in ((0.0, 0), (2.0, 0), (0.0, 13), (5.0, 530)) if n < 100 else ():
                want = reference.attention(q, caches[1], 1, 0.3, cap, window)
                got = ops.attention(q, caches[0], 1, 0.3, cap, window)
                np.testing.assert_allclose(got, want, rtol=0, atol=TILE_ERROR if tiles(isa, dtype, n) else ATTENTION_ERROR[dtype])
            for cache in caches:
                cache.advance(n)
                if n == 40:
                    cache.truncate(cache.length - 3)
            assert caches[0].length == caches[1].length


def test_attention_threads_and_views(isa: str) -> None:
    """Same bits for 1 to 3 threads, and for q, k, v that are views of one product, as for copies of them."""
    joined = normal(1, 70, 6 + 2 + 2, 32)
    q, k, v = joined[:, :6], joined[:, 6:8], joined[:, 8:]
    outputs = []
    for copy in (lambda x: x, np.ascontiguousarray):
        cache = ops.KVCache(1, 2, 32, 700)
        for _ in range(9):
            cache.append(0, copy(k), copy(v))
            cache.advance(70)
        cache.truncate(615)
        for rows in (1, 70):
            cache.append(0, copy(k[:rows]), copy(v[:rows]))
            outputs.append(same_for_any_threads(lambda c=cache, n=rows, f=copy: ops.attention(f(q[:n]), c, 0, 0.2)))
        rotated = changed(lambda x: ops.rope(x[:, :6], 3, normal(2, 16)), joined)
        whole = changed(lambda x: ops.rope(x, 3, normal(2, 16)), joined)
        np.testing.assert_array_equal(rotated[:, :6], whole[:, :6])
        np.testing.assert_array_equal(rotated[:, 6:], joined[:, 6:])
    np.testing.assert_array_equal(outputs[0], outputs[2])
    np.testing.assert_array_equal(outputs[1], outputs[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 130, 400])
def test_a_row_of_attention_is_the_same_in_any_company(window: int, dtype: str, isa: str) -> None:
    """Queries one by one, all together, and each with its own cache in a batch give the same bits; with matrix tiles all
    together have bits of their own, whatever their number."""
    h, kv, d, n, start = 6, 2, 24, 45, 1010
    q, k, v = normal(1, n, h, d), normal(2, start + n, kv, d), normal(3, start + n, kv, d)
    together = ops.KVCache(2, kv, d, start + n, dtype)
    together.append(1, k, v)
    together.advance(start)
    want = same_for_any_threads(lambda: ops.attention(q, together, 1, 0.4, 5.0, window))
    batch = []
    for i in range(n):
        cache = ops.KVCache(2, kv, d, start + i + 1, dtype)
        cache.append(1, k[: start + i], v[: start + i])
        cache.advance(start + i)
        batch.append(cache)
    ops.append_batch(batch, 1, k[start:], v[start:])
    if tiles(isa, dtype, n):
        np.testing.assert_array_equal(ops.attention(q[:20], together, 1, 0.4, 5.0, window), want[:20])
        alone = np.concatenate([ops.attention(q[i : i + 1], batch[i], 1, 0.4, 5.0, window) for i in range(n)])
        np.testing.assert_allclose(alone, want, rtol=0, atol=TILE_ERROR)
        want = alone
    np.testing.assert_array_equal(ops.attention(q[:13], together, 1, 0.4, 5.0, window), want[:13])
    for i in range(n):
        np.testing.assert_array_equal(ops.attention(q[i : i + 1], batch[i], 1, 0.4, 5.0, window)[0], want[i])
    np.testing.assert_array_equal(same_for_any_threads(lambda: ops.attention_batch(q, batch, 1, 0.4, 5.0, window)), want)
    slow = [reference.KVCache(2, kv, d, start + i + 1, dtype) for i in (0, n - 1)]
    for i, cache in zip((0, n - 1), slow):
        cache.append(1, k[: start + i], v[: start + i])
        cache.advance(start + i)
    reference.append_batch(slow, 1, k[[start, -1]], v[[start, -1]])
    oracle = reference.attention_batch(q[[0, -1]], slow, 1, 0.4, 5.0, window)
    np.testing.assert_allclose(want[[0, -1]], oracle, rtol=0, atol=ATTENTION_ERROR[dtype])


def test_rope_batch(isa: str) -> None:
    positions, inv_freq = np.array([7, 0, 4000, 7], np.int32), normal(4, 16)
    x = normal(5, 4, 3, 32)
    got = same_for_any_threads(lambda: changed(lambda y: ops.rope_batch(y, positions, inv_freq, 1.5), x))
    for i, position in enumerate(positions.tolist()):
        want = changed(lambda y, p=position: ops.rope(y, p, inv_freq, 1.5), x[i : i + 1])
        np.testing.assert_array_equal(got[i], want[0])
    want = changed(lambda y: reference.rope_batch(y, positions, inv_freq, 1.5), x)
    np.testing.assert_allclose(got, want, rtol=0, atol=4 * EPS * 1.5 * np.abs(x).max())


def test_an_int8_cache_bears_keys_with_a_large_channel(isa: str) -> None:
    """One channel of 40 among others of 1: rounded as they are, keys would be off by 0.039 here; rotated, by 0.010."""
    k, v, q = normal(1, 199, 1, 64), normal(2, 199, 1, 64), normal(3, 7, 1, 64)
    k[..., 5] += 40
    outputs = []
    for dtype in ("int8", "f32"):
        cache = ops.KVCache(1, 1, 64, 199, dtype)
        cache.append(0, k, v)
        cache.advance(192)
        outputs.append(ops.attention(q, cache, 0, 0.3))
    assert np.sqrt(np.mean((outputs[0] - outputs[1]) ** 2)) < 0.02


def test_attention_extreme_scores(isa: str) -> None:
    """One key takes all the weight, whichever block it is in; scores of +-1e4 do not overflow."""
    cache = ops.KVCache(1, 1, 16, 300, "f32")
    k, v = normal(1, 299, 1, 16), normal(2, 299, 1, 16)
    for winner in (0, 63, 64, 200, 298):
        keys = k.copy()
        keys[winner] = 100
        cache.append(0, keys, v)
        cache.advance(298)
        got = ops.attention(np.full((1, 1, 16), 10, np.float32), cache, 0, 1.0)
        np.testing.assert_allclose(got[0], v[winner, 0], rtol=1e-6)
        cache.truncate(0)


def test_logits(isa: str) -> None:
    rng = np.random.default_rng(3)
    for vocab in (1, 2, 15, 16, 17, 33, 1003):
        p = normal(vocab, 7, vocab) * np.float32(5)
        targets = rng.integers(0, vocab, 7).astype(np.int32)
        np.testing.assert_allclose(ops.nll(p, targets), reference.nll(p, targets), rtol=0, atol=1e-6)
        for noise in (0, 1e-3, 1.0):
            q = (p + np.float32(noise) * normal(vocab + 1, 7, vocab)).astype(np.float32)
            got, want = ops.compare_logits(p, q, targets), reference.compare_logits(p, q, targets)
            np.testing.assert_allclose(got[:, [0, 1, 4]], want[:, [0, 1, 4]], rtol=0, atol=1e-6)
            # terms are positive and of second order, so only the rounding of differences of logits up to 20 is seen
            np.testing.assert_allclose(got[:, 2], want[:, 2], rtol=1e-4, atol=1e-13)
            assert (got[:, 2] >= 0).all()
            np.testing.assert_array_equal(got[:, 3], want[:, 3])
    same_for_any_threads(lambda: ops.compare_logits(p, q, targets))
    same_for_any_threads(lambda: ops.nll(p, targets))


def test_ties_go_to_the_first() -> None:
    p, q = np.zeros((1, 40), np.float32), np.zeros((1, 40), np.float32)
    p[0, [3, 30]], q[0, [3, 20]] = 1, 1
    assert ops.compare_logits(p, q, np.zeros(1, np.int32))[0, 3] == 1
    q[0, 2] = 1
    assert ops.compare_logits(p, q, np.zeros(1, np.int32))[0, 3] == 0


CACHE = ops.KVCache(2, 2, 8, 10)
ZEROS = np.zeros((3, 2, 8), np.float32)


def full_cache() -> ops.KVCache:
    cache = ops.KVCache(2, 2, 8, 10)
    cache.advance(10)
    return cache


BAD = {
    "rms_norm: last axis of x: got 3, need 4": lambda: ops.rms_norm(np.zeros((2, 3), np.float32), np.zeros(4, np.float32), 1e-5),
    "gated: columns of x: got 5, need 4": lambda: ops.gated(np.zeros((2, 5), np.float32), "silu"),
    "gated_linear: rows of the weight: got 7, need 6": lambda: ops.gated_linear(
        np.zeros((2, 4), np.float32), ops.pack([get_format("f32").quantize(np.zeros((7, 4), np.float32))]), "silu"
    ),
    "gated: activation 'relu', need silu or gelu_tanh": lambda: ops.gated(np.zeros((2, 4), np.float32), "relu"),
    "add: values of y: got 2, need 3": lambda: ops.add(np.zeros(3, np.float32), np.zeros(2, np.float32)),
    "softcap: cap must be positive": lambda: ops.softcap(np.zeros(3, np.float32), 0.0),
    "rope: head_dim: got 8, need 6": lambda: ops.rope(ZEROS.copy(), 0, np.zeros(3, np.float32)),
    "rope: heads of a row are not contiguous": lambda: ops.rope(np.zeros((3, 8, 4), np.float32)[:, ::2], 0, np.zeros(2, np.float32)),
    "KVCache: layers, kv_heads, head_dim and capacity must be positive": lambda: ops.KVCache(1, 1, 8, 0),
    "KVCache: head_dim 513, need at most 512": lambda: ops.KVCache(1, 1, 513, 8),
    "KVCache: dtype 'q8_0', need f16, f32, int8 or int4": lambda: ops.KVCache(1, 1, 8, 8, "q8_0"),
    "layer 2, need 0 to 1": lambda: CACHE.append(2, ZEROS, ZEROS),
    "append: k: heads: got 1, need 2": lambda: CACHE.append(0, ZEROS[:, :1], ZEROS),
    "append: v: head_dim: got 4, need 8": lambda: CACHE.append(0, ZEROS, np.zeros((3, 2, 4), np.float32)),
    "append: rows of v: got 2, need 3": lambda: CACHE.append(0, ZEROS, ZEROS[:2]),
    "append: position 11, the cache holds 10": lambda: CACHE.append(0, np.zeros((11, 2, 8), np.float32), np.zeros((11, 2, 8), np.float32)),
    "advance: position 11, the cache holds 10": lambda: CACHE.advance(11),
    "truncate: 1, need 0 to 0": lambda: CACHE.truncate(1),
    "attention: 3 heads, need a multiple of 2": lambda: ops.attention(np.zeros((1, 3, 8), np.float32), CACHE, 0, 1.0),
    "attention: position 11, the cache holds 10": lambda: ops.attention(np.zeros((11, 2, 8), np.float32), CACHE, 0, 1.0),
    "rope: start -1, need 0 to 2^31": lambda: ops.rope(ZEROS.copy(), -1, np.zeros(4, np.float32)),
    "rope_batch: positions: got 2, need 3": lambda: ops.rope_batch(ZEROS.copy(), np.zeros(2, np.int32), np.zeros(4, np.float32)),
    "attention_batch: no caches": lambda: ops.attention_batch(ZEROS[:0], [], 0, 1.0),
    "attention_batch: rows: got 3, need 2": lambda: ops.attention_batch(ZEROS, [CACHE, CACHE], 0, 1.0),
    "attention_batch: caches of different models": lambda: ops.attention_batch(ZEROS[:2], [CACHE, ops.KVCache(2, 1, 8, 4)], 0, 1.0),
    "append_batch: a cache is given twice": lambda: ops.append_batch([CACHE, CACHE], 0, ZEROS[:2], ZEROS[:2]),
    "append_batch: position 11, the cache holds 10": lambda: ops.append_batch([full_cache()], 0, ZEROS[:1], ZEROS[:1]),
    "nll: targets: got 1, need 2": lambda: ops.nll(np.zeros((2, 5), np.float32), np.zeros(1, np.int32)),
    "nll: target 5, need 0 to 4": lambda: ops.nll(np.zeros((1, 5), np.float32), np.array([5], np.int32)),
    "compare_logits: columns of q: got 4, need 5": lambda: ops.compare_logits(
        np.zeros((1, 5), np.float32), np.zeros((1, 4), np.float32), np.zeros(1, np.int32)
    ),
}


@pytest.mark.parametrize("text", BAD)
def test_bad_arguments(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        BAD[text]()
    assert str(caught.value) == text
