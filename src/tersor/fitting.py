"""A budget in bytes -> the recipe whose output fits it, before anything is written: the pipeline's side of planning/budget.py."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.containers.container import Checkpoint, Container
from tersor.errors import RecipeError
from tersor.models import spec_of
from tersor.outputs import assigned, described
from tersor.planning.budget import MIXES, SAMPLES, Fitted, Options, fitting, options_of, recipe_within
from tersor.planning.mix import Candidate
from tersor.planning.sensitivity import measure
from tersor.planning.sizes import machine_ram
from tersor.recipe import Recipe, is_edge
from tersor.targets import TARGETS, fused
from tersor.tensor import TensorInfo

if TYPE_CHECKING:
    from tersor.calibration.samples import Samples

Progress = Callable[[str, int, int], None]  # as pipeline.Progress


def frame_of(steps: str | None, container: str) -> Recipe:
    """Returns the steps around a choice that is still open, `clip` when there are none, with all formats of the container to choose from.

    Raises RecipeError for a text that names formats, and for a container whose matrices are all of one format.
    """
    if container not in MIXES:
        raise RecipeError(
            f"--budget mixes formats, and {container} files hold one kind of numbers; use --to {', '.join(MIXES)}, or --recipe"
        )
    return Recipe.frame(steps or "clip", MIXES[container])


def fit(
    checkpoint: Checkpoint,
    container: Container,
    to: str | None,
    target: Path,
    frame: Recipe,
    budget: int,
    samples: Samples,
    max_ram: int | None,
    progress: Progress | None = None,
) -> Fitted:
    """Returns the recipe of least predicted divergence whose output, all of it, takes at most `budget` bytes.

    to: an engine whose demands narrow the choice. Raises RecipeError for a budget that is too small, and what `options` raises.
    """

    def size(recipe: Recipe) -> int:
        return output_bytes(checkpoint, container, target, recipe, samples)

    matrices = _matrices(checkpoint, container)
    formats = _served(frame.default.formats, to, next(iter(matrices.values())))
    recipe_within(budget, _by_size(matrices.values(), formats), frame, size)  # refuses a budget that is too small before any work
    return recipe_within(budget, options(checkpoint, container, formats, samples, max_ram, progress), frame, size)


def options(
    checkpoint: Checkpoint,
    container: Container,
    formats: tuple[str, ...],
    samples: Samples,
    max_ram: int | None,
    progress: Progress | None = None,
) -> Options:
    """Returns the formats that each matrix may get, with the divergence that each is predicted to cause: the same for any budget.

    Sensitivities come from the first SAMPLES of the samples; in a directory embedding and head stay as they are without a budget, and
    matrices that engines join get one format. max_ram: in bytes, or None.
    Raises RecipeError for a memory that is too small, ModelError for a model that is not one of tersor's own.
    """
    spec = spec_of(checkpoint.description.config)
    parameters = sum(prod(info.shape) for info in checkpoint.tensors.values())
    if (need := 4 * parameters + (1 << 30)) > (max_ram or machine_ram() or need):
        raise RecipeError(f"--budget measures the model in float32, which takes {need} bytes; allow them (--max-ram), or use --recipe")
    matrices = _matrices(checkpoint, container)
    tell: Progress = progress or (lambda what, done, total: None)
    measured = measure(spec, checkpoint.read, samples.tokens[:SAMPLES], progress=partial(tell, "measure sensitivities"))
    found = {name: uses for name, uses in measured.items() if name in matrices}
    done, total = 0, sum(prod(info.shape) for info in matrices.values())
    tell("judge formats", 0, total)

    def chosen(weights: int, name: str) -> None:
        nonlocal done
        done += weights
        tell("judge formats", done, total)

    joined = () if container.name == "gguf" else fused(found)
    judged = options_of(checkpoint.read, found, formats, joined, chosen)
    checkpoint.release()
    return judged


def output_bytes(checkpoint: Checkpoint, container: Container, target: Path, recipe: Recipe, samples: Samples | None) -> int:
    """Returns the bytes of everything that the recipe's output will hold; an output of that size is begun beside it, and removed."""
    _, plan = assigned(checkpoint, container, recipe)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        writer = container.create(Path(folder) / target.name, described(checkpoint.description, plan, recipe, samples), plan)
        try:
            return writer.nbytes
        finally:
            writer.abort()


def _matrices(checkpoint: Checkpoint, container: Container) -> dict[str, TensorInfo]:
    """Returns the matrices whose format is chosen."""
    return {n: info for n, info in checkpoint.tensors.items() if len(info.shape) == 2 and (container.name == "gguf" or not is_edge(n))}


def _by_size(matrices: Collection[TensorInfo], formats: tuple[str, ...]) -> dict[tuple[str, ...], list[Candidate]]:
    """Returns every matrix's candidates with no loss known. Raises FormatError when none fits a matrix."""
    return {(info.name,): [Candidate(f.name, f.nbytes(info.shape), 0.0) for f in fitting(info.shape, formats)] for info in matrices}


def _served(formats: tuple[str, ...], to: str | None, like: TensorInfo) -> tuple[str, ...]:
    """Returns the formats that the engine's demands leave. Raises RecipeError when they leave none."""
    if to not in TARGETS:
        return formats
    demands = TARGETS[to].demands
    left = tuple(f for f in formats if not any(demand({"w": replace(like, name="w", format=f)}) for demand in demands))
    if not left:
        raise RecipeError(f"--to {to} takes none of {', '.join(formats)}; use --recipe")
    return left
