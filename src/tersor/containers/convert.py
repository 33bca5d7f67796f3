"""A model from one container to another without rounding anything again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers import CONTAINERS, get_container, open_checkpoint
from tersor.containers.container import Checkpoint, Container
from tersor.containers.directory import DTYPE_OF
from tersor.errors import ContainerError, FormatError, OutputError, unknown
from tersor.formats import get_format
from tersor.tensor import ModelDescription, QuantizedTensor, TensorInfo

SLAB_VALUES = 1 << 24  # values that are decoded at once

_TORCH_NAME = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def convert(
    src: str | Path | Checkpoint, dst: str | Path, to: str | None = None, force: bool = False, *, dequantize: str | None = None
) -> None:
    """Writes the model src as dst in another container; every tensor keeps its format, so its values stay the same to the bit.

    to: a name of CONTAINERS; by default what dst looks like: `gguf` for a name that ends in .gguf, or else a directory,
    `compressed-tensors` when a tensor is quantized and `huggingface` when none is.
    dequantize: f32, f16 or bf16: write quantized tensors as these floats instead (rounded once, from their float32 values).
    Raises ContainerError when the target cannot hold a tensor's format (names both), FormatError for a dequantize that is no float or
    too narrow, OutputError for an output that exists or cannot be written.
    """
    if dequantize is not None and dequantize not in DTYPE_OF:
        raise FormatError(unknown("float format", dequantize, DTYPE_OF))
    checkpoint = src if isinstance(src, Checkpoint) else open_checkpoint(src)
    try:
        _convert(checkpoint, Path(dst), to, force, dequantize)
    finally:
        if checkpoint is not src:
            checkpoint.close()


def _convert(checkpoint: Checkpoint, dst: Path, to: str | None, force: bool, dequantize: str | None) -> None:
    if dst.exists() and dst.resolve() == checkpoint.path.resolve():
        raise OutputError(f"{dst}: is the input; choose another name for the output")
    plan = [_planned(info, dequantize) for info in checkpoint.tensors.values()]
    target = get_container(to) if to is not None else _target(dst, plan)
    _check_held(checkpoint, target, plan)
    with target.create(dst, _described(checkpoint, target, plan), plan, force=force) as writer:
        for info in plan:
            stored = checkpoint.tensors[info.name]
            tensor = checkpoint.read(info.name) if info.format == stored.format else _dequantized(checkpoint, info)
            writer.write(info.name, tensor)
            del tensor
            checkpoint.release()


def _planned(info: TensorInfo, dequantize: str | None) -> TensorInfo:
    if dequantize is None or info.format in DTYPE_OF:
        return info
    return TensorInfo(info.name, dequantize, info.shape, get_format(dequantize).nbytes(info.shape))


def _target(dst: Path, plan: Sequence[TensorInfo]) -> Container:
    """Returns the container that dst's name and the formats call for."""
    if dst.suffix == ".gguf":
        return CONTAINERS["gguf"]
    return CONTAINERS["huggingface" if all(info.format in DTYPE_OF for info in plan) else "compressed-tensors"]


def _check_held(checkpoint: Checkpoint, target: Container, plan: Sequence[TensorInfo]) -> None:
    """Raises ContainerError for the first tensor that the target cannot hold."""
    for info in plan:
        if not target.holds(info.format):
            fix = "use `tersor quantize`" if target.name == "gguf" else "choose --to gguf, or convert(dequantize='f16')"
            raise ContainerError(
                f"{checkpoint.path}: {info.name} is {info.format}, which {target.name} cannot hold without rounding again; {fix}"
            )


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


def _dequantized(checkpoint: Checkpoint, info: TensorInfo) -> QuantizedTensor:
    """Returns the tensor in the planned float format, decoded a slab of rows at a time when the rows are independent."""
    source, float_format = get_format(checkpoint.tensors[info.name].format), get_format(info.format)
    columns, rows = info.shape[-1], prod(info.shape[:-1])
    step = max(1, SLAB_VALUES // columns) if source.row_independent and len(info.shape) == 2 else rows
    parts = []
    try:
        for start in range(0, rows, step):
            slab = checkpoint.read(info.name, slice(start, start + step)) if step < rows else checkpoint.read(info.name)
            parts.append(float_format.quantize(source.dequantize(slab).reshape(-1, columns)).fields["values"])
            checkpoint.release()
    except FormatError as error:
        raise FormatError(f"{info.name}: {error}") from None
    return QuantizedTensor(info.format, info.shape, {"values": np.concatenate(parts) if len(parts) > 1 else parts[0]})
