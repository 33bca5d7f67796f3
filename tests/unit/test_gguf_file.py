"""One GGUF file: what is refused and in which words, golden bytes, and agreement with the gguf package in both directions."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import gguf_bytes as g
from tersor.containers.gguf_file import BLOCK_TYPES, GGUFFile, file_types, lay_out, write_file
from tersor.errors import ContainerError

ARCH = {"general.architecture": (g.STRING, "llama")}
ONE = [g.Tensor("a", 0, (8,), 0)]
DATA = bytes(32)


def pair(body: bytes, n: int = 1) -> bytes:
    """Returns a file with n key-values whose bytes are given."""
    return g.preamble(0, n) + body


def tensor_file(body: bytes, n: int = 1, data: bytes = DATA) -> bytes:
    """Returns a file with n tensor infos whose bytes are given."""
    head = g.preamble(n, 0) + body
    return head + bytes(-len(head) % 32) + data


BAD: dict[str, tuple[bytes, str]] = {
    "three bytes": (b"GGU", "the magic number at byte 0 needs 4 bytes, the file ends at 3"),
    "wrong magic": (b"GGML" + bytes(60), "starts with b'GGML'"),
    "version 1": (g.preamble(0, 0, version=1), "GGUF version 1; versions 2 and 3"),
    "version 4": (g.preamble(0, 0, version=4), "GGUF version 4"),
    "version 0": (g.preamble(0, 0, version=0), "GGUF version 0"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "no counts": (g.preamble(0, 0)[:12], "the tensor count"),
    "2^63 tensors": (g.preamble(2**63, 0), "announces 9223372036854775808 tensors, but 0 bytes follow"),
    "2^40 key-values": (g.preamble(0, 2**40) + bytes(100), "key-values, but 100 bytes follow"),
    "key longer than the file": (pair(struct.pack("<Q", 2**62) + bytes(40)), "key 0 at byte 32 needs 4611686018427387904 bytes"),
    "key is not UTF-8": (pair(g.string(b"\xff\xfe") + g.value(g.U32, 1)), "not UTF-8"),
    "key twice": (
        g.gguf_bytes(ARCH, [])[:24].replace(struct.pack("<QQ", 0, 1), struct.pack("<QQ", 0, 2)) + (g.string("k") + g.value(g.U32, 1)) * 2,
        "'k' appears twice",
    ),
    "unknown value type": (pair(g.string("k") + struct.pack("<I", 13) + bytes(8)), "unknown type 13"),
    "value cut off": (pair(g.string("k") + struct.pack("<I", g.F64) + bytes(4)), "needs 8 bytes"),
    "string longer than the file": (pair(g.string("k") + struct.pack("<IQ", g.STRING, 2**60)), "truncated or damaged"),
    "value is not UTF-8": (pair(g.string("k") + g.value(g.STRING, b"\xc3")), "not UTF-8"),
    "array of unknown type": (pair(g.string("k") + struct.pack("<IIQ", g.ARRAY, 77, 1) + bytes(8)), "unknown type 77"),
    "array of arrays": (pair(g.string("k") + struct.pack("<IIQ", g.ARRAY, g.ARRAY, 1) + bytes(16)), "array of arrays"),
    "array longer than the file": (pair(g.string("k") + struct.pack("<IIQ", g.ARRAY, g.U64, 2**61)), "needs 18446744073709551616 bytes"),
    "strings longer than the file": (pair(g.string("k") + struct.pack("<IIQ", g.ARRAY, g.STRING, 2**60)), "truncated or damaged"),
    "string of an array too long": (pair(g.string("k") + struct.pack("<IIQQ", g.ARRAY, g.STRING, 1, 99)), "string 0 of the value of 'k'"),
    "strings that pass the end": (pair(g.string("k") + struct.pack("<IIQ", g.ARRAY, g.STRING, 2) + g.string("12345678")), "string 1 of"),
    "string of an array not UTF-8": (
        pair(g.string("k") + g.value((g.ARRAY, g.STRING), [b"\xff"])),
        "string 0 of the value of 'k' is not UTF-8",
    ),
    "alignment 0": (g.gguf_bytes({"general.alignment": (g.U32, 0)}, []), "general.alignment is u32 0"),
    "alignment 24": (g.gguf_bytes({"general.alignment": (g.U32, 24)}, []), "power of two"),
    "alignment of text": (g.gguf_bytes({"general.alignment": (g.STRING, "32")}, []), "general.alignment is str 32"),
    "alignment of 2^31": (g.gguf_bytes({"general.alignment": (g.U32, 2**31)}, []), "power of two"),
    "no axes": (g.gguf_bytes(ARCH, [g.Tensor("a", 0, (), 0)], DATA), "has 0 axes"),
    "five axes": (g.gguf_bytes(ARCH, [g.Tensor("a", 0, (1, 1, 1, 1, 8), 0)], DATA), "has 5 axes"),
    "2^32 axes": (tensor_file(g.string("a") + struct.pack("<I", 2**32 - 1) + bytes(40)), "has 4294967295 axes"),
    "empty axis": (g.gguf_bytes(ARCH, [g.Tensor("a", 0, (8, 0), 0)], DATA), "product is not in"),
    "overflow": (g.gguf_bytes(ARCH, [g.Tensor("a", 0, (2**32, 2**32), 0)], DATA), "product is not in"),
    "unknown type": (g.gguf_bytes(ARCH, [g.Tensor("a", 31, (8,), 0)], DATA), "unknown ggml type '31'; known: "),
    "type of activations": (g.gguf_bytes(ARCH, [g.Tensor("a", 9, (32,), 0)], bytes(64)), "unknown ggml type '9'"),
    "ragged blocks": (g.gguf_bytes(ARCH, [g.Tensor("a", 2, (40,), 0)], DATA), "40 columns, not a multiple of q4_0's block of 32"),
    "unaligned offset": (g.gguf_bytes(ARCH, [g.Tensor("a", 0, (8,), 4)], bytes(64)), "offset 4, not a multiple of the alignment 32"),
    "offset beyond the end": (g.gguf_bytes(ARCH, [g.Tensor("a", 0, (8,), 2**62)], DATA), "ends at byte"),
    "data cut off": (g.gguf_bytes(ARCH, ONE, DATA[:-1]), "'a' ends at byte"),
    "no data": (g.gguf_bytes(ARCH, ONE), "truncated, download it again"),
    "overlap": (g.gguf_bytes(ARCH, [g.Tensor("a", 0, (16,), 0), g.Tensor("b", 0, (8,), 32)], bytes(64)), "'b' overlaps 'a'"),
    "name twice": (g.gguf_bytes(ARCH, [g.Tensor("a", 0, (8,), 0), g.Tensor("a", 0, (8,), 32)], bytes(64)), "'a' appears twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_is_refused(case: str, tmp_path: Path) -> None:
    content, text = BAD[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ContainerError) as caught:
        GGUFFile(path)
    assert text in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_reads_every_value_type(tmp_path: Path) -> None:
    pairs: dict[str, tuple[Any, Any]] = {
        "u8": (g.U8, 200), "i8": (g.I8, -100), "u16": (g.U16, 60000), "i16": (g.I16, -30000), "u32": (g.U32, 4_000_000_000),
        "i32": (g.I32, -5), "f32": (g.F32, 0.5), "yes": (g.BOOL, True), "no": (g.BOOL, False), "text": (g.STRING, "häß\n"),
        "u64": (g.U64, 2**63), "i64": (g.I64, -(2**62)), "f64": (g.F64, 1e300),
        "numbers": ((g.ARRAY, g.I32), [1, -2, 3]), "texts": ((g.ARRAY, g.STRING), ["a", "", "ü"]), "empty": ((g.ARRAY, g.STRING), []),
    }  # fmt: skip
    path = tmp_path / "m.gguf"
    path.write_bytes(g.gguf_bytes(pairs, []))
    read = GGUFFile(path).metadata
    assert {key: list(value) if isinstance(value, np.ndarray) else value for key, (_, value) in read.items()} == {
        key: value for key, (_, value) in pairs.items()
    }
    assert [kind for kind, _ in read.values()][:10] == ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "bool", "str"]
    assert [kind for kind, _ in read.values()][10:] == ["u64", "i64", "f64", "[i32]", "[str]", "[str]"]


def test_golden_bytes(tmp_path: Path) -> None:
    """A file of one key-value and one Q4_0 tensor, as docs/gguf.md draws it."""
    layout = lay_out({"k": ("u16", 7)}, [("ab", BLOCK_TYPES["q4_0"], (2, 64))])
    write_file(tmp_path / "m.gguf", layout).close()
    expected = (
        b"GGUF" b"\x03\0\0\0" b"\x01\0\0\0\0\0\0\0" b"\x01\0\0\0\0\0\0\0"
        b"\x01\0\0\0\0\0\0\0" b"k" b"\x02\0\0\0" b"\x07\0"
        b"\x02\0\0\0\0\0\0\0" b"ab" b"\x02\0\0\0" b"\x40\0\0\0\0\0\0\0" b"\x02\0\0\0\0\0\0\0" b"\x02\0\0\0" b"\0\0\0\0\0\0\0\0"
    )  # fmt: skip
    expected += bytes(96 - len(expected))
    assert (tmp_path / "m.gguf").read_bytes() == expected + bytes(96)  # 4 blocks of 18 bytes, padded to 96


@pytest.mark.parametrize("name", sorted(BLOCK_TYPES.keys() - {"q2_0"}))  # q2_0: below
def test_type_table_is_ggmls(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert (BLOCK_TYPES[name].id, BLOCK_TYPES[name].size, BLOCK_TYPES[name].nbytes) == (int(kind), *gguf.GGML_QUANT_SIZES[kind])


def test_q2_0_is_the_type_of_ggml_h() -> None:
    assert (BLOCK_TYPES["q2_0"].id, BLOCK_TYPES["q2_0"].size, BLOCK_TYPES["q2_0"].nbytes) == (42, 64, 18)  # newer than the gguf package


def test_file_types_name_the_format() -> None:
    assert {f: file_types()[f] for f in ("f32", "f16", "bf16", "q4_0", "q4_k", "q6_k", "iq4_xs")} == {
        "f32": 0, "f16": 1, "bf16": 32, "q4_0": 2, "q4_k": 15, "q6_k": 18, "iq4_xs": 30,
    }  # fmt: skip


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {"w": rng.integers(0, 256, (6, 2 * 34)).astype(np.uint8), "v": rng.standard_normal(5).astype(np.float32)}
    metadata = {
        "general.architecture": ("str", "llama"),
        "a.list": ("[f32]", np.array([1, 2.5], np.float32)),
        "a.words": ("[str]", ["x", "yy"]),
        "a.flag": ("bool", True),
    }
    layout = lay_out(metadata, [("w", BLOCK_TYPES["q8_0"], (6, 64)), ("v", BLOCK_TYPES["f32"], (5,))])
    file = write_file(tmp_path / "m.gguf", layout)
    for name in ("v", "w"):
        file.seek(layout.tensors[name].offset)
        file.write(tensors[name].tobytes())
    file.close()
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert {k: reader.fields[k].contents() for k in metadata} == {
        "general.architecture": "llama", "a.list": [1.0, 2.5], "a.words": ["x", "yy"], "a.flag": True,
    }  # fmt: skip
    for tensor in reader.tensors:
        np.testing.assert_array_equal(tensor.data, tensors[tensor.name])
    assert [t.tensor_type.name for t in reader.tensors] == ["Q8_0", "F32"]


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_reads_what_the_gguf_package_writes(alignment: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_block_count(3)
    writer.add_token_list(["a", "b", "ccc"])
    dense, blocks = rng.standard_normal((3, 5)).astype(np.float32), rng.integers(0, 256, (4, 144)).astype(np.uint8)
    writer.add_tensor("dense", dense)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.metadata["llama.block_count"] == ("u32", 3) and file.metadata["tokenizer.ggml.tokens"] == ("[str]", ["a", "b", "ccc"])
    assert file.tensors["blocks"].shape == (4, 256) and file.tensors["blocks"].type.name == "q4_k" and file.alignment == alignment
    np.testing.assert_array_equal(file.rows("dense").view(np.float32), dense)
    np.testing.assert_array_equal(file.rows("blocks", slice(1, 3)), blocks[1:3])
    first = file.rows("blocks")
    assert not first.flags.writeable and np.shares_memory(first, file.rows("blocks"))
    file.release()
    file.close()
    np.testing.assert_array_equal(first, blocks)
