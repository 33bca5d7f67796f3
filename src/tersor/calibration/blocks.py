"""A walk through one block of a decoder that tersor itself runs, group by group: inputs are shown, then weights are given.

The hidden states of all calibration sequences lie in files where they are many, so that memory holds one batch of sequences, whatever
their number.
Everything is float32, by the decoder's own ops (models/layer.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy as np

from tersor import ops
from tersor.errors import OutputError
from tersor.models.layer import LayerVectors, add_product, has_bias, mix
from tersor.models.spec import GROUPS, DecoderSpec
from tersor.tensor import Array, QuantizedTensor


class Rows:
    """(n, width) float32, written and read some rows at a time: in a file, not mapped, so that it does not count as memory; or kept in
    memory, of which the file is a copy as soon as `store` is called."""

    def __init__(self, path: Path, width: int, kept: int = 0) -> None:
        """An existing file is opened, another made. kept: n, to keep all rows in memory, first those of a whole file; 0 = in the file."""
        self.path = path
        self.width = width
        self._kept: dict[int, Array] | None = {} if kept else None  # by first row, as they were written: not copied
        if self._kept is None:
            path.touch()
            self._file = path.open("r+b", buffering=0)
        elif path.exists():
            stored = np.fromfile(path, np.float32, count=kept * width)
            self._kept[0] = stored[: len(stored) // width * width].reshape(-1, width)

    def write(self, begin: int, rows: Array) -> None:
        """Stores rows (k, width) at begin, not to be changed by the caller from then on. Whoever writes anew writes the same batches."""
        if self._kept is not None:
            self._kept[begin] = np.ascontiguousarray(rows)
            return
        self._file.seek(begin * self.width * 4)
        _write_all(self._file, rows)

    def read(self, begin: int, end: int) -> Array:
        """Returns rows begin to end, not to be written to. Raises OutputError when they were never written whole."""
        if self._kept is not None:
            found = [part[max(begin - first, 0) : end - first] for first, part in sorted(self._kept.items()) if first < end]
            parts = [part for part in found if len(part)]
            if sum(map(len, parts)) != end - begin:
                raise self._cut_off()
            kept = parts[0][:] if len(parts) == 1 else np.concatenate(parts)
            kept.flags.writeable = False
            return kept
        rows = np.empty((end - begin, self.width), np.float32)
        view = memoryview(rows.data).cast("B")
        self._file.seek(begin * self.width * 4)
        while view:
            got = self._file.readinto(view)
            if not got:
                raise self._cut_off()
            view = view[got:]
        return rows

    def _cut_off(self) -> OutputError:
        return OutputError(f"{self.path} is not whole, so the run cannot go on from it; remove {self.path.parent} to begin anew")

    def close(self) -> None:
        """Closes the file, which stays; what is kept in memory stays there."""
        if self._kept is None:
            self._file.close()

    def store(self) -> None:
        """Has everything on disk. Raises OSError when it does not get there."""
        if self._kept is not None:
            with self.path.open("wb", buffering=0) as file:
                for _, rows in sorted(self._kept.items()):
                    _write_all(file, rows)
        sync(self.path)


def _write_all(file: FileIO, rows: Array) -> None:
    """Writes rows where the file stands. Not by ndarray.tofile, which is silent when its last bytes do not fit on the disk."""
    data = memoryview(np.ascontiguousarray(rows, np.float32).data).cast("B")
    while data:
        data = data[file.write(data) :]


def sync(path: Path) -> None:
    """Has a file on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


class Walk(Protocol):
    """One block, walked through once: for each group of `groups` in order, inputs(), then advance()."""

    groups: tuple[tuple[str, ...], ...]  # names of the weights that share an input, in the order they run

    def inputs(self) -> Iterator[Array]:
        """Yields the current group's inputs, (tokens, in) float32, batch by batch; may be called again before advance."""

    def advance(self, weights: Sequence[QuantizedTensor]) -> None:
        """Multiplies the inputs by the group's weights and goes on to the next group."""


class DecoderWalk:
    """The Walk of one layer of a DecoderSpec."""

    def __init__(
        self,
        spec: DecoderSpec,
        index: int,
        vectors: LayerVectors,
        biases: Sequence[Array | None],
        states: Rows,
        after: Rows,
        shape: tuple[int, int],
        scratch: Callable[[str, int], Rows],
        batch: int,
        activations: str = "float",
    ) -> None:
        """vectors, biases: of the layer; one joined bias for each of GROUPS, None where it has none. states: hidden states before the
        layer, (sequences * length, hidden), which stay; after: those after it, to be written. shape: (sequences, length).
        scratch: (name, width) -> rows for what is between. batch: sequences at a time. activations: as of ops.pack.
        The walk closes all files at its end."""
        self.groups = tuple(tuple(f"model.layers.{index}.{name}.weight" for name in group) for group in GROUPS)
        self._spec, self._index, self._vectors, self._biases = spec, index, vectors, biases
        self._states, self._after, self._shape, self._batch = states, after, shape, batch
        self._activations = activations
        self._between = {1: scratch("mixed", spec.heads * spec.head_dim), 3: scratch("gated", spec.intermediate_size)}
        self._at = 0

    def inputs(self) -> Iterator[Array]:
        for begin, end in self._batches():
            yield self._input(begin, end)

    def advance(self, weights: Sequence[QuantizedTensor]) -> None:
        s, v, group = self._spec, self._vectors, self._at
        packed = ops.pack(weights, self._biases[group] if has_bias(s, group) else None, self._activations)
        for begin, end in self._batches():
            x = self._input(begin, end)
            if group == 0:
                self._between[1].write(begin, self._mixed(ops.linear(x, packed)))
            elif group == 2:
                self._between[3].write(begin, ops.gated(ops.linear(x, packed), s.activation))
            else:
                before, norm = (self._states, v.after_attention) if group == 1 else (self._after, v.after_mlp)
                h = before.read(begin, end)
                self._after.write(begin, add_product(ops, s, h if norm is None else h.copy(), x, packed, norm))
        self._at += 1
        if self._at == len(GROUPS):
            for rows in (*self._between.values(), self._states, self._after):
                rows.close()

    def _batches(self) -> Iterator[tuple[int, int]]:
        """Yields (first row, row after the last) of some whole sequences."""
        sequences, length = self._shape
        for begin in range(0, sequences, self._batch):
            yield begin * length, min(begin + self._batch, sequences) * length

    def _input(self, begin: int, end: int) -> Array:
        """Returns rows of the current group's input."""
        if self._at in self._between:
            return self._between[self._at].read(begin, end)
        states, norm = (self._states, self._vectors.norm) if self._at == 0 else (self._after, self._vectors.mlp_norm)
        return ops.rms_norm(states.read(begin, end), norm, self._spec.norm_eps)

    def _mixed(self, joined: Array) -> Array:
        """Returns attention of joined q, k and v, sequence by sequence."""
        s, length = self._spec, self._shape[1]
        cache = ops.KVCache(1, s.kv_heads, s.head_dim, length, "f32")
        parts = []
        for begin in range(0, len(joined), length):
            cache.truncate(0)
            parts.append(mix(ops, s, self._vectors, joined[begin : begin + length], 0, cache))
        return np.concatenate(parts)
