"""Writing GGUF: every tensor at its place from the start, in one file or in several of a size, under temporary names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_VERSION

from tersor.containers.config_to_gguf import write_metadata
from tersor.containers.container import Writer
from tersor.containers.gguf_file import BLOCK_TYPES, KeyValue, Layout, file_types, lay_out, write_file
from tersor.containers.gguf_names import ARCHITECTURES, ROPE_FREQS, permuted_heads, reorder, rows_to_gguf, to_gguf
from tersor.containers.gguf_split import SPLIT_KEYS, Placed, part_paths, split
from tersor.containers.output import check_output, disk_errors, remove, temporary_path
from tersor.containers.safetensors_file import shorten
from tersor.containers.tokenizer_to_gguf import write_tokenizer
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo

_PROVENANCE = ("tersor.", "quantize.imatrix.")

FLOAT_DTYPES = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}


@dataclass
class _File:
    """One file being written. path: its final name; stream: None once it is closed."""

    path: Path
    temporary: Path
    layout: Layout
    stream: BinaryIO | None = None

    def close(self) -> None:
        """Closes the stream, if it is open."""
        if self.stream is not None:
            self.stream.close()
            self.stream = None


class GGUFWriter(Writer):
    """Writes a GGUF file, or its parts, under temporary names. Every tensor has its place from the start, so any order will do.

    Vectors are written as F32, which ggml's operations demand: float vectors of other types are widened, exactly.
    """

    def __init__(
        self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool, max_bytes: int | None = None
    ) -> None:
        """Creates the temporary files at their full size. Raises OutputError and ContainerError as `create` says."""
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
        metadata |= _quantization_keys(self._plan.values()) | _provenance_keys(description, self._plan.values())
        tensors = [(self._names[name], BLOCK_TYPES[kinds[name]], info.shape) for name, info in self._plan.items()]
        if freqs is not None:
            tensors.insert(0, (ROPE_FREQS, BLOCK_TYPES["f32"], freqs.shape))
        self._missing = set(self._plan)
        self._files = self._laid_out(metadata, tensors, max_bytes)
        self.path = self._files[0].path
        self.nbytes = sum(file.layout.size for file in self._files)
        for file in self._files:
            check_output(file.path, self.nbytes, force=force, directory=False)
        self._home = {name: file for file in self._files for name in file.layout.tensors}
        try:
            with disk_errors(path, self.nbytes):
                for file in self._files:
                    file.stream = write_file(file.temporary, file.layout)
                if freqs is not None:
                    self._put(ROPE_FREQS, freqs)
        except BaseException:
            self.abort()
            raise

    def _laid_out(self, metadata: Mapping[str, KeyValue], tensors: Sequence[Placed], max_bytes: int | None) -> list[_File]:
        """Returns the files to be written: one, or the parts of a split model."""
        if max_bytes is None:
            return [_File(self.path, temporary_path(self.path), lay_out(metadata, tensors))]
        layouts = split(str(self.path), metadata, tensors, max_bytes)
        paths = part_paths(self.path, len(layouts))
        return [_File(path, temporary_path(path), layout) for path, layout in zip(paths, layouts, strict=True)]

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
        with disk_errors(self.path, self.nbytes):
            self._put(self._names[name], next(iter(tensor.fields.values())))
        self._missing.discard(name)

    def kept(self, name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        """Returns the tensor as reading it back gives it: gemma's norms, stored as 1 + w, lose float32's last bits of a small w."""
        if len(tensor.shape) > 1:
            return tensor
        values = self._vector(name, tensor).fields["values"] - np.float32(self._shift(name))
        return QuantizedTensor("f32", tensor.shape, {"values": values})

    def _vector(self, name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        values = get_format(tensor.format).dequantize(tensor).reshape(1, -1) + np.float32(self._shift(name))
        return QuantizedTensor("f32", tensor.shape, {"values": values})

    def _shift(self, name: str) -> float:
        """Returns what GGUF adds to a vector."""
        return self._architecture.norm_shift if name.endswith("norm.weight") else 0.0

    def _put(self, name: str, data: Array) -> None:
        """Writes the bytes of one tensor at its place."""
        file = self._home[name]
        target = file.layout.tensors[name]
        data = np.ascontiguousarray(data)
        assert data.nbytes == target.nbytes, (name, data.shape, data.dtype, target)
        assert file.stream is not None
        file.stream.seek(target.offset)
        file.stream.write(data.reshape(-1).view(np.uint8).data)

    def commit(self) -> None:
        """Checks that all was written, then renames the files to their final names, the first, by which a model is opened, last."""
        if self._missing:
            first = next(name for name in self._plan if name in self._missing)
            raise ContainerError(f"{self.path}: {len(self._missing)} announced tensors were not written, first {first}")
        with disk_errors(self.path, self.nbytes):
            for file in self._files:
                file.close()
            for file in reversed(self._files):
                file.temporary.replace(file.path)

    def abort(self) -> None:
        """Removes the temporary files."""
        for file in self._files:
            with suppress(OSError):  # the rest of the buffer may meet a full disk; the file goes anyway
                file.close()
            remove(file.temporary)


def _carried(description: ModelDescription) -> dict[str, KeyValue]:
    """Returns the key-values of a model that came from a GGUF file, verbatim but for those of the next two functions; of another none."""
    if "general.architecture" not in description.metadata:
        return {}
    ours = (*SPLIT_KEYS, *_PROVENANCE, "general.file_type", "general.quantization_version")
    return {key: value for key, value in description.metadata.items() if not key.startswith(ours)}


def _provenance_keys(description: ModelDescription, plan: Iterable[TensorInfo]) -> dict[str, KeyValue]:
    """Returns how the weights were made: the recipe, and the calibration both as JSON and under the keys that llama-quantize writes.

    Weights that come from a GGUF file as they are keep what it says of them. entries_count is the number of matrices whose inputs were
    measured: those of an importance matrix, which is named then, or those of the layers.
    Source: llama.cpp tools/quantize/quantize.cpp (LLM_KV_QUANTIZE_IMATRIX_*).
    """
    made = description.provenance
    if not made:
        return {key: v for key, v in description.metadata.items() if key.startswith(_PROVENANCE) and key != "tersor.writer"}
    keys: dict[str, KeyValue] = {f"tersor.{name}": ("str", v if isinstance(v, str) else json.dumps(v)) for name, v in made.items()}
    if calibration := made.get("calibration"):
        of_layers = sum(len(info.shape) > 1 and info.name.startswith("model.layers.") for info in plan)
        said = {
            "file": ("str", calibration.get("file")),
            "dataset": ("str", calibration["source"]),
            "entries_count": ("i32", calibration.get("entries", of_layers)),
            "chunks_count": ("i32", calibration["samples"]),
        }
        keys |= {f"quantize.imatrix.{name}": value for name, value in said.items() if value[1] is not None}
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
