"""Recording: the ops of one token, run once from Python, are then replayed by a single native call.

A Recorder has the functions of `tersor.ops` that a decoder's layers call. It runs each op as usual and notes it down with
the arrays it read and wrote, which the program keeps. A replay does the same to the same arrays; from token to token only
the content of the first array changes, and the position, which is the cache's length.
"""

from __future__ import annotations

from typing import Protocol

from tersor import _native, ops
from tersor.tensor import Array

Program = _native.Program


class LayerOps(Protocol):
    """The ops of a decoder's layers: the module `tersor.ops` or a Recorder. They mean what tersor.ops says."""

    def linear(self, x: Array, weight: ops.Weight, residual: Array | None = None) -> Array: ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array: ...

    def gated(self, x: Array, activation: str) -> Array: ...

    def add(self, x: Array, y: Array) -> None: ...

    def rope(self, x: Array, start: int, inv_freq: Array, scale: float = 1.0) -> None: ...

    def append(self, cache: ops.KVCache, layer: int, k: Array, v: Array) -> None: ...

    def attention(self, q: Array, cache: ops.KVCache, layer: int, scale: float, softcap: float = 0.0, window: int = 0) -> Array: ...


class Recorder:
    """Runs ops and records them into `program`. Positions are taken to be the cache's length."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, rows: int) -> None:
        """The caches' shape, and how many tokens go through together."""
        self.program = Program(layers, kv_heads, head_dim, rows)

    def linear(self, x: Array, weight: ops.Weight, residual: Array | None = None) -> Array:
        """Returns ops.linear."""
        y = ops.linear(x, weight, residual)
        self.program.linear(x, weight, y, residual)
        return y

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Returns ops.rms_norm."""
        y = ops.rms_norm(x, weight, eps)
        self.program.rms_norm(x, weight, eps, y)
        return y

    def gated(self, x: Array, activation: str) -> Array:
        """Returns ops.gated."""
        y = ops.gated(x, activation)
        self.program.gated(x, activation, y)
        return y

    def add(self, x: Array, y: Array) -> None:
        """Does ops.add."""
        ops.add(x, y)
        self.program.add(x, y)

    def rope(self, x: Array, start: int, inv_freq: Array, scale: float = 1.0) -> None:
        """Does ops.rope; replays start at the cache's length then."""
        ops.rope(x, start, inv_freq, scale)
        self.program.rope(x, inv_freq, scale)

    def append(self, cache: ops.KVCache, layer: int, k: Array, v: Array) -> None:
        """Does cache.append."""
        cache.append(layer, k, v)
        self.program.append(layer, k, v)

    def attention(self, q: Array, cache: ops.KVCache, layer: int, scale: float, softcap: float = 0.0, window: int = 0) -> Array:
        """Returns ops.attention."""
        out = ops.attention(q, cache, layer, scale, softcap, window)
        self.program.attention(q, layer, scale, softcap, window, out)
        return out
