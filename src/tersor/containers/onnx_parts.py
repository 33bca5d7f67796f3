"""How one tensor lies in an ONNX model: its initializers, named after the Hugging Face tensor.

    M.qweight   uint8   (rows, groups, N*B/8)        our codes: a dense bit stream along the row, LSB first, cut at the groups
    M.scales    float32 (rows, groups)               our scales, widened: the operator wants the type of its input
    M.qzeros    uint8   (rows, ceil(groups*B/8))     our zeros, as they are; absent in the symmetric form, whose zero is 2^(B-1)
    M.weight    float32 | float16 | bfloat16 (rows, in)      a float matrix, not transposed; vectors and biases likewise

and w = (code - zero) * scale. Of int8_row_xN:

    M.qweight   int8    (rows, in - N)               our codes
    M.scb       float32 (rows,)                      our absmax
    M.rest      int32   (in - N,)                    the columns that are not apart, by which the input is gathered
    M.outliers  int32   (N,)                         the columns apart, likewise
    M.outlier   float16 (rows, N)                    their weights

and w = code * scb * (1/127), or outlier. Source: microsoft/onnxruntime docs/ContribOperators.md (MatMulNBits, GatherBlockQuantized). The
operators' blocks are powers of two from 16 on; onnxruntime multiplies by 2, 4 and 8 bits on a CPU, and refuses the other widths.
"""

from __future__ import annotations

import re

import numpy as np

from tersor.containers.directory import DTYPE_OF
from tersor.containers.directory_writer import Part
from tersor.formats import get_format
from tersor.formats.outliers import OutlierFormat
from tersor.formats.packing import packed_bytes
from tersor.tensor import Array, QuantizedTensor, TensorInfo

HELD = re.compile(r"int([248])_g(16|32|64|128|256)(s?)f?")


def is_blocks(format: str) -> bool:
    """Returns whether the format is an affine integer that MatMulNBits multiplies by."""
    return HELD.fullmatch(format) is not None


def has_outliers(format: str) -> bool:
    """Returns whether the format has columns apart."""
    return isinstance(get_format(format), OutlierFormat)


def width_and_group(format: str) -> tuple[int, int, bool]:
    """Returns (bits, values of a group, symmetric) of a format for which `is_blocks` is true."""
    match = HELD.fullmatch(format)
    assert match is not None, format
    return int(match[1]), int(match[2]), match[3] == "s"


def parts_of(info: TensorInfo) -> list[Part]:
    """Returns the initializers of one tensor, its bytes in the order of `arrays_of`."""
    if has_outliers(info.format):
        return _outlier_parts(info)
    if not is_blocks(info.format):
        return [Part(info.name, DTYPE_OF[info.format], info.shape)]
    (bits, group, symmetric), module = width_and_group(info.format), info.name.removesuffix(".weight")
    rows, columns = info.shape
    groups = columns // group
    parts = [
        Part(f"{module}.qweight", "U8", (rows, groups, group * bits // 8)),
        Part(f"{module}.scales", "F32", (rows, groups)),
    ]
    if not symmetric:
        parts.append(Part(f"{module}.qzeros", "U8", (rows, packed_bytes(groups, bits))))
    return parts


def _outlier_parts(info: TensorInfo) -> list[Part]:
    format, module, (rows, columns) = get_format(info.format), info.name.removesuffix(".weight"), info.shape
    assert isinstance(format, OutlierFormat)
    count = format.count
    return [
        Part(f"{module}.qweight", "I8", (rows, columns - count)),
        Part(f"{module}.scb", "F32", (rows,)),
        Part(f"{module}.rest", "I32", (columns - count,)),
        Part(f"{module}.outliers", "I32", (count,)),
        Part(f"{module}.outlier", "F16", (rows, count)),
    ]


def arrays_of(tensor: QuantizedTensor) -> list[Array]:
    """Returns the arrays of `parts_of`. Their bytes count; codes keep the two axes of the format."""
    format, fields = get_format(tensor.format), tensor.fields
    if isinstance(format, OutlierFormat):
        rest = format.rest_of(fields["outliers"], tensor.columns)
        return [fields["codes"], fields["scb"], rest, fields["outliers"], fields["outlier"]]
    if not is_blocks(tensor.format):
        return [tensor.fields["values"]]
    arrays = [tensor.fields["codes"], tensor.fields["scale"].astype(np.float32)]
    return arrays + ([tensor.fields["zero"]] if "zero" in tensor.fields else [])
