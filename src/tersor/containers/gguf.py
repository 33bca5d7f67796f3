"""GGUF as a container: Hugging Face's names, orders and config on our side, llama.cpp's in the file.

The file itself (header, offsets) is gguf_file.py; names and row orders gguf_names.py; config config_from_gguf.py and
config_to_gguf.py; tokenizers tokenizer_from_gguf.py and tokenizer_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np

from tersor.containers.config_from_gguf import read_architecture, read_config
from tersor.containers.container import Checkpoint, Container, refuse_unheld
from tersor.containers.directory import find
from tersor.containers.gguf_file import BLOCK_TYPES, MAGIC, GGUFTensor
from tersor.containers.gguf_names import (
    ROPE_FREQS,
    permuted_heads,
    reorder,
    rows_from_gguf,
    to_hugging_face,
)
from tersor.containers.gguf_split import open_parts
from tersor.containers.gguf_writer import FLOAT_DTYPES, GGUFWriter
from tersor.containers.safetensors_file import shorten
from tersor.containers.tokenizer_from_gguf import read_tokenizer
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo


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
        """Opens the file, or all files when it is one of a split model. path is then the first of them.

        Raises ContainerError for anything malformed, for a missing part, and for unknown architectures and tensors.
        """
        self._file = open_parts(path)
        self.path = self._file.path
        self.paths = self._file.paths  # all files, in order
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

    def create(
        self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool = False, max_bytes: int | None = None
    ) -> GGUFWriter:
        """Starts writing a GGUF v3 file. max_bytes: write files of at most this size instead, name-00001-of-00003.gguf and so on; a
        tensor that is larger has a file of its own."""
        refuse_unheld(self, path, plan)
        return GGUFWriter(path, description, plan, force=force, max_bytes=max_bytes)
