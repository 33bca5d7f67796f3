"""Conversion between containers: values stay the same to the bit, or it is refused with the tensor's name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tersor.containers import CONTAINERS, open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.containers.convert import convert
from tersor.errors import ContainerError, FormatError, OutputError
from tersor.formats import get_format
from tersor.tensor import TensorInfo
from tiny import ARCHITECTURES, tiny_model


def values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    tensor = checkpoint.read(name)
    return get_format(tensor.format).dequantize(tensor)


def quantized(path: Path, source: Path, format: str, container: str) -> Path:
    """Writes the model with its projections in this format."""
    checkpoint = open_checkpoint(source)
    tensors = {n: checkpoint.read(n) for n in checkpoint.tensors}
    tensors |= {n: get_format(format).quantize(values(checkpoint, n)) for n in tensors if "_proj" in n}
    plan = [TensorInfo(n, t.format, t.shape, t.nbytes) for n, t in tensors.items()]
    with CONTAINERS[container].create(path, checkpoint.description, plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_there_and_back(model_type: str, dtype: str, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "hf", model_type, dtype=dtype, tie=model_type != "qwen2")
    convert(source, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    first, last = open_checkpoint(source), open_checkpoint(tmp_path / "back")
    assert (last.container, set(last.tensors)) == ("huggingface", set(first.tensors))
    assert last.description.config["dtype"] == {"f32": "float32", "bf16": "bfloat16"}[dtype]
    for name in first.tensors:
        exact = dtype == "bf16" or not name.endswith("norm.weight")  # 1 + w loses bits of a float32 w, not of a bfloat16 one
        np.testing.assert_allclose(values(last, name), values(first, name), rtol=0, atol=0 if exact else 1e-7, err_msg=name)


@pytest.mark.parametrize("format", ["q4_0", "q8_0", "q5_1"])
def test_gguf_to_gguf_keeps_the_blocks(format: str, tmp_path: Path) -> None:
    path = quantized(tmp_path / "a.gguf", tiny_model(tmp_path / "hf"), format, "gguf")
    convert(path, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_compressed_tensors_to_itself(tmp_path: Path) -> None:
    path = quantized(tmp_path / "a", tiny_model(tmp_path / "hf"), "int4_g32", "compressed-tensors")
    convert(path, tmp_path / "b")
    assert (path / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert (path / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


@pytest.mark.parametrize(("format", "container"), [("q4_0", "gguf"), ("int4_g32", "compressed-tensors")])
@pytest.mark.parametrize("float_format", ["f32", "f16", "bf16"])
def test_dequantized_on_demand(format: str, container: str, float_format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.containers.convert.SLAB_VALUES", 1000)  # several slabs, the last one short
    path = quantized(tmp_path / f"a{CONTAINERS[container].suffix}", tiny_model(tmp_path / "hf"), format, container)
    convert(path, tmp_path / "b", dequantize=float_format)
    first, last = open_checkpoint(path), open_checkpoint(tmp_path / "b")
    assert last.container == "huggingface"
    for name, info in first.tensors.items():
        expected = values(first, name)
        if info.format == format:
            assert last.tensors[name].format == float_format
            expected = get_format(float_format).dequantize(get_format(float_format).quantize(expected))
        np.testing.assert_array_equal(values(last, name), expected)


@pytest.mark.parametrize(
    ("format", "container", "to", "text"),
    [
        (
            "q4_0",
            "gguf",
            "huggingface",
            "model.layers.0.self_attn.q_proj.weight is q4_0, which huggingface cannot hold without rounding again",
        ),
        ("q4_0", "gguf", None, "is q4_0, which compressed-tensors cannot hold without rounding again; choose --to gguf"),
        ("int4_g32s", "compressed-tensors", "gguf", "is int4_g32s, which gguf cannot hold without rounding again; use `tersor quantize`"),
        ("int4_g32s", "compressed-tensors", "huggingface", "is int4_g32s, which huggingface cannot hold"),
    ],
)
def test_what_would_round_again_is_refused(format: str, container: str, to: str | None, text: str, tmp_path: Path) -> None:
    path = quantized(tmp_path / f"a{CONTAINERS[container].suffix}", tiny_model(tmp_path / "hf"), format, container)
    with pytest.raises(ContainerError) as caught:
        convert(path, tmp_path / "b", to)
    assert text in str(caught.value) and not (tmp_path / "b").exists()


def test_bad_arguments(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "hf")
    with pytest.raises(ContainerError, match="unknown container 'onnx'; known: compressed-tensors, gguf, huggingface"):
        convert(path, tmp_path / "b", "onnx")
    with pytest.raises(FormatError, match="unknown float format 'q4_0'; known: bf16, f16, f32"):
        convert(path, tmp_path / "b", dequantize="q4_0")
    with pytest.raises(OutputError, match="is the input; choose another name"):
        convert(path, path, force=True)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(OutputError, match="exists already"):
        convert(path, tmp_path / "m.gguf")
    convert(path, tmp_path / "m.gguf", force=True)
    assert open_checkpoint(tmp_path / "m.gguf").container == "gguf"


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    big = {"model.layers.0.mlp.up_proj.weight": np.full((128, 64), 1e5, np.float32)}
    path = quantized(tmp_path / "a.gguf", tiny_model(tmp_path / "hf", change=big), "mxfp4", "gguf")
    with pytest.raises(FormatError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: "):
        convert(path, tmp_path / "b", dequantize="f16")
    assert not (tmp_path / "b").exists()


def test_an_opened_checkpoint_stays_open(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model(tmp_path / "hf"))
    convert(checkpoint, tmp_path / "m.gguf")
    assert checkpoint.read("model.norm.weight").shape == (64,)
