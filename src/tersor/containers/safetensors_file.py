"""One .safetensors file: a validated header over mmap, and a streaming writer.

    file   = u64 N | N bytes of JSON | data           (little-endian)
    JSON   = {name: {"dtype": "F16", "shape": [out, in], "data_offsets": [begin, end]}, "__metadata__": {str: str}}

The tensors tile the data without overlap or hole. Source: huggingface/safetensors README.md ("Format") and
safetensors/src/tensor.rs. We read it ourselves instead of through `safe_open` because mapped views, row slices and giving
pages back (madvise) are needed, and bf16 without torch; everything that the library refuses is refused here too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tersor.containers.mapped import MappedFile
from tersor.errors import ContainerError, unknown
from tersor.tensor import Array

# The library's own limit (tensor.rs: MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000

# More axes than any tensor has; keeps the product of a hostile shape small.
MAX_RANK = 8

# BF16 and the 8-bit floats have no numpy type: raw bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. begin, end: bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """An opened file: `entries` by name in data order, arrays as views of the mapping."""

    def __init__(self, path: Path) -> None:
        """Maps the file and checks its header. Raises ContainerError for anything malformed."""
        self.path = path
        self._file = MappedFile(path)
        try:
            header, self._data = _read_header(self._file)
            self.metadata, self.entries = _check_header(path, header, self._file.size - self._data)
        except BaseException:
            self._file.close()
            raise

    def array(self, name: str, rows: slice | None = None) -> Array:
        """Returns the tensor in its shape, or those rows of its first axis. A read-only view."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if rows is None:
            return self._file.view(self._data + entry.begin, dtype, prod(entry.shape)).reshape(entry.shape)
        start, stop, step = rows.indices(entry.shape[0])
        assert step == 1, "row slices have no step"
        row_items = prod(entry.shape[1:])
        stop = max(start, stop)
        flat = self._file.view(self._data + entry.begin + start * row_items * dtype.itemsize, dtype, (stop - start) * row_items)
        return flat.reshape(stop - start, *entry.shape[1:])

    def release(self) -> None:
        """Gives the pages read so far back to the system."""
        self._file.release()

    def close(self) -> None:
        """Closes the file; arrays handed out stay valid."""
        self._file.close()


def _read_header(file: MappedFile) -> tuple[Any, int]:
    """Returns (the parsed JSON, the offset of the data in bytes)."""
    if file.size < 8:
        raise ContainerError(
            f"{file.path}: {file.size} bytes is too short for safetensors (the header length alone takes 8); download it again"
        )
    length = int.from_bytes(file.read(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise ContainerError(
            f"{file.path}: header of {length} bytes, above the limit of {MAX_HEADER_BYTES}; this is no safetensors file, or it is damaged"
        )
    if length > file.size - 8:
        raise ContainerError(
            f"{file.path}: header of {length} bytes in a file of {file.size}; the file is truncated or damaged, download it again"
        )
    text = file.read(8, length)
    if not text.startswith(b"{"):
        raise ContainerError(f"{file.path}: the header does not start with '{{'; this is no safetensors file, or it is damaged")
    return parse_json(text, str(file.path), "the header"), 8 + length


def parse_json(text: bytes, where: str, what: str) -> Any:
    """Returns the parsed JSON. Raises ContainerError for bad UTF-8, bad syntax, duplicate keys or absurd nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"{shorten(twice)!r} appears twice")
        return out

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ContainerError(f"{where}: {what} is nested too deeply; the file is damaged") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ContainerError(f"{where}: {what} is not valid JSON: {error}; the file is damaged") from None


def shorten(text: object, limit: int = 100) -> str:
    """Returns str(text) as one line that fits an error message: cut, and without control characters; hostile names have megabytes."""
    full = text if isinstance(text, str) else str(text)
    short = full if len(full) <= limit else full[: limit - 3] + "..."
    return short if short.isprintable() else _Escaped("".join(c if c.isprintable() else ascii(c)[1:-1] for c in short))


class _Escaped(str):
    """Text whose control characters are escaped; repr only puts it in quotes and does not escape it once more."""

    def __repr__(self) -> str:
        return f"'{self}'"


def _check_header(path: Path, header: Any, data_bytes: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Returns (metadata, entries in data order). Checks types, dtypes, sizes, overlaps, holes and the end of the data."""
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ContainerError(f"{path}: __metadata__ must map strings to strings; the header is damaged")
    entries = sorted((_check_entry(path, name, value, data_bytes) for name, value in header.items()), key=lambda e: (e.begin, e.end))
    end, last = 0, "the start"
    for entry in entries:
        if entry.begin != end:
            fault = "overlaps" if entry.begin < end else f"leaves a hole of {entry.begin - end} bytes after"
            raise ContainerError(
                f"{path}: tensor {shorten(entry.name)!r} at [{entry.begin}, {entry.end}) {fault} {shorten(last)!r}, which ends at {end};"
                " the file is damaged"
            )
        end, last = entry.end, entry.name
    if end != data_bytes:
        raise ContainerError(
            f"{path}: the tensors end at byte {end} of the data but {data_bytes} bytes are there; the file is damaged, download it again"
        )
    return metadata, {entry.name: entry for entry in entries}


def _check_entry(path: Path, name: str, value: Any, data_bytes: int) -> Entry:
    """Returns the entry, its numbers proven consistent with each other and with the file."""
    where = f"{path}: tensor {shorten(name)!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ContainerError(f"{where}: needs exactly dtype, shape and data_offsets; the header is damaged")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ContainerError(f"{where}: {unknown('dtype', shorten(dtype), DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_is_size(n) for n in shape):
        raise ContainerError(f"{where}: shape {shorten(shape)} is not a list of sizes; the header is damaged")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise ContainerError(f"{where}: data_offsets {shorten(offsets)} is not [begin, end]; the header is damaged")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise ContainerError(
            f"{where}: data_offsets {shorten(offsets)} outside the {data_bytes} bytes of data; the file is truncated, download it again"
        )
    need = prod(shape) * DTYPES[dtype].itemsize
    if end - begin != need:
        raise ContainerError(
            f"{where}: {dtype} {shorten(shape)} needs {shorten(need)} bytes, data_offsets span {end - begin}; the header lies"
        )
    return Entry(name, dtype, tuple(shape), begin, end)


def _is_size(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63


def header_bytes(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Returns the header with its length, padded with spaces so that the data starts at a multiple of 8."""
    body: dict[str, Any] = {"__metadata__": dict(metadata)}
    body |= {e.name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.begin, e.end]} for e in entries}
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Writes the tensors of one announced file, in any order. nbytes: of the whole file."""

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        """Creates the file at its full size's header. entries: tiling the data from 0."""
        self.path = path
        self._file: BinaryIO = path.open("wb")
        header = header_bytes(entries, {"format": "pt"})
        self._file.write(header)
        self._data = len(header)
        self.nbytes = len(header) + max((entry.end for entry in entries), default=0)

    def write(self, entry: Entry, array: Array) -> None:
        """Writes one tensor at its place."""
        data = np.ascontiguousarray(array)
        assert data.dtype == DTYPES[entry.dtype] and data.nbytes == entry.end - entry.begin, (entry, data.dtype, data.shape)
        self._file.seek(self._data + entry.begin)
        self._file.write(data.reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Flushes and closes. Raises OSError when the disk is full."""
        self._file.close()

    def discard(self) -> None:
        """Closes without complaint; the file is about to be removed."""
        with suppress(OSError):
            self._file.close()
