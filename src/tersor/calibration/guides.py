"""What the whole model makes of an error in each linear layer, measured before any is rounded; for methods that are `guided`.

fisher-8             hidden states before block 8, of the unquantized model; gone when the block is measured
guide-8.safetensors  what was measured of block 8; gone when it is rounded. Written from the last block to the first
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tersor.calibration.blocks import Rows
from tersor.calibration.work import Work, write_whole
from tersor.containers.output import disk_errors
from tersor.models.spec import DecoderSpec
from tersor.tensor import Array
from tersor.training import require_torch

OUTPUT_BLOCK = 2048  # outputs whose errors are weighed together: all of a layer that has no more, else those of each 2,048 neighbours


class Guide:
    """Of one linear layer. tokens: the weight of each token, (tokens,) float32, 1 on average. outputs: as of InputStatistics."""

    def __init__(self, tokens: Array, outputs: tuple[Array, ...]) -> None:
        self.tokens, self.outputs = tokens, outputs

    def rescaled(self, scale: Array) -> Guide:
        """Returns that of the same layer when each of its outputs is divided by scale, (rows,) > 0, and what reads them makes up for it."""
        ends = np.cumsum([len(g) for g in self.outputs])
        parts = [scale[end - len(g) : end] for g, end in zip(self.outputs, ends)]
        return Guide(self.tokens, tuple(g * np.outer(s, s) for g, s in zip(self.outputs, parts)))


def measure_guides(
    spec: DecoderSpec,
    read: Any,
    embedded: Callable[[Rows], None],
    work: Work,
    shape: tuple[int, int],
    batch: int,
    told: Callable[[int, int], None],
) -> None:
    """Measures every block into the work's folder, unless it has been done. Needs torch.

    read: of the float checkpoint. embedded: writes the states before block 0. shape: (sequences, length). batch: sequences at a time.
    """
    if work.done or _file(work, 0).exists():
        return
    from safetensors.numpy import save

    from tersor.training.fisher import Measurement

    blocks, n = len(spec.layers), shape[0] * shape[1]
    with disk_errors(work.folder, 4 * n * spec.hidden_size * (blocks + 2)):
        states = [Rows(work.folder / f"fisher-{i}", spec.hidden_size) for i in range(blocks + 1)]
        gradients = Rows(work.folder / "fisher-gradients", spec.hidden_size)
        measured = Measurement(spec, read, shape, states.__getitem__, gradients, batch)
        embedded(states[0])
        for index in range(blocks):
            told(index, 2 * blocks)
            measured.forward(index)
        measured.labels(seed=0)
        for index in reversed(range(blocks)):
            told(2 * blocks - 1 - index, 2 * blocks)
            _remove(states[index + 1])
            arrays = {}
            for name, fisher in measured.backward(index).items():
                arrays[f"{name}|tokens"] = fisher.tokens
                arrays |= {f"{name}|{i}": block for i, block in enumerate(fisher.outputs)}
            write_whole(_file(work, index), save(arrays))
        _remove(states[0])
        _remove(gradients)
    told(2 * blocks, 2 * blocks)


def guides_of(work: Work, index: int) -> Mapping[str, Guide]:
    """Returns the guides of block `index` by full names of weights."""
    from safetensors.numpy import load_file

    arrays = load_file(_file(work, index))
    found = {}
    for name in sorted({key.partition("|")[0] for key in arrays}):
        sizes = arrays[f"{name}|tokens"]
        count, mean = sum(key.startswith(f"{name}|") for key in arrays) - 1, float(sizes.mean(dtype=np.float64))
        reached = mean > 0  # by any gradient
        outputs = tuple(arrays[f"{name}|{i}"] for i in range(count)) if reached else ()
        found[f"model.layers.{index}.{name}"] = Guide(sizes / mean if reached else np.ones_like(sizes), outputs)
    return found


def workspace(spec: DecoderSpec, length: int) -> tuple[int, int]:
    """Returns the bytes that `measure` takes at most: (always, for each sequence of a batch). Raises RecipeError without torch."""
    require_torch("gptq(fisher)")
    from tersor.training import fisher  # its libraries count as memory from here on

    return fisher.workspace(spec, length)


def block_sizes(outputs: int) -> list[int]:
    """Returns the sizes of the blocks of a layer's G, each OUTPUT_BLOCK at most."""
    return [min(OUTPUT_BLOCK, outputs - begin) for begin in range(0, outputs, OUTPUT_BLOCK)]


def _file(work: Work, index: int) -> Path:
    return work.folder / f"guide-{index}.safetensors"


def _remove(rows: Rows) -> None:
    rows.close()
    rows.path.unlink()
