"""What an output will hold, before its first byte: its container, every tensor's format, and what the files say of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.containers import CONTAINERS
from tersor.containers.container import Checkpoint, Container, what_is_lost
from tersor.errors import ContainerError, OutputError
from tersor.formats import get_format
from tersor.recipe import CASTS, KEEP, Choice, Recipe
from tersor.targets import TARGETS, container_for
from tersor.tensor import ModelDescription, TensorInfo

if TYPE_CHECKING:
    from tersor.calibration.imatrix import Imatrix
    from tersor.calibration.samples import Samples


def container_name(out: Path, to: str | None) -> str:
    """Returns the container that `to`, or the output's name, stands for while no recipe says more."""
    if to is None:
        return "gguf" if out.suffix.lower() == ".gguf" else "compressed-tensors"
    return TARGETS[to].containers[0] if to in TARGETS else to


def choose_container(out: Path, recipe: Recipe, to: str | None = None) -> Container:
    """Returns the container named by `to` or that the engine of that name loads, or the one that the output's name and the recipe imply.

    Raises RecipeError, OutputError.
    """
    if to is not None:
        used = [f for choice in (recipe.default, *(rule.choice for rule in recipe.rules)) for f in choice.formats if f != KEEP]
        name = container_for(to, used)
    elif out.suffix.lower() == ".gguf":
        name = "gguf"
    else:
        floats = all(choice.is_cast for choice in (recipe.default, *(rule.choice for rule in recipe.rules)))
        name = "huggingface" if floats else "compressed-tensors"
    if name != "gguf" and out.suffix.lower() in (".gguf", ".safetensors", ".bin", ".pt"):
        raise OutputError(f"{out}: {name} is a directory of files, not one {out.suffix} file; name a directory")
    return CONTAINERS[name]


def plan_tensors(tensors: Mapping[str, TensorInfo], choices: Mapping[str, Choice], container: Container) -> list[TensorInfo]:
    """Returns every tensor as it will be stored. Raises FormatError or ContainerError, naming the tensor, for what cannot be."""
    plan = []
    for name, info in tensors.items():
        chosen = choices[name].format_for(info)
        format = info.format if chosen == KEEP else chosen
        if not container.holds(format):
            lost = what_is_lost(container, format)
            raise ContainerError(f"{container.name} cannot hold {format} of {name}{lost}; {_advice(container, chosen, format)}")
        nbytes = info.nbytes if chosen == KEEP else get_format(format).nbytes(info.shape)
        plan.append(TensorInfo(name, format, info.shape, nbytes))
    return plan


def assigned(checkpoint: Checkpoint, container: Container, recipe: Recipe) -> tuple[Mapping[str, Choice], list[TensorInfo]]:
    """Returns the choice of every tensor, and every tensor as it will be stored. Raises RecipeError, FormatError and ContainerError."""
    tied = bool(checkpoint.description.config.get("tie_word_embeddings"))
    choices = recipe.assign(checkpoint.tensors, gguf=container.name == "gguf", tied=tied)
    return choices, plan_tensors(checkpoint.tensors, choices, container)


def described(
    description: ModelDescription, plan: Sequence[TensorInfo], recipe: Recipe, samples: Samples | Imatrix | None
) -> ModelDescription:
    """Returns the description of the output: how it was made, and config.json's dtype, which loaders cast floats to, as most float values
    of the plan are stored."""
    values = {format: sum(prod(info.shape) for info in plan if info.format == format) for format in CASTS}
    most = max(values, key=lambda format: values[format])
    key = "torch_dtype" if "torch_dtype" in description.config else "dtype"
    name = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[most]
    made = {"recipe": str(recipe)} | ({} if samples is None else {"calibration": dict(samples.provenance)})
    return replace(description, config={**description.config, key: name}, provenance=made)


def _advice(container: Container, chosen: str, format: str) -> str:
    if chosen == KEEP and format not in CASTS:
        return f"`keep` copies {format} as it is, so choose a format for this tensor, like f16"
    holders = [name for name, other in CONTAINERS.items() if other.holds(format)]
    if not holders:
        return "no container can yet"
    return f"{holders[0]} can: " + ("name the output *.gguf" if holders[0] == "gguf" else f"use --to {holders[0]}")
