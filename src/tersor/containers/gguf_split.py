"""A GGUF model in several files: name-00001-of-00003.gguf and so on.

    every file   split.no u16 = 0, 1, ...; split.count u16 = number of files; split.tensors.count i32 = tensors of all files
    the first    all other key-values; the others have none but these three

and each file holds its tensors, at offsets of its own. llama.cpp opens a model by its first file; here any of them will do.
Source: llama.cpp tools/gguf-split/gguf-split.cpp; src/llama-model-loader.cpp for what is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tersor.containers.gguf_file import DEFAULT_ALIGNMENT, BlockType, GGUFFile, GGUFTensor, KeyValue, Layout, lay_out
from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError
from tersor.tensor import Array

NUMBER, COUNT, TENSORS = SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")

Placed = tuple[str, BlockType, tuple[int, ...]]  # name, type, shape

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
MOST_FILES = 65535  # of a u16


def part_paths(path: Path, count: int) -> list[Path]:
    """Returns the names of the parts of a model to be written as path, whether that names the whole or one of its parts."""
    match = _NAME.fullmatch(path.name)
    stem = match[1] if match else path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def stored_files(path: Path) -> list[Path]:
    """Returns the files that hold the model at path: itself, or all parts when it is named as one of them; those that exist."""
    match = _NAME.fullmatch(path.name)
    return [part for part in part_paths(path, int(match[3])) if part.is_file()] if match and path.is_file() else [path]


def open_parts(path: Path) -> GGUFFile | SplitFile:
    """Returns the opened file, or all files of a split model when it is one of them. Raises ContainerError."""
    file = GGUFFile(path)
    try:
        count = _split_value(file, COUNT)
        if count is None or count <= 1:  # merging leaves 0
            return file
        return SplitFile(file, count)
    except BaseException:
        file.close()
        raise


def _split_value(file: GGUFFile, key: str) -> int | None:
    """Returns a key of the split as an integer, None when it is absent."""
    if key not in file.metadata:
        return None
    kind, value = file.metadata[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ContainerError(f"{file.path}: {key} is {kind} {shorten(value)}, needs an integer >= 0; the file is damaged")
    return value


class SplitFile:
    """The parts of a model as one file, with the interface of GGUFFile. path: the first part."""

    def __init__(self, opened: GGUFFile, count: int) -> None:
        """Opens the other parts beside the opened one. Raises ContainerError when one is missing or does not belong to them."""
        match = _NAME.fullmatch(opened.path.name)
        if match is None or int(match[3]) != count:
            raise ContainerError(
                f"{opened.path}: is one of {count} files of a model, which are called name-00001-of-{count:05d}.gguf; restore its name"
            )
        self.paths = paths = part_paths(opened.path, count)
        self.path = paths[0]
        self._files: list[GGUFFile] = []
        self.tensors: dict[str, GGUFTensor] = {}
        self._home: dict[str, GGUFFile] = {}
        try:
            for number, path in enumerate(paths):
                if not path.is_file():
                    raise ContainerError(f"{path}: part {number + 1} of {count} is missing; download it too")
                file = opened if path == opened.path else GGUFFile(path)
                self._files.append(file)
                self._add(file, number, count)
            promised = _split_value(self._files[0], TENSORS)
            if promised is not None and promised != len(self.tensors):
                raise ContainerError(
                    f"{self.path}: {TENSORS} is {promised}, but the {count} files hold {len(self.tensors)}; download them again"
                )
        except BaseException:
            self.close()
            raise
        self.metadata: Mapping[str, KeyValue] = self._files[0].metadata

    def _add(self, file: GGUFFile, number: int, count: int) -> None:
        found = _split_value(file, NUMBER), _split_value(file, COUNT)
        if found != (number, count):
            raise ContainerError(
                f"{file.path}: {NUMBER} and {COUNT} are {found[0]} and {found[1]}, its name says {number} and {count};"
                " the files do not belong together"
            )
        for name, tensor in file.tensors.items():
            if name in self.tensors:
                raise ContainerError(f"{file.path}: tensor {shorten(name)!r} is in {self._home[name].path.name} too; the file is damaged")
            self.tensors[name] = tensor
            self._home[name] = file

    def rows(self, name: str, rows: slice | None = None) -> Array:
        """Returns the tensor's rows, or a contiguous slice of them, as a read-only view: (rows, row_bytes) uint8."""
        return self._home[name].rows(name, rows)

    def release(self) -> None:
        """Gives the pages read so far back to the system."""
        for file in self._files:
            file.release()

    def close(self) -> None:
        """Closes the files; arrays handed out stay valid."""
        for file in self._files:
            file.close()


def split(where: str, metadata: Mapping[str, KeyValue], tensors: Sequence[Placed], max_bytes: int) -> list[Layout]:
    """Returns the layouts of the files, in order; each is at most max_bytes, or holds a single tensor.

    Raises ContainerError when max_bytes is not positive or makes more files than can be counted.
    """
    if max_bytes < 1:
        raise ContainerError(f"{where}: files of at most {max_bytes} bytes; need a positive size")
    keys: dict[str, KeyValue] = {NUMBER: ("u16", 0), COUNT: ("u16", 0), TENSORS: ("i32", len(tensors))}
    alignment = int(metadata.get("general.alignment", ("u32", DEFAULT_ALIGNMENT))[1])
    own = {"general.alignment": metadata["general.alignment"]} if "general.alignment" in metadata else {}
    parts: list[list[Placed]] = []
    size = 0
    for tensor in tensors:
        alone = lay_out({**own, **keys}, [tensor]).size
        if parts and size + alone <= max_bytes:
            parts[-1].append(tensor)
            size += alone  # counts each header anew: a little more than it takes
        else:
            first = lay_out({**metadata, **keys}, []).size + alignment if not parts else 0
            parts.append([tensor])
            size = first + alone
    if len(parts) > MOST_FILES:
        raise ContainerError(f"{where}: {len(parts)} files of {max_bytes} bytes; at most {MOST_FILES} can be counted, use a larger size")
    layouts = []
    for number, part in enumerate(parts):
        numbered: dict[str, KeyValue] = {**keys, NUMBER: ("u16", number), COUNT: ("u16", len(parts))}
        layouts.append(lay_out({**(own if number else metadata), **numbered}, part))
    return layouts
