"""Reading a model directory: config.json, the small files beside it, and float tensors in one or many safetensors files.

Layout: transformers' `save_pretrained`. Weights are `model.safetensors`, or shards named by `weight_map` of
`model.safetensors.index.json`. Pickled weights (`pytorch_model.bin`, `.pth`) can run code when they are loaded and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers.container import Checkpoint, Container
from tersor.containers.safetensors_file import Entry, SafetensorsFile, parse_json, shorten
from tersor.errors import ContainerError
from tersor.formats.floats import f32_from_bf16, is_half
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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

# The quant_method of directories that have a container of their own; HuggingFace leaves these alone.
QUANT_METHODS = ("auto-round", "awq", "bitsandbytes", "compressed-tensors", "gptq", "hqq", "mlx")

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


def names_method(path: Path, *methods: str) -> bool:
    """Returns whether the directory's config.json says that its weights are quantized by one of these methods."""
    config = read_json(path / "config.json")
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and "quant_method" in quantization:
        return quantization["quant_method"] in methods
    return "mlx" in methods and isinstance(config.get("quantization"), dict)  # MLX's names no method


class DirectoryContainer(Container):
    """A directory whose config.json names one of `methods` as its quant_method (names_method); opened by `checkpoint`."""

    suffix = ""
    methods: tuple[str, ...]
    checkpoint: Callable[[Path], Checkpoint]

    def recognizes(self, path: Path) -> bool:
        """Returns whether path is a directory whose config.json names this quant_method."""
        return (path / "config.json").is_file() and names_method(path, *self.methods)

    def open(self, path: Path) -> Checkpoint:
        """Opens the directory. Raises ContainerError."""
        return type(self).checkpoint(path)


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

    def are_half(self, *names: str) -> bool:
        """Returns whether all values of these float tensors are float16 numbers: bfloat16 scales usually are."""
        return all(is_half(self.array(name), self.entries[name].dtype == "BF16") for name in names)

    def floats(self, name: str, dtype: np.dtype[Any], rows: slice | None = None) -> Array:
        """Returns a float tensor or those rows of it as float32, or as float16 when `are_half` says that it can be."""
        stored = self.array(name, rows)
        return (f32_from_bf16(stored) if self.entries[name].dtype == "BF16" else stored).astype(dtype, copy=False)

    def release(self) -> None:
        """Gives pages back to the system."""
        for file in self._files:
            file.release()

    def close(self) -> None:
        """Closes all files."""
        for file in self._files:
            file.close()


class DirectoryCheckpoint(Checkpoint):
    """An opened directory: its shards live as long as it does."""

    _shards: Shards

    def release(self) -> None:
        """Gives pages back to the system."""
        self._shards.release()

    def close(self) -> None:
        """Closes the files."""
        self._shards.close()


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
    return replace(description, config=config)
