"""What GPTQ and AWQ directories share: quantized linear layers as `qweight`, `qzeros` and `scales`, transposed to (in, out).

    M.scales  float (groups, rows)   M.qweight, M.qzeros  int32, packed as gptq.py and awq.py draw them   M.bias  float (rows,), optional

rows: output features; w (rows, in) = (code - zero) * scale of its group of columns. Everything else is a float tensor. The names
are AutoGPTQ's (AutoGPTQ/AutoGPTQ auto_gptq/nn_modules/qlinear), which AutoAWQ took over.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tersor.containers.container import Container, refuse_unheld
from tersor.containers.directory import DirectoryCheckpoint, Shards, find, float_info, is_tied, read_float, with_tied
from tersor.containers.safetensors_file import Entry, shorten
from tersor.errors import ContainerError, FormatError
from tersor.formats import get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.ordered import OrderedFormat
from tersor.formats.packing import pack_bits
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
_PARTS = ("qzeros", "scales", "g_idx")

# What vLLM calls layers that it runs as one; its `dynamic` is asked for these names.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer. plain: the format of its columns in stored order; order: int32 (columns,), the column stored at
    each place, None when columns are stored as they come."""

    plain: AffineFormat
    rows: int
    columns: int
    order: Array | None = None

    @property
    def groups(self) -> int:
        """Number of groups of a row."""
        return self.plain.groups(self.columns)

    def info(self, name: str) -> TensorInfo:
        """Returns what the container announces. Raises FormatError when the format does not exist or does not fit."""
        format = get_format(f"{self.plain.name}{'' if self.order is None else 'o'}")
        format.check((self.rows, self.columns), name)
        return TensorInfo(name, format.name, (self.rows, self.columns), format.nbytes((self.rows, self.columns)))


def stored_format(name: str) -> AffineFormat | None:
    """Returns the affine format of the columns in stored order, None for what is not written: any other family, float minima or zeros,
    and float32 scales, which loaders round to float16 or the model's type."""
    found = get_format(name)
    found = found.plain if isinstance(found, OrderedFormat) else found
    return found if isinstance(found, AffineFormat) and found.kind in ("", "s") and not found.wide else None


class QweightCheckpoint(DirectoryCheckpoint):
    """An opened directory. Subclasses say how a layer is found and unpacked."""

    def __init__(self, path: Path, description: ModelDescription) -> None:
        """Opens the directory. Raises ContainerError for anything missing, malformed or not supported."""
        self.path = path
        self._shards = Shards(path)
        self._layers: dict[str, Layer] = {}
        try:
            tied = is_tied(description.config)
            unused = self._zero_biases()
            infos = (self._info(entry) for entry in self._shards.entries.values() if entry.name not in unused)
            self.tensors: Mapping[str, TensorInfo] = {
                info.name: info for info in infos if info is not None and not (tied and info.name == "lm_head.weight")
            }
        except BaseException:
            self._shards.close()
            raise
        self.description = with_tied(description, self.tensors)

    @abstractmethod
    def layer(self, where: str, module: str, qweight: Entry) -> Layer:
        """Returns the layer that qweight (two axes, int32) belongs to, all parts proven to fit each other. Raises ContainerError."""

    @abstractmethod
    def codes(self, module: str, layer: Layer, rows: slice) -> Array:
        """Returns those rows of the format's `codes`, packed uint8."""

    @abstractmethod
    def zeros(self, module: str, layer: Layer) -> Array:
        """Returns the zeros, (groups, rows) uint8."""

    def _zero_biases(self) -> set[str]:
        """Returns the biases that stand for none: AutoGPTQ gave every quantized layer a bias, of zeros where the model has none."""
        entries = self._shards.entries
        biases = [f"{name.removesuffix('.qweight')}.bias" for name in entries if name.endswith(".qweight")]
        if not all(name in entries for name in biases):
            return set()
        return {name for name in biases if not self._shards.array(name).any()}

    def _info(self, entry: Entry) -> TensorInfo | None:
        """Returns the tensor that a stored one stands for, None for the other parts of a quantized layer."""
        module, _, part = entry.name.rpartition(".")
        if part in _PARTS and f"{module}.qweight" in self._shards.entries:
            return None
        if part != "qweight":
            return float_info(self.path, entry)
        where = f"{self.path}: {shorten(module)}"
        if entry.dtype != "I32" or len(entry.shape) != 2 or 0 in entry.shape:
            raise ContainerError(f"{where}: qweight is {entry.dtype} {shorten(list(entry.shape))}, needs int32 with two axes")
        if f"{module}.weight" in self._shards.entries:
            raise ContainerError(f"{where} has both qweight and weight; the file is damaged")
        name = f"{module}.weight"
        try:
            layer = self.layer(where, module, entry)
            if not self._shards.are_half(f"{module}.scales"):
                layer = replace(layer, plain=layer.plain.of_floats(wide=True))
            info = layer.info(name)
        except FormatError as error:
            raise ContainerError(f"{where}: {error}") from None
        self._layers[name] = layer
        return info

    def check_part(self, where: str, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...], layer: Layer) -> None:
        """Raises ContainerError unless the part `name` is there with one of these dtypes and this shape."""
        entry = self._shards.entries.get(name)
        if entry is None or entry.dtype not in dtypes or entry.shape != shape:
            found = "missing" if entry is None else f"{entry.dtype} {shorten(list(entry.shape))}"
            raise ContainerError(
                f"{where}: {name.rpartition('.')[2]} is {found}, {layer.plain.name} of {layer.rows} x {layer.columns} needs"
                f" {dtypes[0]} {list(shape)}; config and weights disagree"
            )

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the tensor, or those rows of it. A quantized one is transposed and repacked; its scales become float16 or float32."""
        info = find(self.path, self.tensors, name)
        layer = self._layers.get(name)
        if layer is None:
            return read_float(self._shards, info, rows)
        module, rows = name.removesuffix(".weight"), slice(*(rows or slice(None)).indices(layer.rows))
        scales = self._shards.floats(f"{module}.scales", layer.plain.float_type)  # (groups, rows)
        fields = {"codes": self.codes(module, layer, rows), "scale": np.ascontiguousarray(scales[:, rows].T)}
        if layer.plain.kind == "":
            fields["zero"] = pack_bits(np.ascontiguousarray(self.zeros(module, layer)[:, rows].T), layer.plain.width)
        if layer.order is not None:
            fields["order"] = layer.order
        return QuantizedTensor(info.format, (len(fields["codes"]), layer.columns), fields)


def check_plan(container: Container, path: Path, plan: Sequence[TensorInfo], tied: bool, row_block: int, column_block: int) -> None:
    """Raises ContainerError for the first tensor that the container cannot hold: its format, its place, or its shape.

    row_block, column_block: what rows and columns of a quantized matrix must be multiples of.
    """
    refuse_unheld(container, path, plan)
    for info in plan:
        if stored_format(info.format) is None:
            continue
        where = f"{path}: {info.name}"
        if len(info.shape) != 2:
            raise ContainerError(f"{where} has {len(info.shape)} axes; {container.name} holds quantized matrices only")
        if info.name == f"{EMBEDDING}.weight":
            also = ", which is also the head (tie_word_embeddings)" if tied else ""
            raise ContainerError(
                f"{where} is the embedding{also}; {container.name} quantizes linear layers only; keep it in f16 (recipe `embed_tokens=f16`)"
            )
        rows, columns = info.shape
        if rows % row_block or columns % column_block:
            raise ContainerError(
                f"{where} is {rows} x {columns}; loaders of {container.name} need rows that are a multiple of {row_block} and columns of"
                f" {column_block}; keep it in f16 (a rule like `{info.name.split('.')[-2]}=f16`)"
            )


def as_words(stream: Array) -> Array:
    """Returns packed rows, (n, bytes) uint8, as int32 words; bytes: a multiple of 4."""
    words: Array = np.ascontiguousarray(stream).view("<i4")
    return words


def module_expression(modules: Sequence[str]) -> str:
    """Returns a regular expression that matches these names, and vLLM's names of layers that they make up together."""
    known, names = set(modules), list(modules)
    for fused, parts in _FUSED.items():
        for module in modules:
            block, _, last = module.rpartition(".")
            if last == parts[0] and all(f"{block}.{part}" in known for part in parts):
                names.append(f"{block}.{fused}")
    return f"^(?:{'|'.join(map(re.escape, names))})$"
