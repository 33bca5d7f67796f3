"""The streaming loop: what it writes (read back with the gguf package), what it reports, what it refuses, how much memory it takes."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize as gguf_dequantize
from safetensors.torch import load_file

from tersor import slabs
from tersor.containers import open_checkpoint
from tersor.errors import ContainerError, FormatError, ModelError, OutputError, RecipeError
from tersor.pipeline import quantize
from tiny import tiny_config, tiny_model, tiny_tensors

DOWN = "model.layers.0.mlp.down_proj.weight"


def gguf_tensor(path: Path, name: str) -> np.ndarray:
    tensor = next(t for t in GGUFReader(str(path)).tensors if t.name == name)
    return gguf_dequantize(tensor.data, tensor.tensor_type)


def weights(hidden: int = 64, **options: int) -> dict[str, np.ndarray]:
    return tiny_tensors(tiny_config("llama", hidden, options.get("intermediate", 128), 2, 4, 2, True))


def test_what_is_written_and_reported(tmp_path):
    model = tiny_model(tmp_path / "m")
    result = quantize(model, tmp_path / "out.gguf", "q8_0, down_proj=q4_0, layers.1.down_proj=f16")
    stored = {t.name: t for t in result.tensors}
    assert (stored[DOWN].format, stored[DOWN].source, stored[DOWN].method) == ("q4_0", "f32", "rtn")
    assert stored["model.layers.1.mlp.down_proj.weight"].format == "f16"
    assert stored["model.layers.1.mlp.down_proj.weight"].method == "cast"
    assert stored["model.norm.weight"].method == "keep"
    w = weights()[DOWN]
    read = gguf_tensor(tmp_path / "out.gguf", "blk.0.ffn_down.weight")
    expected = np.linalg.norm((read - w).astype(np.float64)) / np.linalg.norm(w.astype(np.float64))
    assert 0.02 < expected < 0.2
    assert stored[DOWN].error == pytest.approx(expected, rel=1e-5)
    assert stored[DOWN].bits_per_weight == 4.5
    assert result.file_bytes == (tmp_path / "out.gguf").stat().st_size
    assert result.bits_per_weight == pytest.approx(8 * result.file_bytes / sum(v.size for v in weights().values()))
    assert (result.container, result.note) == ("gguf", "")


def test_slabs_give_the_same_bytes(tmp_path, monkeypatch):
    model = tiny_model(tmp_path / "m", dtype="bf16")
    for recipe, name in (("q4_0", "a.gguf"), ("clip:int4_g32", "a")):
        quantize(model, tmp_path / name, recipe)
        monkeypatch.setattr(slabs, "SLAB_BYTES", 4 * 64 * 7)  # 7 rows of 64 columns a thread
        quantize(model, tmp_path / f"slabs-{name}", recipe)
        monkeypatch.undo()
        with open_checkpoint(tmp_path / name) as a, open_checkpoint(tmp_path / f"slabs-{name}") as b:
            for tensor in a.tensors:
                x, y = a.read(tensor), b.read(tensor)
                assert x.format == y.format
                for field in x.fields:
                    np.testing.assert_array_equal(x.fields[field], y.fields[field])


def test_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1 << 18)
    peaks = []
    for layers in (2, 12):
        model = tiny_model(tmp_path / f"m{layers}", hidden=256, intermediate=1024, layers=layers)
        quantize(model, tmp_path / "warm.gguf", "q4_0", force=True)
        tracemalloc.start()
        quantize(model, tmp_path / f"{layers}.gguf", "q4_0", verify=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        quantize(model, tmp_path / f"{layers}v.gguf", "q4_0")  # the gguf package keeps records of its own
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.15 * peaks[0] + 200_000, peaks  # 200 kB: names and records of 90 more tensors
    assert peaks[3] < 8e6, peaks  # the model is 47 MB


def test_a_quantized_source_is_dequantized_and_said(tmp_path):
    model = tiny_model(tmp_path / "m")
    quantize(model, tmp_path / "a.gguf", "q4_1")
    result = quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0")
    assert "stored in q4_1 (14 tensors), q8_0 (1 tensor)" in result.note
    a, b = (gguf_tensor(tmp_path / f, "blk.0.ffn_down.weight") for f in ("a.gguf", "b.gguf"))
    assert 0 < np.abs(a - b).max() <= np.abs(a).max() / 127


def test_keep_copies_the_bytes(tmp_path):
    model = tiny_model(tmp_path / "m")
    quantize(model, tmp_path / "a.gguf", "clip:q4_0")
    quantize(tmp_path / "a.gguf", tmp_path / "b.gguf", "q8_0, mlp=keep")
    tensors = [next(t for t in GGUFReader(str(tmp_path / f)).tensors if t.name == "blk.1.ffn_up.weight") for f in ("a.gguf", "b.gguf")]
    np.testing.assert_array_equal(tensors[0].data, tensors[1].data)


def test_output_container_follows_name_recipe_and_to(tmp_path):
    model = tiny_model(tmp_path / "m")
    assert quantize(model, tmp_path / "a", "int8_c").container == "compressed-tensors"
    assert quantize(model, tmp_path / "b", "bf16").container == "huggingface"
    assert quantize(model, tmp_path / "v0.1", "bf16").container == "huggingface"
    assert quantize(model, tmp_path / "c.gguf", "bf16").container == "gguf"
    assert quantize(model, tmp_path / "d.gguf").container == "gguf"
    assert {t.format for t in quantize(model, tmp_path / "e").tensors if "proj" in t.name} == {"int4_g128s", "int4_g64s"}


def test_progress_ends_at_the_total(tmp_path):
    calls = []
    quantize(tiny_model(tmp_path / "m"), tmp_path / "a.gguf", "q4_0", progress=lambda *call: calls.append(call))
    assert list(dict.fromkeys(call[0] for call in calls)) == ["quantize", "verify"]
    for what, total in (("quantize", sum(v.size for v in weights().values())), ("verify", len(weights()))):
        done = [call[1] for call in calls if call[0] == what]
        assert done == sorted(done) and (done[0], done[-1]) == (0, total)
        assert {call[2] for call in calls if call[0] == what} == {total}


@pytest.mark.parametrize("source", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("target", ["f32", "f16", "bf16"])
def test_casts_round_once_and_exactly(tmp_path, source, target):
    model = tiny_model(tmp_path / "m", dtype=source)
    quantize(model, tmp_path / "out", target)
    types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, w in weights().items():
        expected = torch.from_numpy(w).to(types[source]).to(types[target])
        assert written[name].dtype == types[target]
        assert torch.equal(written[name], expected), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(types[target]).removeprefix("torch.")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", ["q4_0", "q4_0, mlp=keep"])
def test_bad_weights_are_named_and_nothing_is_left(tmp_path, value, recipe, monkeypatch):
    monkeypatch.setattr(slabs, "SLAB_BYTES", 4 * 128 * 8)
    w = weights()[DOWN]
    w[21, 5] = value
    model = tiny_model(tmp_path / "m", change={DOWN: w})
    with pytest.raises(ModelError, match=rf"{DOWN} holds {value} at row 21, column 5"):
        quantize(model, tmp_path / "a.gguf", recipe)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_weights_whose_sum_overflows_are_not_taken_for_infinite(tmp_path):
    w = np.full((64, 128), 3e38, np.float32)
    model = tiny_model(tmp_path / "m", change={DOWN: w})
    quantize(model, tmp_path / "a", "bf16")
    with open_checkpoint(tmp_path / "a") as checkpoint:
        assert slabs.dequantize(checkpoint.read(DOWN)).min() > 2.9e38


@pytest.mark.parametrize("recipe", ["f16", "q4_0", "int4_g64"])
def test_weights_beyond_float16_are_refused(tmp_path, recipe):
    w = weights()[DOWN]
    w[3, 4] = 1e9
    model = tiny_model(tmp_path / "m", change={DOWN: w})
    with pytest.raises(FormatError, match=rf"{DOWN}.*(65504|float16)"):
        quantize(model, tmp_path / ("a.gguf" if recipe == "q4_0" else "a"), recipe)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("out", "recipe", "to", "error", "says"),
    [
        ("a.gguf", "int4_g64", None, ContainerError, "gguf cannot hold int4_g64 of model.layers.0.* can: use --to compressed-tensors"),
        ("a", "q4_0", None, ContainerError, r"compressed-tensors cannot hold q4_0 of .*name the output \*.gguf"),
        ("a", "int4_g96", None, FormatError, "int4_g96: model.layers.0.* has 64 columns"),
        ("a.gguf", "q4_k", None, FormatError, "q4_k: model.layers.0.* has 64 columns, not a multiple of 256"),
        ("a.gguf", "q4_0", "ggml", RecipeError, "unknown container or engine 'ggml'; known: awq, "),
        ("a.safetensors", "int4_g64", None, OutputError, "name a directory"),
        ("a.gguf", "int4_g64", "compressed-tensors", OutputError, "name a directory"),
        ("m", "int4_g64", None, OutputError, "is the model itself"),
    ],
)
def test_refusals_before_anything_is_written(tmp_path, out, recipe, to, error, says):
    model = tiny_model(tmp_path / "m")
    with pytest.raises(error, match=says):
        quantize(model, tmp_path / out, recipe, to=to, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_an_output_that_exists_needs_force(tmp_path):
    model = tiny_model(tmp_path / "m")
    (tmp_path / "a.gguf").write_text("mine")
    with pytest.raises(OutputError, match="force"):
        quantize(model, tmp_path / "a.gguf", "q4_0")
    assert (tmp_path / "a.gguf").read_text() == "mine"
    assert quantize(model, tmp_path / "a.gguf", "q4_0", force=True).file_bytes > 4


def test_keep_of_a_type_that_the_container_lacks(tmp_path):
    quantize(tiny_model(tmp_path / "m"), tmp_path / "a.gguf", "q4_0")
    with pytest.raises(ContainerError, match="`keep` copies q4_0 as it is"):
        quantize(tmp_path / "a.gguf", tmp_path / "b", "int4_g64, mlp=keep")


def test_an_interrupt_leaves_nothing(tmp_path):
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_model(tmp_path / "m"), tmp_path / "a.gguf", "q4_0", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_threads_must_be_a_number_of_threads(tmp_path):
    with pytest.raises(RecipeError, match="threads: got 0"):
        quantize(tiny_model(tmp_path / "m"), tmp_path / "a.gguf", "q4_0", threads=0)


def test_zero_weights_have_no_error(tmp_path):
    model = tiny_model(tmp_path / "m", change={DOWN: np.zeros((64, 128), np.float32)})
    result = quantize(model, tmp_path / "a.gguf", "q4_0")
    assert next(t for t in result.tensors if t.name == DOWN).error == 0.0
