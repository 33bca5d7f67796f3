"""One GGUF v3 file: a validated header over mmap, and a streaming writer.

    file    = "GGUF" | u32 version | u64 tensors | u64 key-values | key-value* | tensor info* | padding | data   (little-endian)
    string  = u64 length | UTF-8 bytes
    key-value   = string key | u32 type | value;  an array value = u32 item type | u64 count | items
    tensor info = string name | u32 n | u64 dims[n] (fastest axis first) | u32 ggml type | u64 offset into the data

Source: ggml-org/ggml docs/gguf.md; ggml/src/gguf.cpp for what is refused. The numbers of the format (type ids, block sizes, value
types) come from the `gguf` package's constants. Its reader is not used because it trusts the header (a length of 2^60 or a
tensor beyond the end of the file is met with a crash or a silent short array) and builds one numpy object per string; its writer
is not used because it wants all tensors' data before, or strictly in order and without row chunks.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType

from tersor.containers.mapped import MappedFile
from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError, unknown
from tersor.tensor import Array

MAGIC = b"GGUF"
_LENGTH = struct.Struct("<Q")  # of a string, in front of it
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_ALIGNMENT = 1 << 20

# A key-value as (type, value). Types: u8 i8 u16 i16 u32 i32 f32 bool str u64 i64 f64, and [t] for an array of t.
# Values: int, float, bool, str; arrays are numpy arrays, or a list of str.
KeyValue = tuple[str, Any]

_SCALARS: dict[int, tuple[str, str]] = {
    GGUFValueType.UINT8: ("u8", "<u1"),
    GGUFValueType.INT8: ("i8", "<i1"),
    GGUFValueType.UINT16: ("u16", "<u2"),
    GGUFValueType.INT16: ("i16", "<i2"),
    GGUFValueType.UINT32: ("u32", "<u4"),
    GGUFValueType.INT32: ("i32", "<i4"),
    GGUFValueType.FLOAT32: ("f32", "<f4"),
    GGUFValueType.BOOL: ("bool", "?"),
    GGUFValueType.UINT64: ("u64", "<u8"),
    GGUFValueType.INT64: ("i64", "<i8"),
    GGUFValueType.FLOAT64: ("f64", "<f8"),
}
_TYPE_ID = {name: int(number) for number, (name, _) in _SCALARS.items()} | {"str": int(GGUFValueType.STRING)}
_DTYPE = dict(_SCALARS.values())


@dataclass(frozen=True)
class BlockType:
    """A ggml tensor type. size: values per block; nbytes: bytes per block."""

    id: int
    name: str
    size: int
    nbytes: int


def _block_types() -> dict[str, BlockType]:
    known = {t.name.lower(): BlockType(int(t), t.name.lower(), *GGML_QUANT_SIZES[t]) for t in GGMLQuantizationType if t in GGML_QUANT_SIZES}
    known.setdefault("q2_0", BlockType(42, "q2_0", 64, 18))  # newer than some releases of the gguf package
    for intermediate in ("q8_1", "q8_k", "i8", "i16", "i32", "i64", "f64"):  # never the type of a weight in a file
        known.pop(intermediate, None)
    return known


# The tensor types that may stand in a model file, by our format name, which is ggml's in lower case.
BLOCK_TYPES = _block_types()
_BY_ID = {t.id: t for t in BLOCK_TYPES.values()}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as the file announces it. shape: slowest axis first (the file's dims reversed); offset: bytes from the file's start."""

    name: str
    type: BlockType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[-1] // self.type.size * self.type.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape[:-1]) * self.row_bytes


class _Cursor:
    """Reads the header front to back; every read is checked against the end of the file before anything is allocated."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.at = 0

    def need(self, nbytes: int, what: str) -> None:
        """Raises ContainerError when fewer than nbytes are left."""
        if nbytes > self.file.size - self.at:
            raise ContainerError(
                f"{self.file.path}: {what} at byte {self.at} needs {nbytes} bytes, the file ends at {self.file.size};"
                " it is truncated or damaged, download it again"
            )

    def take(self, nbytes: int, what: str) -> bytes:
        """Returns the next nbytes."""
        self.need(nbytes, what)
        self.at += nbytes
        return self.file.read(self.at - nbytes, nbytes)

    def u32(self, what: str) -> int:
        """Returns the next u32."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """Returns the next u64."""
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str) -> str:
        """Returns the next string."""
        data = self.take(self.u64(f"the length of {what}"), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise ContainerError(f"{self.file.path}: {what} at byte {self.at} is not UTF-8; the file is damaged") from None


class GGUFFile:
    """An opened file: `metadata` and `tensors` by name in file order; data as views of the mapping."""

    def __init__(self, path: Path) -> None:
        """Maps the file and checks its whole header. Raises ContainerError for anything malformed."""
        self.path = path
        self.paths = [path]
        self._file = MappedFile(path)
        try:
            cursor = _Cursor(self._file)
            n_tensors, n_pairs = _read_preamble(cursor)
            self.metadata = _read_metadata(cursor, n_pairs)
            self.alignment = _alignment(path, self.metadata)
            self.tensors = _read_tensors(cursor, n_tensors, self.alignment)
        except BaseException:
            self._file.close()
            raise

    def rows(self, name: str, rows: slice | None = None) -> Array:
        """Returns the tensor's rows, or a contiguous slice of them, as a read-only view: (rows, row_bytes) uint8."""
        tensor = self.tensors[name]
        start, stop, step = (rows or slice(None)).indices(prod(tensor.shape[:-1]))
        assert step == 1, "row slices have no step"
        count = max(0, stop - start)
        flat = self._file.view(tensor.offset + start * tensor.row_bytes, np.uint8, count * tensor.row_bytes)
        return flat.reshape(count, tensor.row_bytes)

    def release(self) -> None:
        """Gives the pages read so far back to the system."""
        self._file.release()

    def close(self) -> None:
        """Closes the file; arrays handed out stay valid."""
        self._file.close()


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Returns (tensor count, key-value count); both are proven to be possible in a file of this size."""
    path = cursor.file.path
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise ContainerError(f"{path}: starts with {magic!r}, a GGUF file starts with {MAGIC!r}; give a .gguf file or a model directory")
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:  # a small number with its bytes the other way round
        raise ContainerError(
            f"{path}: a big-endian GGUF file; only little-endian is supported, convert it with gguf-py's gguf_convert_endian"
        )
    if version not in (2, VERSION):  # 2 differs from 3 only in that big-endian files were not yet a thing
        raise ContainerError(f"{path}: GGUF version {version}; versions 2 and 3 are supported, convert the model again")
    n_tensors, n_pairs = cursor.u64("the tensor count"), cursor.u64("the key-value count")
    left = cursor.file.size - cursor.at
    # The least bytes: a tensor info with an empty name and one axis takes 8+4+8+4+8, a key-value with an empty key 8+4+1.
    for what, count, least in (("tensors", n_tensors, 32), ("key-values", n_pairs, 13)):
        if count * least > left:
            raise ContainerError(f"{path}: announces {count} {what}, but {left} bytes follow; the file is truncated or damaged")
    return n_tensors, n_pairs


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, KeyValue]:
    """Returns all key-values in file order."""
    metadata: dict[str, KeyValue] = {}
    for number in range(count):
        key = cursor.string(f"key {number}")
        if key in metadata:
            raise ContainerError(f"{cursor.file.path}: key {shorten(key)!r} appears twice; the file is damaged")
        metadata[key] = _read_value(cursor, f"the value of {shorten(key)!r}")
    return metadata


def _read_value(cursor: _Cursor, what: str) -> KeyValue:
    kind = cursor.u32(f"the type of {what}")
    if kind == GGUFValueType.STRING:
        return "str", cursor.string(what)
    if kind == GGUFValueType.ARRAY:
        return _read_array(cursor, what)
    name, dtype = _scalar_type(cursor, kind, what)
    raw = cursor.take(np.dtype(dtype).itemsize, what)
    return name, np.frombuffer(raw, dtype)[0].item() if name != "bool" else raw != b"\0"


def _read_array(cursor: _Cursor, what: str) -> KeyValue:
    kind, count = cursor.u32(f"the item type of {what}"), cursor.u64(f"the count of {what}")
    if kind == GGUFValueType.STRING:
        return "[str]", _read_strings(cursor, count, what)
    if kind == GGUFValueType.ARRAY:
        raise ContainerError(
            f"{cursor.file.path}: {what} is an array of arrays, which GGUF readers do not support; convert the model again"
        )
    name, dtype = _scalar_type(cursor, kind, what)
    raw = cursor.take(count * np.dtype(dtype).itemsize, what)
    return f"[{name}]", np.frombuffer(raw, dtype)


def _read_strings(cursor: _Cursor, count: int, what: str) -> list[str]:
    """Returns `count` strings. The inner loop of opening a model: a vocabulary has 10^5 of them."""
    cursor.need(8 * count, what)
    path, size, at = cursor.file.path, cursor.file.size, cursor.at
    data, length_at = cursor.file.view(0, np.uint8, size).data, _LENGTH.unpack_from
    out: list[str] = []
    for number in range(count):
        begin = at + 8
        end = begin + length_at(data, at)[0] if begin <= size else begin
        if end > size:
            raise ContainerError(f"{path}: string {number} of {what} ends at byte {end}, the file at {size}; it is truncated or damaged")
        try:
            out.append(str(data[begin:end], "utf-8"))
        except UnicodeDecodeError:
            raise ContainerError(f"{path}: string {number} of {what} is not UTF-8; the file is damaged") from None
        at = end
    cursor.at = at
    return out


def _scalar_type(cursor: _Cursor, kind: int, what: str) -> tuple[str, str]:
    if kind not in _SCALARS:
        raise ContainerError(f"{cursor.file.path}: {what} has the unknown type {kind} (known: 0 to 12); the file is damaged")
    return _SCALARS[kind]


def _alignment(path: Path, metadata: Mapping[str, KeyValue]) -> int:
    """Returns the data alignment in bytes."""
    kind, value = metadata.get("general.alignment", ("u32", DEFAULT_ALIGNMENT))
    if kind != "u32" or value & (value - 1) or not 0 < value <= MAX_ALIGNMENT:
        raise ContainerError(f"{path}: general.alignment is {kind} {shorten(value)}, needs a power of two up to {MAX_ALIGNMENT}")
    assert isinstance(value, int)
    return value


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    """Returns all tensors in file order, proven to lie in the file and not to overlap."""
    path = cursor.file.path
    tensors: dict[str, GGUFTensor] = {}
    for number in range(count):
        name = cursor.string(f"the name of tensor {number}")
        if name in tensors:
            raise ContainerError(f"{path}: tensor {shorten(name)!r} appears twice; the file is damaged")
        tensors[name] = _read_tensor(cursor, name, alignment)
    data = cursor.at + -cursor.at % alignment
    placed = {n: GGUFTensor(n, t.type, t.shape, data + t.offset) for n, t in tensors.items()}
    end, last = data, ""
    for tensor in sorted(placed.values(), key=lambda t: t.offset):
        if tensor.offset + tensor.nbytes > cursor.file.size:
            raise ContainerError(
                f"{path}: tensor {shorten(tensor.name)!r} ends at byte {tensor.offset + tensor.nbytes}, the file at {cursor.file.size};"
                " it is truncated, download it again"
            )
        if tensor.offset < end:
            raise ContainerError(f"{path}: tensor {shorten(tensor.name)!r} overlaps {shorten(last)!r}; the file is damaged")
        end, last = tensor.offset + tensor.nbytes, tensor.name
    return placed


def _read_tensor(cursor: _Cursor, name: str, alignment: int) -> GGUFTensor:
    """Returns one tensor info; its offset still counts from the start of the data."""
    where = f"{cursor.file.path}: tensor {shorten(name)!r}"
    n_dims = cursor.u32(f"the rank of {shorten(name)!r}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise ContainerError(f"{where} has {n_dims} axes, needs 1 to {MAX_DIMS}; the file is damaged")
    dims = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, f"the shape of {shorten(name)!r}"))
    type_id, offset = cursor.u32(f"the type of {shorten(name)!r}"), cursor.u64(f"the offset of {shorten(name)!r}")
    if type_id not in _BY_ID:
        raise ContainerError(f"{where} has {unknown('ggml type', str(type_id), [f'{t.id} ({t.name})' for t in _BY_ID.values()])}")
    kind = _BY_ID[type_id]
    if prod(dims) == 0 or prod(dims) >= 2**63:
        raise ContainerError(f"{where} has dims {list(dims)}, whose product is not in [1, 2^63); the file is damaged")
    if dims[0] % kind.size:
        raise ContainerError(f"{where} has {dims[0]} columns, not a multiple of {kind.name}'s block of {kind.size}; the file is damaged")
    if offset % alignment:
        raise ContainerError(f"{where} starts at offset {offset}, not a multiple of the alignment {alignment}; the file is damaged")
    return GGUFTensor(name, kind, tuple(reversed(dims)), offset)


def _pack_string(text: str) -> bytes:
    return _pack_strings([text])


def _pack_strings(texts: Sequence[str]) -> bytes:
    """Returns every string behind its length."""
    pack = _LENGTH.pack
    return b"".join([part for data in [text.encode("utf-8") for text in texts] for part in (pack(len(data)), data)])


def _pack_value(kind: str, value: Any) -> bytes:
    """Returns a value with its type in front."""
    if kind == "str":
        return struct.pack("<I", _TYPE_ID["str"]) + _pack_string(value)
    if not kind.startswith("["):
        return struct.pack("<I", _TYPE_ID[kind]) + np.array(value, _DTYPE[kind]).tobytes()
    item = kind[1:-1]
    head = struct.pack("<IIQ", int(GGUFValueType.ARRAY), _TYPE_ID[item], len(value))
    return head + (_pack_strings(value) if item == "str" else np.asarray(value, _DTYPE[item]).tobytes())


@dataclass(frozen=True)
class Layout:
    """Where everything of a file to be written goes. tensors: with offsets from the file's start; size: bytes of the whole file."""

    header: bytes
    tensors: Mapping[str, GGUFTensor]
    size: int


def lay_out(metadata: Mapping[str, KeyValue], tensors: Sequence[tuple[str, BlockType, tuple[int, ...]]]) -> Layout:
    """Returns the header bytes and the place of every tensor. tensors: (name, type, shape) in file order, names unique."""
    alignment = int(metadata.get("general.alignment", ("u32", DEFAULT_ALIGNMENT))[1])
    infos, placed, offset = [], [], 0
    for name, kind, shape in tensors:
        tensor = GGUFTensor(name, kind, shape, offset)
        placed.append(tensor)
        infos.append(_pack_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind.id, offset))
        offset += tensor.nbytes + -tensor.nbytes % alignment
    pairs = [_pack_string(key) + _pack_value(*value) for key, value in metadata.items()]
    header = b"".join([MAGIC, struct.pack("<IQQ", VERSION, len(placed), len(pairs)), *pairs, *infos])
    header += b"\0" * (-len(header) % alignment)
    return Layout(header, {t.name: GGUFTensor(t.name, t.type, t.shape, len(header) + t.offset) for t in placed}, len(header) + offset)


def write_file(path: Path, layout: Layout) -> BinaryIO:
    """Creates the file with its header, at its full size (sparse), and returns it opened for writing."""
    file = path.open("xb")
    try:
        file.write(layout.header)
        file.truncate(layout.size)
    except BaseException:
        file.close()
        raise
    return file


def file_types() -> dict[str, int]:
    """Returns {format: general.file_type}: what a file is called when most of its weights have this format (LLAMA_FTYPE_MOSTLY_*)."""
    special = {"f32": "ALL_F32", "q3_k": "MOSTLY_Q3_K_M", "q4_k": "MOSTLY_Q4_K_M", "q5_k": "MOSTLY_Q5_K_M", "mxfp4": "MOSTLY_MXFP4_MOE"}
    names = {format: special.get(format, f"MOSTLY_{format.upper()}") for format in BLOCK_TYPES}
    return {format: int(LlamaFileType[name]) for format, name in names.items() if name in LlamaFileType.__members__}
