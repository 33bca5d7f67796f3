"""Bit streams: against a loop over single bits, and by hand."""

import numpy as np
import pytest

from oracles import affine_loops
from tersor import _native
from tersor.formats.packing import pack_bits, packed_bytes, unpack_bits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 257])
def test_rows_are_the_drawn_stream(bits, n):
    codes = np.random.default_rng(bits * 1000 + n).integers(0, 2**bits, (3, n), dtype=np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, packed_bytes(n, bits)) and packed.dtype == np.uint8
    for row in range(3):
        assert packed[row].tobytes() == affine_loops.pack_bits(codes[row].tolist(), bits)
    assert np.array_equal(unpack_bits(packed, bits, n), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_survives(bits):
    codes = np.arange(2**bits, dtype=np.uint8)[None]
    assert np.array_equal(unpack_bits(pack_bits(codes, bits), bits, 2**bits), codes)


def test_three_bits_by_hand():
    # c0..c7 = 1..7, 0: byte 0 = 11'010'001, byte 1 = 1'101'100'0, byte 2 = 000'111'11 (c2 and c5 straddle)
    packed = pack_bits(np.array([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=np.uint8), 3)
    assert packed.tolist() == [[0b11010001, 0b01011000, 0b00011111]]


def test_four_bits_by_hand():
    assert pack_bits(np.array([[1, 2, 15]], dtype=np.uint8), 4).tolist() == [[0x21, 0x0F]]


def test_unpacking_ignores_unused_bits():
    assert unpack_bits(np.array([[0xFF]], dtype=np.uint8), 3, 2).tolist() == [[7, 7]]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bytes(threads):
    before = _native.threads()
    codes = np.random.default_rng(0).integers(0, 8, (64, 4096), dtype=np.uint8)
    expected = np.frombuffer(b"".join(affine_loops.pack_bits(row[:16].tolist(), 3) for row in codes), dtype=np.uint8).reshape(64, 6)
    try:
        _native.set_threads(threads)
        packed = pack_bits(codes, 3)
    finally:
        _native.set_threads(before)
    assert np.array_equal(packed[:, :6], expected)
    assert np.array_equal(unpack_bits(packed, 3, 4096), codes)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_native_refuses_other_widths(bits):
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        _native.pack_bits(np.zeros((1, 8), dtype=np.uint8), bits)
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        _native.unpack_bits(np.zeros((1, 8), dtype=np.uint8), bits, 8)


def test_native_refuses_rows_of_another_length():
    with pytest.raises(ValueError, match="ceil"):
        _native.unpack_bits(np.zeros((1, 8), dtype=np.uint8), 3, 8)
