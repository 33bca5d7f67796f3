"""GGUF as a container: Hugging Face's names, orders and config on our side, llama.cpp's in the file.

The file itself (header, offsets) is gguf_file.py; names and row orders gguf_names.py; config config_from_gguf.py and
config_to_gguf.py; tokenizers tokenizer_from_gguf.py and tokenizer_to_gguf.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_VERSION

from tersor.containers.config_from_gguf import read_architecture, read_config
from tersor.containers.config_to_gguf import write_metadata
from tersor.containers.container import Checkpoint, Container, Writer, refuse_unheld
from tersor.containers.directory import find
from tersor.containers.gguf_file import BLOCK_TYPES, MAGIC, GGUFFile, GGUFTensor, KeyValue, file_types, lay_out, write_file
from tersor.containers.gguf_names import (
    ARCHITECTURES,
    ROPE_FREQS,
    permuted_heads,
    reorder,
    rows_from_gguf,
    rows_to_gguf,
    to_gguf,
    to_hugging_face,
)
from tersor.containers.output import check_output, disk_errors, remove, temporary_path
from tersor.containers.safetensors_file import shorten
from tersor.containers.tokenizer_from_gguf import read_tokenizer
from tersor.containers.tokenizer_to_gguf import write_tokenizer
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo

FLOAT_DTYPES = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}


class TokenizerFiles(Mapping[str, bytes]):
    """The tokenizer's files, built when first asked for: it takes a second for a large vocabulary, and not everyone needs them."""

    def __init__(self, build: Callable[[], dict[str, bytes]]) -> None:
        self._build = build

    @cached_property
    def _files(self) -> dict[str, bytes]:
        return self._build()

    def __getitem__(self, name: str) -> bytes:
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class GGUFCheckpoint(Checkpoint):
    """An opened GGUF file."""

    container = "gguf"

    def __init__(self, path: Path) -> None:
        """Opens the file. Raises ContainerError for anything malformed, and for unknown architectures and tensors."""
        self.path = path
        self._file = GGUFFile(path)
        try:
            self._describe()
        except BaseException:
            self._file.close()
            raise

    def _describe(self) -> None:
        where, metadata = str(self.path), self._file.metadata
        self._architecture = read_architecture(where, metadata)
        self._source: dict[str, GGUFTensor] = {}
        for tensor in self._file.tensors.values():
            if tensor.name == ROPE_FREQS:
                continue
            name = to_hugging_face(self._architecture, tensor.name)
            if name is None:
                raise ContainerError(f"{where}: tensor {shorten(tensor.name)!r} is not part of {self._architecture.name} as known here")
            if name in self._source:
                raise ContainerError(
                    f"{where}: tensors {self._source[name].name!r} and {shorten(tensor.name)!r} are both {name}; it is damaged"
                )
            self._source[name] = tensor
        config = read_config(where, self._architecture, metadata, {n: t.shape for n, t in self._source.items()}, self._rope_freqs())
        self.tensors: Mapping[str, TensorInfo] = {name: self._info(name, tensor) for name, tensor in self._source.items()}
        files = TokenizerFiles(lambda: read_tokenizer(where, metadata))
        self.description = ModelDescription(config, files, metadata)

    def _info(self, name: str, tensor: GGUFTensor) -> TensorInfo:
        if len(tensor.shape) == 1 and tensor.type.name not in FLOAT_DTYPES:
            raise ContainerError(
                f"{self.path}: vector {shorten(tensor.name)!r} is {tensor.type.name}, vectors are floats; the file is damaged"
            )
        if self._shift(name):
            return TensorInfo(name, "f32", tensor.shape, 4 * prod(tensor.shape))
        return TensorInfo(name, tensor.type.name, tensor.shape, tensor.nbytes)

    def _shift(self, name: str) -> float:
        return self._architecture.norm_shift if name.endswith("norm.weight") else 0.0

    def _rope_freqs(self) -> Array | None:
        """Returns the divisors of the rope frequencies, None when the file has none."""
        if ROPE_FREQS not in self._file.tensors:
            return None
        tensor = self._file.tensors[ROPE_FREQS]
        values = self._file.rows(ROPE_FREQS).view("<f4").reshape(-1) if tensor.type.name == "f32" else np.zeros(0, np.float32)
        if not values.size or not np.isfinite(values).all() or (values <= 0).any():
            raise ContainerError(f"{self.path}: {ROPE_FREQS} must be finite f32 values above 0; the file is damaged")
        return values

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the tensor, or those rows of it: a view, but for llama's q and k (rows reordered) and gemma's norms (shifted)."""
        find(self.path, self.tensors, name)
        source = self._source[name]
        heads = permuted_heads(self._architecture, name, self.description.config)
        if heads and len(source.shape) == 2:
            order = rows_from_gguf(source.shape[0], heads)[rows or slice(None)]
            whole = self._stored(source, None)
            return reorder(whole, order)
        tensor = self._stored(source, None if heads else rows)
        if heads:
            return reorder(tensor, rows_from_gguf(source.shape[0], heads))
        shift = self._shift(name)
        if shift:
            values = get_format(tensor.format).dequantize(tensor).reshape(1, -1) - np.float32(shift)
            return QuantizedTensor("f32", tensor.shape, {"values": values})
        return tensor

    def _stored(self, source: GGUFTensor, rows: slice | None) -> QuantizedTensor:
        """Returns the tensor as the file has it; a slice of a tensor counts its rows over all but the last axis."""
        data = self._file.rows(source.name, rows)
        shape = source.shape if rows is None else (data.shape[0], source.shape[-1])
        if source.type.name in FLOAT_DTYPES:
            return QuantizedTensor(source.type.name, shape, {"values": data.view(FLOAT_DTYPES[source.type.name])})
        return QuantizedTensor(source.type.name, shape, {"blocks": data})

    def release(self) -> None:
        """Gives pages back to the system."""
        self._file.release()

    def close(self) -> None:
        """Closes the file; arrays handed out stay valid."""
        self._file.close()


class GGUFWriter(Writer):
    """Writes one GGUF file under a temporary name. Every tensor has its place from the start, so any order will do.

    Vectors are written as F32, which ggml's operations demand: float vectors of other types are widened, exactly.
    """

    def __init__(self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool) -> None:
        """Creates the temporary file at its full size. Raises OutputError and ContainerError as `create` says."""
        self.path = path
        self._plan = {info.name: info for info in plan}
        if len(self._plan) != len(plan):
            raise ContainerError(f"{path}: a tensor is announced twice")
        where, self._config = str(path), description.config
        translated, freqs = write_metadata(where, self._config)
        self._architecture = ARCHITECTURES[translated["general.architecture"][1]]
        self._names = {name: self._gguf_name(name) for name in self._plan}
        self._check_shapes()
        kinds = {name: "f32" if len(info.shape) == 1 else info.format for name, info in self._plan.items()}
        metadata = _carried(description) or translated | write_tokenizer(where, description)
        metadata |= _quantization_keys(self._plan.values()) | _provenance_keys(description.provenance)
        tensors = [(self._names[name], BLOCK_TYPES[kinds[name]], info.shape) for name, info in self._plan.items()]
        if freqs is not None:
            tensors.insert(0, (ROPE_FREQS, BLOCK_TYPES["f32"], freqs.shape))
        self._layout = lay_out(metadata, tensors)
        self._missing = set(self._plan)
        check_output(path, self._layout.size, force=force, directory=False)
        self._temporary = temporary_path(path)
        self._file: BinaryIO | None = None
        try:
            with disk_errors(path, self._layout.size):
                self._file = write_file(self._temporary, self._layout)
                if freqs is not None:
                    self._put(ROPE_FREQS, freqs)
        except BaseException:
            self.abort()
            raise

    def _gguf_name(self, name: str) -> str:
        found = to_gguf(self._architecture, name)
        if found is None:
            raise ContainerError(f"{self.path}: GGUF's {self._architecture.name} has no place for tensor {shorten(name)!r}")
        return found

    def _check_shapes(self) -> None:
        """Raises ContainerError when the plan contradicts the config where the file depends on both: head sizes and vocabulary."""
        config = self._config
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        for name, info in self._plan.items():
            heads = permuted_heads(self._architecture, name, config)
            if heads and info.shape[0] != heads * head_dim:
                raise ContainerError(f"{self.path}: {name} has {info.shape[0]} rows, but the config says {heads} heads of {head_dim}")
            if name == "model.embed_tokens.weight" and info.shape[0] != config["vocab_size"]:
                raise ContainerError(f"{self.path}: {name} has {info.shape[0]} rows, but the config says vocab_size {config['vocab_size']}")

    def write(self, name: str, tensor: QuantizedTensor) -> None:
        """Writes one announced tensor: renamed, rows in GGUF's order, gemma's norms shifted."""
        info = self._plan.get(name)
        if info is None or info.format != tensor.format or info.shape != tensor.shape:
            announced = f"{info.format} {list(info.shape)}" if info else "nothing of that name"
            raise ContainerError(f"{self.path}: {name} is {tensor.format} {list(tensor.shape)}, but {announced} was announced")
        if len(tensor.shape) == 1:
            tensor = self._vector(name, tensor)
        heads = permuted_heads(self._architecture, name, self._config)
        if heads:
            tensor = reorder(tensor, rows_to_gguf(tensor.shape[0], heads))
        with disk_errors(self.path, self._layout.size):
            self._put(self._names[name], next(iter(tensor.fields.values())))
        self._missing.discard(name)

    def _vector(self, name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        values = get_format(tensor.format).dequantize(tensor).reshape(1, -1)
        if self._architecture.norm_shift and name.endswith("norm.weight"):
            values = values + np.float32(self._architecture.norm_shift)
        return QuantizedTensor("f32", tensor.shape, {"values": values})

    def _put(self, name: str, data: Array) -> None:
        """Writes the bytes of one tensor at its place."""
        target = self._layout.tensors[name]
        data = np.ascontiguousarray(data)
        assert data.nbytes == target.nbytes, (name, data.shape, data.dtype, target)
        assert self._file is not None
        self._file.seek(target.offset)
        self._file.write(data.reshape(-1).view(np.uint8).data)

    def commit(self) -> None:
        """Checks that all was written, then renames the file to its final name."""
        if self._missing:
            first = next(name for name in self._plan if name in self._missing)
            raise ContainerError(f"{self.path}: {len(self._missing)} announced tensors were not written, first {first}")
        assert self._file is not None
        with disk_errors(self.path, self._layout.size):
            self._file.close()
            self._temporary.replace(self.path)

    def abort(self) -> None:
        """Removes the temporary file."""
        if self._file is not None:
            with suppress(OSError):  # the rest of the buffer may meet a full disk; the file goes anyway
                self._file.close()
        remove(self._temporary)


def _carried(description: ModelDescription) -> dict[str, KeyValue]:
    """Returns the key-values of a model that came from a GGUF file, verbatim but for those of `_quantization_keys`; of another none."""
    if "general.architecture" not in description.metadata:
        return {}
    ours = ("split.", "tersor.", "quantize.imatrix.", "general.file_type", "general.quantization_version")
    return {key: value for key, value in description.metadata.items() if not key.startswith(ours)}


def _provenance_keys(provenance: Mapping[str, Any]) -> dict[str, KeyValue]:
    """Returns how the weights were made: the recipe, and the calibration both as JSON and under the keys of llama.cpp's imatrix files."""
    keys: dict[str, KeyValue] = {f"tersor.{name}": ("str", v if isinstance(v, str) else json.dumps(v)) for name, v in provenance.items()}
    if calibration := provenance.get("calibration"):
        keys["quantize.imatrix.dataset"] = ("str", str(calibration["source"]))
        keys["quantize.imatrix.chunks_count"] = ("i32", int(calibration["samples"]))
    return keys


def _quantization_keys(plan: Iterable[TensorInfo]) -> dict[str, KeyValue]:
    """Returns what says how the weights are stored: the type of most of them, the version of the block layouts, and who wrote it."""
    weights: Counter[str] = Counter()
    for info in plan:
        if len(info.shape) > 1:
            weights[info.format] += prod(info.shape)
    most = weights.most_common(1)[0][0] if weights else "f32"
    try:
        writer = f"tersor {version('tersor')}"
    except PackageNotFoundError:  # run from a source tree
        writer = "tersor"
    keys: dict[str, KeyValue] = {"general.quantization_version": ("u32", GGML_QUANT_VERSION), "tersor.writer": ("str", writer)}
    if most in (known := file_types()):
        keys["general.file_type"] = ("u32", known[most])
    return keys


class GGUF(Container):
    """GGUF files."""

    name = "gguf"
    suffix = ".gguf"

    def recognizes(self, path: Path) -> bool:
        """Returns whether path is a file that starts with GGUF's magic number, or is named like one."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC or path.suffix == self.suffix

    def open(self, path: Path) -> GGUFCheckpoint:
        """Opens the file. Raises ContainerError."""
        return GGUFCheckpoint(path)

    def holds(self, format: str) -> bool:
        """Returns whether the format is a float or a ggml type."""
        return format in BLOCK_TYPES

    def create(self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool = False) -> GGUFWriter:
        """Starts writing a GGUF v3 file."""
        refuse_unheld(self, path, plan)
        return GGUFWriter(path, description, plan, force=force)
