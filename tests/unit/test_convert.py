"""Conversion between containers: values stay the same to the bit, or it is refused with the tensor's name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tersor.containers import CONTAINERS, open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.conversion import convert
from tersor.errors import ContainerError, FormatError, OutputError, RecipeError
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
    monkeypatch.setattr("tersor.conversion.SLAB_VALUES", 1000)  # several slabs, the last one short
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
    ("format", "container", "target", "becomes"),
    [
        *(("q4_0", "gguf", "b", "int4_g32s"), ("q4_1", "gguf", "b", "int4_g32m"), ("q8_0", "gguf", "b", "int8_g32s")),
        *(("int4_g32s", "compressed-tensors", "b.gguf", "q4_0"), ("int4_g64s", "compressed-tensors", "b.gguf", "q4_0")),
        *(("int5_g32s", "compressed-tensors", "b.gguf", "q5_0"), ("int8_cs", "compressed-tensors", "b.gguf", "q8_0")),
    ],
)
def test_grids_that_agree_keep_every_value(format: str, container: str, target: str, becomes: str, tmp_path: Path) -> None:
    path = quantized(tmp_path / f"a{CONTAINERS[container].suffix}", tiny_model(tmp_path / "hf"), format, container)
    to = "mlx" if becomes == "int4_g32m" else None
    changes = convert(path, tmp_path / target, to).changes
    assert {(c.source, c.format, c.error) for c in changes} == {(format, becomes, 0.0)}
    first, last = open_checkpoint(path), open_checkpoint(tmp_path / target)
    for name, info in first.tensors.items():
        assert last.tensors[name].format == (becomes if info.format == format else info.format)
        np.testing.assert_array_equal(values(last, name), values(first, name), err_msg=name)


@pytest.mark.parametrize(
    ("format", "container", "to"),
    [("q4_1", "gguf", "compressed-tensors"), ("int4_g32", "compressed-tensors", "gguf"), ("q4_0", "gguf", "huggingface")],
)
def test_what_would_round_again_is_refused(format: str, container: str, to: str, tmp_path: Path) -> None:
    path = quantized(tmp_path / f"a{CONTAINERS[container].suffix}", tiny_model(tmp_path / "hf"), format, container)
    text = rf"q_proj\.weight is {format}, whose numbers {to} cannot hold; add --requantize RECIPE .*--dequantize f16"
    with pytest.raises(ContainerError, match=text):
        convert(path, tmp_path / "b", to)
    assert not (tmp_path / "b").exists()


def test_requantize_rounds_only_what_has_no_place_and_tells_the_error(tmp_path: Path) -> None:
    path = quantized(tmp_path / "a", tiny_model(tmp_path / "hf"), "int4_g32", "compressed-tensors")
    changes = convert(path, tmp_path / "b.gguf", requantize="rtn:q8_0").changes
    first, last = open_checkpoint(path), open_checkpoint(tmp_path / "b.gguf")
    assert {c.name for c in changes} == {name for name, info in first.tensors.items() if info.format == "int4_g32"}
    for change in changes:
        was, is_now = values(first, change.name), values(last, change.name)
        assert (change.source, change.format) == ("int4_g32", "q8_0")
        assert change.error == pytest.approx(np.linalg.norm(is_now - was) / np.linalg.norm(was), rel=1e-5)
        assert 0 < change.error < 0.01
    for recipe, text in (("gptq:q8_0", "gptq needs more than the weights"), ("keep", "choose another --requantize")):
        with pytest.raises((RecipeError, ContainerError), match=text):
            convert(path, tmp_path / "c.gguf", requantize=recipe)


def test_bad_arguments(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "hf")
    with pytest.raises(ContainerError, match=r"unknown container 'zip'; known: .*compressed-tensors, .*gguf, .*huggingface"):
        convert(path, tmp_path / "b", "zip")
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
