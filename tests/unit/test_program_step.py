"""Recorded ops on keys and values that another library holds: the judge is attention in loops, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tersor import _native, ops
from tersor.formats import get_format
from tersor.ops.program import Program, Recorder
from tersor.tensor import Array

HEADS, KV_HEADS, DIM = 4, 2, 16
RNG = np.random.default_rng(5)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape, dtype=np.float32)


def stepped(rows: int, heads: int = HEADS, head_dim: int = DIM) -> tuple[Program, Array, Array]:
    """Returns a program of what only step does, q, k and v, (rows, heads + 2 KV_HEADS, head_dim), and its output."""
    recorder = Recorder(1, KV_HEADS, head_dim, rows)
    joined = np.empty((rows, heads + 2 * KV_HEADS, head_dim), np.float32)
    recorder.rotate(joined[:, : heads + KV_HEADS])
    q, k, v = joined[:, :heads], joined[:, heads : heads + KV_HEADS], joined[:, heads + KV_HEADS :]
    return recorder.program, joined, recorder.plain_attention(q, k, v, 0.3)


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize(("heads", "head_dim", "sequences", "angles"), [(4, 16, 1, 1), (2, 64, 3, 3), (6, 10, 2, 1), (8, 132, 1, 1)])
def test_a_step_is_attention_to_all_that_was_stepped(isa: str, heads: int, head_dim: int, sequences: int, angles: int) -> None:
    half, tokens = head_dim // 2, 40
    program, joined, out = stepped(4, heads, head_dim)
    memory = np.full((2, sequences, KV_HEADS, tokens, head_dim), np.nan, np.float32)
    seen: list[Array] = []
    _native.force_isa(isa)
    try:
        for position in range(tokens):
            x, angle = normal(sequences, heads + 2 * KV_HEADS, head_dim), RNG.uniform(0, 6, (angles, half))
            cos, sin = (np.tile(f(angle).astype(np.float32), 2) for f in (np.cos, np.sin))
            joined[:sequences] = x
            program.step(memory[0], memory[1], position, cos, sin)
            z = x.astype(np.float64)[..., :half] + 1j * x[..., half:]
            z[:, : heads + KV_HEADS] *= np.exp(1j * angle)[:, None]
            seen.append(np.concatenate([z.real, z.imag], -1))
            for s in range(sequences):
                for h in range(heads):
                    kv = heads + h // (heads // KV_HEADS)
                    weights = np.exp(0.3 * np.array([seen[-1][s, h] @ old[s, kv] for old in seen]))
                    want = weights @ np.array([old[s, kv + KV_HEADS] for old in seen]) / weights.sum()
                    np.testing.assert_allclose(out[s, h * head_dim : (h + 1) * head_dim], want, rtol=1e-4, atol=1e-5)
        assert not np.isnan(memory).any()
    finally:
        _native.force_isa("")


STEP = {"keys": (2, KV_HEADS, 5, DIM), "values": (2, KV_HEADS, 5, DIM), "length": 4, "cos": (2, DIM), "sin": (2, DIM)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"keys": (5, KV_HEADS, 5, DIM)}, "step: 5 rows, need 1 to 4"),
        ({"keys": (0, KV_HEADS, 5, DIM)}, "step: 0 rows"),
        ({"values": (2, KV_HEADS, 6, DIM)}, "step: an axis of values: got 6, need 5"),
        ({"keys": (2, 3, 5, DIM), "values": (2, 3, 5, DIM)}, "step: heads of keys: got 3, need 2"),
        ({"keys": (2, 2, 5, 8), "values": (2, 2, 5, 8)}, "step: head_dim of keys: got 8, need 16"),
        ({"length": 5}, "step: position 5, there is room for 5"),
        ({"length": -1}, "step: position -1"),
        ({"cos": (3, DIM)}, "step: 3 rows of cosines, need 1 or 2"),
        ({"cos": (2, 8)}, "step: columns of cosines: got 8, need 16"),
        ({"sin": (1, DIM)}, "step: rows of sines: got 1, need 2"),
        ({"sin": (2, 17)}, "step: columns of sines: got 17, need 16"),
    ],
)
def test_steps_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    given = STEP | change
    arrays = {name: normal(*shape) for name, shape in given.items() if name != "length"}
    program, joined, _ = stepped(4)
    joined[:] = 0

    def run() -> None:
        program.step(arrays["keys"], arrays["values"], given["length"], arrays["cos"], arrays["sin"])

    if message:
        with pytest.raises(ValueError, match=message):
            run()
    else:
        run()


def test_programs_of_run_and_of_step_are_not_exchanged() -> None:
    with pytest.raises(ValueError, match="run: the program was recorded for step"):
        stepped(1)[0].run([ops.KVCache(1, KV_HEADS, DIM, 4)], np.zeros(1, np.int32))
    for record in ("rope", "append", "attention", "embed"):
        o = Recorder(1, KV_HEADS, DIM, 1)
        cache, heads = ops.KVCache(1, KV_HEADS, DIM, 4), normal(1, KV_HEADS, DIM)
        {
            "rope": lambda o=o, x=heads: o.rope(x, 0, np.ones(DIM // 2, np.float32)),
            "append": lambda o=o, x=heads, c=cache: o.append(c, 0, x, x),
            "attention": lambda o=o, x=heads, c=cache: o.attention(x, c, 0, 1.0),
            "embed": lambda o=o: o.embed(get_format("f32").quantize(normal(9, 40)), 1.0, normal(1, 40)),
        }[record]()
        with pytest.raises(ValueError, match="step: the program was recorded for run"):
            o.program.step(normal(1, 2, 3, DIM), normal(1, 2, 3, DIM), 0, normal(1, DIM), normal(1, DIM))
