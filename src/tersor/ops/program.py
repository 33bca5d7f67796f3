"""Recording: the ops of a few tokens, written down once from Python, are then replayed by a single native call.

A Recorder has the functions of `tersor.ops` that a decoder's layers call. It runs none of them: it notes each down with the
arrays that it will read and write, which the program keeps. A replay does the ops to the first n rows of those arrays; from
replay to replay only the tokens change, and the positions, which are the caches' lengths.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tersor import _native, ops
from tersor.tensor import Array, QuantizedTensor

Program = _native.Program
Results = dict[tuple[object, ...], list[Array]]  # op and shape -> arrays, the next one's turn first


class LayerOps(Protocol):
    """The ops of a decoder: the module `tersor.ops` or a Recorder. They mean what tersor.ops says."""

    def linear(self, x: Array, weight: ops.Weight, residual: Array | None = None) -> Array: ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array: ...

    def gated(self, x: Array, activation: str) -> Array: ...

    def gated_linear(self, x: Array, weight: ops.Weight, activation: str) -> Array: ...

    def add(self, x: Array, y: Array) -> None: ...

    def rope(self, x: Array, start: int, inv_freq: Array, scale: float = 1.0) -> None: ...

    def append(self, cache: ops.KVCache, layer: int, k: Array, v: Array) -> None: ...

    def attention(self, q: Array, cache: ops.KVCache, layer: int, scale: float, softcap: float = 0.0, window: int = 0) -> Array: ...

    def softcap(self, x: Array, cap: float) -> None: ...


class Recorder:
    """Records ops into `program`. Positions and caches are those of the replay, whatever is given here.

    Results of the same op and shape share memory, so that they stay in the CPU's cache: what linear without residual, gated,
    attention or rms_norm of rows returned is overwritten by the next op of its name and shape, other results by the one after
    that: a sum, which the next one reads (inputs count as such), or the rms_norm of heads, since queries and keys are used together.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, rows: int, results: Results | None = None) -> None:
        """The caches' shape, and how many tokens go through together at most. results: of recorders whose programs share memory,
        and so are never replayed at the same time."""
        self.program = Program(layers, kv_heads, head_dim, rows)
        self._rows = rows
        self._results: Results = {} if results is None else results

    def input(self, width: int) -> Array:
        """Returns an array, (rows, width), to be filled before a replay."""
        return self._result("sum", self._rows, width)

    def embed(self, tensor: QuantizedTensor, scale: float, x: Array) -> bool:
        """Records that x is ops.embed of the replay's tokens; False when the tensor has no native reader, and x is left alone."""
        if not ops.embeds_natively(tensor):
            return False
        self.program.embed(*ops._stored(tensor), scale, x)
        return True

    def linear(self, x: Array, weight: ops.Weight, residual: Array | None = None) -> Array:
        """Records ops.linear."""
        y = self._result("linear", len(x), weight.rows, turns=1) if residual is None else self._result("sum", len(x), weight.rows)
        self.program.linear(x, weight, y, residual)
        return y

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Records ops.rms_norm. x: (rows, d), or (rows, heads, d) whose rows may be apart."""
        y = self._result("rms_norm", *x.shape, turns=x.ndim - 1)
        self.program.rms_norm(x, weight, eps, y)
        return y

    def gated(self, x: Array, activation: str) -> Array:
        """Records ops.gated."""
        y = self._result("gated", len(x), x.shape[1] // 2, turns=1)
        self.program.gated(x, activation, y)
        return y

    def gated_linear(self, x: Array, weight: ops.Weight, activation: str) -> Array:
        """Records ops.gated_linear."""
        y = self._result("gated", len(x), weight.rows // 2, turns=1)
        self.program.gated_linear(x, weight, activation, y)
        return y

    def add(self, x: Array, y: Array) -> None:
        """Records ops.add."""
        self.program.add(x, y)

    def rope(self, x: Array, start: int, inv_freq: Array, scale: float = 1.0) -> None:
        """Records ops.rope."""
        self.program.rope(x, inv_freq, scale)

    def append(self, cache: ops.KVCache, layer: int, k: Array, v: Array) -> None:
        """Records ops.append."""
        self.program.append(layer, k, v)

    def attention(self, q: Array, cache: ops.KVCache, layer: int, scale: float, softcap: float = 0.0, window: int = 0) -> Array:
        """Records ops.attention."""
        out = self._result("attention", len(q), q.shape[1] * q.shape[2], turns=1)
        self.program.attention(q, layer, scale, softcap, window, out)
        return out

    def rotate(self, x: Array) -> None:
        """Records a rotation as of ops.rope, by the angles that Program.step is given."""
        self.program.rotate(x)

    def plain_attention(self, q: Array, k: Array, v: Array, scale: float) -> Array:
        """Records that k and v, (rows, kv_heads, head_dim), are appended to the memory that Program.step is given, and returns the
        attention of q, (rows, heads, head_dim), to all of it."""
        out = self._result("attention", len(q), q.shape[1] * q.shape[2], turns=1)
        self.program.plain_attention(q, k, v, scale, out)
        return out

    def softcap(self, x: Array, cap: float) -> None:
        """Records ops.softcap."""
        self.program.softcap(x, cap)

    def top(self, x: Array) -> Array:
        """Records the place of the first largest value of each row, (rows,) int32."""
        out = np.empty(len(x), np.int32)
        self.program.top(x, out)
        return out

    def _result(self, op: str, *shape: int, turns: int = 2) -> Array:
        """Returns the array of this op and shape whose turn it is."""
        arrays = self._results.setdefault((op, *shape), [])
        if len(arrays) < turns:
            arrays.append(ops.empty(*shape))
        else:
            arrays.append(arrays.pop(0))
        return arrays[-1]
