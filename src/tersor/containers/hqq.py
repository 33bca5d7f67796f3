"""HQQ directories: safetensors as transformers' save_pretrained and hqq's save_to_safetensors write them.

A quantized linear layer `M` (rows, in), G = rows*in/N groups of N values along the row, is stored as

    M.W_q            uint8 or int32 (S, N)  codes, packed across groups: containers/hqq_layer.py
    M.scale, M.zero  float (G, 1)           w = (q - zero) * scale, our intB_gNz (or zf); zero is in steps, and any float
    M.shape, nbits, group_size, axis, ...   small tensors that say the rest; loaders demand each of them

and config.json has a `quantization_config` {quant_method: hqq, quant_config, skip_modules}. Source: mobiusml/hqq (dropbox/hqq)
hqq/core/quantize.py (Quantizer, HQQLinear), huggingface/transformers src/transformers/quantizers/quantizer_hqq.py.

Our intB_gN and intB_gNs are written with their integer zeros and flagged as rounded and not optimized, which is what they are; a
layer with these flags whose zeros are all codes is read as such again. hqq computes in the type that the loader asks for; in float32
it gives our values exactly. Its own save_quantized writes a pickle (qmodel.pt), which can run code when loaded, and is refused.
transformers 4.57 loads what is written here; 5.23 loads no HQQ directory, whoever wrote it: it has no code left that would, and says
that the weights are "newly initialized".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers.container import refuse_unheld
from tersor.containers.directory import (
    DTYPE_OF,
    DirectoryCheckpoint,
    DirectoryContainer,
    Shards,
    find,
    float_info,
    is_tied,
    read_description,
    read_float,
    with_tied,
)
from tersor.containers.directory_writer import DirectoryWriter, Part
from tersor.containers.hqq_layer import PARTS, Layer, pack_groups, read_layer, small_arrays, splits, unpack_groups, words
from tersor.containers.safetensors_file import DTYPES, Entry, shorten
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.float_zero import FloatZeroFormat
from tersor.formats.packing import pack_bits, unpack_bits
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo

METHOD = "hqq"
EMBEDDING = "model.embed_tokens.weight"

_BITS = (1, 2, 3, 4, 8)  # those that hqq packs; it stores 5 and 6 bits in bytes, which can be read
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items() if name in ("U8", "I32", "I64", "F16", "F32")}


def integers(format: str) -> AffineFormat | FloatZeroFormat | None:
    """Returns the format when it is an integer format that hqq holds: with a zero, float, integer or fixed, per group or row."""
    found = get_format(format)
    if isinstance(found, FloatZeroFormat):
        return found if found.width in _BITS else None
    plain = type(found) is AffineFormat and found.kind in ("", "s") and found.group_size >= 0
    return found if plain and isinstance(found, AffineFormat) and found.width in _BITS else None


class HQQCheckpoint(DirectoryCheckpoint):
    """An opened directory."""

    container = METHOD

    def __init__(self, path: Path) -> None:
        """Opens the directory. Raises ContainerError for anything missing, malformed or not supported."""
        self.path = path
        description, _ = read_description(path)
        self._shards = Shards(path)
        try:
            self._layers: dict[str, Layer] = {}
            tied = is_tied(description.config)
            infos = (self._info(entry) for entry in self._shards.entries.values())
            self.tensors: Mapping[str, TensorInfo] = {
                info.name: info for info in infos if info is not None and not (tied and info.name == "lm_head.weight")
            }
        except BaseException:
            self._shards.close()
            raise
        self.description = with_tied(description, self.tensors)

    def _info(self, entry: Entry) -> TensorInfo | None:
        """Returns the tensor that a stored one stands for, None for the parts that belong to another."""
        module, _, part = entry.name.rpartition(".")
        if part != "W_q":
            return None if part in PARTS and f"{module}.W_q" in self._shards.entries else float_info(self.path, entry)
        layer = read_layer(f"{self.path}: {shorten(module)}", self._shards, module)
        name = f"{module}.weight"
        if name in self._shards.entries:
            raise ContainerError(f"{self.path}: {shorten(module)} has both a weight and W_q; the file is damaged")
        self._layers[name] = layer
        wide = not self._shards.are_half(f"{module}.scale", f"{module}.zero")
        format = get_format(f"int{layer.bits}_{layer.axis}{self._kind(module, layer)}{'f' * wide}")
        return TensorInfo(name, format.name, (layer.rows, layer.columns), format.nbytes((layer.rows, layer.columns)))

    def _kind(self, module: str, layer: Layer) -> str:
        """Returns "z", or for zeros that are said to be rounded "" when all are codes, "s" when all are the middle one."""
        if not layer.rounded:
            return "z"
        zero = self._shards.floats(f"{module}.zero", np.dtype(np.float32))
        if layer.bits > 1 and (zero == 2 ** (layer.bits - 1)).all():
            return "s"
        return "" if ((zero == np.rint(zero)) & (zero >= 0) & (zero < 2**layer.bits)).all() else "z"

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the tensor, or those rows of it. Codes are packed anew; scales and zeros become float16 or float32.

        Raises ContainerError for codes of 5 or 6 bits that are larger.
        """
        info = find(self.path, self.tensors, name)
        layer = self._layers.get(name)
        if layer is None:
            return read_float(self._shards, info, rows)
        module, format = name.removesuffix(".weight"), get_format(info.format)
        assert isinstance(format, AffineFormat | FloatZeroFormat)
        start, stop, _ = (rows or slice(None)).indices(layer.rows)
        stop = max(start, stop)
        codes = self._codes(module, layer, start, stop)
        both = (self._shards.floats(f"{module}.{part}", format.float_type) for part in ("scale", "zero"))
        scale, zero = (stored.reshape(layer.rows, layer.groups)[start:stop] for stored in both)
        fields = {"codes": pack_bits(codes, layer.bits), "scale": scale}
        if isinstance(format, FloatZeroFormat):
            fields["zero"] = zero
        elif format.kind == "":
            fields["zero"] = pack_bits(zero.astype(np.uint8), layer.bits)
        return QuantizedTensor(info.format, (stop - start, layer.columns), fields)

    def _codes(self, module: str, layer: Layer, start: int, stop: int) -> Array:
        stored = self._shards.array(f"{module}.W_q").reshape(-1)  # of any type (view_as_float): its bytes count
        packed = stored.view("<i4" if layer.bits == 3 else np.uint8).reshape(-1, layer.group)
        codes = unpack_groups(packed, layer.bits, start * layer.groups, stop * layer.groups)
        if layer.bits in (5, 6) and codes.size and codes.max() >= 2**layer.bits:
            raise ContainerError(f"{self.path}: {module} holds the code {codes.max()} in {layer.bits} bits; the file is damaged")
        return codes.reshape(stop - start, layer.columns)


def layer_of(info: TensorInfo) -> Layer:
    """Returns how a tensor of the plan is stored."""
    format = integers(info.format)
    assert format is not None
    rows, columns = info.shape
    return Layer(rows, columns, format.width, format.group_size or columns, not isinstance(format, FloatZeroFormat))


def write_quantization(plan: Iterable[TensorInfo], tied: bool) -> dict[str, Any] | None:
    """Returns the quantization_config of a plan, None when nothing is quantized.

    quant_config is one for all layers, or by tag (`self_attn.q_proj`) when they differ: that of the first layer of the tag, since
    loaders take the numbers of a stored layer from its own tensors. skip_modules: every linear layer that stays in float.
    """
    by_tag: dict[str, dict[str, Any]] = {}
    skipped = ["lm_head"] if tied else []
    for info in plan:
        module = info.name.removesuffix(".weight")
        if integers(info.format) is not None:
            by_tag.setdefault(".".join(p for p in module.split(".") if p not in ("model", "layers") and not p.isnumeric()), _config(info))
        elif len(info.shape) == 2 and info.name != EMBEDDING:
            skipped.append(module)
    if not by_tag:
        return None
    first = next(iter(by_tag.values()))
    config = first if all(own == first for own in by_tag.values()) else by_tag
    return {"quant_method": METHOD, "quant_config": config, "skip_modules": skipped}


def _config(info: TensorInfo) -> dict[str, Any]:
    layer = layer_of(info)
    weights = {
        "nbits": layer.bits,
        "channel_wise": True,
        "group_size": layer.group,
        "optimize": False,
        "round_zero": layer.rounded,
        "axis": 1,
        "view_as_float": False,
    }
    return {"weight_quant_params": weights, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}


class HQQWriter(DirectoryWriter):
    """Writes a directory; quantized layers as their parts, floats as they are."""

    widest_first = True

    def parts(self, info: TensorInfo) -> list[Part]:
        """Returns the safetensors tensors that hold one tensor of the plan."""
        format = integers(info.format)
        if format is None:
            return super().parts(info)
        layer, module = layer_of(info), info.name.removesuffix(".weight")
        count = layer.rows * layer.groups
        big = [
            Part(f"{module}.W_q", "I32" if layer.bits == 3 else "U8", (words(count, layer.bits), layer.group)),
            *(Part(f"{module}.{part}", "F32" if format.wide else "F16", (count, 1)) for part in ("scale", "zero")),
        ]
        small = small_arrays(layer, str(format.float_type))
        return big + [Part(f"{module}.{part}", _DTYPE_NAMES[array.dtype], array.shape) for part, array in small.items()]

    def arrays(self, tensor: QuantizedTensor, info: TensorInfo) -> list[Array]:
        """Returns the arrays of `parts`, in the same order."""
        format = integers(info.format)
        if format is None:
            return super().arrays(tensor, info)
        layer = layer_of(info)
        codes = unpack_bits(tensor.fields["codes"], layer.bits, layer.columns)
        scale = tensor.fields["scale"]
        if isinstance(format, FloatZeroFormat):
            zero = tensor.fields["zero"]
        elif format.kind == "s":
            zero = np.full(scale.shape, format.middle, format.float_type)
        else:
            zero = unpack_bits(tensor.fields["zero"], layer.bits, layer.groups).astype(format.float_type)
        return [pack_groups(codes.reshape(-1, layer.group), layer.bits), scale, zero, *small_arrays(layer, str(format.float_type)).values()]

    def config(self, description: ModelDescription) -> dict[str, Any]:
        """Returns config.json with a quantization_config, when anything is quantized."""
        quantization = write_quantization(self._plan.values(), is_tied(description.config))
        return {**description.config, "quantization_config": quantization} if quantization else dict(description.config)


class HQQ(DirectoryContainer):
    """Directories for transformers 4 with the hqq package."""

    name = METHOD
    methods = (METHOD,)
    checkpoint = HQQCheckpoint

    def holds(self, format: str) -> bool:
        """Returns whether the format is a float, or an integer of 1, 2, 3, 4 or 8 bits with a zero, per group or row."""
        return format in DTYPE_OF or integers(format) is not None

    def create(self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool = False) -> HQQWriter:
        """Starts writing. Refuses what hqq has no layer for, and shapes that do not split into its packed parts."""
        refuse_unheld(self, path, plan)
        for info in plan:
            if integers(info.format) is None:
                continue
            if info.name == EMBEDDING or len(info.shape) != 2 or not info.name.endswith(".weight"):
                raise ContainerError(f"{path}: {info.name} is no linear layer, which is all that hqq quantizes; keep it in float")
            layer = layer_of(info)
            if not splits(layer.rows * layer.groups, layer.bits):
                raise ContainerError(
                    f"{path}: {info.name} has {layer.rows * layer.groups} groups, which hqq cannot split into bytes of {8 // layer.bits}"
                    f" {layer.bits}-bit codes; use 8 or 3 bits, or keep it in float"
                )
        return HQQWriter(path, description, plan, force=force)
