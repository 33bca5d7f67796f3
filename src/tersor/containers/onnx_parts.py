"""How one tensor lies in an ONNX model: its initializers, named after the Hugging Face tensor.

    M.qweight   uint8   (rows, groups, N*B/8)        our codes: a dense bit stream along the row, LSB first, cut at the groups
    M.scales    float32 (rows, groups)               our scales, widened: the operator wants the type of its input
    M.qzeros    uint8   (rows, ceil(groups*B/8))     our zeros, as they are; absent in the symmetric form, whose zero is 2^(B-1)
    M.weight    float32 | float16 | bfloat16 (rows, in)      a float matrix, not transposed; vectors and biases likewise

and w = (code - zero) * scale. Source: microsoft/onnxruntime docs/ContribOperators.md (MatMulNBits, GatherBlockQuantized). The
operators' blocks are powers of two from 16 on; onnxruntime multiplies by 2, 4 and 8 bits on a CPU, and refuses the other widths.
"""

from __future__ import annotations

import re

import numpy as np

from tersor.containers.directory import DTYPE_OF
from tersor.containers.directory_writer import Part
from tersor.formats.packing import packed_bytes
from tersor.tensor import Array, QuantizedTensor, TensorInfo

HELD = re.compile(r"int([248])_g(16|32|64|128|256)(s?)f?")


def is_blocks(format: str) -> bool:
    """Returns whether the format is an affine integer that MatMulNBits multiplies by."""
    return HELD.fullmatch(format) is not None


def width_and_group(format: str) -> tuple[int, int, bool]:
    """Returns (bits, values of a group, symmetric) of a format for which `is_blocks` is true."""
    match = HELD.fullmatch(format)
    assert match is not None, format
    return int(match[1]), int(match[2]), match[3] == "s"


def parts_of(info: TensorInfo) -> list[Part]:
    """Returns the initializers of one tensor, its bytes in the order of `arrays_of`."""
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


def arrays_of(tensor: QuantizedTensor) -> list[Array]:
    """Returns the arrays of `parts_of`. Their bytes count; codes keep the two axes of the format."""
    if not is_blocks(tensor.format):
        return [tensor.fields["values"]]
    arrays = [tensor.fields["codes"], tensor.fields["scale"].astype(np.float32)]
    return arrays + ([tensor.fields["zero"]] if "zero" in tensor.fields else [])
