"""llama.cpp's importance matrix: bytes laid down by hand, the gguf package as a foreign reader, hostile files, every refusal."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import gguf_bytes as g
from tersor.calibration.imatrix import is_imatrix, read_imatrix, write_imatrix
from tersor.containers import open_checkpoint
from tersor.errors import ContainerError, ModelError, OutputError
from tersor.tensor import InputStatistics

PAIRS: dict[str, tuple[Any, Any]] = {
    "general.type": (g.STRING, "imatrix"),
    "imatrix.datasets": ((g.ARRAY, g.STRING), ["a.txt"]),
    "imatrix.chunk_count": (g.U32, 2),
    "imatrix.chunk_size": (g.U32, 4),
}
PROVENANCE = {"source": "a.txt", "samples": 2, "seqlen": 4}
Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


def by_hand(
    sums: dict[str, list[float]], counts: dict[str, list[float]], pairs: dict[str, tuple[Any, Any]] = PAIRS, kind: int = 0
) -> bytes:
    """Returns an imatrix GGUF. kind: ggml type of the sums (0: f32)."""
    tensors, data = [], b""
    for suffix, part in ((".in_sum2", sums), (".counts", counts)):
        for name, values in part.items():
            dims = (len(values), 1) if suffix == ".in_sum2" else (1, len(values))
            tensors.append(g.Tensor(name + suffix, kind, dims, len(data)))
            data += struct.pack(f"<{len(values)}f", *values)
            data += b"\0" * (-len(data) % 32)
    return g.gguf_bytes(pairs, tensors, data)


def legacy(entries: list[tuple[str, int, list[float]]], tail: bytes = struct.pack("<ii", 2, 5) + b"a.txt") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        out += struct.pack(f"<{len(values)}f", *values)
    return out + tail


def statistics(mean_square: list[float], tokens: int = 8) -> InputStatistics:
    values = np.array(mean_square, np.float32)
    return InputStatistics(tokens, values, values, values)


def read(tmp_path: Path, content: bytes, **options: Any) -> dict[str, InputStatistics]:
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    return dict(read_imatrix(path, "llama", **options).statistics)


def refused(tmp_path: Path, content: bytes, **options: Any) -> str:
    with pytest.raises(ContainerError) as caught:
        read(tmp_path, content, **options)
    text = str(caught.value)
    assert str(tmp_path / "i.dat") in text and "\n" not in text and len(text) < 1000
    return text


def test_reads_gguf(tmp_path: Path) -> None:
    sums = {"blk.0.attn_q.weight": [8.0, 0.0, 4.0], "blk.1.ffn_down.weight": [3.0, 6.0]}
    found = read(tmp_path, by_hand(sums, {"blk.0.attn_q.weight": [8.0], "blk.1.ffn_down.weight": [6.0]}))
    assert set(found) == {Q, DOWN}
    assert found[Q].tokens == 8 and found[Q].mean_square.tolist() == [1.0, 0.0, 0.5] and found[Q].mean_square.dtype == np.float32
    assert found[DOWN].tokens == 6 and found[DOWN].importance.tolist() == [0.5, 1.0]
    assert found[Q].gram is None and np.isnan(found[Q].absmax).all() and np.isnan(found[Q].mean_abs).all()


@pytest.mark.parametrize("tail", [b"", struct.pack("<ii", 2, 5) + b"a.txt"])
def test_reads_dat(tail: bytes, tmp_path: Path) -> None:
    found = read(tmp_path, legacy([("blk.0.attn_q.weight", 2, [2.0, 0.0]), ("output.weight", 3, [1.5])], tail))
    assert set(found) == {Q, "lm_head.weight"}
    assert found[Q].mean_square.tolist() == [1.0, 0.0] and found[Q].tokens == 1024
    assert found["lm_head.weight"].mean_square.tolist() == [0.5] and found["lm_head.weight"].tokens == 1536


def test_provenance_is_what_the_file_says(tmp_path: Path) -> None:
    entry = {NAME: [1.0]}
    unsaid = {"source": None, "kind": "imatrix", "samples": None, "seqlen": None, "entries": 1}
    odd = {
        "general.type": (g.STRING, "imatrix"),
        "imatrix.datasets": (g.STRING, "a"),
        "imatrix.chunk_count": (g.STRING, "2"),
        "imatrix.chunk_size": (g.U32, 2**31),
    }
    cases = [
        (by_hand(entry, entry), unsaid | {"source": "a.txt", "samples": 2, "seqlen": 4}),
        (by_hand(entry, entry, {"general.type": (g.STRING, "imatrix")}), unsaid),
        (by_hand(entry, entry, odd), unsaid),
        (legacy([(NAME, 1, [1.0])]), unsaid | {"source": "a.txt", "samples": 2}),
        (legacy([(NAME, 1, [1.0])], b""), unsaid),
        (legacy([(NAME, 1, [1.0])], struct.pack("<i", -1)), unsaid),
    ]
    for content, said in cases:
        (tmp_path / "i.x").write_bytes(content)
        found = read_imatrix(tmp_path / "i.x", "llama")
        assert found.provenance == said | {"file": "i.x", "sha256": hashlib.sha256(content).hexdigest()}
        assert set(found.statistics) == {Q}


def test_sums_of_x_are_passed_over(tmp_path: Path) -> None:
    tensors = [g.Tensor(f"{NAME}.{part}", 0, (1, 1), 32 * i) for i, part in enumerate(("in_sum", "in_sum2", "counts"))]
    data = b"".join(struct.pack("<f", value) + bytes(28) for value in (-1.0, 6.0, 2.0))
    assert read(tmp_path, g.gguf_bytes(PAIRS, tensors, data))[Q].mean_square.tolist() == [3.0]


def test_what_is_an_importance_matrix(tmp_path: Path) -> None:
    entry = {NAME: [1.0]}
    contents = {"a.gguf": by_hand(entry, entry), "b": by_hand(entry, entry), "c.dat": legacy([(NAME, 1, [1.0])])}
    others = {"d.dat": b"a text", "e.dat": b"a", "f.txt": contents["c.dat"], "g.dat": b"", "h.txt": b"GGU"}
    for name, content in (contents | others).items():
        (tmp_path / name).write_bytes(content)
        assert is_imatrix(tmp_path / name) == (name in contents), name
    assert not is_imatrix(tmp_path) and not is_imatrix(tmp_path / "nowhere.dat") and not is_imatrix("a\0b")


def test_writes_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    write_imatrix(path, {DOWN: statistics([0.5, 1.0], 6), Q: statistics([1.0, 0.0, 0.5])}, "llama", PROVENANCE)
    reader = gguf.GGUFReader(path)
    keys = ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    assert [reader.fields[k].contents() for k in keys] == ["imatrix", ["a.txt"], 2, 4]
    assert json.loads(reader.fields["tersor.calibration"].contents()) == PROVENANCE
    assert {t.name: (t.data.tolist(), t.shape.tolist(), t.tensor_type.name) for t in reader.tensors} == {
        "blk.0.attn_q.weight.in_sum2": ([[8.0, 0.0, 4.0]], [3, 1], "F32"),
        "blk.0.attn_q.weight.counts": ([[8.0]], [1, 1], "F32"),
        "blk.1.ffn_down.weight.in_sum2": ([[3.0, 6.0]], [2, 1], "F32"),
        "blk.1.ffn_down.weight.counts": ([[6.0]], [1, 1], "F32"),
    }
    assert [t.name for t in reader.tensors] == sorted(t.name for t in reader.tensors)  # as llama-imatrix orders them
    again = read_imatrix(path, "llama").statistics
    assert again[Q].mean_square.tolist() == [1.0, 0.0, 0.5] and again[DOWN].tokens == 6


def test_same_statistics_give_the_same_bytes(tmp_path: Path) -> None:
    for name, order in (("a", [Q, DOWN]), ("b", [DOWN, Q])):
        write_imatrix(tmp_path / name, {key: statistics([1.0, 2.0]) for key in order}, "llama", PROVENANCE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_write_refuses(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    good = {Q: statistics([1.0])}
    with pytest.raises(ContainerError, match="unknown model_type 'mamba'"):
        write_imatrix(path, good, "mamba", PROVENANCE)
    with pytest.raises(ContainerError, match=r"no place for tensor 'model\.layers\.0\.mlp\.router\.weight'"):
        write_imatrix(path, {"model.layers.0.mlp.router.weight": statistics([1.0])}, "llama", PROVENANCE)
    for bad in (statistics([1.0, float("nan")]), statistics([float("inf")]), statistics([3e38]), statistics([1.0], tokens=0)):
        with pytest.raises(ModelError, match=f"{Q}: statistics of . tokens, or not finite"):
            write_imatrix(path, {Q: bad}, "llama", PROVENANCE)
    assert not list(tmp_path.iterdir())
    write_imatrix(path, good, "llama", PROVENANCE)
    with pytest.raises(OutputError, match="exists already"):
        write_imatrix(path, good, "llama", PROVENANCE)
    write_imatrix(path, good, "llama", PROVENANCE, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["i.gguf"]


NAME = "blk.0.attn_q.weight"
BAD_GGUF = {
    "not an imatrix": (by_hand({}, {}, {"general.type": (g.STRING, "model")}), "general.type is 'model', not imatrix"),
    "no type": (by_hand({}, {}, {}), "general.type is 'missing'"),
    "no counts": (by_hand({NAME: [1.0]}, {}), "in_sum2 and counts are f32 [1, 1] and None"),
    "no sums": (by_hand({}, {NAME: [1.0]}), "in_sum2 and counts are None and f32 [1, 1]"),
    "neither": (g.gguf_bytes(PAIRS, [g.Tensor("x", 0, (1, 1), 0)], bytes(32)), "'x': in_sum2 and counts are None and None"),
    "experts": (by_hand({NAME: [1.0]}, {NAME: [1.0, 2.0]}), "the matrices of experts are not read"),
    "f16": (by_hand({NAME: [1.0, 1.0]}, {NAME: [1.0]}, kind=1), "are f16 [1, 2] and f16 [1, 1]; need f32"),
    "no tokens": (by_hand({NAME: [0.0]}, {NAME: [0.0]}), "saw 0 tokens; make the importance matrix from more text"),
    "nan tokens": (by_hand({NAME: [0.0]}, {NAME: [float("nan")]}), "saw nan tokens"),
    "negative": (by_hand({NAME: [-1.0]}, {NAME: [1.0]}), "negative or not finite"),
    "infinite": (by_hand({NAME: [float("inf")]}, {NAME: [1.0]}), "negative or not finite"),
    "not a number": (by_hand({NAME: [float("nan")]}, {NAME: [1.0]}), "negative or not finite"),
    "unknown": (by_hand({"blk.0.ssm\n.weight": [1.0]}, {"blk.0.ssm\n.weight": [1.0]}), "is no tensor of this llama; the importance matrix"),
    "truncated": (by_hand({NAME: [1.0] * 64}, {NAME: [1.0]})[:-64], "truncated"),
}  # fmt: skip
BAD_DAT = {
    "one byte": (b"\1", "the number of entries at byte 0 needs 4 bytes, the file ends at 1"),
    "text": (b"hello, this is a text", "is damaged or no importance matrix"),
    "no entries": (struct.pack("<i", 0), "announces 0 entries"),
    "negative entries": (struct.pack("<i", -1), "announces -1 entries"),
    "long name": (struct.pack("<ii", 1, 2**31 - 1) + b"blk", "name 0 at byte 8 needs 2147483647 bytes"),
    "negative name": (struct.pack("<ii", 1, -1), "name 0 at byte 8 needs -1 bytes"),
    "many values": (struct.pack("<iicii", 1, 1, b"x", 1, 2**31 - 1), "the values of 'x' at byte 17 needs 8589934588 bytes"),
    "no calls": (legacy([(NAME, 0, [1.0])]), "has 0 calls and 1 values"),
    "no values": (legacy([(NAME, 1, [])]), "has 1 calls and 0 values"),
    "twice": (legacy([(NAME, 1, [1.0]), (NAME, 1, [1.0])]), "or appears twice"),
    "bad name": (legacy([("\x00", 1, [1.0])]), "'\\x00' is no tensor of this llama"),
    "truncated": (legacy([(NAME, 1, [1.0, 2.0])], b"")[:-1], "needs 8 bytes"),
    "nan": (legacy([(NAME, 1, [float("nan")])]), "negative or not finite"),
    "half a count": (legacy([(NAME, 1, [1.0])], b"\1"), "the number of chunks at byte 39 needs 4 bytes"),
    "half a length": (legacy([(NAME, 1, [1.0])], bytes(6)), "the length of the text's name at byte 43 needs 4 bytes"),
    "long text name": (legacy([(NAME, 1, [1.0])], struct.pack("<ii", 1, 9)), "the text's name at byte 47 needs 9 bytes"),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_malformed_gguf(case: str, tmp_path: Path) -> None:
    content, text = BAD_GGUF[case]
    assert text in refused(tmp_path, content)


@pytest.mark.parametrize("case", BAD_DAT)
def test_malformed_dat(case: str, tmp_path: Path) -> None:
    content, text = BAD_DAT[case]
    assert text in refused(tmp_path, content)


def test_of_another_model(tmp_path: Path) -> None:
    content = by_hand({NAME: [1.0, 2.0]}, {NAME: [1.0]})
    assert read(tmp_path, content, shapes={Q: (4, 2)})[Q].tokens == 1
    assert "has 2 columns, the model's 3; the importance matrix is of another model" in refused(tmp_path, content, shapes={Q: (4, 3)})
    assert "is no tensor of this llama" in refused(tmp_path, content, shapes={DOWN: (4, 2)})
    assert "the file is empty" in refused(tmp_path, b"")
    with pytest.raises(ContainerError, match="cannot read: No such file"):
        read_imatrix(tmp_path / "nowhere", "llama")


@pytest.mark.parametrize(
    "content", [by_hand({NAME: [1.0] * 8}, {NAME: [2.0]}), legacy([(NAME, 1, [1.0] * 8), ("output.weight", 1, [1.0])])]
)
def test_damaged_copies_are_refused_or_read(content: bytes, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    refusals = 0
    for _ in range(300):
        damaged = bytearray(content)
        at = int(rng.integers(len(damaged)))
        edge = [0, 1, 2**31 - 1, 2**31, 2**32 - 1][int(rng.integers(5))]
        damaged[at : at + 4] = struct.pack("<I", edge) if rng.random() < 0.7 else b""
        (tmp_path / "i.dat").write_bytes(damaged)
        try:
            found = read_imatrix(tmp_path / "i.dat", "llama").statistics
        except ContainerError:
            refusals += 1
        else:
            assert all(np.isfinite(s.mean_square).all() and s.tokens > 0 for s in found.values())
    assert refusals > 30


@pytest.mark.parametrize(
    ("kind", "says"),
    [("imatrix", "an importance matrix, no model; give it to tersor quantize as --calib"), ("adapter", "adapter, no model")],
)
def test_it_is_no_model(tmp_path: Path, kind: str, says: str) -> None:
    (tmp_path / "i.gguf").write_bytes(
        by_hand({"blk.0.attn_q.weight": [1.0]}, {"blk.0.attn_q.weight": [1.0]}, PAIRS | {"general.type": (g.STRING, kind)})
    )
    with pytest.raises(ContainerError, match=f"i.gguf is {says}"):
        open_checkpoint(tmp_path / "i.gguf")
