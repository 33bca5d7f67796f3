"""bitsandbytes directories: NF4, FP4 and LLM.int8() weights as transformers loads them.

A linear layer's matrix `W` = `M.weight` (rows, in) is stored as

    4 bits   W                                     uint8 (rows*in/2, 1)  byte = q0<<4 | q1, row after row
             W.absmax                              float32 (blocks,), or uint8 when nested; a block is 64 values
             W.quant_map                           float32 (16,) the table
             W.nested_absmax, W.nested_quant_map   float32 (ceil(blocks/256),), (256,)  nested only: what absmax is looked up in
             W.quant_state.bitsandbytes__nf4       uint8: JSON {quant_type, blocksize, dtype, shape, nested_blocksize, nested_dtype,
                                                   nested_offset}, padded with spaces here so that its length is known beforehand
    int8     W                                     int8 (rows, in)
             M.SCB                                 float32 (rows,) the row's absmax
             M.weight_format                       uint8 () = 0, "row"

These are the fields of our formats nf4, fp4, nf4_dq, fp4_dq and int8_row. Source: bitsandbytes-foundation/bitsandbytes
bitsandbytes/functional.py (QuantState.as_dict, from_dict), bitsandbytes/nn/modules.py (Linear8bitLt), utils.py (pack_dict_to_tensor).

The JSON's dtype is the float type that the package decodes to; asked for float32 it gives our values exactly. Of int8 layers it
rounds the inputs too when it runs, all but outliers (llm_int8_threshold), as our engine does with activations llm_int8; the weights
say nothing of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers.bitsandbytes_state import (
    FLOAT_DTYPES,
    METHOD,
    STATE,
    FourBits,
    as_float32,
    read_state,
    state_bytes,
    write_quantization,
)
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
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.formats.lookup import DoubleLookupFormat, LookupFormat, dynamic_map
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo

INT8 = "int8_row"
EMBEDDING = "model.embed_tokens.weight"

_ROW_FORMAT = 0  # of weight_format; 1..3 are column orders of old GPU kernels


class BitsAndBytesCheckpoint(DirectoryCheckpoint):
    """An opened directory."""

    container = "bnb"

    def __init__(self, path: Path) -> None:
        """Opens the directory. Raises ContainerError for anything missing, malformed or not supported."""
        self.path = path
        description, quantization = read_description(path)
        self._shards = Shards(path)
        try:
            self._states: dict[str, FourBits] = {}
            self._four_bit = {name.partition(f".{STATE}")[0] for name in self._shards.entries if STATE in name}
            tied = is_tied(description.config)
            infos = (self._info(entry) for entry in self._shards.entries.values())
            self.tensors: Mapping[str, TensorInfo] = {
                info.name: info for info in infos if info is not None and not (tied and info.name == "lm_head.weight")
            }
            self._check_config(quantization or {})
        except BaseException:
            self._shards.close()
            raise
        self.description = with_tied(description, self.tensors)

    def _check_config(self, quantization: Mapping[str, Any]) -> None:
        """Raises ContainerError when the config names the other kind of weights."""
        quantized = [info for info in self.tensors.values() if info.format not in DTYPE_OF]
        if not quantized:
            self.note = "the weights are float: quantization_config asks bitsandbytes to quantize them when it loads them"
        for info in quantized:
            kind, other = ("8bit", "4bit") if info.format == INT8 else ("4bit", "8bit")
            if quantization.get(f"load_in_{other}") and not quantization.get(f"load_in_{kind}"):
                raise ContainerError(
                    f"{self.path}: quantization_config says load_in_{other}, but {info.name} is {info.format}; config and weights disagree"
                )

    def _info(self, entry: Entry) -> TensorInfo | None:
        """Returns the tensor that a stored one stands for, None for its statistics."""
        owner, _, part = entry.name.rpartition(".")
        if STATE in entry.name:
            return self._four_bits(entry)
        if entry.name in self._four_bit or owner in self._four_bit:
            return None  # told of by its state
        if part in ("SCB", "weight_format") and f"{owner}.weight" in self._shards.entries:
            return None
        return self._int8(entry) if entry.dtype == "I8" else float_info(self.path, entry)

    def _four_bits(self, entry: Entry) -> TensorInfo:
        name = entry.name.partition(f".{STATE}")[0]
        state = read_state(self.path, self._shards, entry)
        self._states[name] = state
        return TensorInfo(name, state.format, state.shape, get_format(state.format).nbytes(state.shape))

    def _int8(self, entry: Entry) -> TensorInfo:
        """Returns the info of an LLM.int8() matrix after checking that its parts fit each other."""
        where, module = f"{self.path}: {shorten(entry.name)}", entry.name.removesuffix(".weight")
        if len(entry.shape) != 2 or 0 in entry.shape:
            raise ContainerError(f"{where} has shape {list(entry.shape)}, needs (rows, columns)")
        scb, order = self._shards.entries.get(f"{module}.SCB"), self._shards.entries.get(f"{module}.weight_format")
        if scb is None or scb.dtype not in FLOAT_DTYPES or prod(scb.shape) != entry.shape[0]:
            found = "missing" if scb is None else (scb.dtype, scb.shape)
            raise ContainerError(
                f"{where}: SCB is {found}, int8 of {entry.shape[0]} rows needs F32 ({entry.shape[0]},); the file is damaged"
            )
        if order is not None and (order.dtype != "U8" or order.shape not in ((), (1,)) or self._shards.array(order.name).any()):
            raise ContainerError(f"{where}: weight_format is not 0; only rows in their order are supported; save it anew")
        return TensorInfo(entry.name, INT8, entry.shape, get_format(INT8).nbytes(entry.shape))

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the tensor, or those rows of it. Codes are views.

        Raises ContainerError for rows of a nested tensor, whose statistics belong to the whole, and for an int8 code of -128.
        """
        info = find(self.path, self.tensors, name)
        if info.format in DTYPE_OF:
            return read_float(self._shards, info, rows)
        if info.format == INT8:
            return self._read_int8(info, rows)
        fields = self._states[name].fields(self._shards, name, rows)
        return QuantizedTensor(info.format, (len(fields["codes"]), info.shape[1]), fields)

    def _read_int8(self, info: TensorInfo, rows: slice | None) -> QuantizedTensor:
        codes = self._shards.array(info.name, rows)
        if codes.size and codes.min() == -128:
            raise ContainerError(f"{self.path}: {info.name} holds the code -128, LLM.int8() has -127..127; the file is damaged")
        scb = as_float32(self._shards, f"{info.name.removesuffix('.weight')}.SCB").reshape(-1, 1)
        return QuantizedTensor(INT8, codes.shape, {"codes": codes, "scb": scb if rows is None else scb[rows]})


class BitsAndBytesWriter(DirectoryWriter):
    """Writes a directory; quantized layers as their parts, floats as they are."""

    widest_first = True

    def parts(self, info: TensorInfo) -> list[Part]:
        """Returns the safetensors tensors that hold one tensor of the plan."""
        if info.format in DTYPE_OF:
            return super().parts(info)
        name, (rows, columns) = info.name, info.shape
        if info.format == INT8:
            module = name.removesuffix(".weight")
            return [Part(name, "I8", info.shape), Part(f"{module}.SCB", "F32", (rows,)), Part(f"{module}.weight_format", "U8", ())]
        blocks = rows * columns // 64
        nested = info.format.endswith("_dq")
        parts = [Part(name, "U8", (rows * columns // 2, 1)), Part(f"{name}.absmax", "U8" if nested else "F32", (blocks,))]
        parts.append(Part(f"{name}.quant_map", "F32", (16,)))
        if nested:
            parts += [Part(f"{name}.nested_absmax", "F32", (-(-blocks // 256),)), Part(f"{name}.nested_quant_map", "F32", (256,))]
        state = state_bytes(info, self._description.config, 0.0 if nested else None)
        return [*parts, Part(f"{name}.{STATE}{info.format.removesuffix('_dq')}", "U8", (len(state),))]

    def arrays(self, tensor: QuantizedTensor, info: TensorInfo) -> list[Array]:
        """Returns the arrays of `parts`, in the same order."""
        fields = tensor.fields
        if info.format in DTYPE_OF:
            return super().arrays(tensor, info)
        if info.format == INT8:
            return [fields["codes"], fields["scb"], np.zeros((), np.uint8)]
        format = get_format(info.format)
        assert isinstance(format, LookupFormat)
        arrays = [fields["codes"], fields["absmax"], format.table]
        offset = None
        if isinstance(format, DoubleLookupFormat):
            arrays += [fields["nested_absmax"], dynamic_map()]
            offset = float(fields["nested_offset"][0])
        return [*arrays, np.frombuffer(state_bytes(info, self._description.config, offset), np.uint8)]

    def config(self, description: ModelDescription) -> dict[str, Any]:
        """Returns config.json with a quantization_config, when anything is quantized."""
        quantization = write_quantization(self._plan.values(), description.config)
        return {**description.config, "quantization_config": quantization} if quantization else dict(description.config)


class BitsAndBytes(DirectoryContainer):
    """Directories with bitsandbytes' 4-bit or 8-bit weights, for transformers."""

    name = "bnb"
    methods = (METHOD,)
    checkpoint = BitsAndBytesCheckpoint

    def holds(self, format: str) -> bool:
        """Returns whether the format is a float, nf4, fp4, nf4_dq, fp4_dq or int8_row."""
        return format in DTYPE_OF or format == INT8 or isinstance(get_format(format), LookupFormat)

    def create(self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool = False) -> BitsAndBytesWriter:
        """Starts writing. Refuses what no loader turns into a layer: two kinds in one directory, a quantized embedding."""
        refuse_unheld(self, path, plan)
        first: TensorInfo | None = None
        for info in plan:
            if info.format in DTYPE_OF:
                continue
            if info.name == EMBEDDING or len(info.shape) != 2 or not info.name.endswith(".weight"):
                raise ContainerError(f"{path}: {info.name} is no linear layer, which is all that bitsandbytes quantizes; keep it in float")
            first = first or info
            if info.format != first.format:
                raise ContainerError(
                    f"{path}: {first.name} is {first.format} and {info.name} is {info.format}; a bitsandbytes directory holds one kind,"
                    " since its config names one; use one format for all quantized layers"
                )
        return BitsAndBytesWriter(path, description, plan, force=force)
