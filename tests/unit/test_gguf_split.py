"""GGUF models in several files: against the gguf package's own splitting writer, and what does not belong together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from tersor.cli.app import app
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.containers.gguf import GGUF
from tersor.containers.gguf_file import BLOCK_TYPES
from tersor.containers.gguf_split import part_paths, split, stored_files
from tersor.conversion import convert
from tersor.engine import load
from tersor.errors import ContainerError, OutputError, TersorError
from tersor.inspection import inspect
from tersor.pipeline import file_bytes, quantize
from tersor.tensor import TensorInfo
from tersor.verification.readers import READERS
from tiny import tiny_model

KEYS = {
    "dataset": ("STRING", "wiki.txt"),
    "entries_count": ("INT32", 14),
    "chunks_count": ("INT32", 12),
}
SIZE = 40_000  # the tokenizer alone takes some 15 kB


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("m")
    quantize(tiny_model(path / "hf", hidden=64, intermediate=128, layers=2), path / "m.gguf", "q8_0")
    return path / "m.gguf"


@pytest.fixture
def parts(whole: Path, tmp_path: Path) -> list[Path]:
    convert(whole, tmp_path / "s.gguf", split_bytes=SIZE, verify=False)
    return sorted(tmp_path.iterdir())


def same(one: Checkpoint, two: Checkpoint) -> None:
    assert {n: (i.format, i.shape) for n, i in one.tensors.items()} == {n: (i.format, i.shape) for n, i in two.tensors.items()}
    for name in one.tensors:
        for field, expected in one.read(name).fields.items():
            np.testing.assert_array_equal(two.read(name).fields[field], expected, err_msg=name)


def test_parts_are_named_keyed_and_of_the_size(whole: Path, parts: list[Path]) -> None:
    count = len(parts)
    assert count > 2 and [p.name for p in parts] == [f"s-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    assert all(part.stat().st_size <= SIZE for part in parts) and sum(p.stat().st_size for p in parts) > whole.stat().st_size
    tensors: dict[str, Any] = {}
    for number, part in enumerate(parts):
        reader = gguf.GGUFReader(part)
        keys = {key: (field.types, field.contents()) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert keys["split.no"] == ([gguf.GGUFValueType.UINT16], number)
        assert keys["split.count"] == ([gguf.GGUFValueType.UINT16], count)
        assert keys["split.tensors.count"] == ([gguf.GGUFValueType.INT32], len(gguf.GGUFReader(whole).tensors))
        assert len(keys) == 3 if number else "tokenizer.ggml.tokens" in keys
        assert reader.tensors
        tensors |= {tensor.name: tensor for tensor in reader.tensors}
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(whole).tensors}
    assert list(tensors) == list(expected)
    for name, tensor in expected.items():
        assert tensors[name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(tensors[name].data, tensor.data)


def test_any_part_opens_the_whole(whole: Path, parts: list[Path]) -> None:
    expected = open_checkpoint(whole)
    for part in parts:
        found = open_checkpoint(part)
        assert found.path == parts[0] and found.container == "gguf"
        same(expected, found)
        assert found.description.config == expected.description.config
        assert dict(found.description.files) == dict(expected.description.files)
        found.release()
        found.close()
    assert file_bytes(parts[1]) == sum(part.stat().st_size for part in parts) == inspect(parts[2]).file_bytes
    tokens = np.array([5, 6, 7], np.int32)
    logits = [m.head(m.forward(tokens, m.new_cache(8))) for m in (load(whole), load(parts[-1]))]
    np.testing.assert_array_equal(*logits)


def test_the_independent_reader_finds_all_parts(whole: Path, parts: list[Path]) -> None:
    expected, found = dict(READERS["gguf"].weights(whole)), dict(READERS["gguf"].weights(parts[1]))
    assert list(expected) == list(found)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_merged_again_it_is_the_same_file(whole: Path, parts: list[Path], tmp_path: Path) -> None:
    convert(parts[0], tmp_path / "merged.gguf", verify=False)
    assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()


def test_reads_what_the_gguf_package_splits(whole: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(tmp_path / "g.gguf", "llama", split_max_tensors=5)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == -(-len(reader.tensors) // 5)
    for part in files:
        same(open_checkpoint(whole), open_checkpoint(part))


def test_a_tensor_larger_than_the_size_has_its_own_file(whole: Path, tmp_path: Path) -> None:
    done = convert(whole, tmp_path / "s.gguf", split_bytes=1, verify=False)
    assert len(list(tmp_path.iterdir())) == len(open_checkpoint(whole).tensors)
    same(open_checkpoint(whole), open_checkpoint(done.path))


def test_one_file_that_fits_is_part_one_of_one(whole: Path, tmp_path: Path) -> None:
    convert(whole, tmp_path / "s.gguf", split_bytes=1 << 30, verify=False)
    assert [p.name for p in tmp_path.iterdir()] == ["s-00001-of-00001.gguf"]
    same(open_checkpoint(whole), open_checkpoint(tmp_path / "s-00001-of-00001.gguf"))


def test_the_command_says_what_it_wrote(whole: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(whole), str(tmp_path / "s.gguf"), "--split-size", "40kB", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert found["path"] == str(parts[0]) and found["file_bytes"] == sum(part.stat().st_size for part in parts)
    assert found["verification"]["verdict"] == "verified" and set(found["verification"]["files"]) == {part.name for part in parts}
    assert found["verification"]["compared"] == len(open_checkpoint(whole).tensors)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_nothing(error: type[BaseException], whole: Path, tmp_path: Path) -> None:
    source = open_checkpoint(whole)
    with pytest.raises(error), GGUF().create(tmp_path / "s.gguf", source.description, list(source.tensors.values()), max_bytes=SIZE):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_existing_parts_need_force(whole: Path, parts: list[Path]) -> None:
    with pytest.raises(OutputError, match=r"s-00001-of-0000\d\.gguf: exists already; choose another name or use --force"):
        convert(whole, parts[0].with_name("s.gguf"), split_bytes=SIZE, verify=False)
    convert(whole, parts[0].with_name("s.gguf"), split_bytes=SIZE, force=True, verify=False)
    assert sorted(parts[0].parent.iterdir()) == parts


def test_names() -> None:
    assert [p.name for p in part_paths(Path("a/m-00002-of-00009.gguf"), 2)] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert stored_files(Path("x.gguf")) == [Path("x.gguf")]


def edited(part: Path, key: bytes, value: bytes) -> None:
    """Overwrites the value of a key of a split, which begins 4 bytes after the key: its type is before it."""
    data = bytearray(part.read_bytes())
    at = data.index(key) + len(key) + 4
    data[at : at + len(value)] = value
    part.write_bytes(data)


def renamed(parts: list[Path]) -> None:
    parts[0].rename(parts[0].with_name("m.gguf"))


NAMED = "split.no and split.count are {found}, its name says 1 and {n}"
REFUSED: dict[str, tuple[Any, str]] = {
    "missing": (lambda p: p[1].unlink(), "part 2 of {n} is missing; download it too"),
    "renamed": (renamed, "is one of {n} files of a model, which are called name-00001-of-"),
    "other number": (lambda p: edited(p[1], b"split.no", b"\2\0"), NAMED.replace("{found}", "2 and {n}")),
    "other count": (lambda p: edited(p[1], b"split.count", b"\2\0"), NAMED.replace("{found}", "1 and 2")),
    "other total": (lambda p: edited(p[0], b"split.tensors.count", b"\3\0\0\0"), "split.tensors.count is 3, but the {n} files"),
    "negative total": (lambda p: edited(p[0], b"split.tensors.count", b"\3\0\0\x80"), "needs an integer >= 0; the file is damaged"),
    "a part twice": (
        lambda p: (p[2].write_bytes(p[1].read_bytes()), edited(p[2], b"split.no", b"\2\0")),
        "is in s-00002-of-0000{n}.gguf too; the file is damaged",
    ),
    "cut": (lambda p: p[1].write_bytes(p[1].read_bytes()[:-100]), "truncated"),
    "no model": (lambda p: p[1].write_bytes(b"nothing here"), "a GGUF file starts with"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_belong_together_are_refused(case: str, parts: list[Path]) -> None:
    change, text = REFUSED[case]
    change(parts)
    path = parts[0] if parts[0].exists() else parts[0].with_name("m.gguf")
    with pytest.raises(ContainerError) as caught:
        open_checkpoint(path)
    assert text.format(n=len(parts)) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("to", "size", "text"), [("huggingface", 100, "only gguf is split on demand"), ("gguf", 0, "need a positive size")]
)
def test_what_cannot_be_split(to: str, size: int, text: str, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(TersorError, match=text):
        convert(whole, tmp_path / "s", to=to, dequantize="f32", split_bytes=size, verify=False)
    assert list(tmp_path.iterdir()) == []


def test_more_files_than_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.containers.gguf_split.MOST_FILES", 3)
    with pytest.raises(ContainerError, match="m: 4 files of 1 bytes; at most 3 can be counted, use a larger size"):
        split("m", {}, [(f"t{n}", BLOCK_TYPES["f32"], (1,)) for n in range(4)], 1)


def test_provenance_goes_with_the_weights(tmp_path: Path) -> None:
    """llama-quantize's keys, read by the gguf package; a file converted as it is keeps them."""
    source = open_checkpoint(tiny_model(tmp_path / "hf", layers=2))
    made = {"recipe": "gptq:q8_0", "calibration": {"source": "wiki.txt", "samples": 12, "seqlen": 64}}
    plan = [TensorInfo(n, i.format, i.shape, i.nbytes) for n, i in source.tensors.items()]
    with CONTAINERS["gguf"].create(tmp_path / "m.gguf", replace(source.description, provenance=made), plan) as writer:
        for info in plan:
            writer.write(info.name, source.read(info.name))
    convert(tmp_path / "m.gguf", tmp_path / "copy.gguf", verify=False)
    for name in ("m.gguf", "copy.gguf"):
        fields = gguf.GGUFReader(tmp_path / name).fields
        found = {key: (fields[f"quantize.imatrix.{key}"].types[0].name, fields[f"quantize.imatrix.{key}"].contents()) for key in KEYS}
        assert found == KEYS
        assert fields["tersor.recipe"].contents() == "gptq:q8_0"
