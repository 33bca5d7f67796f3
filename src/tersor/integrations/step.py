"""A plain decoder layer recorded for single tokens: one native call for what is thirty calls of torch and numpy.

    norm(x) -> q, k, v -> rotate -> append to the cache, attend -> + x -> norm -> gate, up -> act -> down, + x

A token a sequence, at most ROWS sequences of equal length, no mask: what `generate` asks of a layer after the prompt.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
import torch

from tersor import ops
from tersor.integrations.growing import Memory
from tersor.ops.program import Program, Recorder, Results
from tersor.tensor import Array

ROWS = 16  # sequences; a product treats each as if it were alone (ops.linear)

_results: Results = {}  # of all layers, so that they stay in the CPU's cache
_lock = Lock()  # whoever replays holds them


class Step:
    """The recording of a layer, made when it is first asked for, and made anew when norms or biases have changed."""

    def __init__(self) -> None:
        self._stamp: list[tuple[int, int]] = []
        self._program: Program | None = None

    def run(self, plain: Any, x: torch.Tensor, memory: Memory, cos: Array, sin: Array) -> torch.Tensor:
        """Returns the layer's output, (sequences, 1, dim), and writes keys and values at memory.length.

        plain: decoder_layer.Plain; x: (sequences, 1, dim); cos and sin: (1 or sequences, head_dim)."""
        stamp = [(vector.data_ptr(), vector._version) for vector in plain.vectors]
        values, n = x.numpy(), x.shape[0]
        with _lock:
            if self._program is None or stamp != self._stamp:
                self._record(plain)
                self._stamp = stamp
            program = self._program
            assert program is not None
            self._x[:n] = values
            program.step(memory.keys, memory.values, memory.length, cos, sin)
            return torch.from_numpy(self._out[:n].copy())

    def _record(self, plain: Any) -> None:
        heads, kv_heads, head_dim = plain.heads
        o = Recorder(1, kv_heads, head_dim, ROWS, _results)
        x = o.input(plain.down.out_features)
        joined = o.linear(o.rms_norm(x, *plain.norm(0)), plain.qkv.packed, plain.bias(ROWS))
        by_head = joined.reshape(ROWS, heads + 2 * kv_heads, head_dim)
        o.rotate(by_head[:, : heads + kv_heads])
        q, k, v = by_head[:, :heads], by_head[:, heads : heads + kv_heads], by_head[:, heads + kv_heads :]
        mixed = o.plain_attention(q, k, v, plain.attention.scaling)
        between = o.linear(mixed, _packed(plain.output), x)
        halves = o.linear(o.rms_norm(between, *plain.norm(1)), plain.gate_up.packed)
        y = o.linear(o.gated(halves, plain.activation), _packed(plain.down), between)
        self._x, self._out = (array.reshape(ROWS, 1, -1) for array in (x, y))
        self._program = o.program

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles nothing: a copy is to be recorded."""
        return Step, ()


def _packed(linear: Any) -> ops.Weight:
    packed: ops.Weight = linear._parameters["weight"].matrix.packed
    return packed


def tables(rope: Any, head_dim: int) -> tuple[Array, Array] | None:
    """Returns cos and sin of single tokens, (1 or sequences, head_dim), None when they are others than `Step.run` takes."""
    found = []
    for table in rope:
        if table.dtype is not torch.float32 or table.shape[1:] != (1, head_dim):
            return None
        rows = np.ascontiguousarray(table.numpy().reshape(-1, head_dim))
        if not np.array_equal(rows[:, : head_dim // 2], rows[:, head_dim // 2 :]):
            return None
        found.append(rows)
    cos, sin = found
    return cos, sin
