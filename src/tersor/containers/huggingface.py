"""Hugging Face directories: float weights in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tersor.containers.container import Container, refuse_unheld
from tersor.containers.directory import (
    DTYPE_OF,
    QUANT_METHODS,
    DirectoryCheckpoint,
    Shards,
    find,
    float_info,
    is_tied,
    names_method,
    read_description,
    read_float,
    with_tied,
)
from tersor.containers.directory_writer import DirectoryWriter
from tersor.containers.onnx_file import has_graph
from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError, unknown
from tersor.tensor import ModelDescription, QuantizedTensor, TensorInfo


class HuggingFaceCheckpoint(DirectoryCheckpoint):
    """An opened directory of float weights."""

    container = "huggingface"

    def __init__(self, path: Path) -> None:
        """Opens the directory. Raises ContainerError for anything missing, malformed or quantized."""
        self.path = path
        description, quantization = read_description(path)
        if quantization is not None:
            method = quantization.get("quant_method")
            raise ContainerError(f"{path}: {unknown('quant_method', shorten(method), QUANT_METHODS)}; open the float original")
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


class HuggingFace(Container):
    """Directories with float weights."""

    name = "huggingface"
    suffix = ""

    def recognizes(self, path: Path) -> bool:
        """Returns whether path is a directory with a config.json that is no other container's, and no ONNX graph instead of weights."""
        return (path / "config.json").is_file() and not names_method(path, *QUANT_METHODS) and not has_graph(path)

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
