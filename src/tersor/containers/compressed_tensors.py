"""compressed-tensors directories: integer weights as vLLM and transformers load them.

A quantized linear layer `M` is stored as

    pack-quantized   M.weight_packed      int32 (rows, ceil(in*B/32))      a dense bit stream along the row, LSB first: our codes
                     M.weight_scale       float (rows, groups), (rows, 1) per channel, (1,) per tensor
                     M.weight_shape       int64 (2,) = rows, in
                     M.weight_zero_point  int32 (ceil(rows*B/32), groups)  asymmetric only: a dense bit stream down the column;
                                          per tensor instead int8 (1,) = zero - 2^(B-1)
    int-quantized    M.weight             int8 (rows, in) = code - 128
                     M.weight_scale       as above
                     M.weight_zero_point  int8, asymmetric only = zero - 128

    both             M.input_scale        float (1,), where inputs are rounded with calibrated scales (ActivationScheme)

and w = (code - zero) * scale, zero = 2^(B-1) when symmetric. config.json's `quantization_config` says which. Source:
vllm-project/compressed-tensors src/compressed_tensors/compressors/{pack_quantized,naive_quantized}, quantization/quant_config.py.

The package computes in the scale's type: from our float16 scales it gives float16(w), the correctly rounded float16 of the
float32 value that our formats decode to, since code - zero has at most 9 bits and one product is rounded once. With the scales
widened to float32 first (as loading in float32 does) it gives our values exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, inf
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers.compressed_tensors_config import (
    EMBEDDING,
    INTEGER,
    METHOD,
    PACKED,
    affine,
    read_schemes,
    rounds_input,
    stores_int8,
    write_quantization,
)
from tersor.containers.container import Checkpoint, Container, refuse_unheld
from tersor.containers.directory import (
    DTYPE_OF,
    Shards,
    find,
    float_info,
    is_tied,
    names_method,
    read_description,
    read_float,
    with_tied,
)
from tersor.containers.directory_writer import DirectoryWriter, Part
from tersor.containers.safetensors_file import Entry, shorten
from tersor.errors import ContainerError, FormatError
from tersor.formats import get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.floats import f32_from_bf16
from tersor.formats.packing import pack_bits, packed_bytes, unpack_bits
from tersor.tensor import ActivationScheme, Array, ModelDescription, QuantizedTensor, TensorInfo

_SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point")


class CompressedTensorsCheckpoint(Checkpoint):
    """An opened directory."""

    container = METHOD

    def __init__(self, path: Path) -> None:
        """Opens the directory. Raises ContainerError for anything missing, malformed or not supported."""
        self.path = path
        description, quantization = read_description(path)
        self._schemes = read_schemes(str(path / "config.json"), quantization or {})
        self._shards = Shards(path)
        try:
            self._affine: dict[str, AffineFormat] = {}
            self._inputs: dict[str, str] = {}  # of a module's Scheme
            tied = is_tied(description.config)
            infos = (self._info(entry) for entry in self._shards.entries.values())
            self.tensors: Mapping[str, TensorInfo] = {
                info.name: info for info in infos if info is not None and not (tied and info.name == "lm_head.weight")
            }
            description = replace(description, activations=self._activations())
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
        if part == "weight_packed" or (part == "weight" and entry.dtype == "I8"):
            return self._quantized(module, entry, PACKED if part == "weight_packed" else INTEGER)
        if part in _SUFFIXES and {f"{module}.weight_packed", f"{module}.weight"} & set(self._shards.entries):
            return None
        return float_info(self.path, entry)

    def _quantized(self, module: str, entry: Entry, stored: str) -> TensorInfo:
        """Returns the info of a quantized layer after checking that all its parts fit each other."""
        where = f"{self.path}: {shorten(module)}"
        fitting = [s for s in self._schemes if s.matches(module) and s.format in (stored, None)]
        if not fitting:
            raise ContainerError(
                f"{where} is stored {stored}, but no config group with that format targets it; config and weights disagree"
            )
        scheme = max(fitting, key=lambda s: s.matches(module))
        rows, columns = self._shape(where, module, entry, stored)
        try:
            format = get_format(scheme.our_format)
            format.check((rows, columns), module)
        except FormatError as error:
            raise ContainerError(f"{where}: {error}") from None
        assert isinstance(format, AffineFormat)
        self._check_parts(where, module, format, stored, rows, columns)
        name = f"{module}.weight"
        self._affine[name] = format
        self._inputs[module] = scheme.inputs
        return TensorInfo(name, format.name, (rows, columns), format.nbytes((rows, columns)))

    def _shape(self, where: str, module: str, entry: Entry, stored: str) -> tuple[int, int]:
        if stored == INTEGER:
            shape = list(entry.shape)
        else:
            part = self._shards.entries.get(f"{module}.weight_shape")
            if part is None or part.shape != (2,) or part.dtype not in ("I64", "I32"):
                raise ContainerError(f"{where}.weight_shape is missing or not two integers; the file is damaged")
            shape = self._shards.array(part.name).tolist()
        if len(shape) != 2 or not all(0 < n < 2**31 for n in shape):
            raise ContainerError(f"{where} has shape {shorten(shape)}, needs (rows, columns)")
        return shape[0], shape[1]

    def _check_parts(self, where: str, module: str, format: AffineFormat, stored: str, rows: int, columns: int) -> None:
        for part in _parts(f"{module}.weight", format, rows, columns, stored):
            entry = self._shards.entries.get(part.name)
            found = None if entry is None else (entry.dtype, entry.shape)
            dtypes = (
                ("F16", "BF16", "F32")
                if part.name.endswith("scale")
                else (part.dtype, "I32" if part.name.endswith("shape") else part.dtype)
            )
            shapes = (part.shape, (1, 1)) if part.shape == (1,) else (part.shape,)
            if found is None or found[0] not in dtypes or found[1] not in shapes:
                raise ContainerError(
                    f"{where}: {part.name.rpartition('.')[2]} is {found or 'missing'}, {format.name} of {rows} x {columns} needs"
                    f" {dtypes[0]} {part.shape}; config and weights disagree"
                )
        if stored == INTEGER and format.width != 8:
            raise ContainerError(f"{where}: {format.width}-bit codes stored as int8; only 8-bit ones are supported in {INTEGER}")
        order = self._shards.entries.get(f"{module}.weight_g_idx")
        if order is not None:
            expected = np.arange(columns) // format.group_size if format.group_size > 0 else np.zeros(columns)
            if order.shape != (columns,) or not np.array_equal(self._shards.array(order.name), expected):
                raise ContainerError(f"{where}: groups are not runs of columns (weight_g_idx, actorder); that is not supported yet")

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the tensor, or those rows of it. Codes are views; zeros are repacked; scales become float16.

        Raises ContainerError when a scale is no float16 number (bfloat16 and float32 scales are usually exact).
        """
        info = find(self.path, self.tensors, name)
        format = self._affine.get(name)
        if format is None:
            return read_float(self._shards, info, rows)
        module = name.removesuffix(".weight")
        per_tensor = format.group_size < 0
        fields = {"codes": self._codes(module, format, info.shape[1], rows), "scale": self._scale(module, None if per_tensor else rows)}
        if format.kind == "":
            zeros = self._zeros(module, format, *info.shape)
            fields["zero"] = pack_bits(zeros if rows is None or per_tensor else np.ascontiguousarray(zeros[rows]), format.width)
        return QuantizedTensor(format.name, (fields["codes"].shape[0], info.shape[1]), fields)

    def _codes(self, module: str, format: AffineFormat, columns: int, rows: slice | None) -> Array:
        if f"{module}.weight_packed" not in self._shards.entries:
            codes: Array = self._shards.array(f"{module}.weight", rows).view(np.uint8) ^ 0x80
            return codes
        stream = self._shards.array(f"{module}.weight_packed", rows).view(np.uint8)
        return np.ascontiguousarray(stream[:, : packed_bytes(columns, format.width)])

    def _scale(self, module: str, rows: slice | None) -> Array:
        name = f"{module}.weight_scale"
        stored = self._shards.array(name)
        stored = stored.reshape(len(stored), -1)[rows or slice(None)]
        if self._shards.entries[name].dtype == "F16":
            return stored
        wide = f32_from_bf16(stored) if self._shards.entries[name].dtype == "BF16" else stored
        with np.errstate(over="ignore"):
            scale: Array = wide.astype(np.float16)
        if not np.array_equal(scale.astype(np.float32), wide):
            raise ContainerError(f"{self.path}: {name} holds scales that are no float16 numbers; they cannot be kept exactly")
        return scale

    def _zeros(self, module: str, format: AffineFormat, rows: int, columns: int) -> Array:
        """Returns the zeros as codes, (rows, groups) uint8; (1, 1) per tensor."""
        stored = self._shards.array(f"{module}.weight_zero_point")
        if stored.dtype == np.int8:
            zeros: Array = (stored.astype(np.int16) + format.middle).astype(np.uint8).reshape(len(stored), -1) & format.max_code
            return zeros
        streams = np.ascontiguousarray(stored.T).view(np.uint8)  # (groups, bytes of a column)
        return np.ascontiguousarray(unpack_bits(np.ascontiguousarray(streams[:, : packed_bytes(rows, format.width)]), format.width, rows).T)

    def release(self) -> None:
        """Gives pages back to the system."""
        self._shards.release()

    def close(self) -> None:
        """Closes the files."""
        self._shards.close()


def _parts(name: str, format: AffineFormat, rows: int, columns: int, stored: str) -> list[Part]:
    """Returns the safetensors tensors of a quantized layer: codes, scale, shape (packed), zeros (asymmetric)."""
    module, groups = name.removesuffix(".weight"), format.groups(columns)
    per_tensor = format.group_size < 0
    scale = (1,) if per_tensor else (rows, groups)
    if stored == INTEGER:
        parts = [Part(name, "I8", (rows, columns)), Part(f"{module}.weight_scale", "F16", scale)]
    else:
        words = ceil(columns * format.width / 32)
        parts = [Part(f"{module}.weight_packed", "I32", (rows, words)), Part(f"{module}.weight_scale", "F16", scale)]
        parts.append(Part(f"{module}.weight_shape", "I64", (2,)))
    if format.kind == "":
        plain = per_tensor or stored == INTEGER
        shape = scale if plain else (ceil(rows * format.width / 32), groups)
        parts.append(Part(f"{module}.weight_zero_point", "I8" if plain else "I32", shape))
    return parts


def _as_words(stream: Array) -> Array:
    """Returns packed rows, (rows, bytes) uint8, as int32 words, zero-padded to whole words."""
    padded = np.zeros((stream.shape[0], -(-stream.shape[1] // 4) * 4), np.uint8)
    padded[:, : stream.shape[1]] = stream
    return padded.view("<i4")


class CompressedTensorsWriter(DirectoryWriter):
    """Writes a directory; quantized layers as their parts, floats as they are."""

    def parts(self, info: TensorInfo) -> list[Part]:
        """Returns the safetensors tensors that hold one tensor of the plan."""
        format = affine(info.format)
        if format is None:
            return super().parts(info)
        rows, columns = info.shape
        parts = _parts(info.name, format, rows, columns, INTEGER if stores_int8(format) else PACKED)
        if self._input_scale(info.name) is not None:
            parts.append(Part(f"{info.name.removesuffix('.weight')}.input_scale", "F32", (1,)))
        return parts

    def _input_scale(self, name: str) -> float | None:
        """Returns the static scale of a quantized tensor's input, None when there is none."""
        activations, module = self._description.activations, name.removesuffix(".weight")
        if activations is None or activations.scales is None or not rounds_input(activations, module):
            return None
        return activations.scales[module]

    def arrays(self, tensor: QuantizedTensor, info: TensorInfo) -> list[Array]:
        """Returns the arrays of `parts`, in the same order."""
        format = affine(info.format)
        if format is None:
            return super().arrays(tensor, info)
        input_scale = self._input_scale(info.name)
        last = [] if input_scale is None else [np.array([input_scale], np.float32)]
        codes, scale = tensor.fields["codes"], tensor.fields["scale"]
        if stores_int8(format):
            return [(codes ^ 0x80).view(np.int8), scale, *last]
        arrays = [_as_words(codes), scale, np.array(info.shape, np.int64)]
        if format.kind == "":
            zeros = unpack_bits(tensor.fields["zero"], format.width, scale.shape[1])  # (rows, groups)
            if format.group_size < 0:
                arrays.append((zeros.astype(np.int16) - format.middle).astype(np.int8))
            else:
                streams = _as_words(pack_bits(np.ascontiguousarray(zeros.T), format.width))  # (groups, words down the column)
                arrays.append(np.ascontiguousarray(streams.T))
        return arrays + last

    def config(self, description: ModelDescription) -> dict[str, Any]:
        """Returns config.json with a quantization_config, when anything is quantized."""
        quantization = write_quantization(self._plan.values(), is_tied(description.config), description.activations)
        return {**description.config, "quantization_config": quantization} if quantization else dict(description.config)


class CompressedTensors(Container):
    """Directories with integer weights for vLLM and transformers."""

    name = METHOD
    suffix = ""

    def recognizes(self, path: Path) -> bool:
        """Returns whether path is a directory whose config.json names this quant_method."""
        return (path / "config.json").is_file() and names_method(path, METHOD)

    def open(self, path: Path) -> CompressedTensorsCheckpoint:
        """Opens the directory. Raises ContainerError."""
        return CompressedTensorsCheckpoint(path)

    def holds(self, format: str) -> bool:
        """Returns whether the format is a float, or an affine integer without float minimum."""
        return format in DTYPE_OF or affine(format) is not None

    def create(
        self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool = False
    ) -> CompressedTensorsWriter:
        """Starts writing. Refuses a quantized embedding that is also the head, since loaders tie float weights only."""
        refuse_unheld(self, path, plan)
        for info in plan:
            if affine(info.format) is not None and len(info.shape) != 2:
                raise ContainerError(f"{path}: {info.name} has {len(info.shape)} axes; {METHOD} holds quantized matrices only")
            if info.name == f"{EMBEDDING}.weight" and affine(info.format) is not None and is_tied(description.config):
                raise ContainerError(
                    f"{path}: {info.name} is also the head (tie_word_embeddings), which loaders of {METHOD} expect in float;"
                    " keep it in f16 (recipe `embed_tokens=f16`)"
                )
        return CompressedTensorsWriter(path, description, plan, force=force)
