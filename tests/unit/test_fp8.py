"""fp8 and nvfp4_gs against torch's float8_e4m3fn and the compressed-tensors package; what their encoders do at the edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

from tersor.errors import FormatError
from tersor.formats import get_format
from tersor.formats.fp8 import E4M3, Fp8Format, e4m3_from_f32, f32_from_e4m3
from tersor.formats.nvfp4 import E2M1, Nvfp4Format, e2m1_from_f32

FP8 = {"fp8_c": "FP8_DYNAMIC", "fp8_t": "FP8", "fp8_b128": "FP8_BLOCK"}


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(5, size=shape) * 0.05).astype(np.float32)


def scheme(name: str) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], **PRESET_SCHEMES[name])


def test_the_table_is_torchs() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, theirs)
    np.testing.assert_array_equal(np.signbit(E4M3), np.signbit(theirs))
    assert np.flatnonzero(np.isnan(E4M3)).tolist() == [127, 255]
    np.testing.assert_array_equal(f32_from_e4m3(np.array([[1, 0x7E, 0x80]], np.uint8)), np.array([[2.0**-9, 448, -0.0]], np.float32))


def test_rounding_is_torchs() -> None:
    """All float16 numbers, all halves between codes and their neighbours, and random numbers of every size."""
    finite = np.sort(E4M3[np.isfinite(E4M3)])
    halves = (finite[1:] + finite[:-1]) / np.float32(2)
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32),
            *(halves, np.nextafter(halves, np.float32(9e9)), np.nextafter(halves, np.float32(-9e9)), finite),
            (rng.standard_normal(20000) * 2.0 ** rng.integers(-60, 60, 20000)).astype(np.float32),
            np.array([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, np.inf, -np.inf], np.float32),
        ]
    )
    ours = e4m3_from_f32(x)
    theirs = torch.from_numpy(x).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    theirs = np.where(theirs == 0x80, 0, np.where(theirs == 0xFF, 0x7F, theirs))  # one zero, one NaN
    np.testing.assert_array_equal(ours, theirs)


def test_e2m1_rounding_is_the_packages() -> None:
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA

    halves = (E2M1[1:8] + E2M1[:7]) / np.float32(2)
    x = np.concatenate([E2M1, halves, np.nextafter(halves, np.float32(9)), np.nextafter(halves, np.float32(0)), weights(5000) * 40])
    x = np.concatenate([x, -x, np.array([100, -100], np.float32)])
    theirs = FP4_E2M1_DATA.cast_to_fp4(torch.from_numpy(x.copy())).numpy()
    np.testing.assert_array_equal(E2M1[e2m1_from_f32(x)], theirs)
    assert not (e2m1_from_f32(x) == 8).any()  # no -0


@pytest.mark.parametrize("shape", [(128, 256), (150, 256), (5, 128)])
@pytest.mark.parametrize("name", FP8)
def test_fp8_is_what_the_package_stores(name: str, shape: tuple[int, int]) -> None:
    w = weights(*shape)
    w[:, :3] *= 30
    tensor = get_format(name).quantize(w)
    format = scheme(FP8[name])
    scale = torch.from_numpy(tensor.fields["scale"])
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    theirs = compressor.compress({"weight": torch.from_numpy(w), "weight_scale": scale}, format)
    codes = theirs["weight"].view(torch.uint8).numpy()
    np.testing.assert_array_equal(tensor.fields["codes"], np.where(codes == 0x80, 0, codes))
    decoded = compressor.decompress(theirs, format)["weight"]
    assert decoded.dtype == torch.float32
    np.testing.assert_array_equal(get_format(name).dequantize(tensor), decoded.numpy())


@pytest.mark.parametrize("name", ["fp8_c", "fp8_t"])
def test_fp8_scales_are_the_packages(name: str) -> None:
    w = torch.from_numpy(weights(40, 96))
    low, high = (w.amin(1, keepdim=True), w.amax(1, keepdim=True)) if name == "fp8_c" else (w.min().reshape(1, 1), w.max().reshape(1, 1))
    expected, _ = calculate_qparams(low, high, scheme(FP8[name]).weights)
    np.testing.assert_array_equal(get_format(name).fit(w.numpy())["scale"], expected.numpy())


def test_nvfp4_is_what_the_package_stores() -> None:
    w = weights(24, 96)
    tensor = get_format("nvfp4_gs").quantize(w)
    format = scheme("NVFP4A16")
    rows = torch.from_numpy(w)
    global_scale = generate_gparam(rows.min(), rows.max())
    np.testing.assert_array_equal(tensor.fields["global_scale"][0], global_scale.numpy())
    blocks = rows.reshape(24, 6, 16)
    scale, _ = calculate_qparams(blocks.amin(2), blocks.amax(2), format.weights, global_scale=global_scale)
    # Theirs is (global * (absmax / 6)) with 6 as half of 12; the same numbers.
    np.testing.assert_array_equal(tensor.fields["scale"], scale.to(torch.float8_e4m3fn).view(torch.uint8).numpy())
    codes = quantize(rows, scale.float(), None, format.weights, global_scale=global_scale).numpy()
    low, high = tensor.fields["codes"] & 15, tensor.fields["codes"] >> 4  # the first value is in the low nibble
    np.testing.assert_array_equal(E2M1[np.stack([low, high], axis=2).reshape(24, 96)], codes)
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    state = {"weight": rows, "weight_scale": scale.float(), "weight_global_scale": global_scale}
    packed = compressor.compress(state, format)
    theirs = packed["weight_packed"].numpy()
    no_minus_zero = np.where(theirs & 15 == 8, theirs & 0xF0, theirs)
    no_minus_zero = np.where(no_minus_zero >> 4 == 8, no_minus_zero & 15, no_minus_zero)
    np.testing.assert_array_equal(tensor.fields["codes"], no_minus_zero)


def test_fp8_values_by_hand() -> None:
    w = np.array([[448, -1.0625, 0.0009765625, 17]], np.float32)  # scale 1; 1.0625 lies halfway, 2^-10 too, 17 as well
    tensor = get_format("fp8_c").quantize(w)
    assert tensor.fields["codes"].tolist() == [[0x7E, 0xB8, 0x00, 0x58]] and tensor.fields["scale"].tolist() == [[1.0]]
    assert get_format("fp8_c").dequantize(tensor).tolist() == [[448.0, -1.0, 0.0, 16.0]]


def test_a_block_of_rows_may_be_short() -> None:
    w = weights(130, 256)
    w[128:] *= 1000
    tensor = get_format("fp8_b128").quantize(w)
    assert tensor.fields["scale"].shape == (2, 2)
    expected = [[np.abs(w[r : r + 128, c : c + 128]).max() / np.float32(448) for c in (0, 128)] for r in (0, 128)]
    assert tensor.fields["scale"].tolist() == expected
    error = np.abs(get_format("fp8_b128").dequantize(tensor) - w)
    assert (error <= np.abs(w) / 16 + np.repeat(np.repeat(tensor.fields["scale"], 128, 0)[:130], 128, 1) * 2.0**-10).all()


@pytest.mark.parametrize("name", [*FP8, "nvfp4_gs"])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_very_small_and_large_weights(name: str, scale: float) -> None:
    w = (weights(4, 128).astype(np.float64) * scale).astype(np.float32)
    format = get_format(name)
    decoded = format.dequantize(format.quantize(w))
    assert np.isfinite(decoded).all()
    if scale > 1e-35:
        assert np.abs(decoded - w).max() <= np.abs(w).max() * (0.17 if name == "nvfp4_gs" else 0.04)


def test_a_group_far_below_the_largest_is_not_lost() -> None:
    w = np.ones((1, 32), np.float32)
    w[0, 16:] = 1e-6  # global * 1e-6 / 6 is below half of 2^-9
    tensor = get_format("nvfp4_gs").quantize(w)
    assert tensor.fields["scale"].tolist() == [[0x7E, 1]]


def test_the_search_finds_four_over_six() -> None:
    """Weights at 1 and 3/4 of the largest: with the largest at 4, both are levels; at 6, 4.5 is none."""
    w = np.tile(np.array([1, 0.75], np.float32), 8)[None]
    w = np.concatenate([w, np.full((1, 16), 1.75, np.float32)])
    format = get_format("nvfp4_gs")
    assert np.abs(format.dequantize(format.quantize(w)) - w)[0].max() > 0.05
    np.testing.assert_allclose(format.dequantize(format.quantize_clipped(w))[0], w[0], rtol=1e-6)


def test_names() -> None:
    assert isinstance(get_format("FP8_C"), Fp8Format) and isinstance(get_format("nvfp4_gs"), Nvfp4Format)
    with pytest.raises(FormatError, match="unknown format 'fp8_g32'"):
        get_format("fp8_g32")
    with pytest.raises(FormatError, match="fp8_b128: layer has 100 columns, not a multiple of 128; use fp8_c"):
        get_format("fp8_b128").check((4, 100), "layer")
