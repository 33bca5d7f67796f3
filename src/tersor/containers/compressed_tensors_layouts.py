"""How compressed-tensors lays the fields of a number format out as safetensors tensors: one Layout per compression format.

A quantized module `M` of (rows, in) weights is stored as

    pack-quantized        M.weight_packed        int32 (rows, ceil(in*B/32))      a dense bit stream along the row, LSB first: our codes
                          M.weight_scale         float (rows, groups), (rows, 1) per channel, (1,) per tensor
                          M.weight_shape         int64 (2,) = rows, in
                          M.weight_zero_point    int32 (ceil(rows*B/32), groups)  asymmetric only: a dense bit stream down the column;
                                                 per tensor instead int8 (1,) = zero - 2^(B-1)
                          M.weight_g_idx         int32 (in,), the group of each column, where groups are no runs (actorder "group")
    int-quantized         M.weight               int8 (rows, in) = code - 128
                          M.weight_scale         as above
                          M.weight_zero_point    int8, asymmetric only = zero - 128
    float-quantized       M.weight               float8_e4m3 (rows, in)
                          M.weight_scale         float (rows, 1), (1,) per tensor, (ceil(rows/128), in/128) in blocks
    nvfp4-pack-quantized  M.weight_packed        uint8 (rows, in/2)   byte = q1<<4 | q0, q = E2M1 bits
                          M.weight_scale         float8_e4m3 (rows, in/16)
                          M.weight_global_scale  float32 (1,)         w = e2m1(q) * (scale / global_scale)
    mxfp4-pack-quantized  M.weight_packed        uint8 (rows, in/2)   as above
                          M.weight_scale         uint8 (rows, in/32) = e, w = e2m1(q) * 2^(e - 127)

Source: vllm-project/compressed-tensors src/compressed_tensors/compressors/{pack_quantized,naive_quantized,nvfp4,mxfp4}.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import ceil, prod
from typing import ClassVar

import numpy as np

from tersor.containers.directory import Shards
from tersor.containers.directory_writer import Part
from tersor.errors import ContainerError
from tersor.formats import Format, get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.floats import f32_from_bf16
from tersor.formats.fp8 import BLOCK, Fp8Format
from tersor.formats.nvfp4 import Nvfp4Format, pack_low_first, unpack_low_first
from tersor.formats.ordered import OrderedFormat
from tersor.formats.packing import pack_bits, packed_bytes, unpack_bits
from tersor.tensor import Array, QuantizedTensor

FLOAT_DTYPES = ("F16", "BF16", "F32")


class Layout(ABC):
    """A compression format. name: as config.json calls it. accepts: dtypes that a part may have besides the one that we write."""

    name: str
    accepts: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @abstractmethod
    def holds(self, format: Format) -> bool:
        """Returns whether this layout stores the format."""

    @abstractmethod
    def parts(self, module: str, format: Format, rows: int, columns: int) -> list[Part]:
        """Returns the safetensors tensors of a module, as we write them; codes first."""

    @abstractmethod
    def arrays(self, tensor: QuantizedTensor, format: Format) -> list[Array]:
        """Returns the arrays of `parts`, in the same order."""

    @abstractmethod
    def fields(self, stored: Stored, format: Format, shape: tuple[int, ...], rows: slice | None) -> dict[str, Array]:
        """Returns the fields of a checked module, or of those rows of it."""


class Stored:
    """The stored tensors of one module by the last part of their names."""

    def __init__(self, shards: Shards, module: str) -> None:
        self._shards, self._module = shards, module
        self.where = f"{shards.path}: {module}"

    def __contains__(self, part: str) -> bool:
        return f"{self._module}.{part}" in self._shards.entries

    def array(self, part: str, rows: slice | None = None) -> Array:
        """Returns the tensor or those rows of it, as stored."""
        return self._shards.array(f"{self._module}.{part}", rows)

    def wide(self, part: str, rows: slice | None = None) -> Array:
        """Returns a float tensor, at least two axes, as float16 when it is that and else as float32, or those rows of it."""
        stored = self.array(part)
        stored = stored.reshape(stored.shape[0] if stored.ndim else 1, -1)[rows or slice(None)]
        return f32_from_bf16(stored) if self._shards.entries[f"{self._module}.{part}"].dtype == "BF16" else stored


class Integers(Layout):
    """What both integer layouts share: scales, float16 or float32, and which zeros there are."""

    accepts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight_scale": FLOAT_DTYPES,
        "weight_shape": ("I64", "I32"),
        "weight_g_idx": ("I32", "I64"),
    }

    def scale(self, stored: Stored, format: AffineFormat, rows: slice | None) -> Array:
        """Returns the scales as the format has them."""
        return stored.wide("weight_scale", None if format.group_size < 0 else rows).astype(format.float_type, copy=False)

    def packed_zeros(self, zeros: Array, format: AffineFormat, rows: slice | None) -> Array:
        """Returns zeros, (rows, groups) uint8, as our field."""
        return pack_bits(zeros if rows is None or format.group_size < 0 else np.ascontiguousarray(zeros[rows]), format.width)


class PackQuantized(Integers):
    """Integers of 1 to 8 bits as dense bit streams, also with an order of columns."""

    name = "pack-quantized"

    def holds(self, format: Format) -> bool:
        return isinstance(format, OrderedFormat) or (isinstance(format, AffineFormat) and format.kind in ("", "s"))

    def parts(self, module: str, format: Format, rows: int, columns: int) -> list[Part]:
        if isinstance(format, OrderedFormat):
            return [*self.parts(module, format.plain, rows, columns), Part(f"{module}.weight_g_idx", "I32", (columns,))]
        assert isinstance(format, AffineFormat)
        groups = format.groups(columns)
        scale = _scale_shape(format, rows, columns)
        parts = [
            Part(f"{module}.weight_packed", "I32", (rows, ceil(columns * format.width / 32))),
            Part(f"{module}.weight_scale", _float_dtype(format), scale),
            Part(f"{module}.weight_shape", "I64", (2,)),
        ]
        if format.kind == "" and format.group_size < 0:
            parts.append(Part(f"{module}.weight_zero_point", "I8", scale))
        elif format.kind == "":
            parts.append(Part(f"{module}.weight_zero_point", "I32", (ceil(rows * format.width / 32), groups)))
        return parts

    def arrays(self, tensor: QuantizedTensor, format: Format) -> list[Array]:
        if isinstance(format, OrderedFormat):
            plain, order = format.split(tensor)
            codes = pack_bits(format.unpack(tensor)[0], format.width)
            groups = np.empty(len(order), np.int32)
            groups[order] = np.arange(len(order)) // format.group_size
            in_columns = QuantizedTensor(plain.format, plain.shape, {**plain.fields, "codes": codes})
            return [*self.arrays(in_columns, format.plain), groups]
        assert isinstance(format, AffineFormat)
        scale = tensor.fields["scale"]
        arrays = [_as_words(tensor.fields["codes"]), scale, np.array(tensor.shape, np.int64)]
        if format.kind == "":
            zeros = unpack_bits(tensor.fields["zero"], format.width, scale.shape[1])  # (rows, groups)
            if format.group_size < 0:
                arrays.append((zeros.astype(np.int16) - format.middle).astype(np.int8))
            else:
                streams = _as_words(pack_bits(np.ascontiguousarray(zeros.T), format.width))  # (groups, words down the column)
                arrays.append(np.ascontiguousarray(streams.T))
        return arrays

    def fields(self, stored: Stored, format: Format, shape: tuple[int, ...], rows: slice | None) -> dict[str, Array]:
        if isinstance(format, OrderedFormat):
            fields = self.fields(stored, format.plain, shape, rows)
            order = np.argsort(stored.array("weight_g_idx"), kind="stable").astype(np.int32)
            in_columns = unpack_bits(fields["codes"], format.width, shape[1])
            return {**fields, "codes": pack_bits(np.ascontiguousarray(in_columns[:, order]), format.width), "order": order}
        assert isinstance(format, AffineFormat)
        stream = stored.array("weight_packed", rows).view(np.uint8)
        codes = np.ascontiguousarray(stream[:, : packed_bytes(shape[1], format.width)])
        fields = {"codes": codes, "scale": self.scale(stored, format, rows)}
        if format.kind == "":
            fields["zero"] = self.packed_zeros(self._zeros(stored, format, shape[0]), format, rows)
        return fields

    def _zeros(self, stored: Stored, format: AffineFormat, rows: int) -> Array:
        """Returns the zeros as codes, (rows, groups) uint8; (1, 1) per tensor."""
        packed = stored.array("weight_zero_point")
        if format.group_size < 0:
            zeros: Array = (packed.astype(np.int16) + format.middle).astype(np.uint8).reshape(1, 1) & format.max_code
            return zeros
        streams = np.ascontiguousarray(packed.T).view(np.uint8)  # (groups, bytes of a column)
        return np.ascontiguousarray(unpack_bits(np.ascontiguousarray(streams[:, : packed_bytes(rows, format.width)]), format.width, rows).T)


class IntQuantized(Integers):
    """8-bit integers as they are. We write the symmetric ones per channel or tensor this way, and read all."""

    name = "int-quantized"

    def holds(self, format: Format) -> bool:
        return isinstance(format, AffineFormat) and format.kind in ("", "s") and format.width == 8

    def parts(self, module: str, format: Format, rows: int, columns: int) -> list[Part]:
        assert isinstance(format, AffineFormat)
        scale = _scale_shape(format, rows, columns)
        parts = [Part(f"{module}.weight", "I8", (rows, columns)), Part(f"{module}.weight_scale", _float_dtype(format), scale)]
        return [*parts, Part(f"{module}.weight_zero_point", "I8", scale)] if format.kind == "" else parts

    def arrays(self, tensor: QuantizedTensor, format: Format) -> list[Array]:
        assert isinstance(format, AffineFormat) and format.kind == "s"
        return [(tensor.fields["codes"] ^ 0x80).view(np.int8), tensor.fields["scale"]]

    def fields(self, stored: Stored, format: Format, shape: tuple[int, ...], rows: slice | None) -> dict[str, Array]:
        assert isinstance(format, AffineFormat)
        fields: dict[str, Array] = {"codes": stored.array("weight", rows).view(np.uint8) ^ 0x80, "scale": self.scale(stored, format, rows)}
        if format.kind == "":
            zeros = stored.array("weight_zero_point").view(np.uint8) ^ 0x80
            fields["zero"] = self.packed_zeros(zeros.reshape(zeros.shape[0], -1), format, rows)
        return fields


class FloatQuantized(Layout):
    """8-bit floats as they are, with float32 scales."""

    name = "float-quantized"
    accepts: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight_scale": FLOAT_DTYPES}

    def holds(self, format: Format) -> bool:
        return isinstance(format, Fp8Format)

    def parts(self, module: str, format: Format, rows: int, columns: int) -> list[Part]:
        assert isinstance(format, Fp8Format)
        scale = (1,) if format.axis == "t" else format.scale_shape(rows, columns)
        return [Part(f"{module}.weight", "F8_E4M3", (rows, columns)), Part(f"{module}.weight_scale", "F32", scale)]

    def arrays(self, tensor: QuantizedTensor, format: Format) -> list[Array]:
        return [tensor.fields["codes"], tensor.fields["scale"]]

    def fields(self, stored: Stored, format: Format, shape: tuple[int, ...], rows: slice | None) -> dict[str, Array]:
        assert isinstance(format, Fp8Format)
        of_scale = None if format.axis == "t" else rows
        if format.axis == "b128" and rows is not None:
            start, stop, _ = rows.indices(shape[0])
            if start % BLOCK:
                raise ContainerError(f"{stored.where}: rows from {start} on; those of {format.name} can be read from multiples of {BLOCK}")
            of_scale = slice(start // BLOCK, ceil(stop / BLOCK))
        scale = np.ascontiguousarray(stored.wide("weight_scale", of_scale), dtype=np.float32)
        return {"codes": stored.array("weight", rows), "scale": scale}


class NvFp4(Layout):
    """4-bit floats with 8-bit float scales and a global one."""

    name = "nvfp4-pack-quantized"

    def holds(self, format: Format) -> bool:
        return isinstance(format, Nvfp4Format)

    def parts(self, module: str, format: Format, rows: int, columns: int) -> list[Part]:
        return [
            Part(f"{module}.weight_packed", "U8", (rows, columns // 2)),
            Part(f"{module}.weight_scale", "F8_E4M3", (rows, columns // 16)),
            Part(f"{module}.weight_global_scale", "F32", (1,)),
        ]

    def arrays(self, tensor: QuantizedTensor, format: Format) -> list[Array]:
        return [tensor.fields["codes"], tensor.fields["scale"], tensor.fields["global_scale"]]

    def fields(self, stored: Stored, format: Format, shape: tuple[int, ...], rows: slice | None) -> dict[str, Array]:
        global_scale = stored.array("weight_global_scale").reshape(1, 1)
        if not 0 < global_scale[0, 0] < np.inf:
            raise ContainerError(
                f"{stored.where}.weight_global_scale is {global_scale[0, 0]}, needs a positive number; the file is damaged"
            )
        codes, scale = stored.array("weight_packed", rows), stored.array("weight_scale", rows)
        return {"codes": codes, "scale": scale, "global_scale": global_scale}


class MxFp4(Layout):
    """4-bit floats with powers of two: ggml's mxfp4, whose block of 17 bytes is e and 16 bytes, low nibbles first, here taken apart."""

    name = "mxfp4-pack-quantized"
    accepts: ClassVar[Mapping[str, tuple[str, ...]]] = {"weight_scale": ("U8", "F8_E8M0")}

    def holds(self, format: Format) -> bool:
        return format.name == "mxfp4"

    def parts(self, module: str, format: Format, rows: int, columns: int) -> list[Part]:
        return [
            Part(f"{module}.weight_packed", "U8", (rows, columns // 2)),
            Part(f"{module}.weight_scale", "U8", (rows, columns // 32)),
        ]

    def arrays(self, tensor: QuantizedTensor, format: Format) -> list[Array]:
        blocks = tensor.fields["blocks"].reshape(tensor.rows, -1, 17)
        exponents, qs = blocks[..., 0], blocks[..., 1:]
        _check_exponents("mxfp4", exponents)
        codes = np.concatenate([qs & 15, qs >> 4], axis=2).reshape(tensor.rows, -1)
        return [pack_low_first(codes), np.ascontiguousarray(exponents)]

    def fields(self, stored: Stored, format: Format, shape: tuple[int, ...], rows: slice | None) -> dict[str, Array]:
        codes, exponents = unpack_low_first(stored.array("weight_packed", rows)), stored.array("weight_scale", rows)
        _check_exponents(stored.where, exponents)
        codes = codes.reshape(*exponents.shape, 32)
        blocks = np.concatenate([exponents[..., None], codes[..., 16:] << 4 | codes[..., :16]], axis=2)
        return {"blocks": blocks.reshape(len(exponents), 17 * exponents.shape[1])}


def _check_exponents(where: str, exponents: Array) -> None:
    """Raises ContainerError for 255, which is NaN here and 2^128 in ggml."""
    if (exponents == 255).any():
        raise ContainerError(f"{where}: a scale's exponent is 255, which stands for no number; the file is damaged")


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (PackQuantized(), IntQuantized(), FloatQuantized(), NvFp4(), MxFp4())}


def layout_of(format: str) -> Layout | None:
    """Returns the layout in which a format is written, None when compressed-tensors has none.

    8-bit symmetric integers per channel or tensor are plain int8, all others packed.
    """
    found = get_format(format)
    if isinstance(found, AffineFormat) and found.width == 8 and found.kind == "s" and found.group_size <= 0:
        return LAYOUTS["int-quantized"]
    return next((layout for layout in LAYOUTS.values() if layout.holds(found)), None)


def fits_part(layout: Layout, part: Part, dtype: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a stored tensor of this dtype and shape can be read as the part. One value may have any number of axes."""
    dtypes = layout.accepts.get(part.name.rpartition(".")[2], (part.dtype,))
    return dtype in dtypes and (shape == part.shape or (part.shape == (1,) and len(shape) <= 2 and prod(shape) == 1))


def _scale_shape(format: AffineFormat, rows: int, columns: int) -> tuple[int, ...]:
    return (1,) if format.group_size < 0 else (rows, format.groups(columns))


def _float_dtype(format: AffineFormat) -> str:
    return "F32" if format.wide else "F16"


def _as_words(stream: Array) -> Array:
    """Returns packed rows, (rows, bytes) uint8, as int32 words, zero-padded to whole words."""
    padded = np.zeros((stream.shape[0], -(-stream.shape[1] // 4) * 4), np.uint8)
    padded[:, : stream.shape[1]] = stream
    return padded.view("<i4")
