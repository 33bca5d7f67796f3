"""Hugging Face directories: what is read, carried over, sharded and refused; outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tersor.containers import open_checkpoint, output
from tersor.containers.directory import CARRIED
from tersor.containers.directory_writer import DirectoryWriter
from tersor.containers.safetensors_file import ShardWriter
from tersor.errors import ContainerError, OutputError
from tersor.tensor import ModelDescription, QuantizedTensor, TensorInfo
from tiny import safetensors_bytes, tiny_model


def library_tensors(path: Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a directory as the safetensors library reads them."""
    out = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "np") as shard:
            out |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return out


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_reads_what_the_library_reads(shards: int, dtype: str, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m", shards=shards, dtype=dtype)
    checkpoint, expected = open_checkpoint(path), library_tensors(path)
    assert checkpoint.container == "huggingface" and set(checkpoint.tensors) == set(expected)
    for name, array in expected.items():
        info, tensor = checkpoint.tensors[name], checkpoint.read(name)
        assert (info.format, info.shape, info.nbytes) == (dtype, array.shape, array.nbytes)
        np.testing.assert_array_equal(tensor.fields["values"].reshape(array.shape), array)
        assert not tensor.fields["values"].flags.writeable
    part = checkpoint.read("model.embed_tokens.weight", slice(3, 9))
    assert part.shape == (6, 64)
    np.testing.assert_array_equal(part.fields["values"], expected["model.embed_tokens.weight"][3:9])
    assert checkpoint.read("model.norm.weight", slice(0, 1)).shape == (1, 64)  # a vector is one row


def test_bfloat16_is_raw_bits(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model(tmp_path / "m", dtype="bf16", change={"model.norm.weight": np.full(64, -1.5, np.float32)}))
    values = checkpoint.read("model.norm.weight").fields["values"]
    assert values.dtype == np.uint16 and set(values[0].tolist()) == {0xBFC0}


def test_small_files_are_carried(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m")
    for name in CARRIED:
        if not (path / name).exists():
            (path / name).write_bytes(f"content of {name}".encode())
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool.jinja").write_text("t")
    (path / "README.md").write_text("not carried")
    source = open_checkpoint(path)
    write(tmp_path / "out", source.description, {n: source.read(n) for n in source.tensors})
    kept = {*CARRIED, "additional_chat_templates/tool.jinja"}
    assert {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*") if f.is_file()} == {
        *kept,
        "config.json",
        "model.safetensors",
    }
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((path / "config.json").read_text())


@pytest.mark.parametrize(("stated", "expected"), [(True, True), (False, False), (None, True)])
def test_a_tied_head_is_hidden(stated: bool | None, expected: bool, tmp_path: Path) -> None:
    """A copy of the embedding that is stored as the head is no tensor of its own; gemma ties when the config is silent."""
    path = tiny_model(tmp_path / "m", "gemma2", tie=False)
    config = json.loads((path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(config | ({} if stated is None else {"tie_word_embeddings": stated})))
    checkpoint = open_checkpoint(path)
    assert ("lm_head.weight" not in checkpoint.tensors) == expected
    assert checkpoint.description.config["tie_word_embeddings"] == expected


def test_ties_are_stated_when_the_config_is_silent(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m", tie=True)
    config = json.loads((path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(path).description.config["tie_word_embeddings"] is True


# --- refusals -------------------------------------------------------------------------------------------------------------


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        (path / name).write_text(json.dumps(change(json.loads((path / name).read_text()))))

    return apply


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(content) and None  # type: ignore[return-value]


def pickled(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "pytorch_model.bin").touch()


INDEX = "model.safetensors.index.json"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "no config.json"),
    "config is a list": (replaced("config.json", b"[]"), "holds a JSON list, needs an object"),
    "config is no JSON": (replaced("config.json", b"{"), "not valid JSON"),
    "config with a key twice": (replaced("config.json", b'{"a": 1, "a": 2}'), "'a' appears twice"),
    "quantization_config is text": (edit("config.json", lambda c: c | {"quantization_config": "x"}), "is no object"),
    "quantized by another method": (
        edit("config.json", lambda c: c | {"quantization_config": {"quant_method": "exl3"}}),
        "unknown quant_method 'exl3'; known: auto-round, awq, ",
    ),
    "shard missing": (lambda p: (p / "model-00002-of-00003.safetensors").unlink(), "shard model-00002-of-00003.safetensors of 3"),
    "shard truncated": (
        lambda p: os.truncate(p / "model-00002-of-00003.safetensors", 900),
        "model-00002-of-00003.safetensors",
    ),
    "index without weight_map": (replaced(INDEX, b"{}"), "weight_map must map"),
    "weight_map of numbers": (replaced(INDEX, b'{"weight_map": {"a": 1}}'), "weight_map must map"),
    "shard outside": (replaced(INDEX, b'{"weight_map": {"a": "../x.safetensors"}}'), "'../x.safetensors' is no name of a safetensors file"),
    "shard is no safetensors": (replaced(INDEX, b'{"weight_map": {"a": "config.json"}}'), "'config.json' is no name"),
    "index promises more": (
        edit(INDEX, lambda i: {"weight_map": i["weight_map"] | {"x": "model-00001-of-00003.safetensors"}}),
        "lacks tensor 'x', which the index promises",
    ),
    "index lists less": (
        edit(INDEX, lambda i: {"weight_map": {k: v for k, v in i["weight_map"].items() if k != "model.embed_tokens.weight"}}),
        "holds tensor 'model.embed_tokens.weight', which the index does not list",
    ),
    "no index": (lambda p: (p / INDEX).unlink(), "3 safetensors files but no model.safetensors.index.json"),
    "pickle": (lambda p: ((p / INDEX).unlink(), pickled(p)), "weights are pickled (pytorch_model.bin), which can run code"),
    "no weights": (lambda p: [f.unlink() for f in p.glob("*.safetensors*")], "no safetensors file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_directory_is_refused(case: str, tmp_path: Path) -> None:
    change, text = REFUSED[case]
    path = tiny_model(tmp_path / "m", shards=3)
    change(path)
    with pytest.raises(ContainerError) as caught:
        open_checkpoint(path)
    assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "shape", "text"),
    [("I64", [1], "is I64; weights are F32, F16, BF16"), ("F32", [], "at least one value"), ("F32", [0, 2], "at least one value")],
)
def test_tensors_that_are_no_weights_are_refused(dtype: str, shape: list[int], text: str, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m")
    size = {"I64": 8, "F32": 4}[dtype] if 0 not in shape else 0
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(ContainerError) as caught:
        open_checkpoint(path)
    assert text in str(caught.value)


def test_unknown_tensor_names_a_near_one(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model(tmp_path / "m"))
    with pytest.raises(
        ContainerError, match=r"no tensor 'layers\.0\.q_proj\.weight'; there is model\.layers\.0\.self_attn\.q_proj\.weight"
    ):
        checkpoint.read("layers.0.q_proj.weight")
    with pytest.raises(ContainerError, match=r"no tensor 'x'; it has 20 tensors, `tersor inspect` lists them"):
        checkpoint.read("x")


def test_huge_side_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.containers.directory.MAX_SIDE_FILE_BYTES", 1000)
    path = tiny_model(tmp_path / "m")
    with pytest.raises(ContainerError, match=r"tokenizer\.json: \d+ bytes, above the limit of 1000"):
        open_checkpoint(path)


def test_what_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ContainerError, match=r"no such file or directory; give a \.gguf file, a model directory or a hub id"):
        open_checkpoint(tmp_path / "none")
    (tmp_path / "x.bin").write_bytes(b"1234")
    with pytest.raises(ContainerError, match="not a GGUF file"):
        open_checkpoint(tmp_path / "x.bin")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "m.gguf").touch()
    with pytest.raises(ContainerError, match=r"no config\.json; open m\.gguf itself"):
        open_checkpoint(tmp_path / "d")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: (_ for _ in ()).throw(OSError("offline\nmore")))
    with pytest.raises(ContainerError, match=r"org/name: no such file or directory here, and not to be had from the hub: offline$"):
        open_checkpoint("org/name")


def test_hub_ids_are_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    path = tiny_model(tmp_path / "m")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda repository, allow_patterns: asked.update({repository: allow_patterns}) or path
    )
    assert open_checkpoint("org/name").path == path
    assert not any("bin" in p or p.endswith("*") or "pt" in p for p in asked["org/name"])


# --- writing ----------------------------------------------------------------------------------------------------------------


def write(
    path: Path, description: ModelDescription, tensors: dict[str, QuantizedTensor], force: bool = False, limit: int = 5_000_000_000
) -> None:
    plan = [TensorInfo(n, t.format, t.shape, t.nbytes) for n, t in tensors.items()]
    with DirectoryWriter(path, description, plan, force=force, max_shard_bytes=limit) as writer:
        for name in reversed(tensors):  # any order
            writer.write(name, tensors[name])


def floats(**shapes: tuple[int, ...]) -> dict[str, QuantizedTensor]:
    rng = np.random.default_rng(0)
    return {
        n: QuantizedTensor("f32", s, {"values": rng.standard_normal((int(np.prod(s[:-1])), s[-1]), np.float32)}) for n, s in shapes.items()
    }


def test_shards_are_cut_at_the_limit(tmp_path: Path) -> None:
    tensors = floats(a=(4, 8), b=(4, 8), c=(100, 8), d=(2, 8))
    write(tmp_path / "m", ModelDescription({"model_type": "llama"}), tensors, limit=256)
    names = sorted(f.name for f in (tmp_path / "m").glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    assert {n: s[6:11] for n, s in index["weight_map"].items()} == {"a": "00001", "b": "00001", "c": "00002", "d": "00003"}
    found = library_tensors(tmp_path / "m")
    assert set(found) == set(tensors) and all((found[n] == tensors[n].fields["values"]).all() for n in tensors)


def test_existing_outputs(tmp_path: Path) -> None:
    tensors, config = floats(a=(2, 2)), ModelDescription({"model_type": "llama"})
    write(tmp_path / "m", config, tensors)
    with pytest.raises(OutputError, match="exists already; choose another name or use --force"):
        write(tmp_path / "m", config, tensors)
    (tmp_path / "m" / "old").touch()
    write(tmp_path / "m", config, tensors, force=True)
    assert sorted(f.name for f in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "photos").mkdir()
    with pytest.raises(OutputError, match=r"is a directory without config\.json, and --force replaces only a model directory"):
        write(tmp_path / "photos", config, tensors, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, and --force replaces only a model directory"):
        write(tmp_path / "file", config, tensors, force=True)
    with pytest.raises(OutputError, match="does not exist; create it first"):
        write(tmp_path / "none" / "m", config, tensors)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "m", "photos"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_nothing_is_left_behind(error: type[BaseException], tmp_path: Path) -> None:
    tensors = floats(a=(2, 2), b=(2, 2))
    plan = [TensorInfo(n, t.format, t.shape, t.nbytes) for n, t in tensors.items()]
    with pytest.raises(error), DirectoryWriter(tmp_path / "m", ModelDescription({}), plan, force=False) as writer:
        writer.write("a", tensors["a"])
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_forced_replacement_that_fails_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = floats(a=(2, 2))
    write(tmp_path / "m", ModelDescription({"n": 1}), tensors)
    rename, calls = Path.rename, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OutputError, match="cannot write: input/output error"):
        write(tmp_path / "m", ModelDescription({"n": 2}), tensors, force=True)
    assert [f.name for f in tmp_path.iterdir()] == ["m"] and json.loads((tmp_path / "m" / "config.json").read_text()) == {"n": 1}


def test_full_disk_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OutputError, match=r"needs 64 bytes, the disk has 10 free; make room or choose another disk"):
        write(tmp_path / "m", ModelDescription({}), floats(a=(4, 4)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_while_writing(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(code, "no space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(OutputError, match="the disk is full; the output needs 64 bytes"):
        write(tmp_path / "m", ModelDescription({}), floats(a=(4, 4)))
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_written_is_what_transformers_reads(tmp_path: Path) -> None:
    import torch

    bits = np.array([[0x3FC0, 0xC000, 0x0001, 0x7F80]], np.uint16)
    write(tmp_path / "m", ModelDescription({}), {"x": QuantizedTensor("bf16", (1, 4), {"values": bits})})
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        tensor = file.get_tensor("x")
    assert tensor.dtype == torch.bfloat16 and tensor.view(torch.uint16).tolist() == bits.tolist()


def test_bytes_of_a_hand_made_file(tmp_path: Path) -> None:
    """The helper of the other tests, which lays bytes by hand, and our writer give the same file but for the header's spacing."""
    tensors = floats(a=(3, 2))
    write(tmp_path / "m", ModelDescription({}), tensors)
    mine, theirs = (tmp_path / "m" / "model.safetensors").read_bytes(), safetensors_bytes({"a": tensors["a"].fields["values"]})
    assert mine[-24:] == theirs[-24:] and json.loads(mine[8 : 8 + mine[0]]) == json.loads(theirs[8 : 8 + theirs[0]])
