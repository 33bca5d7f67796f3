"""AWQ directories in AutoAWQ's GEMM packing, as AutoAWQ, gptqmodel, vLLM, SGLang and transformers load them.

A quantized linear layer `M` of `rows` outputs and `in` inputs, 4 bits, groups of N columns (or one group, of all):

    M.qweight  int32 (in, rows/8)      word k of input i: nibble n (bits 4n .. 4n+3) is the code of output 8k + ORDER[n]
    M.qzeros   int32 (groups, rows/8)  zeros of the group, in the same order
    M.scales   float16 (groups, rows)

with ORDER = 0 2 4 6 1 3 5 7, and w[r, i] = (code - zero) * scale. The zero is stored as it is. Sources: casper-hansen/AutoAWQ
awq/modules/linear/gemm.py (WQLinear_GEMM.from_linear), awq/utils/packing_utils.py; vllm-project/vllm
vllm/model_executor/layers/quantization/auto_awq.py.

config.json's `quantization_config` has one group size for the whole model, so all quantized layers share it. `modules_to_not_convert`
names the linear layers that stay float; loaders match the names as parts of a module's. gptqmodel (7.6) does not look there, so its own
`dynamic` says it too. The embedding and the head are always float.

A symmetric format is written with zeros of 8, since GEMM kernels read zeros (`zero_point: true`); a layer whose zeros are all 8 is
read as symmetric: the same values. Held: int4, symmetric or with an integer zero, groups of 16, 32, 64 or 128 or a whole row.
Other packings of the same quantization (`gemv`, `gemv_fast`, `marlin`, llm-awq's) are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers.directory import DTYPE_OF, DirectoryContainer, is_tied, read_description
from tersor.containers.directory_writer import DirectoryWriter, Part
from tersor.containers.qweight import EMBEDDING, HEAD, Layer, QweightCheckpoint, as_words, check_plan, module_expression, stored_format
from tersor.containers.safetensors_file import Entry, shorten
from tersor.errors import ContainerError, unknown
from tersor.formats import get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.packing import pack_bits, unpack_bits
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo

METHOD = "awq"
GEMM = "gemm"
GROUP_SIZES = (16, 32, 64, 128)  # of gptqmodel's kernels
_BITS, _PER_WORD, _MIDDLE = 4, 8, 8
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # output of a word's nibble
_NIBBLE = np.argsort(_ORDER)  # nibble of a word's output


class AWQCheckpoint(QweightCheckpoint):
    """An opened directory."""

    container = METHOD

    def __init__(self, path: Path) -> None:
        """Opens the directory. Raises ContainerError for anything missing, malformed or not supported."""
        description, quantization = read_description(path)
        self._group_size, self._zero_point = read_quantization(str(path / "config.json"), quantization or {})
        super().__init__(path, description)

    def layer(self, where: str, module: str, qweight: Entry) -> Layer:
        """Returns the layer of a qweight."""
        columns, rows = qweight.shape[0], qweight.shape[1] * _PER_WORD
        whole = self._group_size == -1 or (self._group_size == columns and columns > GROUP_SIZES[-1])
        axis = "c" if whole else f"g{self._group_size}"
        layer = Layer(_affine(f"int{_BITS}_{axis}"), rows, columns)
        layer.plain.check((rows, columns), module)
        self.check_part(where, f"{module}.scales", ("F16", "BF16", "F32"), (layer.groups, rows), layer)
        symmetric = replace(layer, plain=_affine(f"int{_BITS}_{axis}s"))
        if not self._zero_point and f"{module}.qzeros" not in self._shards.entries:
            return symmetric
        self.check_part(where, f"{module}.qzeros", ("I32",), (layer.groups, rows // _PER_WORD), layer)
        if (self.zeros(module, layer) == _MIDDLE).all():
            return symmetric
        if not self._zero_point:
            raise ContainerError(f"{where}: qzeros are not all {_MIDDLE}, but zero_point is false; config and weights disagree")
        return layer

    def codes(self, module: str, layer: Layer, rows: slice) -> Array:
        """Returns those rows of `codes`."""
        first, last = rows.start // _PER_WORD, -(-rows.stop // _PER_WORD)
        words = self._shards.array(f"{module}.qweight")[:, first:last]
        codes = _unpack(words)[:, rows.start - first * _PER_WORD : max(rows.start, rows.stop) - first * _PER_WORD]
        return pack_bits(np.ascontiguousarray(codes.T), _BITS)

    def zeros(self, module: str, layer: Layer) -> Array:
        """Returns the zeros, (groups, rows) uint8."""
        return _unpack(self._shards.array(f"{module}.qzeros"))


def _affine(name: str) -> AffineFormat:
    format = get_format(name)
    assert isinstance(format, AffineFormat)
    return format


def _unpack(words: Array) -> Array:
    """Returns the values of words, (n, 8 * words) uint8, outputs in their order."""
    n, count = words.shape
    nibbles = unpack_bits(np.ascontiguousarray(words).view(np.uint8), _BITS, count * _PER_WORD)
    return np.ascontiguousarray(nibbles.reshape(n, count, _PER_WORD)[:, :, _NIBBLE]).reshape(n, count * _PER_WORD)


def _pack(values: Array) -> Array:
    """Returns values, (n, rows) uint8, as words, (n, rows/8) int32."""
    n, rows = values.shape
    nibbles = values.reshape(n, rows // _PER_WORD, _PER_WORD)[:, :, _ORDER].reshape(n, rows)
    return as_words(pack_bits(np.ascontiguousarray(nibbles), _BITS))


def read_quantization(where: str, quantization: Mapping[str, Any]) -> tuple[int, bool]:
    """Returns (group size in columns or -1 for all, whether zeros are stored). Raises ContainerError for what is not GEMM in 4 bits."""
    packing = quantization.get("version", quantization.get("format", GEMM))
    if not isinstance(packing, str) or packing.lower() != GEMM:
        raise ContainerError(f"{where}: {unknown('AWQ version', shorten(packing), [GEMM])}; save it again with version GEMM")
    if quantization.get("backend") == "llm-awq":
        raise ContainerError(f"{where}: backend is llm-awq, which packs in another way than {GEMM}; save it again with AutoAWQ")
    bits = quantization.get("bits", quantization.get("w_bit", _BITS))
    if bits != _BITS:
        raise ContainerError(f"{where}: bits is {shorten(bits)}; AWQ layers of {_BITS} bits are supported")
    size = quantization.get("group_size", quantization.get("q_group_size", 128))
    if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and size < 1):
        raise ContainerError(f"{where}: group_size is {shorten(size)}, needs a number of columns, or -1 for all; the config is damaged")
    zero_point = quantization.get("zero_point", True)
    if not isinstance(zero_point, bool):
        raise ContainerError(f"{where}: zero_point is {shorten(zero_point)}, needs true or false; the config is damaged")
    return size, zero_point


def write_quantization(plan: Iterable[TensorInfo]) -> dict[str, Any] | None:
    """Returns the quantization_config of a plan, None when nothing is quantized."""
    size, floats = None, [HEAD]
    for info in plan:
        module, format = info.name.removesuffix(".weight"), stored_format(info.format)
        if format is not None:
            size = format.group_size or -1
        elif len(info.shape) == 2 and module not in (EMBEDDING, HEAD):
            floats.append(module)
    if size is None:
        return None
    config = {
        "quant_method": METHOD,
        "bits": _BITS,
        "group_size": size,
        "zero_point": True,
        "version": GEMM,
        "modules_to_not_convert": floats,
    }
    return {**config, "dynamic": {f"-:{module_expression(floats[1:])}": {}}} if len(floats) > 1 else config


class AWQWriter(DirectoryWriter):
    """Writes a directory; quantized layers as their parts, floats as they are."""

    def parts(self, info: TensorInfo) -> list[Part]:
        """Returns the safetensors tensors that hold one tensor of the plan."""
        format = stored_format(info.format)
        if format is None:
            return super().parts(info)
        (rows, columns), module = info.shape, info.name.removesuffix(".weight")
        groups = format.groups(columns)
        return [
            Part(f"{module}.qweight", "I32", (columns, rows // _PER_WORD)),
            Part(f"{module}.qzeros", "I32", (groups, rows // _PER_WORD)),
            Part(f"{module}.scales", "F16", (groups, rows)),
        ]

    def arrays(self, tensor: QuantizedTensor, info: TensorInfo) -> list[Array]:
        """Returns the arrays of `parts`, in the same order."""
        format = stored_format(info.format)
        if format is None:
            return super().arrays(tensor, info)
        rows, columns = info.shape
        codes, groups = unpack_bits(tensor.fields["codes"], _BITS, columns), format.groups(columns)
        zeros = np.full((rows, groups), _MIDDLE, np.uint8) if format.kind == "s" else unpack_bits(tensor.fields["zero"], _BITS, groups)
        return [_pack(codes.T), _pack(zeros.T), tensor.fields["scale"].T]

    def config(self, description: ModelDescription) -> dict[str, Any]:
        """Returns config.json with a quantization_config, when anything is quantized."""
        quantization = write_quantization(self._plan.values())
        return {**description.config, "quantization_config": quantization} if quantization else dict(description.config)


class AWQ(DirectoryContainer):
    """Directories of AutoAWQ."""

    name = METHOD
    methods = (METHOD,)
    checkpoint = AWQCheckpoint

    def holds(self, format: str) -> bool:
        """Returns whether the format is a float, or a 4-bit affine integer of the groups that loaders have."""
        found = stored_format(format)
        if found is None:
            return format in DTYPE_OF
        return found.name == format and found.width == _BITS and found.group_size in (0, *GROUP_SIZES)

    def create(self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool = False) -> AWQWriter:
        """Starts writing. Refuses a quantized embedding or head, more than one group size, and rows that do not fill words of 8."""
        check_plan(self, path, plan, is_tied(description.config), _PER_WORD, 1)
        first: dict[int, TensorInfo] = {}
        for info in plan:
            format = stored_format(info.format)
            if format is None:
                continue
            if info.name == f"{HEAD}.weight":
                raise ContainerError(f"{path}: {info.name} is the head, which loaders of {METHOD} expect in float; keep it in f16")
            first.setdefault(format.group_size, info)
        if len(first) > 1:
            a, b = list(first.values())[:2]
            raise ContainerError(
                f"{path}: {a.name} is {a.format} and {b.name} {b.format}, but {METHOD} has one group size for the whole model; use one"
                " that divides the columns of all, or --to compressed-tensors"
            )
        return AWQWriter(path, description, plan, force=force)
