"""Recorded ops: a replay does what the ops did, to what is in the arrays now and at the cache's position; misfits are refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tersor import ops
from tersor.formats import get_format
from tersor.ops.program import Program, Recorder
from tersor.tensor import Array, QuantizedTensor

HEADS, KV_HEADS, DIM = 4, 2, 16
RNG = np.random.default_rng(3)
ANY = np.full(16, -1, np.int32)  # tokens of programs that do not embed


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape, dtype=np.float32)


def weight(rows: int, columns: int) -> ops.Weight:
    w = normal(rows, columns)
    return ops.pack([QuantizedTensor("f32", w.shape, {"values": w})], normal(rows), "float")


QKV, OUT, GATE, NORM = weight((HEADS + 2 * KV_HEADS) * DIM, 40), weight(40, HEADS * DIM), weight(64, 40), normal(40)
DOWN, HEAD_NORM, FREQUENCIES = weight(40, 32), normal(DIM), np.geomspace(1, 0.01, DIM // 2).astype(np.float32)


def layer(o: Any, x: Array, cache: ops.KVCache) -> Array:
    """A layer in which every op occurs."""
    heads = o.linear(o.rms_norm(x, NORM, 1e-5), QKV).reshape(len(x), -1, DIM)
    q = o.rms_norm(heads[:, :HEADS], HEAD_NORM, 1e-5)
    o.rope(q, cache.length, FREQUENCIES, 1.2)
    o.rope(heads[:, HEADS : HEADS + KV_HEADS], cache.length, FREQUENCIES)
    o.append(cache, 1, heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :])
    x = o.linear(o.attention(q, cache, 1, 0.3, 20.0, 3), OUT, x)
    o.add(x, o.linear(o.gated(o.linear(x, GATE), "silu"), DOWN))
    return o.linear(o.gated(o.linear(x, GATE), "gelu_tanh"), DOWN, x)


def recorded(rows: int) -> tuple[Program, Array, Array]:
    """Returns the program of `layer`, its input and its output."""
    recorder = Recorder(2, KV_HEADS, DIM, rows)
    x = np.empty((rows, 40), np.float32)
    return recorder.program, x, layer(recorder, x, ops.KVCache(2, KV_HEADS, DIM, 1))


def test_a_replay_equals_the_ops() -> None:
    caches = [ops.KVCache(2, KV_HEADS, DIM, 9) for _ in range(2)]
    program, x, out = recorded(1)
    for _ in range(9):
        x[:] = normal(1, 40)
        want = layer(ops, x.copy(), caches[1])
        program.run(caches[:1], ANY[:1])
        np.testing.assert_array_equal(out, want)
        for cache in caches:
            cache.advance(1)
    with pytest.raises(ValueError, match="run: position 10, the cache holds 9"):
        program.run(caches[:1], ANY[:1])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_rows_that_follow_each_other_equal_the_ops(n: int) -> None:
    caches = [ops.KVCache(2, KV_HEADS, DIM, 20) for _ in range(2)]
    program, x, out = recorded(5)
    for _ in range(4):
        x[:] = np.nan  # rows beyond n are not looked at
        x[:n] = normal(n, 40)
        want = layer(ops, x[:n].copy(), caches[1])
        program.run(caches[:1], ANY[:n])
        np.testing.assert_array_equal(out[:n], want)
        for cache in caches:
            cache.advance(n)


def test_rows_of_several_caches_equal_one_after_the_other() -> None:
    together, alone = ([ops.KVCache(2, KV_HEADS, DIM, 8 + i) for i in range(4)] for _ in range(2))
    program, x, out = recorded(6)
    for i in range(4):  # caches of different lengths
        for pair in (together, alone):
            rows = np.random.default_rng(i).standard_normal((i, 40), dtype=np.float32)
            if i:
                layer(ops, rows, pair[i])
                pair[i].advance(i)
    for chosen in ([0, 1, 2, 3], [3, 1], [2], [0, 2, 3]):
        inputs = normal(len(chosen), 40)
        want = np.concatenate([layer(ops, inputs[row : row + 1].copy(), alone[i]) for row, i in enumerate(chosen)])
        x[: len(chosen)] = inputs
        program.run([together[i] for i in chosen], ANY[: len(chosen)])
        np.testing.assert_array_equal(out[: len(chosen)], want)
        for i in chosen:
            together[i].advance(1)
            alone[i].advance(1)


def test_the_program_keeps_its_arrays() -> None:
    recorder = Recorder(1, KV_HEADS, DIM, 1)
    cache = ops.KVCache(1, KV_HEADS, DIM, 4)
    first = normal(1, 40)
    x, want = first, first.copy()
    for _ in range(20):
        norm, w = normal(40), weight(40, 40)
        want = ops.linear(ops.rms_norm(want, norm, 1e-5), w)
        x = recorder.linear(recorder.rms_norm(x, norm, 1e-5), w)
    others = [np.ones((1, 40), np.float32) for _ in range(100)]  # would land in freed memory
    recorder.program.run([cache], ANY[:1])
    np.testing.assert_array_equal(x, want)
    assert all((o == 1).all() for o in others)


def test_one_array_serves_the_norms_of_rows() -> None:
    recorder = Recorder(1, KV_HEADS, DIM, 1)
    assert np.shares_memory(*(recorder.rms_norm(normal(1, 40), NORM, 1e-5) for _ in range(2)))


def test_two_arrays_serve_results_of_one_shape_in_turns() -> None:
    recorder = Recorder(1, KV_HEADS, DIM, 1)
    results = [recorder.rms_norm(normal(1, 2, 40), NORM, 1e-5) for _ in range(5)]
    assert [any(np.shares_memory(results[i], results[j]) for j in (i - 2, i + 2) if 0 <= j < 5) for i in range(5)] == [True] * 5
    assert not any(np.shares_memory(a, b) for a, b in pairwise(results))
    assert not np.shares_memory(results[0], recorder.rms_norm(normal(1, DIM), HEAD_NORM, 1e-5))


@pytest.mark.parametrize("shape", [(2, KV_HEADS, DIM), (1, 1, DIM), (1, KV_HEADS, 8)])
def test_a_cache_of_another_model_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="run: a cache of another model"):
        Program(1, KV_HEADS, DIM, 1).run([ops.KVCache(*shape, 4)], ANY[:1])


@pytest.mark.parametrize(
    ("which", "n", "message"),
    [
        ([0], 0, "run: 0 rows, need 1 to 4"),
        ([0], 5, "run: 5 rows, need 1 to 4"),
        ([0, 1], 3, "run: 3 rows and 2 caches, need one cache, or as many"),
        ([], 1, "run: 1 rows and 0 caches"),
        ([0, 1, 0], 3, "run: a cache is given twice"),
        ([0], 3, "run: position 3, the cache holds 2"),
    ],
)
def test_runs_that_do_not_fit_are_refused(which: list[int], n: int, message: str) -> None:
    caches = [ops.KVCache(2, KV_HEADS, DIM, 2) for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        Program(2, KV_HEADS, DIM, 4).run([caches[i] for i in which], ANY[:n])


def table(format: str, rows: int, columns: int) -> QuantizedTensor:
    return get_format(format).quantize(normal(rows, columns))


@pytest.mark.parametrize("format", ["f32", "f16", "bf16", "q4_1", "q6_k", "int4_g64"])
def test_tokens_are_embedded(format: str) -> None:
    tensor = table(format, 50, 256)
    recorder = Recorder(1, KV_HEADS, DIM, 4)
    x = np.zeros((4, 256), np.float32)
    assert recorder.embed(tensor, 1.5, x)
    want = ops.embed(tensor, np.array([49, 0, 7], np.int32), 1.5)
    del tensor  # the program keeps its bytes
    recorder.program.run([ops.KVCache(1, KV_HEADS, DIM, 4)], np.array([49, 0, 7], np.int32))
    np.testing.assert_array_equal(x[:3], want)
    assert (x[3] == 0).all()
    for bad in (-1, 50):
        with pytest.raises(ValueError, match=f"run: token {bad}, need 0 to 49"):
            recorder.program.run([ops.KVCache(1, KV_HEADS, DIM, 4)], np.array([3, bad], np.int32))


def test_formats_without_a_native_reader_are_left_to_the_caller() -> None:
    assert not Recorder(1, KV_HEADS, DIM, 4).embed(table("nf4_dq", 50, 256), 1.0, normal(4, 256))


@pytest.mark.parametrize("width", [1, 5, 16, 1023, 1024, 1025, 5000])
def test_the_first_of_the_largest_and_softcap(width: int) -> None:
    recorder = Recorder(1, KV_HEADS, DIM, 3)
    x = np.round(normal(3, width) * 2)  # many are equal
    recorder.softcap(x, 5.0)
    tops = recorder.top(x)
    want = x.copy()
    ops.softcap(want, 5.0)
    recorder.program.run([ops.KVCache(1, KV_HEADS, DIM, 4)], ANY[:3])
    np.testing.assert_array_equal(x, want)
    np.testing.assert_array_equal(tops, want.argmax(axis=1))


Call = Callable[[Program], None]
THREE = normal(1, HEADS, DIM), normal(1, KV_HEADS, DIM), normal(1, KV_HEADS, DIM)
MISFITS: dict[str, tuple[Call, str]] = {
    "embed rows": (lambda p: p.embed(*ops._stored(table("f32", 9, 40)), 1.0, normal(2, 40)), "embed: rows of out: got 2, need 1"),
    "embed columns": (lambda p: p.embed(*ops._stored(table("f32", 9, 40)), 1.0, normal(1, 41)), "embed: columns of out"),
    "softcap": (lambda p: p.softcap(normal(1, 4), 0.0), "softcap: cap must be positive"),
    "softcap rows": (lambda p: p.softcap(normal(2, 4), 1.0), "softcap: rows of x"),
    "top rows": (lambda p: p.top(normal(2, 4), np.empty(1, np.int32)), "top: rows of x"),
    "top values": (lambda p: p.top(normal(1, 4), np.empty(2, np.int32)), "top: values of out"),
    "top columns": (lambda p: p.top(normal(1, 0), np.empty(1, np.int32)), "top: x has no columns"),
    "linear rows": (lambda p: p.linear(normal(2, 40), OUT, normal(2, 40), None), "linear: rows of x: got 2, need 1"),
    "linear columns": (lambda p: p.linear(normal(1, 40), OUT, normal(1, 40), None), "linear: columns of x: got 40, need 64"),
    "linear rows out": (lambda p: p.linear(normal(1, 64), OUT, normal(2, 40), None), "linear: rows of y"),
    "linear out": (lambda p: p.linear(normal(1, 64), OUT, normal(1, 41), None), "linear: columns of y"),
    "linear residual": (lambda p: p.linear(normal(1, 64), OUT, normal(1, 40), normal(1, 41)), "linear: columns of residual"),
    "linear residual rows": (lambda p: p.linear(normal(1, 64), OUT, normal(1, 40), normal(2, 40)), "linear: rows of residual"),
    "rms_norm": (lambda p: p.rms_norm(normal(1, 40), NORM, 1e-5, normal(1, 80)), "rms_norm: values of y: got 80, need 40"),
    "rms_norm axes": (lambda p: p.rms_norm(normal(40), NORM, 1e-5, normal(1, 40)), "rms_norm: x has 1 axes, need 2 or 3"),
    "rms_norm rows": (lambda p: p.rms_norm(normal(2, 40), NORM, 1e-5, normal(2, 40)), "rms_norm: rows of x: got 2, need 1"),
    "rms_norm columns": (lambda p: p.rms_norm(normal(1, 39), NORM, 1e-5, normal(1, 39)), "rms_norm: last axis of x: got 39, need 40"),
    "rms_norm strides": (lambda p: p.rms_norm(normal(1, 80)[:, ::2], NORM, 1e-5, normal(1, 40)), "rms_norm: a row is not contiguous"),
    "gated activation": (lambda p: p.gated(normal(1, 40), "relu", normal(1, 20)), "gated: activation 'relu'"),
    "gated columns": (lambda p: p.gated(normal(1, 40), "silu", normal(1, 21)), "gated: columns of x: got 40, need 42"),
    "gated rows of x": (lambda p: p.gated(normal(2, 40), "silu", normal(2, 20)), "gated: rows of x"),
    "gated rows": (lambda p: p.gated(normal(1, 40), "silu", normal(2, 20)), "gated: rows of y"),
    "add rows": (lambda p: p.add(normal(2, 40), normal(2, 40)), "add: rows of x: got 2, need 1"),
    "add": (lambda p: p.add(normal(1, 40), normal(1, 39)), "add: values of y"),
    "rope rows": (lambda p: p.rope(normal(2, 4, DIM), FREQUENCIES, 1.0), "rope: rows: got 2, need 1"),
    "rope head_dim": (lambda p: p.rope(normal(1, 4, 8), FREQUENCIES, 1.0), "rope: head_dim: got 8, need 16"),
    "rope strides": (lambda p: p.rope(normal(1, DIM, 4).transpose(0, 2, 1), FREQUENCIES, 1.0), "rope: "),
    "rope frequencies": (lambda p: p.rope(normal(1, 4, DIM), normal(7), 1.0), "rope: values of inv_freq"),
    "rotate rows": (lambda p: p.rotate(normal(2, 4, DIM)), "rotate: rows: got 2, need 1"),
    "rotate head_dim": (lambda p: p.rotate(normal(1, 4, 8)), "rotate: head_dim: got 8, need 16"),
    "plain rows": (lambda p: p.plain_attention(*THREE[:2], normal(2, 2, DIM), 1.0, normal(1, 64)), "plain_attention: rows: got 2"),
    "plain heads": (
        lambda p: p.plain_attention(*THREE[:2], normal(1, 3, DIM), 1.0, normal(1, 64)),
        "plain_attention: heads: got 3, need 2",
    ),
    "plain queries": (lambda p: p.plain_attention(normal(1, 3, DIM), *THREE[1:], 1.0, normal(1, 48)), "plain_attention: 3 heads"),
    "plain out": (lambda p: p.plain_attention(*THREE, 1.0, normal(1, 63)), "plain_attention: columns of out: got 63, need 64"),
    "plain out rows": (lambda p: p.plain_attention(*THREE, 1.0, normal(2, 64)), "plain_attention: rows of out"),
    "append layer": (lambda p: p.append(2, normal(1, 2, DIM), normal(1, 2, DIM)), "append: layer 2, need 0 to 1"),
    "append heads": (lambda p: p.append(0, normal(1, 2, DIM), normal(1, 4, DIM)), "append: heads: got 4, need 2"),
    "attention layer": (lambda p: p.attention(normal(1, 4, DIM), -1, 1.0, 0.0, 0, normal(1, 64)), "attention: layer -1"),
    "attention heads": (lambda p: p.attention(normal(1, 3, DIM), 0, 1.0, 0.0, 0, normal(1, 48)), "attention: 3 heads"),
    "attention out": (lambda p: p.attention(normal(1, 4, DIM), 0, 1.0, 0.0, 0, normal(1, 63)), "attention: columns of out"),
    "attention rows": (lambda p: p.attention(normal(1, 4, DIM), 0, 1.0, 0.0, 0, normal(2, 64)), "attention: rows of out"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_refused(case: str) -> None:
    call, message = MISFITS[case]
    with pytest.raises(ValueError, match=message):
        call(Program(2, KV_HEADS, DIM, 1))


def test_arrays_that_would_be_copied_are_refused() -> None:
    program = Program(2, KV_HEADS, DIM, 1)
    for x in (normal(1, 40).astype(np.float64), normal(1, 80)[:, ::2]):
        with pytest.raises((TypeError, RuntimeError)):
            program.add(x, normal(1, 40))
