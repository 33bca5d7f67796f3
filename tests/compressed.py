"""compressed-tensors directories in tests: written with chosen formats, damaged on purpose, decompressed by the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers import CONTAINERS, open_checkpoint
from tersor.containers.safetensors_file import Entry, SafetensorsFile, ShardWriter
from tersor.formats import get_format
from tersor.tensor import ActivationScheme, QuantizedTensor, TensorInfo

CT = CONTAINERS["compressed-tensors"]


def quantized(
    out: Path, source: Path, choose: Callable[[str], str | None], activations: ActivationScheme | None = None
) -> dict[str, QuantizedTensor]:
    """Writes the model with the chosen format of every matrix; returns the tensors as they were written."""
    checkpoint = open_checkpoint(source)
    tensors = {}
    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        format = choose(name) if len(info.shape) == 2 else None
        tensors[name] = get_format(format).quantize(get_format(tensor.format).dequantize(tensor)) if format else tensor
    plan = [TensorInfo(n, t.format, t.shape, t.nbytes) for n, t in tensors.items()]
    with CT.create(out, replace(checkpoint.description, activations=activations), plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return tensors


def linears(format: str) -> Callable[[str], str | None]:
    return lambda name: format if "_proj" in name else None


def values(tensor: QuantizedTensor) -> np.ndarray:
    return get_format(tensor.format).dequantize(tensor)


def decompressed(path: Path, wide: bool) -> dict[str, np.ndarray]:
    """Returns every quantized weight of a directory as the compressed-tensors package decompresses it.

    wide: the scales are brought to float32 first, as loading the model in float32 does; otherwise as they are stored.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    config = QuantizationConfig.model_validate(json.loads((path / "config.json").read_text())["quantization_config"])
    stored = load_file(path / "model.safetensors")
    modules = {name.rpartition(".")[0] for name in stored if name.endswith("weight_scale")}
    out = {}
    for module in modules:
        exact = [s for s in config.config_groups.values() if module in s.targets]
        scheme = exact[0] if exact else next(iter(config.config_groups.values()))
        state = {name.rpartition(".")[2]: t for name, t in stored.items() if name.rpartition(".")[0] == module}
        state["weight_scale"] = state["weight_scale"].to(torch.float32) if wide else state["weight_scale"]
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        weight = compressor.decompress(state, scheme)["weight"]
        out[f"{module}.weight"] = (weight.float() if weight.dtype == torch.bfloat16 else weight).numpy()
    return out


def check_read_back(path: Path, tensors: dict[str, QuantizedTensor]) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.container == "compressed-tensors" and "quantization_config" not in checkpoint.description.config
    assert {n: (i.format, i.shape, i.nbytes) for n, i in checkpoint.tensors.items()} == {
        n: (t.format, t.shape, t.nbytes) for n, t in tensors.items()
    }
    for name, tensor in tensors.items():
        for rows in (None, slice(0, 1), slice(33, 70)) if len(tensor.shape) == 2 else (None,):
            found = checkpoint.read(name, rows)
            for field, expected in tensor.fields.items():
                part = expected if rows is None or (tensor.format.endswith(("_t", "_ts")) and field != "codes") else expected[rows]
                np.testing.assert_array_equal(found.fields[field], part, err_msg=f"{name} {field} {rows}")
            assert found.shape == (tensor.shape if rows is None else (len(next(iter(found.fields.values()))), tensor.shape[1]))


def config_edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Returns a change of the quantization_config."""

    def apply(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        change(config["quantization_config"])
        (path / "config.json").write_text(json.dumps(config))

    return apply


def weights_edit(**changes: Any) -> Callable[[Path], None]:
    return config_edit(lambda q: q["config_groups"]["group_0"]["weights"].update(changes))


def group_edit(**changes: Any) -> Callable[[Path], None]:
    return config_edit(lambda q: q["config_groups"]["group_0"].update(changes))


def tensor_edit(change: Callable[[dict[str, tuple[str, np.ndarray]]], Any]) -> Callable[[Path], None]:
    """Returns a change of the stored tensors, given as {name: (dtype, array)}."""

    def apply(path: Path) -> None:
        file = SafetensorsFile(path / "model.safetensors")
        tensors = {name: (entry.dtype, file.array(name).copy()) for name, entry in file.entries.items()}
        change(tensors)
        entries, end = [], 0
        for name, (dtype, array) in tensors.items():
            entries.append(Entry(name, dtype, array.shape, end, end + array.nbytes))
            end += array.nbytes
        writer = ShardWriter(path / "model.safetensors", entries)
        for entry in entries:
            writer.write(entry, tensors[entry.name][1])
        writer.close()

    return apply
