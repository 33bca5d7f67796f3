"""Quantized model directories for tests: written by us, edited through the safetensors package, compared with an independent reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers import CONTAINERS, open_checkpoint
from tersor.formats import get_format
from tersor.tensor import QuantizedTensor, TensorInfo
from tersor.verification.readers import READERS

Choose = Callable[[str], str | None]
Edit = Callable[[Path], None]


def quantized(container: str, out: Path, source: Path, choose: Choose) -> dict[str, QuantizedTensor]:
    """Writes the model with the chosen format of every matrix; returns the tensors as they were written."""
    checkpoint = open_checkpoint(source)
    tensors = {}
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        format = choose(name) if len(info.shape) == 2 else None
        tensors[name] = get_format(format).quantize(get_format(tensor.format).dequantize(tensor)) if format else tensor
    write(container, out, source, tensors)
    return tensors


def write(container: str, out: Path, source: Path, tensors: dict[str, QuantizedTensor]) -> None:
    """Writes these tensors with the description of the model at source."""
    plan = [TensorInfo(n, t.format, t.shape, t.nbytes) for n, t in tensors.items()]
    with CONTAINERS[container].create(out, open_checkpoint(source).description, plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def linears(format: str) -> Choose:
    return lambda name: format if "_proj" in name else None


def values(tensor: QuantizedTensor) -> np.ndarray:
    return get_format(tensor.format).dequantize(tensor)


def check_reader(container: str, path: Path, tensors: dict[str, QuantizedTensor]) -> None:
    """The independent reader finds every tensor with exactly the values that were meant."""
    found = dict(READERS[container].weights(path))
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values(tensor), err_msg=name)


def config_edit(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """Returns a change of config.json."""

    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        change(config)
        (path / "config.json").write_text(json.dumps(config))

    return apply


def tensor_edit(change: Callable[[dict[str, Any]], Any]) -> Edit:
    """Returns a change of the stored tensors, given as {name: torch tensor}."""

    def apply(path: Path) -> None:
        from safetensors.torch import load, save

        file = path / "model.safetensors"
        tensors = load(file.read_bytes())
        change(tensors)
        file.unlink()
        file.write_bytes(save(tensors, {"format": "pt"}))

    return apply
