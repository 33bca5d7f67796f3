"""Hugging Face directories: config.json, tokenizer files, and float weights in one or many safetensors files.

Layout: transformers' `save_pretrained`. Weights are `model.safetensors`, or shards named by `weight_map` of
`model.safetensors.index.json`. Pickled weights (`pytorch_model.bin`, `.pth`) can run code when they are loaded and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tersor.containers.container import Checkpoint, Container, Writer
from tersor.containers.output import check_output, disk_errors, remove, replace_directory, temporary_path
from tersor.containers.safetensors_file import DTYPES, Entry, SafetensorsFile, ShardWriter, parse_json, shorten
from tersor.errors import ContainerError, unknown
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
MAX_SIDE_FILE_BYTES = 256 << 20

# Small files that travel with the weights. `tokenizer.model` and the vocab files serve readers without tokenizer.json.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)

FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
DTYPE_OF = {format: dtype for dtype, format in FLOATS.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises ContainerError when it is missing, too large or no object."""
    value = parse_json(read_side_file(path), str(path), "the file")
    if not isinstance(value, dict):
        raise ContainerError(f"{path}: holds a JSON {type(value).__name__}, needs an object; the file is damaged")
    return value


def read_side_file(path: Path) -> bytes:
    """Returns the bytes of a small file. Raises ContainerError when it is missing, unreadable or not small."""
    try:
        size = path.stat().st_size
        if size > MAX_SIDE_FILE_BYTES:
            raise ContainerError(f"{path}: {size} bytes, above the limit of {MAX_SIDE_FILE_BYTES} for such a file; it is damaged")
        return path.read_bytes()
    except OSError as error:
        raise ContainerError(f"{path}: cannot read: {error.strerror or error}") from error


def names_method(path: Path, method: str) -> bool:
    """Returns whether the directory's config.json has a quantization_config of this quant_method."""
    quantization = read_json(path / "config.json").get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == method


def read_description(path: Path) -> tuple[ModelDescription, dict[str, Any] | None]:
    """Returns (description, quantization_config or None) of a directory."""
    config = read_json(path / "config.json")
    quantization = config.pop("quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        raise ContainerError(f"{path / 'config.json'}: quantization_config is no object; the file is damaged")
    files = {name: read_side_file(path / name) for name in CARRIED if (path / name).is_file()}
    templates = path / "additional_chat_templates"
    if templates.is_dir():
        files |= {f"{templates.name}/{f.name}": read_side_file(f) for f in sorted(templates.glob("*.jinja"))}
    return ModelDescription(config, files), quantization


class Shards:
    """The safetensors files of a directory as one namespace."""

    def __init__(self, path: Path) -> None:
        """Opens every file and checks it. Raises ContainerError when a shard is missing or disagrees with the index."""
        self.path = path
        self._files: list[SafetensorsFile] = []
        self.entries: dict[str, Entry] = {}
        self._home: dict[str, SafetensorsFile] = {}
        try:
            for file_name, expected in _shard_names(path).items():
                self._add(file_name, expected)
        except BaseException:
            self.close()
            raise

    def _add(self, file_name: str, expected: set[str] | None) -> None:
        file = SafetensorsFile(self.path / file_name)
        self._files.append(file)
        if expected is not None and expected != set(file.entries):
            missing, extra = sorted(expected - set(file.entries)), sorted(set(file.entries) - expected)
            fault = f"lacks tensor {shorten(missing[0])!r}" if missing else f"holds tensor {shorten(extra[0])!r}"
            tail = "which the index promises" if missing else "which the index does not list there"
            raise ContainerError(f"{file.path}: {fault}, {tail}; shard and {INDEX} do not belong together")
        for name, entry in file.entries.items():
            self.entries[name] = entry
            self._home[name] = file

    def array(self, name: str, rows: slice | None = None) -> Array:
        """Returns the tensor or those rows of it, as a view."""
        return self._home[name].array(name, rows)

    def release(self) -> None:
        """Gives pages back to the system."""
        for file in self._files:
            file.release()

    def close(self) -> None:
        """Closes all files."""
        for file in self._files:
            file.close()


def _shard_names(path: Path) -> dict[str, set[str] | None]:
    """Returns {file name: names of its tensors, or None when there is no index}."""
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise ContainerError(f"{path / INDEX}: weight_map must map tensor names to file names; the index is damaged")
        shards: dict[str, set[str] | None] = {}
        for name, shard in weight_map.items():
            known = shards.setdefault(shard, set())
            assert known is not None
            known.add(name)
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ContainerError(f"{path / INDEX}: {shorten(shard)!r} is no name of a safetensors file in this directory")
            if not (path / shard).is_file():
                raise ContainerError(f"{path}: shard {shard} of {len(shards)}, named by {INDEX}, is missing; download it again")
        return dict(sorted(shards.items()))
    names = sorted(f.name for f in path.glob("*.safetensors"))
    if SINGLE in names or len(names) == 1:
        return {SINGLE if SINGLE in names else names[0]: None}
    if names:
        raise ContainerError(f"{path}: {len(names)} safetensors files but no {INDEX}; download the index too")
    pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in path.glob(pattern))
    if pickled:
        raise ContainerError(
            f"{path}: weights are pickled ({pickled[0]}), which can run code when loaded; convert them with"
            " transformers' save_pretrained(safe_serialization=True) and open that"
        )
    raise ContainerError(f"{path}: no safetensors file; a model directory holds config.json and {SINGLE} or shards with {INDEX}")


class HuggingFaceCheckpoint(Checkpoint):
    """An opened directory of float weights."""

    container = "huggingface"

    def __init__(self, path: Path) -> None:
        """Opens the directory. Raises ContainerError for anything missing, malformed or quantized."""
        self.path = path
        description, quantization = read_description(path)
        if quantization is not None:
            method = quantization.get("quant_method")
            raise ContainerError(f"{path}: {unknown('quant_method', shorten(method), ['compressed-tensors'])}; open the float original")
        self._shards = Shards(path)
        try:
            tied = is_tied(description.config)
            self.tensors: Mapping[str, TensorInfo] = {
                name: float_info(path, entry) for name, entry in self._shards.entries.items() if not (tied and name == "lm_head.weight")
            }
        except BaseException:
            self._shards.close()
            raise
        self.description = with_tied(description, self.tensors)

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the tensor, or those rows of it, as a view."""
        info = find(self.path, self.tensors, name)
        return read_float(self._shards, info, rows)

    def release(self) -> None:
        """Gives pages back to the system."""
        self._shards.release()

    def close(self) -> None:
        """Closes the files."""
        self._shards.close()


def find(path: Path, tensors: Mapping[str, TensorInfo], name: str) -> TensorInfo:
    """Returns the tensor's info. Raises ContainerError when there is none of that name."""
    if name not in tensors:
        near = [n for n in tensors if n.endswith(name.rsplit(".", 2)[-2] + ".weight")] if "." in name else []
        hint = f"; there is {near[0]}" if near else f"; it has {len(tensors)} tensors, `tersor inspect` lists them"
        raise ContainerError(f"{path}: no tensor {shorten(name)!r}{hint}")
    return tensors[name]


def float_info(path: Path, entry: Entry) -> TensorInfo:
    """Returns the info of a float tensor. Raises ContainerError for other dtypes, scalars and empty tensors."""
    if entry.dtype not in FLOATS:
        raise ContainerError(f"{path}: tensor {shorten(entry.name)!r} is {entry.dtype}; weights are {', '.join(FLOATS)}")
    if not entry.shape or 0 in entry.shape:
        raise ContainerError(
            f"{path}: tensor {shorten(entry.name)!r} has shape {list(entry.shape)}, needs at least one value on every axis"
        )
    return TensorInfo(entry.name, FLOATS[entry.dtype], entry.shape, entry.end - entry.begin)


def read_float(shards: Shards, info: TensorInfo, rows: slice | None) -> QuantizedTensor:
    """Returns a float tensor as `values` (rows, in); a vector is one row."""
    columns = info.shape[-1]
    if rows is None or len(info.shape) != 2:
        values = shards.array(info.name).reshape(prod(info.shape[:-1]), columns)
        if rows is None:
            return QuantizedTensor(info.format, info.shape, {"values": values})
        values = values[rows]
    else:
        values = shards.array(info.name, rows)
    return QuantizedTensor(info.format, values.shape, {"values": values})


def is_tied(config: Mapping[str, Any]) -> bool:
    """Returns whether the head is the embedding: what the config says, or else the architecture's default (true for gemma)."""
    default = str(config.get("model_type", "")).startswith("gemma")
    return bool(config.get("tie_word_embeddings", default))


def with_tied(description: ModelDescription, tensors: Mapping[str, TensorInfo]) -> ModelDescription:
    """Returns the description with `tie_word_embeddings` stated; left alone when the config states it."""
    if "tie_word_embeddings" in description.config:
        return description
    config = {**description.config, "tie_word_embeddings": "lm_head.weight" not in tensors}
    return ModelDescription(config, description.files, description.metadata)


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
    """Writes a directory under a temporary name. Subclasses say how a tensor becomes safetensors parts."""

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
        for name, data in description.files.items():
            target = self._temporary / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(data)

    def _open_shards(self, shards: Sequence[Sequence[Part]]) -> None:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            file_name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            entries, end = [], 0
            for part in shard:
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


class HuggingFace(Container):
    """Directories with float weights."""

    name = "huggingface"
    suffix = ""

    def recognizes(self, path: Path) -> bool:
        """Returns whether path is a directory with a config.json that is not compressed-tensors'."""
        return (path / "config.json").is_file() and not names_method(path, "compressed-tensors")

    def open(self, path: Path) -> HuggingFaceCheckpoint:
        """Opens the directory. Raises ContainerError."""
        return HuggingFaceCheckpoint(path)

    def holds(self, format: str) -> bool:
        """Returns whether the format is f32, f16 or bf16."""
        return format in DTYPE_OF

    def create(self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool = False) -> DirectoryWriter:
        """Starts writing shards of at most 5 GB."""
        refuse_unheld(self, path, plan)
        return DirectoryWriter(path, description, plan, force=force)


def refuse_unheld(container: Container, path: Path, plan: Sequence[TensorInfo]) -> None:
    """Raises ContainerError for the first tensor whose format the container cannot hold."""
    for info in plan:
        if not container.holds(info.format):
            raise ContainerError(
                f"{path}: {container.name} cannot hold {info.format} ({info.name}); choose another recipe or another container (--to)"
            )
