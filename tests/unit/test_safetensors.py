"""One safetensors file: what is refused and in which words, and that what we write the library reads, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from tersor.containers.safetensors_file import MAX_HEADER_BYTES, Entry, SafetensorsFile, ShardWriter
from tersor.errors import ContainerError


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Returns a file with this header, as JSON unless it is bytes already."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


NESTED = b'{"a":' * 100_000
BAD: dict[str, tuple[bytes, str]] = {
    "seven bytes": (b"1234567", "too short"),
    "header above the limit": (raw({}, length=MAX_HEADER_BYTES + 1), "above the limit"),
    "header longer than the file": (raw({}, length=3), "truncated"),
    "length of 2^63": (raw({}, length=2**63), "above the limit"),
    "no object": (raw(b"[1, 2]"), "does not start with"),
    "empty header": (raw(b""), "does not start with"),
    "bad JSON": (raw(b'{"a": }'), "not valid JSON"),
    "bad UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "nested": (raw(NESTED), "nested too deeply"),
    "huge number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "duplicate": (raw(b'{"a": 1, "a": 2}'), "'a' appears twice"),
    "metadata is no object": (raw({"__metadata__": 3}), "__metadata__"),
    "metadata of numbers": (raw({"__metadata__": {"a": 3}}), "__metadata__"),
    "entry is no object": (raw({"a": 3}), "exactly dtype, shape"),
    "entry lacks offsets": (raw({"a": {"dtype": "F32", "shape": []}}), "exactly dtype, shape"),
    "entry with more": (raw({"a": entry() | {"x": 1}}, b"1234"), "exactly dtype, shape"),
    "unknown dtype": (raw({"a": entry("F12")}, b"1234"), "unknown dtype 'F12'; known: BF16"),
    "dtype is no text": (raw({"a": entry() | {"dtype": ["F32"]}}, b"1234"), "unknown dtype"),
    "shape is no list": (raw({"a": entry() | {"shape": "1"}}, b"1234"), "not a list of sizes"),
    "shape of floats": (raw({"a": entry(shape=(1.0,))}, b"1234"), "not a list of sizes"),
    "shape of booleans": (raw({"a": entry(shape=(True,))}, b"1234"), "not a list of sizes"),
    "negative size": (raw({"a": entry(shape=(-1,))}, b"1234"), "not a list of sizes"),
    "size of 2^63": (raw({"a": entry(shape=(2**63,))}, b"1234"), "not a list of sizes"),
    "nine axes": (raw({"a": entry(shape=[1] * 9)}, b"1234"), "not a list of sizes"),
    "overflow": (raw({"a": entry(shape=(2**62, 4))}, b"1234"), "the header lies"),
    "three offsets": (raw({"a": entry(offsets=(0, 4, 4))}, b"1234"), "not [begin, end]"),
    "offsets turned round": (raw({"a": entry(offsets=(4, 0))}, b"1234"), "outside the 4 bytes"),
    "beyond the end": (raw({"a": entry(shape=(2,), offsets=(0, 8))}, b"1234"), "outside the 4 bytes"),
    "span and shape disagree": (raw({"a": entry(shape=(2,))}, b"1234"), "the header lies"),
    "overlap": (raw({"a": entry(), "b": entry(shape=(1,), offsets=(2, 6))}, b"123456"), "'b' at [2, 6) overlaps 'a'"),
    "same place": (raw({"a": entry(), "b": entry()}, b"1234"), "overlaps"),
    "hole": (raw({"a": entry(), "b": entry(offsets=(8, 12))}, b"1" * 12), "hole of 4 bytes"),
    "hole at the start": (raw({"a": entry(offsets=(4, 8))}, b"1" * 8), "hole of 4 bytes"),
    "bytes after the last": (raw({"a": entry()}, b"12345"), "5 bytes are there"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_is_refused(case: str, tmp_path: Path) -> None:
    content, text = BAD[case]
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(ContainerError) as caught:
        SafetensorsFile(path)
    assert text in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", BAD)
def test_what_the_library_accepts_of_these_is_known(case: str, tmp_path: Path) -> None:
    """We refuse all that the library refuses, and three things more, on purpose."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(BAD[case][0])
    ours_alone = {"duplicate", "entry with more", "nine axes"}
    try:
        with safe_open(path, "np"):
            assert case in ours_alone
    except SafetensorError:
        pass


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="cannot read: No such file"):
        SafetensorsFile(tmp_path / "none.safetensors")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(ContainerError, match="the file is empty"):
        SafetensorsFile(tmp_path / "empty.safetensors")
    with pytest.raises(ContainerError, match="cannot read"):
        SafetensorsFile(tmp_path)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "f32": rng.standard_normal((5, 3)).astype(np.float32),
        "f16": rng.standard_normal((2, 3, 4)).astype(np.float16),
        "i8": rng.integers(-128, 128, (7, 1)).astype(np.int8),
        "i64": np.arange(4),
        "scalar": np.array(3, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert set(file.entries) == set(tensors) and file.metadata == {"format": "pt"}
    for name, expected in tensors.items():
        array = file.array(name)
        assert array.dtype == expected.dtype and not array.flags.writeable
        np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(file.array("f32", slice(1, 4)), tensors["f32"][1:4])
    np.testing.assert_array_equal(file.array("f16", slice(1, None)), tensors["f16"][1:])
    assert file.array("f32", slice(3, 2)).shape == (0, 3)


def test_views_share_the_mapping_and_outlive_the_file(tmp_path: Path) -> None:
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    array, again = file.array("a"), file.array("a")
    assert np.shares_memory(array, again)
    file.release()
    file.close()
    np.testing.assert_array_equal(array, [[0, 1, 2], [3, 4, 5]])


def test_unaligned_data_is_copied(tmp_path: Path) -> None:
    """A header of a length that is no multiple of 4 is legal, and shifts all data off its alignment."""
    path = tmp_path / "m.safetensors"
    header = json.dumps({"a": entry(shape=(2,), offsets=(0, 8))}).encode()
    header += b" " * (-len(header) % 4 + 1)
    path.write_bytes(raw(header, np.array([1.5, -2.0], np.float32).tobytes()))
    array = SafetensorsFile(path).array("a")
    assert array.flags.aligned and array.tolist() == [1.5, -2.0]


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.int8)}
    entries = [Entry("a.weight", "F32", (2, 3), 0, 24), Entry("b", "I8", (5,), 24, 29)]
    writer = ShardWriter(tmp_path / "m.safetensors", entries)
    writer.write(entries[1], tensors["b"])  # any order
    writer.write(entries[0], tensors["a.weight"])
    writer.close()
    read = load_file(tmp_path / "m.safetensors")
    assert {name: array.tolist() for name, array in read.items()} == {name: array.tolist() for name, array in tensors.items()}
    with safe_open(tmp_path / "m.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "m.safetensors").read_bytes()[:8], "little") % 8 == 0
