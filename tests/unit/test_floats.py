"""f32, f16, bf16 against torch's conversions and hand cases."""

import math

import numpy as np
import pytest
import torch

from tersor import _native
from tersor.errors import FormatError
from tersor.formats import get_format
from tersor.formats.floats import bf16_from_f32, f32_from_bf16, f32_from_f16


def every_kind_of_float32():
    """Random bit patterns, and around every bfloat16 the middle between two neighbours and its neighbours."""
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    middles = (np.arange(0, 2**16, dtype=np.uint32) << 16) | 0x8000
    return np.concatenate([random, middles, middles - 1, middles + 1]).view(np.float32)


def test_bf16_rounds_like_torch_for_every_bit_pattern():
    w = every_kind_of_float32()
    ours, theirs = bf16_from_f32(w), torch.from_numpy(w).to(torch.bfloat16).view(torch.uint16).numpy()
    nan = np.isnan(w)
    assert (ours[~nan] == theirs[~nan]).all()
    assert np.isnan(f32_from_bf16(ours[nan])).all()


@pytest.mark.parametrize(
    "bits, rounded",
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F808000, 0x3F80),  # halfway, down to even
        (0x3F818000, 0x3F82),  # halfway, up to even
        (0x3F808001, 0x3F81),
        (0x80000000, 0x8000),  # -0
        (0x00000001, 0x0000),  # the smallest subnormal
        (0x7F7FFFFF, 0x7F80),  # the largest float32 becomes infinity
        (0x7F800000, 0x7F80),
        (0x7F800001, 0x7FC0),  # NaN whose payload would be lost
        (0xFFFFFFFF, 0xFFFF),  # NaN whose rounding would carry into the sign
    ],
)
def test_bf16_of_hand_cases(bits, rounded):
    assert bf16_from_f32(np.array([bits], np.uint32).view(np.float32))[0] == rounded


def test_every_bf16_comes_back():
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    values = f32_from_bf16(bits)
    assert (values.view(np.uint32) == torch.from_numpy(bits).view(torch.bfloat16).float().numpy().view(np.uint32)).all()
    quiet = ~np.isnan(values)
    assert (bf16_from_f32(values)[quiet] == bits[quiet]).all()


@pytest.mark.parametrize("name, dtype", [("f32", np.float32), ("f16", np.float16), ("bf16", np.uint16)])
def test_stored_fields_and_sizes(name, dtype):
    f = get_format(name)
    w = np.random.default_rng(1).standard_normal((2, 3, 5)).astype(np.float32)
    stored = f.quantize(w)
    assert stored.shape == (2, 3, 5) and list(stored.fields) == ["values"]
    assert stored.fields["values"].dtype == dtype and stored.fields["values"].shape == (6, 5)
    assert stored.nbytes == f.nbytes(w.shape) == 30 * np.dtype(dtype).itemsize
    assert f.bits_per_weight() == f.bits == 8 * np.dtype(dtype).itemsize
    back = f.dequantize(stored)
    assert back.dtype == np.float32 and back.shape == w.shape
    assert np.abs(back - w).max() <= {"f32": 0, "f16": 2**-11, "bf16": 2**-8}[name] * np.abs(w).max()
    assert (f.dequantize(f.pack(*f.unpack(stored), w.shape)) == back).all()


def test_vectors_are_one_row():
    stored = get_format("bf16").quantize(np.ones(7, np.float32))
    assert stored.fields["values"].shape == (1, 7) and stored.shape == (7,)


def test_f16_rounds_half_to_even_and_refuses_what_it_cannot_hold():
    f = get_format("f16")
    w = np.array([[2049, 2051, 65504, 65519, -0.0, 2**-24, 2**-25]], np.float32)
    expected = np.array([[2048, 2052, 65504, 65504, -0.0, 2**-24, 0]], np.float32)
    back = f.dequantize(f.quantize(w))
    assert (back == expected).all() and np.signbit(back[0, 4])
    with pytest.raises(FormatError, match=r"^f16: tensor holds -65520, beyond float16's largest 65504; use bf16 or f32$"):
        f.quantize(np.array([[1, -65520]], np.float32))
    assert np.isinf(f.dequantize(f.quantize(np.array([[np.inf]], np.float32)))[0, 0])


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_numbers_that_are_none_stay_so(name):
    f = get_format(name)
    back = f.dequantize(f.quantize(np.array([[np.nan, np.inf, -np.inf]], np.float32)))[0]
    assert np.isnan(back[0]) and back[1] == np.inf and back[2] == -np.inf


def test_every_f16_is_widened_like_numpys_and_a_nan_keeps_its_payload():
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    values, wide = bits.view(np.float16), f32_from_f16(bits.view(np.float16)).view(np.uint32)
    nan = np.isnan(values)
    assert (wide[~nan] == values.astype(np.float32).view(np.uint32)[~nan]).all()
    payload = (bits[nan].astype(np.uint32) & 0x8000) << 16 | 0x7F800000 | (bits[nan].astype(np.uint32) & 0x3FF) << 13
    assert (wide[nan] == payload).all()


@pytest.mark.parametrize("dtype, widen", [(np.float16, f32_from_f16), (np.uint16, f32_from_bf16)])
def test_halves_of_any_shape_and_place_are_widened(dtype, widen):
    bits = np.random.default_rng(2).integers(0, 2**15 - 2**11, 240, dtype=np.uint16)  # finite in both types
    for values in (bits, bits[:7], bits[:0], bits.reshape(4, 5, 12), bits.reshape(12, 20).T, bits[::3], bits[3]):
        values = np.asarray(values)
        want = values.view(np.float16).astype(np.float32) if dtype == np.float16 else (values.astype(np.uint32) << 16).view(np.float32)
        assert widen(values.view(dtype)).shape == values.shape
        assert np.array_equal(widen(values.view(dtype)), want)
    raw = np.frombuffer(b"x" + bits.tobytes(), np.uint8)[1:].view(np.uint16)  # odd address, read-only
    assert not raw.flags.aligned and np.array_equal(widen(raw.view(dtype)), widen(bits.view(dtype)))


@pytest.mark.parametrize("size", [1, 7, 255, 256, 257, 100_001])
def test_square_sums_against_exact_sums(size):
    rng = np.random.default_rng(size)
    w, decoded = rng.standard_normal((2, size)).astype(np.float32)
    squares = math.fsum(float(x) ** 2 for x in w), math.fsum((float(y) - float(x)) ** 2 for x, y in zip(w, decoded, strict=True))
    assert _native.square_sums(w, decoded) == pytest.approx(squares, rel=30 * 2**-24)


def test_square_sums_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="square_sums: 4 decoded values for 3 weights"):
        _native.square_sums(np.zeros(3, np.float32), np.zeros(4, np.float32))


@pytest.mark.parametrize("value, found", [(np.nan, np.nan), (-np.inf, np.inf), (np.inf, np.inf), (-7, 7), (2**-149, 2**-149)])
def test_largest_magnitude(value, found):
    for size in (1, 15, 40_000):
        w = np.zeros(size, np.float32)
        w[size // 2] = value
        assert np.array_equal(_native.largest_magnitude(w), found, equal_nan=True)
