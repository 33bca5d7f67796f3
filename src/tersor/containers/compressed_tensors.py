"""compressed-tensors directories: integer and small float weights as vLLM and transformers load them.

A module's weights lie as compressed_tensors_layouts.py draws them, and config.json's `quantization_config` says which modules are
stored how. Beside the weights of a module M there may be

    M.input_scale            float (1,), where inputs are rounded with calibrated scales (ActivationScheme; or to FP8, not kept)
    M.input_global_scale     float (1,), of inputs rounded to NVFP4, not kept
    M.weight_g_idx           int32 (in,), the group of each column (actorder)

and w = (code - zero) * scale, zero = 2^(B-1) when symmetric. Source: vllm-project/compressed-tensors
src/compressed_tensors/compressors, quantization/quant_config.py.

The package computes in the scale's type: from float16 scales it gives float16(w), the correctly rounded float16 of the
float32 value that our formats decode to, since code - zero has at most 9 bits and one product is rounded once. With the scales
widened to float32 first (as loading in float32 does) it gives our values exactly, as it does from float32 scales. FP8's scales are
float32, so w is exact; of NVFP4 and MXFP4 the package gives bfloat16(w), which for MXFP4 is w.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers.compressed_tensors_config import EMBEDDING, METHOD, read_schemes, rounds_input, write_quantization
from tersor.containers.compressed_tensors_layouts import LAYOUTS, Layout, Stored, fits_part, layout_of
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
from tersor.errors import ContainerError, FormatError
from tersor.formats import Format, get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.floats import f32_from_bf16
from tersor.formats.ordered import OrderedFormat
from tersor.tensor import ActivationScheme, Array, ModelDescription, QuantizedTensor, TensorInfo

# The layouts that a tensor with this last part of its name and this dtype may belong to.
_STORED_AS = {
    ("weight_packed", "I32"): ("pack-quantized",),
    ("weight_packed", "U8"): ("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
    ("weight", "I8"): ("int-quantized",),
    ("weight", "F8_E4M3"): ("float-quantized",),
}

_SUFFIXES = (
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
    *("input_scale", "input_zero_point", "input_global_scale"),
)


class CompressedTensorsCheckpoint(DirectoryCheckpoint):
    """An opened directory."""

    container = METHOD

    def __init__(self, path: Path) -> None:
        """Opens the directory. Raises ContainerError for anything missing, malformed or not supported."""
        self.path = path
        description, quantization = read_description(path)
        self._schemes = read_schemes(str(path / "config.json"), quantization or {})
        self._shards = Shards(path)
        try:
            self._stored: dict[str, tuple[Format, Layout]] = {}  # of a quantized tensor
            self._inputs: dict[str, str] = {}  # of a module's Scheme
            tied = is_tied(description.config)
            infos = (self._info(entry) for entry in self._shards.entries.values())
            self.tensors: Mapping[str, TensorInfo] = {
                info.name: info for info in infos if info is not None and not (tied and info.name == "lm_head.weight")
            }
            description = replace(description, activations=self._activations())
            if others := [module for module, how in self._inputs.items() if how == "other"]:
                self.note = f"the inputs of {len(others)} layers ({others[0]}, ...) are to be rounded to small floats or groups; here they"
                self.note += " are kept finer, and a copy of this model will not say so"
        except BaseException:
            self._shards.close()
            raise
        self.description = with_tied(description, self.tensors)

    def _activations(self) -> ActivationScheme | None:
        """Returns how inputs are rounded: by calibrated scales if there are any, else as the linear layers say."""
        static = [module for module, how in self._inputs.items() if how == "static"]
        if static:
            return ActivationScheme({module: self._input_scale(module) for module in static})
        return ActivationScheme() if "dynamic" in self._inputs.values() else None

    def _input_scale(self, module: str) -> float:
        name = f"{module}.input_scale"
        entry, zero = self._shards.entries.get(name), self._shards.entries.get(f"{module}.input_zero_point")
        if entry is None or entry.dtype not in ("F16", "BF16", "F32") or entry.shape not in ((), (1,), (1, 1)):
            found = "missing" if entry is None else (entry.dtype, entry.shape)
            raise ContainerError(f"{self.path}: {shorten(name)} is {found}, needs one float; config and weights disagree")
        stored = self._shards.array(name)
        scale = float((f32_from_bf16(stored) if entry.dtype == "BF16" else stored).reshape(()))
        if not 0 < scale < inf:
            raise ContainerError(f"{self.path}: {shorten(name)} is {scale}, needs a positive number; the file is damaged")
        if zero is not None and self._shards.array(zero.name).any():
            raise ContainerError(f"{self.path}: {shorten(zero.name)} is not 0, but the config says symmetric; config and weights disagree")
        return scale

    def _info(self, entry: Entry) -> TensorInfo | None:
        """Returns the tensor that a stored one stands for, None for its scales and zeros."""
        module, _, part = entry.name.rpartition(".")
        if (part, entry.dtype) in _STORED_AS:
            return self._quantized(module, entry, _STORED_AS[part, entry.dtype])
        if part in _SUFFIXES and {f"{module}.weight_packed", f"{module}.weight"} & set(self._shards.entries):
            return None
        return float_info(self.path, entry)

    def _quantized(self, module: str, entry: Entry, stored: Sequence[str]) -> TensorInfo:
        """Returns the info of a quantized layer after checking that all its parts fit each other. stored: names of its possible layouts."""
        where = f"{self.path}: {shorten(module)}"
        fitting = [s for s in self._schemes if s.matches(module) and (s.format is None or s.format in stored)]
        if not fitting:
            raise ContainerError(
                f"{where} is stored {' or '.join(stored)}, but no config group with that format targets it; config and weights disagree"
            )
        scheme = max(fitting, key=lambda s: s.matches(module))
        rows, columns = self._shape(where, module, entry)
        try:
            format = get_format(scheme.our_format)
            format.check((rows, columns), module)
            format = self._in_order(where, module, format, columns, scheme.ordered)
        except FormatError as error:
            raise ContainerError(f"{where}: {error}") from None
        layout = next((LAYOUTS[name] for name in stored if LAYOUTS[name].holds(format)), None)
        if layout is None:
            raise ContainerError(f"{where} is stored {' or '.join(stored)}, which cannot hold {format.name}; config and weights disagree")
        self._check_parts(where, module, format, layout, rows, columns)
        format = self._of_floats(module, format)
        name = f"{module}.weight"
        self._stored[name] = format, layout
        self._inputs[module] = scheme.inputs
        return TensorInfo(name, format.name, (rows, columns), format.nbytes((rows, columns)))

    def _of_floats(self, module: str, format: Format) -> Format:
        """Returns an integer format with float32 scales when the stored ones are no float16 numbers."""
        plain = format.plain if isinstance(format, OrderedFormat) else format
        if not isinstance(plain, AffineFormat) or self._shards.are_half(f"{module}.weight_scale"):
            return format
        plain = plain.of_floats(wide=True)
        return OrderedFormat(plain) if isinstance(format, OrderedFormat) else plain

    def _shape(self, where: str, module: str, entry: Entry) -> tuple[int, int]:
        shape = list(entry.shape)
        if entry.name.endswith("weight_packed") and entry.dtype == "U8":
            shape[-1:] = [2 * n for n in shape[-1:]]
        elif entry.name.endswith("weight_packed"):
            part = self._shards.entries.get(f"{module}.weight_shape")
            if part is None or part.shape != (2,) or part.dtype not in ("I64", "I32"):
                raise ContainerError(f"{where}.weight_shape is missing or not two integers; the file is damaged")
            shape = self._shards.array(part.name).tolist()
        if len(shape) != 2 or not all(0 < n < 2**31 for n in shape):
            raise ContainerError(f"{where} has shape {shorten(shape)}, needs (rows, columns)")
        return shape[0], shape[1]

    def _check_parts(self, where: str, module: str, format: Format, layout: Layout, rows: int, columns: int) -> None:
        for part in layout.parts(module, format, rows, columns):
            entry = self._shards.entries.get(part.name)
            if entry is None or not fits_part(layout, part, entry.dtype, entry.shape):
                found = "missing" if entry is None else (entry.dtype, entry.shape)
                raise ContainerError(
                    f"{where}: {part.name.rpartition('.')[2]} is {found}, {format.name} of {rows} x {columns} needs"
                    f" {part.dtype} {part.shape}; config and weights disagree"
                )

    def _in_order(self, where: str, module: str, format: Format, columns: int, ordered: bool) -> Format:
        """Returns the format with an order of columns when the stored groups are no runs. ordered: the config says that they may not be."""
        entry = self._shards.entries.get(f"{module}.weight_g_idx")
        if entry is None:
            if ordered:
                raise ContainerError(f"{where}.weight_g_idx is missing, but the config says actorder; without it the weights are wrong")
            return format
        if entry.shape != (columns,) or entry.dtype not in ("I32", "I64"):
            raise ContainerError(f"{where}.weight_g_idx is {entry.dtype} {entry.shape}, needs I32 ({columns},); the file is damaged")
        groups, size = self._shards.array(entry.name), format.group_size if format.group_size > 0 else columns
        if (groups == -1).all() or np.array_equal(groups, np.arange(columns) // size):  # -1 is how it is initialized
            return format
        if not np.array_equal(np.sort(groups), np.arange(columns) // size):
            raise ContainerError(f"{where}.weight_g_idx does not give each of {columns // size} groups {size} columns; the file is damaged")
        if not isinstance(format, AffineFormat):
            raise ContainerError(f"{where}.weight_g_idx reorders the columns of {format.name}; only integers can have that")
        return OrderedFormat(format)

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the tensor, or those rows of it. Codes are views where they lie as ours.

        Raises ContainerError for a scale that is NaN or not positive where there is one of the tensor, and for rows of fp8_b128 that do
        not start with a block.
        """
        info = find(self.path, self.tensors, name)
        if name not in self._stored:
            return read_float(self._shards, info, rows)
        format, layout = self._stored[name]
        fields = layout.fields(Stored(self._shards, name.removesuffix(".weight")), format, info.shape, rows)
        count = info.shape[0] if rows is None else len(range(*rows.indices(info.shape[0])))
        return QuantizedTensor(format.name, (count, info.shape[1]), fields)


class CompressedTensorsWriter(DirectoryWriter):
    """Writes a directory; quantized layers as their parts, floats as they are."""

    def parts(self, info: TensorInfo) -> list[Part]:
        """Returns the safetensors tensors that hold one tensor of the plan."""
        layout, module = layout_of(info.format), info.name.removesuffix(".weight")
        if layout is None:
            return super().parts(info)
        parts = layout.parts(module, get_format(info.format), *info.shape)
        return parts if self._input_scale(info.name) is None else [*parts, Part(f"{module}.input_scale", "F32", (1,))]

    def _input_scale(self, name: str) -> float | None:
        """Returns the static scale of a quantized tensor's input, None when there is none."""
        activations, module = self._description.activations, name.removesuffix(".weight")
        if activations is None or activations.scales is None or not rounds_input(activations, module):
            return None
        return activations.scales[module]

    def arrays(self, tensor: QuantizedTensor, info: TensorInfo) -> list[Array]:
        """Returns the arrays of `parts`, in the same order."""
        layout = layout_of(info.format)
        if layout is None:
            return super().arrays(tensor, info)
        arrays, input_scale = layout.arrays(tensor, get_format(info.format)), self._input_scale(info.name)
        return arrays if input_scale is None else [*arrays, np.array([input_scale], np.float32)]

    def config(self, description: ModelDescription) -> dict[str, Any]:
        """Returns config.json with a quantization_config, when anything is quantized."""
        quantization = write_quantization(self._plan.values(), is_tied(description.config), description.activations)
        return {**description.config, "quantization_config": quantization} if quantization else dict(description.config)


class CompressedTensors(DirectoryContainer):
    """Directories with quantized weights for vLLM and transformers."""

    name = METHOD
    methods = (METHOD,)
    checkpoint = CompressedTensorsCheckpoint

    def holds(self, format: str) -> bool:
        """Returns whether the format is a float, an affine integer without float minimum or zero, fp8, nvfp4_gs or mxfp4."""
        return format in DTYPE_OF or layout_of(format) is not None

    def create(
        self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool = False
    ) -> CompressedTensorsWriter:
        """Starts writing. Refuses a quantized embedding that is also the head, since loaders tie float weights only, and inputs
        rounded to int8 before float weights, which no engine computes."""
        refuse_unheld(self, path, plan)
        for info in plan:
            if layout_of(info.format) is None:
                continue
            if len(info.shape) != 2:
                raise ContainerError(f"{path}: {info.name} has {len(info.shape)} axes; {METHOD} holds quantized matrices only")
            if rounds_input(description.activations, info.name.removesuffix(".weight")) and not info.format.startswith("int"):
                raise ContainerError(
                    f"{path}: {info.name} is {info.format}, but its inputs are to be rounded to int8;"
                    " choose int8_cs or leave out --activations"
                )
            if info.name == f"{EMBEDDING}.weight" and is_tied(description.config):
                raise ContainerError(
                    f"{path}: {info.name} is also the head (tie_word_embeddings), which loaders of {METHOD} expect in float;"
                    " keep it in f16 (recipe `embed_tokens=f16`)"
                )
        return CompressedTensorsWriter(path, description, plan, force=force)
