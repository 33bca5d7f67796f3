"""A model from one container to another, its numbers the same to the bit; what has no place there is refused, or rounded again if asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tersor.containers import CONTAINERS, get_container, open_checkpoint
from tersor.containers.container import Checkpoint, Container, Writer, what_is_lost
from tersor.containers.directory import DTYPE_OF
from tersor.containers.gguf import GGUF
from tersor.errors import ContainerError, FormatError, OutputError, RecipeError, unknown
from tersor.formats import get_format
from tersor.formats.exact import alternatives, exactly
from tersor.recipe import KEEP, Choice, Recipe
from tersor.slabs import quantize_tensor
from tersor.targets import TARGETS, check_demands
from tersor.tensor import ModelDescription, QuantizedTensor, TensorInfo
from tersor.verification.digests import values_digest
from tersor.verification.record import drop_proof

if TYPE_CHECKING:
    from tersor.verification.record import Verification

SLAB_VALUES = 1 << 24  # values that are decoded at once

_TORCH_NAME = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote: where (of a split model the first file), the tensors whose format changed, and what opening it again showed
    (None when that was not asked for)."""

    path: Path
    changes: tuple[Change, ...]
    verification: Verification | None


@dataclass(frozen=True)
class Change:
    """A tensor that is stored in another format than before. error: relative RMS error that this added, 0 when the values are the same."""

    name: str
    source: str
    format: str
    error: float


def convert(
    src: str | Path | Checkpoint,
    dst: str | Path,
    to: str | None = None,
    force: bool = False,
    *,
    dequantize: str | None = None,
    requantize: str | None = None,
    split_bytes: int | None = None,
    verify: bool = True,
) -> Conversion:
    """Writes the model src as dst in another container, every value the same to the bit; returns which tensors changed their format.

    A format that the target has no place for becomes one that holds the same numbers (formats/exact.py: int4_g32s and Q4_0 are such).

    to: a name of CONTAINERS; by default what dst looks like: `gguf` for a name that ends in .gguf, or else a directory,
    `compressed-tensors` when a tensor is quantized and `huggingface` when none is.
    dequantize: f32, f16 or bf16: write quantized tensors as these floats instead (rounded once, from their float32 values).
    split_bytes: of GGUF only: write files of at most so many bytes, name-00001-of-00003.gguf and so on. (Directories have shards of 5 GB.)
    requantize: a recipe, of methods that need no data, for the tensors whose numbers the target cannot hold.
    verify: open dst again with a reader that is not ours, compare, and leave verification.json beside it.
    Raises ContainerError when the target cannot hold a tensor's numbers (names both), FormatError for a dequantize that is no float or
    too narrow, RecipeError, OutputError for an output that exists or cannot be written.
    """
    if dequantize is not None and dequantize not in DTYPE_OF:
        raise FormatError(unknown("float format", dequantize, DTYPE_OF))
    recipe = None if requantize is None else _checked(Recipe.parse(requantize))
    checkpoint = src if isinstance(src, Checkpoint) else open_checkpoint(src)
    try:
        path, changes, meant = _convert(checkpoint, Path(dst), to, force, dequantize, recipe, verify, split_bytes)
    finally:
        if checkpoint is not src:
            checkpoint.close()
    if not verify:
        drop_proof(path)
        return Conversion(path, tuple(changes), None)
    from tersor.verification.verify import verify as verified

    return Conversion(path, tuple(changes), verified(path, meant=meant, logits=False))


def _checked(recipe: Recipe) -> Recipe:
    for step in recipe.steps:
        if step.method.needs != "nothing" or step.method.stage != "round":
            raise RecipeError(f"--requantize {recipe}: {step} needs more than the weights; use rtn or clip, or `tersor quantize`")
    return recipe


def _convert(
    checkpoint: Checkpoint,
    dst: Path,
    to: str | None,
    force: bool,
    dequantize: str | None,
    requantize: Recipe | None,
    verify: bool,
    split_bytes: int | None,
) -> tuple[Path, list[Change], dict[str, str]]:
    """Returns (what was written, changes, digests of what was handed to the writer)."""
    if dst.exists() and dst.resolve() == checkpoint.path.resolve():
        raise OutputError(f"{dst}: is the input; choose another name for the output")
    floats = dequantize is not None or all(info.format in DTYPE_OF for info in checkpoint.tensors.values())
    target = _target(checkpoint, to) if to is not None else CONTAINERS[_named(dst, floats)]
    choices = _choices(checkpoint, target, requantize)
    plan = [_planned(checkpoint, info, target, dequantize, choices.get(info.name)) for info in checkpoint.tensors.values()]
    check_demands(to, plan)
    changes, meant = [], {}
    with _created(target, dst, _described(checkpoint, target, plan), plan, force, split_bytes) as writer:
        for info in plan:
            stored = checkpoint.tensors[info.name]
            tensor, error = _moved(checkpoint, stored, info, dequantize, choices.get(info.name))
            if verify:
                meant[info.name] = values_digest(writer.kept(info.name, tensor))
            writer.write(info.name, tensor)
            if info.format != stored.format:
                changes.append(Change(info.name, stored.format, info.format, error))
            del tensor
            checkpoint.release()
    return writer.path, changes, meant


def _created(
    target: Container, dst: Path, description: ModelDescription, plan: Sequence[TensorInfo], force: bool, split_bytes: int | None
) -> Writer:
    if split_bytes is None:
        return target.create(dst, description, plan, force=force)
    if not isinstance(target, GGUF):
        raise ContainerError(f"{dst}: only gguf is split on demand; a {target.name} directory has shards of 5 GB anyway")
    return target.create(dst, description, plan, force=force, max_bytes=split_bytes)


def _target(checkpoint: Checkpoint, to: str) -> Container:
    """Returns the container of this name, or of what the engine loads the first that holds most of the model's formats."""
    if to not in TARGETS:
        return get_container(to)
    formats = [info.format for info in checkpoint.tensors.values()]
    return max((CONTAINERS[name] for name in TARGETS[to].containers), key=lambda c: sum(c.holds(f) for f in formats))


def _named(dst: Path, floats: bool) -> str:
    """Returns the container that dst's name and the formats call for."""
    return "gguf" if dst.suffix == ".gguf" else "huggingface" if floats else "compressed-tensors"


def _choices(checkpoint: Checkpoint, target: Container, recipe: Recipe | None) -> dict[str, Choice]:
    if recipe is None:
        return {}
    tied = bool(checkpoint.description.config.get("tie_word_embeddings"))
    return recipe.assign(checkpoint.tensors, gguf=target.name == "gguf", tied=tied)


def _planned(checkpoint: Checkpoint, info: TensorInfo, target: Container, dequantize: str | None, choice: Choice | None) -> TensorInfo:
    """Returns the tensor as it will be stored. Raises ContainerError when its numbers have no place there."""

    def stored_as(format: str) -> TensorInfo:
        return TensorInfo(info.name, format, info.shape, get_format(format).nbytes(info.shape))

    if dequantize is not None and info.format not in DTYPE_OF:
        return stored_as(dequantize)
    if target.holds(info.format):
        return info
    for format in alternatives(info.format):
        if target.holds(format) and get_format(format).fits(info.shape) and exactly(checkpoint.read(info.name), format) is not None:
            checkpoint.release()
            return stored_as(format)
    if choice is not None:
        format = choice.format_for(info)
        if format == KEEP or not target.holds(format):
            raise ContainerError(f"{target.name} cannot hold {format} of {info.name}; choose another --requantize")
        return stored_as(format)
    raise ContainerError(
        f"{checkpoint.path}: {info.name} is {info.format}, whose numbers {target.name} cannot hold"
        f"{what_is_lost(target, info.format)}; add --requantize RECIPE to round them"
        " again (the added error is printed), --dequantize f16 to store floats, or choose another --to"
    )


def _moved(
    checkpoint: Checkpoint, stored: TensorInfo, info: TensorInfo, dequantize: str | None, choice: Choice | None
) -> tuple[QuantizedTensor, float]:
    """Returns the tensor in the planned format, and the relative RMS error that this adds."""
    if info.format == stored.format:
        return checkpoint.read(info.name), 0.0
    if dequantize is not None and info.format == dequantize:
        return _dequantized(checkpoint, info)
    made = exactly(checkpoint.read(info.name), info.format)
    if made is not None:
        return made, 0.0
    assert choice is not None
    return quantize_tensor(checkpoint, stored, info.format, choice.step, lambda done: None)


def _described(checkpoint: Checkpoint, target: Container, plan: Sequence[TensorInfo]) -> ModelDescription:
    """Returns the description; a config that came from GGUF gets the dtype of most values, which directories state."""
    description = checkpoint.description
    if checkpoint.container != "gguf" or target.name == "gguf":
        return description
    values: dict[str, int] = {}
    for info in plan:
        values[info.format] = values.get(info.format, 0) + prod(info.shape)
    floats = {format: count for format, count in values.items() if format in _TORCH_NAME}
    most = max(floats, key=lambda format: floats[format]) if floats else "f16"
    config: dict[str, Any] = {**description.config, "dtype": _TORCH_NAME[most]}
    return replace(description, config=config)


def _dequantized(checkpoint: Checkpoint, info: TensorInfo) -> tuple[QuantizedTensor, float]:
    """Returns the tensor in the planned float format, decoded a slab of rows at a time when the rows are independent, and what
    rounding to that format added."""
    source, float_format = get_format(checkpoint.tensors[info.name].format), get_format(info.format)
    columns, rows = info.shape[-1], prod(info.shape[:-1])
    step = max(1, SLAB_VALUES // columns) if source.row_independent and len(info.shape) == 2 else rows
    parts, squared_error, squares = [], 0.0, 0.0
    try:
        for start in range(0, rows, step):
            slab = checkpoint.read(info.name, slice(start, start + step)) if step < rows else checkpoint.read(info.name)
            w = source.dequantize(slab).reshape(-1, columns)
            stored = float_format.quantize(w)
            squared_error += float(np.square(float_format.dequantize(stored).reshape(w.shape) - w, dtype=np.float64).sum())
            squares += float(np.square(w, dtype=np.float64).sum())
            parts.append(stored.fields["values"])
            checkpoint.release()
    except FormatError as error:
        raise FormatError(f"{info.name}: {error}") from None
    whole = QuantizedTensor(info.format, info.shape, {"values": np.concatenate(parts) if len(parts) > 1 else parts[0]})
    return whole, sqrt(squared_error / squares) if squares else 0.0
