"""llama.cpp's importance matrix: how large the inputs of every matrix are on calibration text, as a file.

    GGUF    two float32 tensors for each matrix, `<GGUF name>.in_sum2` (matrices, in): the sum of x^2 over tokens, and `<GGUF name>.counts`
            (matrices, 1): the tokens; general.type = imatrix, imatrix.datasets [str], imatrix.chunk_count u32, imatrix.chunk_size u32
    .dat    i32 entries | entry* | i32 chunks | i32 length | name of the text        (chunks and name may be missing; little-endian)
            entry = i32 length | GGUF name | i32 calls | i32 n | n float32: the mean of x^2 times calls

Source: ggml-org/llama.cpp tools/imatrix/imatrix.cpp (writes), common/imatrix-loader.cpp and tools/quantize/quantize.cpp (read).
GGUF's other order of the rows of q and k does not matter here: the numbers belong to columns. Sums of x (`.in_sum`) are passed over.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers.gguf_file import BLOCK_TYPES, MAGIC, GGUFFile, KeyValue, lay_out, write_file
from tersor.containers.gguf_names import GGUFArchitecture, architecture_of, to_gguf, to_hugging_face
from tersor.containers.mapped import MappedFile
from tersor.containers.output import check_output, disk_errors, remove, temporary_path
from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError, ModelError
from tersor.tensor import Array, InputStatistics

LEGACY_TOKENS = 512  # of a call: a .dat does not say; llama-imatrix's default
_SUM, _COUNT, _MEAN = ".in_sum2", ".counts", ".in_sum"
_FLOAT_MAX = float(np.finfo(np.float32).max)
_INT_MAX = 2**31 - 1
_Entry = tuple[str, Array, float]  # GGUF name, mean of x^2 (in,) float64, tokens


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix that was read.

    statistics: by Hugging Face name of the weight. Only mean_square is known: mean_abs and absmax are NaN, so that a method that needs them
    cannot pass unnoticed, gram is None.
    provenance, for the output's metadata, plain values like those of Samples, None for what the file does not say: source (the text, as the
    file names it), kind (imatrix), file (its name), sha256 (of its bytes), samples (chunks), seqlen (tokens of each), entries.
    """

    statistics: Mapping[str, InputStatistics]
    provenance: Mapping[str, Any]


def is_imatrix(calib: str | Path) -> bool:
    """Returns whether calib is the path of a GGUF file, or of a .dat that is no text: its fourth byte, the highest of the number of
    entries, is 0."""
    path = Path(calib)
    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
    except (OSError, ValueError):
        return False
    return head == MAGIC or (path.suffix.lower() == ".dat" and head[3:] == b"\0")


def write_imatrix(
    path: Path, statistics: Mapping[str, InputStatistics], model_type: str, provenance: Mapping[str, Any], *, force: bool = False
) -> None:
    """Writes statistics as the GGUF that llama-quantize --imatrix reads.

    statistics: by Hugging Face name of the weight (model.layers.0.self_attn.q_proj.weight). model_type: the config's.
    provenance: of Samples; source, samples and seqlen become llama.cpp's keys, all of it `tersor.calibration`, as JSON.
    Raises ContainerError for an architecture or tensor that GGUF has no name for, ModelError for statistics that are not
    finite or of no tokens, OutputError when path cannot be written.
    """
    architecture = architecture_of(str(path), model_type)
    arrays: dict[str, Array] = {}
    for name, found in statistics.items():
        gguf = to_gguf(architecture, name)
        if gguf is None:
            raise ContainerError(f"{path}: GGUF's {architecture.name} has no place for tensor {shorten(name)!r}")
        sums = found.mean_square.astype(np.float64) * found.tokens
        if found.tokens < 1 or not np.all(np.abs(sums) <= _FLOAT_MAX):
            raise ModelError(f"{path}: {name}: statistics of {found.tokens} tokens, or not finite; need finite ones of at least one token")
        arrays[gguf + _SUM] = sums.astype(np.float32)[None]
        arrays[gguf + _COUNT] = np.array([[found.tokens]], np.float32)
    metadata: dict[str, KeyValue] = {
        "general.type": ("str", "imatrix"),
        "imatrix.datasets": ("[str]", [str(provenance["source"])]),
        "imatrix.chunk_count": ("u32", int(provenance["samples"])),
        "imatrix.chunk_size": ("u32", int(provenance["seqlen"])),
        "tersor.calibration": ("str", json.dumps(dict(provenance))),
    }
    layout = lay_out(metadata, [(name, BLOCK_TYPES["f32"], arrays[name].shape) for name in sorted(arrays)])
    check_output(path, layout.size, force=force, directory=False)
    temporary = temporary_path(path)
    try:
        with disk_errors(path, layout.size):
            with write_file(temporary, layout) as file:
                for name, array in arrays.items():
                    file.seek(layout.tensors[name].offset)
                    file.write(array.astype("<f4").tobytes())
            temporary.replace(path)
    finally:
        with suppress(OSError):
            remove(temporary)


def read_imatrix(path: Path, model_type: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Imatrix:
    """Returns an importance matrix, in GGUF or .dat.

    shapes: the model's tensors; their columns are compared. Of a .dat, tokens is calls x 512, which is what llama-imatrix does
    unless it is told otherwise. Raises ContainerError for a file that is malformed or of another model.
    """
    architecture = architecture_of(str(path), model_type)
    with closing(MappedFile(path)) as file:
        read = _read_gguf if file.read(0, len(MAGIC)) == MAGIC else _read_legacy
        digest = hashlib.sha256(file.view(0, np.uint8, file.size).data).hexdigest()
    entries, said = read(path)
    statistics = dict(_named(path, entries, architecture, shapes))
    about = {"source": None, "kind": "imatrix", "file": path.name, "sha256": digest, "samples": None, "seqlen": None}
    return Imatrix(statistics, about | said | {"entries": len(statistics)})


def _named(
    path: Path, entries: Iterable[_Entry], architecture: GGUFArchitecture, shapes: Mapping[str, tuple[int, ...]] | None
) -> Iterator[tuple[str, InputStatistics]]:
    """Yields entries under their Hugging Face names, checked."""
    for gguf, mean_square, tokens in entries:
        where = f"{path}: {shorten(gguf)!r}"
        name = to_hugging_face(architecture, gguf)
        if name is None or (shapes is not None and name not in shapes):
            raise ContainerError(f"{where} is no tensor of this {architecture.name}; the importance matrix is of another model")
        if shapes is not None and shapes[name][-1] != len(mean_square):
            raise ContainerError(
                f"{where} has {len(mean_square)} columns, the model's {shapes[name][-1]}; the importance matrix is of another model"
            )
        if not np.all((mean_square >= 0) & (mean_square <= _FLOAT_MAX)):
            raise ContainerError(f"{where} has means of squares that are negative or not finite; make the importance matrix again")
        unknown = np.full(len(mean_square), np.nan, np.float32)
        yield name, InputStatistics(int(tokens), mean_square.astype(np.float32), unknown, unknown)


def _read_gguf(path: Path) -> tuple[list[_Entry], dict[str, Any]]:
    """Returns what the file says of every matrix, and of itself."""
    with closing(GGUFFile(path)) as file:
        return list(_gguf_entries(path, file)), _gguf_keys(file.metadata)


def _gguf_keys(metadata: Mapping[str, KeyValue]) -> dict[str, Any]:
    """Returns what the keys say of text and chunks, without those that are missing, of another type, or no count that a .dat could hold."""
    said = {key: metadata.get(f"imatrix.{name}") for key, name in (("samples", "chunk_count"), ("seqlen", "chunk_size"))}
    numbers = {key: found[1] for key, found in said.items() if found is not None and found[0] == "u32" and 0 < found[1] <= _INT_MAX}
    kind, texts = metadata.get("imatrix.datasets", ("", []))
    return numbers | ({"source": ", ".join(texts)} if kind == "[str]" and texts else {})


def _gguf_entries(path: Path, file: GGUFFile) -> Iterator[_Entry]:
    kind = file.metadata.get("general.type", ("str", "missing"))[1]
    if kind != "imatrix":
        raise ContainerError(f"{path}: general.type is {shorten(kind)!r}, not imatrix; give a file that llama-imatrix wrote")
    for stem in sorted({name.removesuffix(_SUM).removesuffix(_COUNT) for name in file.tensors if not name.endswith(_MEAN)}):
        pair = [file.tensors.get(stem + _SUM), file.tensors.get(stem + _COUNT)]
        found = [t for t in pair if t is not None and t.type.name == "f32" and len(t.shape) == 2 and t.shape[0] == 1]
        if len(found) != 2 or found[1].shape != (1, 1):
            shown = [None if t is None else f"{t.type.name} {list(t.shape)}" for t in pair]
            raise ContainerError(
                f"{path}: {shorten(stem)!r}: in_sum2 and counts are {shown[0]} and {shown[1]}; need f32 [1, in] and f32 [1, 1],"
                " the matrices of experts are not read"
            )
        sums, counts = (file.rows(t.name).view("<f4")[0].astype(np.float64) for t in found)
        if not 1 <= counts[0] < 2**63:
            raise ContainerError(f"{path}: {shorten(stem)!r} saw {counts[0]:g} tokens; make the importance matrix from more text")
        yield stem, sums / counts[0], counts[0]


def _read_legacy(path: Path) -> tuple[list[_Entry], dict[str, Any]]:
    """Returns the same of a .dat. Every length is checked against the end of the file before anything is read."""
    file = MappedFile(path)
    at = 0

    def take(count: int, what: str) -> bytes:
        nonlocal at
        if not 0 <= count <= file.size - at:
            raise ContainerError(
                f"{path}: {what} at byte {at} needs {count} bytes, the file ends at {file.size}; it is damaged or no importance matrix"
            )
        at += count
        return file.read(at - count, count)

    def integer(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    entries = integer("the number of entries")
    if entries < 1:
        raise ContainerError(f"{path}: announces {entries} entries; it is damaged or no importance matrix")
    found: dict[str, _Entry] = {}
    for number in range(entries):
        raw = take(integer(f"the length of name {number}"), f"name {number}")
        name = raw.decode("utf-8", "replace")
        calls, count = integer(f"the calls of {shorten(name)!r}"), integer(f"the length of {shorten(name)!r}")
        values = np.frombuffer(take(4 * count, f"the values of {shorten(name)!r}"), "<f4").astype(np.float64)
        if calls < 1 or count < 1 or name in found:
            raise ContainerError(f"{path}: {shorten(name)!r} has {calls} calls and {count} values, or appears twice; the file is damaged")
        found[name] = name, values / calls, calls * LEGACY_TOKENS
    said: dict[str, Any] = {}
    if at < file.size:
        said["samples"] = chunks if (chunks := integer("the number of chunks")) > 0 else None
    if at < file.size:
        said["source"] = take(integer("the length of the text's name"), "the text's name").decode("utf-8", "replace")
    file.close()
    return list(found.values()), said
