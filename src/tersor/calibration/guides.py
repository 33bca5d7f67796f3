"""What the whole model makes of an error in each linear layer, measured before any is rounded; for methods that are `guided`.

fisher-8             hidden states before block 8, of the unquantized model; gone when the block is measured
fisher-gradients     for the states after the block in work
guide-8.safetensors  what was measured of block 8; gone when it is rounded. Written from the last block to the first
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tersor.calibration.blocks import Rows
from tersor.calibration.work import Work, write_whole
from tersor.containers.container import Checkpoint
from tersor.containers.output import disk_errors
from tersor.errors import ModelError, OutputError
from tersor.models.spec import DecoderSpec, expected_tensors
from tersor.tensor import Array, output_blocks
from tersor.training import require_torch

if TYPE_CHECKING:
    from tersor.training.fisher import Measurement

LABELS_SEED = 0  # draws the labels, whatever drew the samples


@dataclass(frozen=True, eq=False)
class Guide:
    """Of one linear layer. tokens: the weight of each token, (tokens,) float32, 1 on average. outputs: as of InputStatistics."""

    tokens: Array
    outputs: tuple[Array, ...]

    def rescaled(self, scale: Array) -> Guide:
        """Returns that of the same layer when each of its outputs is divided by scale, (rows,) > 0, and what reads them makes up for it.

        Tokens keep their weights, though |g_t| of the scaled outputs is another norm of the same gradient.
        """
        ends = np.cumsum([len(g) for g in self.outputs])
        parts = [scale[end - len(g) : end] for g, end in zip(self.outputs, ends)]
        return Guide(self.tokens, tuple(g * np.outer(s, s) for g, s in zip(self.outputs, parts)))


class Guides:
    """Those of one block by full names of weights, read when they are asked for."""

    def __init__(self, work: Work, index: int) -> None:
        self._path, self._prefix = work.guide(index), f"model.layers.{index}."
        self._scales: dict[str, Array] = {}

    def rescale(self, name: str, scale: Array) -> None:
        """Has the outputs of a layer divided by scale, (rows,)."""
        self._scales[name] = scale

    def __getitem__(self, name: str) -> Guide:
        from safetensors import safe_open

        key = name.removeprefix(self._prefix)
        with safe_open(str(self._path), "numpy") as file:
            sizes, count = file.get_tensor(f"{key}|tokens"), sum(other.startswith(f"{key}|") for other in file.keys()) - 1  # noqa: SIM118
            outputs = tuple(file.get_tensor(f"{key}|{i}") for i in range(count))
        if not (mean := float(sizes.mean(dtype=np.float64))) > 0:  # no gradient reaches it
            return Guide(np.ones_like(sizes), ())
        guide = Guide(sizes / np.float32(mean), outputs)
        return guide.rescaled(self._scales[name]) if name in self._scales else guide


def measure_guides(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    wanted: Collection[str],
    embedded: Callable[[Rows], None],
    work: Work,
    shape: tuple[int, int],
    batch: int,
    told: Callable[[int, int], None],
) -> None:
    """Measures the wanted layers into the work's folder, unless it has been done. Needs torch.

    wanted: full names of weights. embedded: writes the states before block 0. shape: (sequences, length). batch: sequences at a time.
    Raises ModelError, naming the layer, for gradients that are not finite; OutputError when the disk is too small.
    """
    from tersor.training.fisher import Measurement

    _remove_states(work)  # of a run that was killed
    if work.done or work.guide(0).exists():
        return
    n = shape[0] * shape[1]
    _check_disk(work, spec, wanted, n)
    with disk_errors(work.folder, _disk_bytes(spec, wanted, n)):
        states = [Rows(work.folder / f"fisher-{i}", spec.hidden_size) for i in range(len(spec.layers) + 1)]
        gradients = Rows(work.folder / "fisher-gradients", spec.hidden_size)
        try:
            embedded(states[0])
            measured = Measurement(spec, checkpoint.read, shape, states.__getitem__, gradients, batch)
            _measure(measured, len(spec.layers), wanted, work, checkpoint.release, told)
        finally:
            for rows in (*states, gradients):
                rows.close()
    _remove_states(work)


def _measure(
    measured: Measurement,
    blocks: int,
    wanted: Collection[str],
    work: Work,
    release: Callable[[], None],
    told: Callable[[int, int], None],
) -> None:
    """Writes the guides, all states before block 0 being there. release: gives back what has been read of the checkpoint."""
    from safetensors.numpy import save

    for index in range(blocks):
        told(index, 2 * blocks)
        measured.forward(index)
        release()
    measured.labels(LABELS_SEED)
    release()
    for index in reversed(range(blocks)):
        told(2 * blocks - 1 - index, 2 * blocks)
        (work.folder / f"fisher-{index + 1}").unlink()
        prefix, arrays = f"model.layers.{index}.", {}
        for name, fisher in measured.backward(index, {w.removeprefix(prefix) for w in wanted if w.startswith(prefix)}).items():
            if not (np.isfinite(fisher.tokens).all() and all(np.isfinite(g).all() for g in fisher.outputs)):
                raise ModelError(f"{prefix}{name}: the gradient of its output is not finite; use gptq without fisher")
            arrays[f"{name}|tokens"] = fisher.tokens
            arrays |= {f"{name}|{i}": block for i, block in enumerate(fisher.outputs)}
        release()
        write_whole(work.guide(index), save(arrays))
    told(2 * blocks, 2 * blocks)


def workspace(spec: DecoderSpec, length: int) -> tuple[int, int]:
    """Returns the bytes that measure_guides takes at most: (always, for each sequence of a batch). Raises RecipeError without torch."""
    require_torch("gptq(fisher)")
    from tersor.training import fisher  # its libraries count as memory from here on

    return fisher.workspace(spec, length)


def _disk_bytes(spec: DecoderSpec, wanted: Collection[str], tokens: int) -> int:
    """Returns the bytes that lie on the disk at most: the states before and after every block, gradients, and every G."""
    shapes = expected_tensors(spec)
    products = sum(4 * n * n for name in wanted for n in output_blocks(shapes[name][0]))
    return 4 * tokens * spec.hidden_size * (len(spec.layers) + 2) + products


def _check_disk(work: Work, spec: DecoderSpec, wanted: Collection[str], tokens: int) -> None:
    """Raises OutputError when the disk is too small."""
    need, free = _disk_bytes(spec, wanted, tokens), shutil.disk_usage(work.folder).free
    if need > free:
        raise OutputError(
            f"{work.folder}: gptq(fisher) keeps {need / 2**30:.1f} GiB of hidden states there while it measures, and "
            f"{free / 2**30:.1f} GiB are free; use fewer or shorter samples, or write to another disk"
        )


def _remove_states(work: Work) -> None:
    """Removes the files of states."""
    for file in work.folder.glob("fisher-*"):
        file.unlink()
