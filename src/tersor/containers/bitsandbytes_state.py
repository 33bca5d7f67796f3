"""bitsandbytes' statistics of a 4-bit matrix (QuantState), and config.json's `quantization_config`.

Source: bitsandbytes-foundation/bitsandbytes bitsandbytes/functional.py (QuantState, dequantize_4bit, dequantize_blockwise);
huggingface/transformers src/transformers/utils/quantization_config.py (BitsAndBytesConfig), quantizers/quantizers_utils.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from tersor.containers.directory import DTYPE_OF, Shards, is_tied
from tersor.containers.safetensors_file import Entry, parse_json, shorten
from tersor.errors import ContainerError, unknown
from tersor.formats.floats import f32_from_bf16
from tersor.formats.lookup import BLOCK, NESTED_BLOCK, TABLES, dynamic_map
from tersor.tensor import Array, TensorInfo

METHOD = "bitsandbytes"
STATE = "quant_state.bitsandbytes__"  # and the name of the table
FLOAT_DTYPES = ("F32", "F16", "BF16")

_MAX_STATE_BYTES = 4096
_MAX_BLOCK = 4096
_OFFSET_DIGITS = 32  # room for any float64 as JSON


@dataclass(frozen=True)
class FourBits:
    """A 4-bit matrix as it is stored.

    format: the one that holds it to the bit: nested as bitsandbytes nests today, else plain with the absmax that it stands for.
    block: values that share an absmax, a multiple of 64. nested_block, offset: 0 and 0 unless nested.
    """

    format: str
    shape: tuple[int, int]
    block: int
    nested_block: int
    offset: float

    def fields(self, shards: Shards, name: str, rows: slice | None) -> dict[str, Array]:
        """Returns the fields of the format, of these rows. Raises ContainerError for rows of a nested one."""
        count, columns = self.shape
        codes = shards.array(name).reshape(-1).view(np.uint8).reshape(count, columns // 2)
        if self.format.endswith("_dq"):
            if rows is not None:
                raise ContainerError(f"{shards.path}: {name} is {self.format}, whose rows share their statistics; read it whole")
            absmax = shards.array(f"{name}.absmax").reshape(count, columns // BLOCK)
            nested = shards.array(f"{name}.nested_absmax").reshape(-1)
            return {"codes": codes, "absmax": absmax, "nested_absmax": nested, "nested_offset": np.array([self.offset], np.float32)}
        absmax = self._absmax(shards, name).reshape(count, columns // BLOCK)
        return {"codes": codes, "absmax": absmax} if rows is None else {"codes": codes[rows], "absmax": absmax[rows]}

    def _absmax(self, shards: Shards, name: str) -> Array:
        """Returns the float32 absmax of every 64 values: map[a] * nested_absmax + offset if nested, repeated for longer blocks."""
        absmax = shards.array(f"{name}.absmax").reshape(-1)
        if self.nested_block:
            nested = np.repeat(shards.array(f"{name}.nested_absmax").reshape(-1), self.nested_block)[: absmax.size]
            absmax = shards.array(f"{name}.nested_quant_map").reshape(-1)[absmax] * nested + np.float32(self.offset)
        else:
            absmax = as_float32(shards, f"{name}.absmax").reshape(-1)
        return np.repeat(absmax, self.block // BLOCK)[: prod(self.shape) // BLOCK]


def as_float32(shards: Shards, name: str) -> Array:
    """Returns a stored float tensor widened to float32, exactly."""
    values = shards.array(name)
    wide: Array = f32_from_bf16(values) if shards.entries[name].dtype == "BF16" else values.astype(np.float32, copy=False)
    return wide


def read_state(path: Path, shards: Shards, entry: Entry) -> FourBits:
    """Returns what a `quant_state` tensor and its neighbours say, proven to fit each other. Raises ContainerError."""
    name, _, table = entry.name.partition(f".{STATE}")
    where = f"{path}: {shorten(name)}"
    if table not in TABLES:
        raise ContainerError(f"{where}: {unknown('quant_type', shorten(table), TABLES)}")
    state = _parsed(where, shards, entry)
    shape, block = state.get("shape"), state.get("blocksize")
    if state.get("quant_type") != table:
        raise ContainerError(f"{where}: quant_type is {shorten(state.get('quant_type'))} in a state named {table}; the file is damaged")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_count(n, 2**31) for n in shape):
        raise ContainerError(f"{where}: quant_state says shape {shorten(shape)}, needs [rows, columns]")
    rows, columns = shape
    if columns % BLOCK:
        raise ContainerError(f"{where} has {columns} columns, not a multiple of {BLOCK}: blocks across rows are not supported")
    if not _is_count(block, _MAX_BLOCK) or block % BLOCK:
        raise ContainerError(f"{where}: blocksize {shorten(block)} is not supported, only multiples of {BLOCK} up to {_MAX_BLOCK}")
    _check_codes(where, shards, name, rows * columns)
    _check_part(where, shards, f"{name}.quant_map", ("F32",), 16)
    if not np.array_equal(shards.array(f"{name}.quant_map").reshape(-1), TABLES[table]):
        raise ContainerError(f"{where}: quant_map is not the table of {table}; other tables are not supported")
    blocks = -(-rows * columns // block)
    if not any(key.startswith("nested") for key in state):
        _check_part(where, shards, f"{name}.absmax", FLOAT_DTYPES, blocks)
        return FourBits(table, (rows, columns), block, 0, 0.0)
    return _nested(where, shards, name, state, FourBits(table, (rows, columns), block, 0, 0.0), blocks)


def _nested(where: str, shards: Shards, name: str, state: Mapping[str, Any], plain: FourBits, blocks: int) -> FourBits:
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if not _is_count(block, _MAX_BLOCK):
        raise ContainerError(f"{where}: nested_blocksize {shorten(block)} is not in 1..{_MAX_BLOCK}; the file is damaged")
    if not isinstance(offset, int | float) or isinstance(offset, bool) or not abs(offset) < 3e38:
        raise ContainerError(f"{where}: nested_offset is {shorten(offset)}, needs a finite number; the file is damaged")
    _check_part(where, shards, f"{name}.absmax", ("U8",), blocks)
    _check_part(where, shards, f"{name}.nested_absmax", ("F32",), -(-blocks // block))
    _check_part(where, shards, f"{name}.nested_quant_map", ("F32",), 256)
    ours = np.array_equal(shards.array(f"{name}.nested_quant_map").reshape(-1), dynamic_map())
    same = ours and block == NESTED_BLOCK and plain.block == BLOCK
    return FourBits(f"{plain.format}_dq" if same else plain.format, plain.shape, plain.block, block, float(offset))


def _parsed(where: str, shards: Shards, entry: Entry) -> dict[str, Any]:
    if entry.dtype != "U8" or prod(entry.shape) > _MAX_STATE_BYTES:
        raise ContainerError(f"{where}: quant_state is {entry.dtype} {list(entry.shape)}, needs at most {_MAX_STATE_BYTES} bytes of JSON")
    state = parse_json(shards.array(entry.name).tobytes(), where, "quant_state")
    if not isinstance(state, dict):
        raise ContainerError(f"{where}: quant_state holds a JSON {type(state).__name__}, needs an object; the file is damaged")
    return state


def _is_count(value: object, most: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most


def _check_codes(where: str, shards: Shards, name: str, values: int) -> None:
    """The codes lie in any dtype (bnb_4bit_quant_storage): their bytes count."""
    entry = shards.entries.get(name)
    if entry is None or (entry.end - entry.begin) * 2 != values:
        found = "missing" if entry is None else f"{entry.end - entry.begin} bytes"
        raise ContainerError(f"{where}: the codes are {found}, {values} values of 4 bits need {values // 2} bytes; the file is damaged")


def _check_part(where: str, shards: Shards, name: str, dtypes: tuple[str, ...], count: int) -> None:
    entry = shards.entries.get(name)
    if entry is None or entry.dtype not in dtypes or prod(entry.shape) != count:
        found = "missing" if entry is None else (entry.dtype, entry.shape)
        raise ContainerError(f"{where}: {name.rpartition('.')[2]} is {found}, needs {dtypes[0]} ({count},); the file is damaged")


def model_dtype(config: Mapping[str, Any]) -> str:
    """Returns the float type that layers compute in, as torch calls it: the model's."""
    dtype = config.get("dtype", config.get("torch_dtype"))
    return dtype if dtype in ("float32", "float16", "bfloat16") else "float32"


def state_bytes(info: TensorInfo, config: Mapping[str, Any], offset: float | None) -> bytes:
    """Returns the JSON of a matrix's state. offset: nested_offset, None when not nested; the length does not depend on it."""
    state: dict[str, Any] = {
        "quant_type": info.format.removesuffix("_dq"),
        "blocksize": BLOCK,
        "dtype": model_dtype(config),
        "shape": list(info.shape),
    }
    if offset is None:
        return json.dumps(state).encode()
    assert isfinite(offset), "the mean of finite absmax values"
    state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    text = json.dumps(state)[:-1] + f', "nested_offset": {offset!r}' + "}"
    return text.ljust(len(json.dumps(state)) + len(', "nested_offset": ') + _OFFSET_DIGITS).encode()


def write_quantization(plan: Iterable[TensorInfo], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the quantization_config of a plan, None when nothing is quantized.

    llm_int8_skip_modules names every linear layer that stays in float (of 8-bit and 4-bit models alike): loaders turn all others
    into quantized layers. A tied head has no tensor but is a layer.
    """
    kinds, skipped = set(), ["lm_head"] if is_tied(config) else []
    for info in plan:
        if info.format not in DTYPE_OF:
            kinds.add(info.format)
        elif len(info.shape) == 2 and info.name != "model.embed_tokens.weight":
            skipped.append(info.name.removesuffix(".weight"))
    if not kinds:
        return None
    format = kinds.pop()
    four = format != "int8_row"
    return {
        "quant_method": METHOD,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "bnb_4bit_quant_type": format.removesuffix("_dq") if four else "fp4",
        "bnb_4bit_use_double_quant": format.endswith("_dq"),
        "bnb_4bit_compute_dtype": model_dtype(config),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": skipped,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }
