"""The independent readers of GGUF, float and compressed-tensors models see exactly what was written, in every format and architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tersor.containers import CONTAINERS, open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.formats import FORMATS, get_format
from tersor.tensor import QuantizedTensor, TensorInfo
from tersor.verification.readers import READERS
from tiny import ARCHITECTURES, tiny_model

NAMES = ("compressed-tensors", "gguf", "huggingface")
CASES = [
    (name, format)
    for name in NAMES
    for format in FORMATS
    if CONTAINERS[name].holds(format) and FORMATS[format].can_encode and FORMATS[format].fits((256, 768))
    if name != "compressed-tensors" or format not in ("f32", "f16", "bf16")  # a directory of floats is huggingface's
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose rows of 768 values suit every group size."""
    return open_checkpoint(
        tiny_model(tmp_path_factory.mktemp("m") / "m", hidden=768, intermediate=256, layers=1, heads=4, kv_heads=2, tie=False)
    )


def write(name: str, path: Path, model: Checkpoint, tensors: dict[str, QuantizedTensor]) -> None:
    plan = [TensorInfo(n, t.format, t.shape, t.nbytes) for n, t in tensors.items()]
    with CONTAINERS[name].create(path, model.description, plan) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)


def check(name: str, path: Path, tensors: dict[str, QuantizedTensor]) -> None:
    found = dict(READERS[name].weights(path))
    assert set(found) == set(tensors)
    for key, tensor in tensors.items():
        expected = get_format(tensor.format).dequantize(tensor)
        assert found[key].dtype == np.float32 and found[key].shape == tensor.shape, key
        np.testing.assert_array_equal(found[key], expected, err_msg=key)


@pytest.mark.parametrize(("name", "format"), CASES)
def test_reader_sees_what_was_written(name: str, format: str, model: Checkpoint, tmp_path: Path) -> None:
    tensors = {key: model.read(key) for key in model.tensors}
    for key in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        tensors[key] = get_format(format).quantize(get_format(tensors[key].format).dequantize(tensors[key]))
    path = tmp_path / f"out{CONTAINERS[name].suffix}"
    write(name, path, model, tensors)
    check(name, path, tensors)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture(name: str, model_type: str, tmp_path: Path) -> None:
    """Names, row orders and norms come back; with a head of its own where the container has a place for one."""
    model = open_checkpoint(tiny_model(tmp_path / "m", model_type, heads=4, kv_heads=2, tie=model_type.startswith("gemma")))
    tensors = {key: model.read(key) for key in model.tensors}
    if name == "compressed-tensors":
        key = "model.layers.1.mlp.up_proj.weight"
        format = next(f for f in FORMATS if CONTAINERS[name].holds(f) and FORMATS[f].can_encode and f not in ("f32", "f16", "bf16"))
        tensors[key] = get_format(format).quantize(get_format(tensors[key].format).dequantize(tensors[key]))
    path = tmp_path / f"out{CONTAINERS[name].suffix}"
    write(name, path, model, tensors)
    if name == "gguf" and model_type.startswith("gemma"):  # which keeps 1 + norm in float32
        for key in [key for key in tensors if key.endswith("norm.weight")]:
            moved = tensors[key].fields["values"] + np.float32(1) - np.float32(1)
            tensors[key] = QuantizedTensor("f32", tensors[key].shape, {"values": moved})
    check(name, path, tensors)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_byte_is_seen(name: str, model: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / f"out{CONTAINERS[name].suffix}"
    format = "q8_0" if CONTAINERS[name].holds("q8_0") else "int8_cs" if CONTAINERS[name].holds("int8_cs") else "f32"
    tensors = {key: model.read(key) for key in model.tensors}
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] = get_format(format).quantize(get_format(tensors[key].format).dequantize(tensors[key]))
    write(name, path, model, tensors)
    file = path if path.is_file() else path / "model.safetensors"
    stored = bytes(next(iter(tensors[key].fields.values()))[0, 64:96].tobytes())
    data = bytearray(file.read_bytes())
    if format == "int8_cs":
        stored = bytes(b ^ 0x80 for b in stored)
    at = data.index(stored)
    data[at + 7] ^= 1
    file.write_bytes(data)
    with pytest.raises(AssertionError, match="up_proj"):
        check(name, path, tensors)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_needed_is_there(name: str) -> None:
    assert READERS[name].missing() is None and READERS[name].version()
