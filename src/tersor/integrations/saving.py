"""What save_pretrained writes of a model on tersor's kernels: a compressed-tensors directory, as tersor's writer lays it out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tersor.containers.compressed_tensors import CompressedTensors, CompressedTensorsWriter
from tersor.containers.container import refuse_unheld
from tersor.containers.directory import is_tied
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.formats.exact import alternatives, exactly
from tersor.integrations.weight import QuantizedWeight
from tersor.tensor import ModelDescription, QuantizedTensor, TensorInfo

_CONTAINER = CompressedTensors()
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class _Layout(CompressedTensorsWriter):
    """The writer's layout without its files."""

    def __init__(self, description: ModelDescription, plan: Sequence[TensorInfo]) -> None:
        self._description = description
        self._plan = {info.name: info for info in plan}


def stored_state(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Returns (the tensors of a compressed-tensors directory, its quantization_config or None when nothing is quantized).

    Raises ContainerError for a weight whose numbers that container cannot hold.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state: dict[str, torch.Tensor] = {}
    weights: dict[str, QuantizedTensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, QuantizedWeight):
            if name not in tied:
                weights[name] = _holdable(name, value.matrix.tensor)
        else:
            state[name] = value
    plan = [TensorInfo(name, t.format, t.shape, t.nbytes) for name, t in weights.items()]
    config = {"tie_word_embeddings": bool(getattr(model.config, "tie_word_embeddings", False))}
    refuse_unheld(_CONTAINER, Path("save_pretrained"), plan)
    _refuse_tied(plan, is_tied(config), model)
    layout = _Layout(ModelDescription(config), plan)
    for info in plan:
        for part, array in zip(layout.parts(info), layout.arrays(weights[info.name], info), strict=True):
            state[part.name] = _tensor(array, part.dtype)
    return state, layout.config(ModelDescription(config)).get("quantization_config")


def _holdable(name: str, tensor: QuantizedTensor) -> QuantizedTensor:
    """Returns the tensor, or the same numbers in a format that the container holds."""
    if _CONTAINER.holds(tensor.format):
        return tensor
    for format in alternatives(tensor.format):
        if _CONTAINER.holds(format) and get_format(format).fits(tensor.shape):
            made = exactly(tensor, format)
            if made is not None:
                return made
    raise ContainerError(
        f"save_pretrained: {name} is {tensor.format}, whose numbers {_CONTAINER.name} cannot hold; keep the file it came from,"
        " or choose another recipe, like rtn:int4_g64s"
    )


def _refuse_tied(plan: Sequence[TensorInfo], tied: bool, model: Any) -> None:
    embedding = model.get_input_embeddings()
    name = next((f"{n}.weight" for n, m in model.named_modules() if m is embedding), "")
    for info in plan:
        if tied and info.name == name and info.format not in _FLOATS:
            raise ContainerError(
                f"save_pretrained: {name} is {info.format} and also the head (tie_word_embeddings), which loaders of {_CONTAINER.name}"
                " expect in float; leave embedding and head to the recipe's default"
            )


def _tensor(array: Any, dtype: str) -> torch.Tensor:
    """Returns an own copy of the array as a tensor; bfloat16 arrays are its bits."""
    copied = torch.from_numpy(np.array(array.view(np.int16) if dtype == "BF16" else array))
    return copied.view(torch.bfloat16) if dtype == "BF16" else copied
