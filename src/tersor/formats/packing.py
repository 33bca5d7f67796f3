"""Codes to bytes and back: every row is one dense bit stream, least significant bit first.

    value i = bits [i*B, i*B + B) of the row's stream;  stream bit k = bit k % 8 of byte k // 8

For B = 3:  byte 0 = c2[1:0] c1[2:0] c0[2:0]   byte 1 = c5[0] c4[2:0] c3[2:0] c2[2]   byte 2 = c7[2:0] c6[2:0] c5[2:1]
The unused high bits of a row's last byte are zero.
"""

from __future__ import annotations

import numpy as np

from tersor import _native
from tersor.tensor import Array


def packed_bytes(count: int, bits: int) -> int:
    """Returns the bytes that count codes of this many bits take: ceil(count * bits / 8)."""
    return (count * bits + 7) // 8


def pack_bits(codes: Array, bits: int) -> Array:
    """Returns the packed rows, (rows, ceil(n * bits / 8)) uint8. codes: (rows, n) uint8 in [0, 2^bits); bits in 1..8."""
    packed: Array = _native.pack_bits(np.ascontiguousarray(codes), bits)
    return packed


def unpack_bits(packed: Array, bits: int, n: int) -> Array:
    """Returns the codes, (rows, n) uint8, of rows packed by `pack_bits`. packed: (rows, ceil(n * bits / 8)) uint8."""
    codes: Array = _native.unpack_bits(np.ascontiguousarray(packed), bits, n)
    return codes
