"""One HQQ layer as it is stored: its small tensors, proven to fit each other, and its packing.

    packing   a word holds           of groups (there are G = rows*in/N, S = ceil(G / per word))
    8bit_u8   q                      also of 5 and 6 bits
    4bit_u8   a<<4 | b               s, s + S
    2bit_u8   a<<6 | b<<4 | c<<2 | d   s, s + S, s + 2S, s + 3S
    1bit_u8   a<<7 | ... | h         s, ..., s + 7S
    3bit_32   a<<27 | ... | j        s, ..., s + 9S, in an int32; the groups past G are zeros

W_q is (S, N) words, s its row. Source: mobiusml/hqq (dropbox/hqq) hqq/core/bitpack.py, hqq/core/quantize.py (HQQLinear.state_dict),
hqq/core/utils.py (encode_safetensor_type).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np

from tersor.containers.directory import Shards
from tersor.containers.safetensors_file import DTYPES, shorten
from tersor.errors import ContainerError, FormatError
from tersor.formats import get_format
from tersor.tensor import Array

# All that HQQLinear.state_dict writes beside W_q and bias; loaders demand each.
PARTS = (
    *("scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
)
PACKING = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}

_PER_WORD = {"8bit_u8": 1, "4bit_u8": 2, "3bit_32": 10, "2bit_u8": 4, "1bit_u8": 8}
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Layer:
    """What the small tensors say. group: values of a group. rounded: whether zeros are said to be integers (no optimizer moved them)."""

    rows: int
    columns: int
    bits: int
    group: int
    rounded: bool

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return self.columns // self.group

    @property
    def axis(self) -> str:
        """The middle of our format's name: g64, or c for a group that is a row and no group of ours."""
        return f"g{self.group}" if self.group != self.columns or (self.group % 16 == 0 and self.group <= 256) else "c"


def words(count: int, bits: int) -> int:
    """Returns the rows of W_q for so many groups: ceil(count / values in a word)."""
    return ceil(count / _PER_WORD[PACKING[bits]])


def splits(count: int, bits: int) -> bool:
    """Returns whether hqq can pack so many groups: its bytes need equal parts, only the 3-bit words are padded."""
    return bits == 3 or count % _PER_WORD[PACKING[bits]] == 0


def pack_groups(codes: Array, bits: int) -> Array:
    """Returns W_q of the codes of all groups, (G, N) uint8."""
    per, count = _PER_WORD[PACKING[bits]], len(codes)
    size = words(count, bits)
    width = 8 // per if per != 10 else 3
    packed = np.zeros((size, codes.shape[1]), np.int32 if bits == 3 else np.uint8)
    for part in range(per):
        own = codes[part * size : (part + 1) * size].astype(packed.dtype)
        packed[: len(own)] |= own << (width * (per - 1 - part))
    return packed


def unpack_groups(packed: Array, bits: int, start: int, stop: int) -> Array:
    """Returns the codes of groups start..stop, (stop - start, N) uint8. packed: W_q, (S, N)."""
    per, size = _PER_WORD[PACKING[bits]], len(packed)
    width = 8 // per if per != 10 else 3
    codes = np.empty((stop - start, packed.shape[1]), np.uint8)
    for part in range(per):
        low, high = max(start, part * size), min(stop, (part + 1) * size)
        if low < high:
            own = packed[low - part * size : high - part * size]
            codes[low - start : high - start] = (own >> (width * (per - 1 - part))) & (2**width - 1)
    return codes


def read_layer(where: str, shards: Shards, module: str) -> Layer:
    """Returns what the tensors of a module say. Raises ContainerError for what is missing, contradictory or not supported."""
    _refuse_others(where, shards, module)
    shape = _integers(where, shards, module, "shape", 2)
    bits = _bits(where, shards, module)
    group, axis = _number(where, shards, module, "group_size"), _number(where, shards, module, "axis")
    if axis != 1:
        raise ContainerError(f"{where}: axis {shorten(axis)}: groups run along the rows; only axis=1, along the columns, is supported")
    rows, columns = shape
    if not (0 < rows < 2**31 and 0 < columns < 2**31):
        raise ContainerError(f"{where} has shape [{rows}, {columns}], needs (rows, columns); the file is damaged")
    if not isinstance(group, int) or not 0 < group <= columns or columns % group:
        raise ContainerError(f"{where}: groups of {shorten(group)} do not divide rows of {columns} columns; that is not supported")
    plain = not _flag(where, shards, module, "optimize", True) and _flag(where, shards, module, "round_zero", False)
    layer = Layer(rows, columns, bits, group, plain)
    try:
        get_format(f"int{bits}_{layer.axis}z").check((rows, columns), module)
    except FormatError as error:
        raise ContainerError(f"{where}: {error}") from None
    _check_sizes(where, shards, module, layer)
    return layer


def _refuse_others(where: str, shards: Shards, module: str) -> None:
    """Raises ContainerError for quantized or offloaded scales and zeros, which hqq itself no longer stores."""
    for part in ("quant_scale", "quant_zero"):
        if _flag(where, shards, module, part, False):
            raise ContainerError(f"{where}: {part}: scales and zeros are themselves quantized; that is not supported")
    if f"{module}.zero_scale" in shards.entries:
        raise ContainerError(f"{where}: zero_scale: scales and zeros are offloaded together; that is not supported")


def _bits(where: str, shards: Shards, module: str) -> int:
    bits, packing = _number(where, shards, module, "nbits"), _text(where, shards, module, "packing")
    bits = 2 if abs(bits - 1.58) < 1e-3 else bits
    if bits not in PACKING or bits != int(bits):
        raise ContainerError(f"{where}: nbits is {shorten(bits)}; only {', '.join(map(str, sorted(PACKING)))} are supported")
    if packing != PACKING[int(bits)]:
        raise ContainerError(f"{where}: packing {packing!r} of {int(bits)} bits, needs {PACKING[int(bits)]!r}; the file is damaged")
    return int(bits)


def _check_sizes(where: str, shards: Shards, module: str, layer: Layer) -> None:
    count = layer.rows * layer.groups
    stored = shards.entries[f"{module}.W_q"]
    need = words(count, layer.bits) * layer.group * (4 if layer.bits == 3 else 1)
    if stored.end - stored.begin != need or not splits(count, layer.bits):
        raise ContainerError(
            f"{where}: W_q is {stored.dtype} {list(stored.shape)}, {layer.rows} x {layer.columns} in {layer.bits} bits and groups of"
            f" {layer.group} need {need} bytes; the file is damaged"
        )
    for part in ("scale", "zero"):
        entry = shards.entries.get(f"{module}.{part}")
        if entry is None or entry.dtype not in _FLOATS or prod(entry.shape) != count:
            found = "missing" if entry is None else (entry.dtype, entry.shape)
            raise ContainerError(f"{where}: {part} is {found}, needs F16 ({count}, 1); the file is damaged")


def _number(where: str, shards: Shards, module: str, part: str) -> Any:
    """Returns a stored scalar: int or float."""
    entry = shards.entries.get(f"{module}.{part}")
    if entry is None or prod(entry.shape) != 1 or entry.dtype not in ("I32", "I64", "U8", "F32", "BOOL"):
        found = "missing" if entry is None else (entry.dtype, entry.shape)
        raise ContainerError(f"{where}: {part} is {found}, needs one number; the file is damaged")
    return shards.array(entry.name).reshape(()).item()


def _flag(where: str, shards: Shards, module: str, part: str, default: bool) -> bool:
    return bool(_number(where, shards, module, part)) if f"{module}.{part}" in shards.entries else default


def _integers(where: str, shards: Shards, module: str, part: str, count: int) -> list[int]:
    entry = shards.entries.get(f"{module}.{part}")
    if entry is None or entry.shape != (count,) or entry.dtype not in ("I64", "I32"):
        found = "missing" if entry is None else (entry.dtype, entry.shape)
        raise ContainerError(f"{where}: {part} is {found}, needs {count} integers; the file is damaged")
    values: list[int] = shards.array(entry.name).tolist()
    return values


def _text(where: str, shards: Shards, module: str, part: str) -> str:
    """Returns a text stored as one byte a character."""
    entry = shards.entries.get(f"{module}.{part}")
    if entry is None or entry.dtype != "U8" or prod(entry.shape) > 64:
        found = "missing" if entry is None else (entry.dtype, entry.shape)
        raise ContainerError(f"{where}: {part} is {found}, needs the bytes of a short text; the file is damaged")
    return shards.array(entry.name).tobytes().decode("latin-1")


def small_arrays(layer: Layer, compute_dtype: str) -> Mapping[str, Array]:
    """Returns the small tensors of a layer to be written, by part, all of PARTS but scale and zero."""
    flags = {"encoded_state_dict": 1, "stores_quant_config": 1, "channel_wise": 1, "round_zero": int(layer.rounded)}
    absent = ("view_as_float", "quant_scale", "quant_zero", "offload_meta", "optimize")
    numbers = {"nbits": layer.bits, "group_size": layer.group, "axis": 1}
    texts = {
        "packing": PACKING[layer.bits],
        "unpack_view_dtype": "torch.int32" if layer.bits == 3 else "torch.uint8",
        "compute_dtype": f"torch.{compute_dtype}",
    }
    return {
        "shape": np.array([layer.rows, layer.columns], DTYPES["I64"]),
        **{part: np.array(value, DTYPES["I32"]) for part, value in numbers.items()},
        **{part: np.array(value, np.uint8) for part, value in (flags | dict.fromkeys(absent, 0)).items()},
        **{part: np.frombuffer(text.encode(), np.uint8) for part, text in texts.items()},
    }
