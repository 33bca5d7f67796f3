"""The calibrated loop for a decoder that only transformers knows, or on a GPU: the same order, through torch modules.

Hidden states stay in memory; of the recipe's steps rounding methods work here, which need no more than statistics of inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.calibrated import BlockReport, Calibrator, Progress
from tersor.calibration.doctor import Examination, examine
from tersor.calibration.samples import Samples
from tersor.calibration.statistics import StatisticsBuilder, check_statistics
from tersor.calibration.work import Made, Work
from tersor.containers.container import Checkpoint
from tersor.errors import RecipeError
from tersor.memory import resident_bytes
from tersor.recipe import Choice, Recipe
from tersor.slabs import dequantize
from tersor.tensor import Array, TensorInfo
from tersor.training import require_torch


class TorchCalibrator(Calibrator):
    """One calibrated run over any causal language model of transformers, block by block from a skeleton without weights."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        choices: Mapping[str, Choice],
        plan: Sequence[TensorInfo],
        tokens: Array,
        max_ram: int | None,
        device: str,
        force: bool,
        report: Callable[[Any], None] | None,
        progress: Progress | None,
    ) -> None:
        """Arguments as of Calibrator. device: cpu or cuda. Raises RecipeError for what only tersor's own architectures can do."""
        kind = checkpoint.description.config.get("model_type")
        for step in recipe.steps:
            asks_more = step.method.compares(step.options) or step.method.guided(step.options)
            if step.method.stage != "round" or step.method.needs == "samples" or asks_more:
                raise RecipeError(
                    f"{step} works on tersor's own architectures on the CPU, not on {kind} by transformers on {device}; use gptq"
                )
        if max_ram is not None:
            raise RecipeError(f"--max-ram is kept for tersor's own architectures on the CPU, not for {kind} by transformers on {device}")
        require_torch(f"calibration of {kind} on {device}")
        import torch

        from tersor.calibration.torch_blocks import TorchBlocks

        if device == "cuda" and not torch.cuda.is_available():
            raise RecipeError("--device cuda: torch finds no CUDA device here; use --device cpu")
        self._keep(checkpoint, recipe, choices, plan, tokens, force, report, progress)
        self._blocks = TorchBlocks(checkpoint, device)

    def examine(self, samples: Samples, folder: Path) -> Examination:
        """Returns what the doctor says of the samples by themselves: layers are checked when they are reached."""
        return examine(samples, int(self._checkpoint.description.config["vocab_size"]), [])

    def run(self, work: Work) -> None:
        """Makes every matrix of the blocks into work; blocks that are done already are only run through."""
        self._begin(work)
        x, begun, first = self._blocks.embed(self._tokens), time.perf_counter(), work.done
        for index in range(len(self._blocks)):
            start = time.perf_counter()
            with self._blocks.load(index) as block:
                if index < first:
                    for name in (name for names in block.groups for name in names):
                        block.replace(name, dequantize(work.read(name).tensor))
                    x = block.run(x)
                    continue
                made: dict[str, Made] = {}
                for group, names in enumerate(block.groups):
                    gram = any(self._choices[name].step.method.needs == "gram" for name in names)
                    builder = StatisticsBuilder(block.weight(names[0]).shape[1], gram=gram)
                    for part in block.inputs(group, x):
                        builder.add(np.ascontiguousarray(part.float().cpu().numpy()))
                    statistics = builder.result()
                    check_statistics(statistics, names[0], rounded=self._rounds(names) and not self._force)
                    rounded = self._round_group({name: block.weight(name) for name in names}, statistics)
                    for name, m in rounded.items():
                        self._advance(name)
                        block.replace(name, dequantize(m.tensor))
                    made |= rounded
                x = block.run(x)
            work.save(made)
            now = time.perf_counter()
            if self._report is not None:
                errors = {name: m.output_error for name, m in made.items() if m.output_error is not None}
                left = (now - begun) / (index + 1 - first) * (len(self._blocks) - index - 1)
                self._report(BlockReport(index, len(self._blocks), errors, None, now - start, left, resident_bytes()))
