"""Writing a model directory: small files and shards under a temporary name, renamed when whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tersor.containers.container import Writer
from tersor.containers.directory import DTYPE_OF, INDEX, SINGLE
from tersor.containers.output import check_output, disk_errors, remove, replace_directory, temporary_path
from tersor.containers.safetensors_file import DTYPES, Entry, ShardWriter
from tersor.errors import ContainerError
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo

PROVENANCE = "tersor.json"  # how the weights were made: recipe, calibration
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Part:
    """One safetensors tensor to be written. name, dtype, shape as in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class DirectoryWriter(Writer):
    """Writes a directory under a temporary name. Subclasses say how a tensor becomes safetensors parts.

    widest_first: whether the parts of a shard lie by falling size of their values instead of in plan order. Parts of any number
    of bytes need it, so that every value of the others lies at a multiple of its size.
    """

    widest_first = False

    def __init__(
        self,
        path: Path,
        description: ModelDescription,
        plan: Sequence[TensorInfo],
        *,
        force: bool,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Creates the temporary directory with all small files and empty shards. Raises OutputError as `create` says."""
        self.path = path
        self._description = description
        self._plan = {info.name: info for info in plan}
        if len(self._plan) != len(plan):
            raise ContainerError(f"{path}: a tensor is announced twice")
        self._written: set[str] = set()
        parts = {info.name: self.parts(info) for info in plan}
        shards = list(_split(parts, max_shard_bytes))
        self._need = sum(part.nbytes for own in parts.values() for part in own) + sum(len(data) for data in description.files.values())
        check_output(path, self._need, force=force, directory=True)
        self._temporary = temporary_path(path)
        self._home: dict[str, tuple[ShardWriter, Entry]] = {}
        self._shards: list[ShardWriter] = []
        try:
            with disk_errors(path, self._need):
                self._temporary.mkdir()
                self._write_side_files(description)
                self._open_shards(shards)
                opened = {shard.path for shard in self._shards}
                beside = [file for file in self._temporary.rglob("*") if file.is_file() and file not in opened]
            self.nbytes = sum(shard.nbytes for shard in self._shards) + sum(file.stat().st_size for file in beside)
        except BaseException:
            self.abort()
            raise

    def parts(self, info: TensorInfo) -> list[Part]:
        """Returns the safetensors tensors that hold one tensor of the plan."""
        return [Part(info.name, DTYPE_OF[info.format], info.shape)]

    def arrays(self, tensor: QuantizedTensor, info: TensorInfo) -> list[Array]:
        """Returns the arrays of `parts`, in the same order."""
        return [tensor.fields["values"]]

    def config(self, description: ModelDescription) -> dict[str, Any]:
        """Returns config.json as it will be written."""
        return dict(description.config)

    def _write_side_files(self, description: ModelDescription) -> None:
        text = json.dumps(self.config(description), indent=2, sort_keys=True) + "\n"
        (self._temporary / "config.json").write_text(text, encoding="utf-8")
        files = dict(description.files)
        if description.provenance:
            files[PROVENANCE] = (json.dumps(dict(description.provenance), indent=2) + "\n").encode()
        for name, data in files.items():
            target = self._temporary / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(data)

    def _open_shards(self, shards: Sequence[Sequence[Part]]) -> None:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file_name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            entries, end = [], 0
            for part in sorted(shard, key=lambda part: -DTYPES[part.dtype].itemsize) if self.widest_first else shard:
                entries.append(Entry(part.name, part.dtype, part.shape, end, end + part.nbytes))
                end += part.nbytes
            writer = ShardWriter(self._temporary / file_name, entries)
            self._shards.append(writer)
            self._home |= {entry.name: (writer, entry) for entry in entries}
            weight_map |= {entry.name: file_name for entry in entries}
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(p.nbytes for s in shards for p in s)}, "weight_map": weight_map}
            (self._temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: QuantizedTensor) -> None:
        """Writes one announced tensor, in any order."""
        info = self._plan.get(name)
        if info is None or info.format != tensor.format or info.shape != tensor.shape:
            announced = f"{info.format} {list(info.shape)}" if info else "nothing of that name"
            raise ContainerError(f"{self.path}: {name} is {tensor.format} {list(tensor.shape)}, but {announced} was announced")
        with disk_errors(self.path, self._need):
            for part, array in zip(self.parts(info), self.arrays(tensor, info), strict=True):
                shard, entry = self._home[part.name]
                shard.write(entry, array)
        self._written.add(name)

    def commit(self) -> None:
        """Checks that all was written, then renames the directory to its final name."""
        missing = [name for name in self._plan if name not in self._written]
        if missing:
            raise ContainerError(f"{self.path}: {len(missing)} announced tensors were not written, first {missing[0]}")
        with disk_errors(self.path, self._need):
            for shard in self._shards:
                shard.close()
            replace_directory(self._temporary, self.path)

    def abort(self) -> None:
        """Removes the temporary directory."""
        for shard in self._shards:
            shard.discard()
        remove(self._temporary)


def _split(parts: Mapping[str, Sequence[Part]], limit: int) -> Iterator[list[Part]]:
    """Yields the parts of each shard, in plan order; the parts of one tensor stay together; a shard is at most limit bytes, if it can."""
    shard: list[Part] = []
    size = 0
    for own in parts.values():
        nbytes = sum(part.nbytes for part in own)
        if shard and size + nbytes > limit:
            yield shard
            shard, size = [], 0
        shard += own
        size += nbytes
    yield shard
