"""GPTQ directories, as AutoGPTQ, gptqmodel, vLLM, SGLang and transformers load them.

A quantized linear layer `M` of `rows` outputs and `in` inputs, B bits, groups of N columns (or one group, of all):

    M.qweight  int32 (in*B/32, rows)      codes: each column of words is one output's dense bit stream along the input, LSB first
    M.qzeros   int32 (groups, rows*B/32)  zeros: each row of words is one group's dense bit stream along the output, LSB first
    M.scales   float16 (groups, rows)
    M.g_idx    int32 (in,)                group of every input column: i // N, or any when act-order was used

and w[r, i] = (code - zero[g_idx[i], r]) * scale[g_idx[i], r]. Source: ModelCloud/GPTQModel gptqmodel/nn_modules/qlinear/__init__.py
(GPTQQuantLinear, PackableQuantLinear.pack_original, dequantize_weight); versions: gptqmodel/utils/model.py
(convert_gptq_v1_to_v2_format_module) and utils/model_dequant.py. Three bits straddle words there as they do in our stream.

Versions. v1 (`checkpoint_format: gptq`) stores (zero - 1) mod 2^B, v2 (`gptq_v2`) the zero. A symmetric zero is 2^(B-1), which
v1 holds without wrapping and every loader knows. A zero of 0 wraps in v1, and loaders differ then: gptqmodel (7.6; 3 bits apart)
adds one to whole words, so that the carry damages the neighbour, but masks each field in its safetensors reader; vLLM's kernels
(csrc/quantization/gptq/q_gemm.cu) add one to each field without a mask, which gives 2^B. So v2 is written as soon as one tensor is
asymmetric, v1 otherwise. We read both, modulo 2^B. transformers hands either version to gptqmodel; vLLM's newest config
(auto_gptq.py) takes symmetric 4 and 8 bits only.

Act-order. A g_idx that is not i // N gives our formats with the suffix `o`, whose groups are runs of stored columns:
order = argsort(g_idx), stable. Every group must have exactly N columns. Groups fixed before the columns were reordered
(static groups) are plain i // N in the file.

Held: 2, 3, 4 and 8 bits, symmetric or with an integer zero, groups of 16, 32, 64, 128 or 256 or a whole row. 5 to 7 bits exist in
gptqmodel's own `gptq_p` only, with other words. Embeddings stay float, since loaders replace linear layers only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers.directory import DTYPE_OF, DirectoryContainer, is_tied, read_description
from tersor.containers.directory_writer import DirectoryWriter, Part
from tersor.containers.gptq_config import (
    AUTO_ROUND,
    BITS,
    GROUP_SIZES,
    METHOD,
    V1,
    checkpoint_format,
    read_quantization,
    write_quantization,
)
from tersor.containers.qweight import Layer, QweightCheckpoint, as_words, check_plan, stored_format
from tersor.containers.safetensors_file import Entry
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.packing import pack_bits, packed_bytes, unpack_bits
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo

SIDE_CONFIG = "quantize_config.json"  # where AutoGPTQ looks
_BLOCK = 32  # rows and columns that loaders pack at once


class GPTQCheckpoint(QweightCheckpoint):
    """An opened directory."""

    container = METHOD

    def __init__(self, path: Path) -> None:
        """Opens the directory. Raises ContainerError for anything missing, malformed or not supported."""
        description, quantization = read_description(path)
        self._quantization = read_quantization(str(path / "config.json"), quantization or {})
        super().__init__(path, description)

    def layer(self, where: str, module: str, qweight: Entry) -> Layer:
        """Returns the layer of a qweight."""
        scheme = self._quantization.scheme(module)
        if scheme is None:
            raise ContainerError(f"{where} is quantized, but `dynamic` says that it is not; config and weights disagree")
        words, rows = qweight.shape
        columns, rest = divmod(words * 32, scheme.bits)
        if rest:
            raise ContainerError(
                f"{where}: qweight has {words} words a row, which {scheme.bits}-bit codes do not fill; the file is damaged"
            )
        layer = Layer(_affine(scheme.format_name(columns, scheme.symmetric)), rows, columns)
        layer.plain.check((rows, columns), module)
        self.check_part(where, f"{module}.scales", ("F16", "BF16", "F32"), (layer.groups, rows), layer)
        self.check_part(where, f"{module}.qzeros", ("I32",), (layer.groups, ceil(rows * scheme.bits / 32)), layer)
        if scheme.symmetric and not self._is_middle(module, layer):
            layer = replace(layer, plain=_affine(scheme.format_name(columns, False)))
        if f"{module}.g_idx" in self._shards.entries:
            self.check_part(where, f"{module}.g_idx", ("I32", "I64"), (columns,), layer)
            layer = replace(layer, order=self._order(where, module, layer))
        elif scheme.by_column and layer.groups > 1:
            raise ContainerError(
                f"{where}: g_idx is missing, but desc_act is true, so no one can say which scale a column has;"
                " make or download the file again"
            )
        return layer

    def _is_middle(self, module: str, layer: Layer) -> bool:
        """Returns whether all zeros are 2^(B-1), as the flag `sym` promises; some writers set it for any zeros."""
        stored = self._shards.array(f"{module}.qzeros")
        return bool((stored == _middle_words(layer.plain, layer.rows, self._quantization.version)).all())

    def _order(self, where: str, module: str, layer: Layer) -> Array | None:
        """Returns the columns by group, (columns,) int32, None when each group is the next run of columns."""
        g_idx, size = self._shards.array(f"{module}.g_idx"), layer.columns // layer.groups
        if np.array_equal(g_idx, np.arange(layer.columns) // size):
            return None
        if g_idx.min() < 0 or g_idx.max() >= layer.groups:
            raise ContainerError(
                f"{where}: g_idx goes from {g_idx.min()} to {g_idx.max()}, needs 0 to {layer.groups - 1}; config and weights disagree"
            )
        counts = np.bincount(g_idx, minlength=layer.groups)
        if (counts != size).any():
            group = int(np.flatnonzero(counts != size)[0])
            raise ContainerError(
                f"{where}: g_idx gives group {group} {counts[group]} columns, needs {size}; such uneven groups are not supported"
            )
        order: Array = np.argsort(g_idx, kind="stable").astype(np.int32)
        return order

    def codes(self, module: str, layer: Layer, rows: slice) -> Array:
        """Returns those rows of `codes`: the words of an output, in our stream's order."""
        stream = np.ascontiguousarray(self._shards.array(f"{module}.qweight")[:, rows].T).view(np.uint8)
        if layer.order is None:
            return stream
        return pack_bits(unpack_bits(stream, layer.plain.width, layer.columns)[:, layer.order], layer.plain.width)

    def zeros(self, module: str, layer: Layer) -> Array:
        """Returns the zeros, (groups, rows) uint8."""
        width = layer.plain.width
        stream = np.ascontiguousarray(self._shards.array(f"{module}.qzeros")).view(np.uint8)
        stored = unpack_bits(np.ascontiguousarray(stream[:, : packed_bytes(layer.rows, width)]), width, layer.rows)
        return stored if self._quantization.version != V1 else (stored + np.uint8(1)) & np.uint8(layer.plain.max_code)


def _affine(name: str) -> AffineFormat:
    format = get_format(name)
    assert isinstance(format, AffineFormat)
    return format


def _middle_words(format: AffineFormat, rows: int, version: str) -> Array:
    """Returns a group's words of qzeros, (1, ceil(rows*B/32)) int32, when all its zeros are 2^(B-1)."""
    packed = pack_bits(np.full((1, rows), format.middle - (version == V1), np.uint8), format.width)
    stream = np.zeros((1, ceil(rows * format.width / 32) * 4), np.uint8)
    stream[:, : packed.shape[1]] = packed
    return as_words(stream)


class GPTQWriter(DirectoryWriter):
    """Writes a directory; quantized layers as their parts, floats as they are."""

    def __init__(self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool) -> None:
        """Starts writing. The config is written twice, for loaders that look in either place."""
        self._quantization = write_quantization(plan)
        self._version = checkpoint_format(format for info in plan if (format := stored_format(info.format)) is not None)
        if self._quantization is not None:
            text = json.dumps(self._quantization, indent=2) + "\n"
            description = replace(description, files={**description.files, SIDE_CONFIG: text.encode()})
        super().__init__(path, description, plan, force=force)

    def parts(self, info: TensorInfo) -> list[Part]:
        """Returns the safetensors tensors that hold one tensor of the plan."""
        format = stored_format(info.format)
        if format is None:
            return super().parts(info)
        (rows, columns), module = info.shape, info.name.removesuffix(".weight")
        groups = format.groups(columns)
        return [
            Part(f"{module}.qweight", "I32", (columns * format.width // 32, rows)),
            Part(f"{module}.qzeros", "I32", (groups, rows * format.width // 32)),
            Part(f"{module}.scales", "F16", (groups, rows)),
            Part(f"{module}.g_idx", "I32", (columns,)),
        ]

    def arrays(self, tensor: QuantizedTensor, info: TensorInfo) -> list[Array]:
        """Returns the arrays of `parts`, in the same order."""
        format = stored_format(info.format)
        if format is None:
            return super().arrays(tensor, info)
        rows, columns = info.shape
        groups = format.groups(columns)
        codes, scale, order = tensor.fields["codes"], tensor.fields["scale"], tensor.fields.get("order")
        g_idx = (np.arange(columns) // (columns // groups)).astype("<i4")
        if order is not None:
            back = np.argsort(order)
            codes, g_idx = pack_bits(unpack_bits(codes, format.width, columns)[:, back], format.width), g_idx[back]
        return [as_words(codes).T, self._zeros(tensor, format, rows, groups), scale.T, g_idx]

    def _zeros(self, tensor: QuantizedTensor, format: AffineFormat, rows: int, groups: int) -> Array:
        """Returns qzeros, (groups, rows*B/32) int32."""
        if format.kind == "s":
            return np.tile(_middle_words(format, rows, self._version), (groups, 1))
        zeros = unpack_bits(tensor.fields["zero"], format.width, groups)
        return as_words(pack_bits(np.ascontiguousarray(zeros.T), format.width))

    def config(self, description: ModelDescription) -> dict[str, Any]:
        """Returns config.json with a quantization_config, when anything is quantized."""
        return {**description.config, "quantization_config": self._quantization} if self._quantization else dict(description.config)


class GPTQ(DirectoryContainer):
    """Directories of AutoGPTQ and its successors."""

    name = METHOD
    methods = (METHOD, AUTO_ROUND)
    checkpoint = GPTQCheckpoint

    def holds(self, format: str) -> bool:
        """Returns whether the format is a float, or an affine integer of the bits and groups that loaders have."""
        found = stored_format(format)
        return format in DTYPE_OF or (found is not None and found.width in BITS and found.group_size in (0, *GROUP_SIZES))

    def create(self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool = False) -> GPTQWriter:
        """Starts writing. Refuses quantized embeddings, and matrices whose rows or columns are no multiple of 32, as AutoGPTQ,
        ExLlama and vLLM demand."""
        check_plan(self, path, plan, is_tied(description.config), _BLOCK, _BLOCK)
        return GPTQWriter(path, description, plan, force=force)
