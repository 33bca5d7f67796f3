"""MLX directories: affine groups as mlx-lm loads them on Apple silicon.

A quantized matrix `M.weight` (rows, in), of a linear layer or an embedding, is stored as

    M.weight   uint32 (rows, in*B/32)  a dense bit stream along the row, LSB first: our codes
    M.scales   float (rows, in/N)
    M.biases   float (rows, in/N)      w = q * scale + bias: our intB_gNm (or mf), whose min is the bias

for B = 1, 2, 3, 4, 5, 6, 8 and N = 32, 64, 128 (one bit: mlx 0.32 has it). config.json says in `quantization` {group_size, bits,
mode} and, under a module's name, what differs there; `quantization_config` repeats it for the model's page on the hub. All other
names and orders are Hugging Face's. Source: ml-explore/mlx-lm mlx_lm/utils.py (quantize_model, load_model), ml-explore/mlx
python/src/ops.cpp (quantize, dequantize), mlx/backend/cpu/quantized.cpp.

MLX computes in the type of the scales. Those of float16, widened to float32 first, give our values exactly, since q * scale has at most
19 bits and only the sum is rounded; of those that are float32 both are rounded, there as here. Beside bfloat16 floats it falls back to
float32, so f16 is the type to keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
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
from tersor.containers.safetensors_file import Entry, shorten
from tersor.errors import ContainerError, unknown
from tersor.formats import get_format
from tersor.formats.affine import BITS, AffineFormat
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo

METHOD = "mlx"
GROUPS = (32, 64, 128)

_MODES = ("affine",)
_SCALES = ("F16", "BF16", "F32")


def affine(format: str) -> AffineFormat | None:
    """Returns the format when MLX can hold it, else None."""
    found = get_format(format)
    return found if isinstance(found, AffineFormat) and found.kind == "m" and found.group_size in GROUPS else None


class MLXCheckpoint(DirectoryCheckpoint):
    """An opened directory."""

    container = METHOD

    def __init__(self, path: Path) -> None:
        """Opens the directory. Raises ContainerError for anything missing, malformed or not supported."""
        self.path = path
        description, _ = read_description(path)
        config = dict(description.config)
        self._quantization = config.pop("quantization", {})
        if not isinstance(self._quantization, Mapping):
            raise ContainerError(f"{path / 'config.json'}: quantization is {shorten(self._quantization)}, needs an object")
        description = replace(description, config=config)
        self._shards = Shards(path)
        try:
            self._affine: dict[str, AffineFormat] = {}
            tied = is_tied(config)
            infos = (self._info(entry) for entry in self._shards.entries.values())
            self.tensors: Mapping[str, TensorInfo] = {
                info.name: info for info in infos if info is not None and not (tied and info.name == "lm_head.weight")
            }
        except BaseException:
            self._shards.close()
            raise
        self.description = with_tied(description, self.tensors)

    def _info(self, entry: Entry) -> TensorInfo | None:
        """Returns the tensor that a stored one stands for, None for its scales and biases."""
        module, _, part = entry.name.rpartition(".")
        weight = self._shards.entries.get(f"{module}.weight")
        if part in ("scales", "biases") and weight is not None and weight.dtype == "U32":
            return None
        return self._quantized(module, entry) if part == "weight" and entry.dtype == "U32" else float_info(self.path, entry)

    def _quantized(self, module: str, entry: Entry) -> TensorInfo:
        """Returns the info of a quantized layer after checking that all its parts fit each other."""
        where = f"{self.path}: {shorten(module)}"
        format = read_format(where, self._quantization, module)
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise ContainerError(f"{where} has shape {list(entry.shape)}, needs (rows, words); other quantized shapes are not supported")
        rows, words = entry.shape
        columns = words * 32 // format.width
        if words * 32 % format.width or columns % format.group_size:
            raise ContainerError(f"{where}: rows of {words} words are no whole groups of {format.name}; config and weights disagree")
        for part in ("scales", "biases"):
            found = self._shards.entries.get(f"{module}.{part}")
            if found is None or found.dtype not in _SCALES or found.shape != (rows, columns // format.group_size):
                got = "missing" if found is None else (found.dtype, found.shape)
                raise ContainerError(
                    f"{where}: {part} is {got}, {format.name} of {rows} x {columns} needs F16 {(rows, columns // format.group_size)};"
                    " config and weights disagree"
                )
        format = format.of_floats(wide=not self._shards.are_half(f"{module}.scales", f"{module}.biases"))
        self._affine[entry.name] = format
        return TensorInfo(entry.name, format.name, (rows, columns), format.nbytes((rows, columns)))

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the tensor, or those rows of it. Codes are views; scales become float16 or float32."""
        info = find(self.path, self.tensors, name)
        if name not in self._affine:
            return read_float(self._shards, info, rows)
        module = name.removesuffix(".weight")
        codes = self._shards.array(name, rows).view(np.uint8)
        scale, minimum = (self._shards.floats(f"{module}.{part}", self._affine[name].float_type, rows) for part in ("scales", "biases"))
        return QuantizedTensor(info.format, (len(codes), info.shape[1]), {"codes": codes, "scale": scale, "min": minimum})


def read_format(where: str, quantization: Mapping[str, Any], module: str) -> AffineFormat:
    """Returns the format that `quantization` gives a module. Raises ContainerError for anything that is not affine or not stored."""
    own = quantization.get(module, True)
    if own is False:
        raise ContainerError(f"{where}: quantization says false, but the weight is packed; config and weights disagree")
    settings = quantization if own is True else own
    if not isinstance(settings, Mapping):
        raise ContainerError(f"{where}: quantization is {shorten(settings)}, needs an object; the config is damaged")
    mode, bits, group = settings.get("mode", "affine"), settings.get("bits", 4), settings.get("group_size", 64)
    if mode not in _MODES:
        raise ContainerError(f"{where}: {unknown('mode', shorten(mode), _MODES)}; open the float original")
    found = affine(f"int{bits}_g{group}m") if _is_one_of(bits, BITS) and _is_one_of(group, GROUPS) else None
    if found is None:
        raise ContainerError(f"{where}: {shorten(bits)} bits in groups of {shorten(group)}; MLX has 1..6 and 8 bits, groups {GROUPS}")
    return found


def _is_one_of(value: object, known: tuple[int, ...]) -> bool:
    return type(value) is int and value in known


def write_quantization(plan: Iterable[TensorInfo]) -> dict[str, Any] | None:
    """Returns `quantization` of a plan, None when nothing is quantized: the commonest format, and the modules of others by name."""
    formats = {info.name.removesuffix(".weight"): format for info in plan if (format := affine(info.format)) is not None}
    if not formats:
        return None

    def settings(format: AffineFormat) -> dict[str, Any]:
        return {"group_size": format.group_size, "bits": format.width, "mode": "affine"}

    most = Counter(formats.values()).most_common(1)[0][0]
    return settings(most) | {module: settings(format) for module, format in formats.items() if format != most}


class MLXWriter(DirectoryWriter):
    """Writes a directory; quantized matrices as their parts, floats as they are."""

    def parts(self, info: TensorInfo) -> list[Part]:
        """Returns the safetensors tensors that hold one tensor of the plan."""
        format = affine(info.format)
        if format is None:
            return super().parts(info)
        rows, columns = info.shape
        module, groups = info.name.removesuffix(".weight"), (rows, columns // format.group_size)
        words = (rows, columns * format.width // 32)
        floats = "F32" if format.wide else "F16"
        return [Part(info.name, "U32", words), Part(f"{module}.scales", floats, groups), Part(f"{module}.biases", floats, groups)]

    def arrays(self, tensor: QuantizedTensor, info: TensorInfo) -> list[Array]:
        """Returns the arrays of `parts`, in the same order."""
        if affine(info.format) is None:
            return super().arrays(tensor, info)
        return [np.ascontiguousarray(tensor.fields["codes"]).view("<u4"), tensor.fields["scale"], tensor.fields["min"]]

    def config(self, description: ModelDescription) -> dict[str, Any]:
        """Returns config.json with `quantization` and its copy, when anything is quantized."""
        quantization = write_quantization(self._plan.values())
        both = {} if quantization is None else {"quantization": quantization, "quantization_config": quantization}
        return {**description.config, **both}


class MLX(DirectoryContainer):
    """Directories for mlx-lm."""

    name = METHOD
    methods = (METHOD,)
    checkpoint = MLXCheckpoint

    def holds(self, format: str) -> bool:
        """Returns whether the format is a float, or intB_gNm or intB_gNmf with N = 32, 64, 128."""
        return format in DTYPE_OF or affine(format) is not None

    def create(self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool = False) -> MLXWriter:
        """Starts writing. Refuses quantized tensors that are no matrix of a layer."""
        refuse_unheld(self, path, plan)
        for info in plan:
            if affine(info.format) is not None and (len(info.shape) != 2 or not info.name.endswith(".weight")):
                raise ContainerError(f"{path}: {info.name} is no matrix of a layer, which is all that {METHOD} quantizes; keep it in float")
        return MLXWriter(path, description, plan, force=force)
