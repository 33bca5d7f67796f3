"""Affine integers: the worked example, the grids of special groups, the search, and native against numpy and a slow loop."""

import itertools

import numpy as np
import pytest

from oracles import affine_loops
from tersor import _native
from tersor.errors import FormatError
from tersor.formats import affine, get_format
from tersor.formats.affine import AffineFormat, dequantize_range, quantize_range

NAMES = affine.EXAMPLES


def fmt(name: str) -> AffineFormat:
    found = get_format(name)
    assert isinstance(found, AffineFormat)
    return found


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, size=(rows, columns)) * 0.05).astype(np.float32)


@pytest.fixture(params=_native.isas())
def isa(request):
    _native.force_isa(request.param)
    yield request.param
    _native.force_isa("")


# The worked example and its function.


def test_worked_example():
    code, scale = quantize_range(0.12345678, -0.5, 0.5, 8)
    assert int(code) == 159
    assert scale == pytest.approx(1 / 255, abs=1e-15)
    assert float(dequantize_range(code, -0.5, scale)) == pytest.approx(0.12353, abs=1e-5)


def test_range_ends_and_halves():
    codes, scale = quantize_range(np.array([-9.0, 0.0, 0.5, 1.5, 2.5, 3.0, 9.0]), 0.0, 3.0, 2)
    assert scale == 1.0
    assert codes.tolist() == [0, 0, 0, 2, 2, 3, 3]  # half to even, clipped to the range
    assert dequantize_range(codes, 0.0, scale).tolist() == [0, 0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("low", "high", "bits"), [(1.0, 1.0, 8), (1.0, -1.0, 8), (0.0, np.inf, 8), (np.nan, 1.0, 8), (0.0, 1.0, 0), (0.0, 1.0, 9)]
)
def test_range_refuses(low, high, bits):
    with pytest.raises(FormatError, match=r"quantize_range: .* need"):
        quantize_range(0.5, low, high, bits)


# Names.


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("int7_g64", r"7-bit codes; need one of \(1, 2, 3, 4, 5, 6, 8\); use int8_g64"),
        ("int16_c", "use int8_c"),
        ("int4_g20", "group of 20; need a multiple of 16 in 16..256; use int4_g16"),
        ("int4_g8", "use int4_g16"),
        ("int4_g512s", "use int4_g256s"),
        ("int1_g64s", "use binary_g64"),
        ("int1_cs", "use binary_g64"),
        ("binary_g24", "use binary_g16"),
    ],
)
def test_bad_names_say_what_to_use(name, text):
    with pytest.raises(FormatError, match=text):
        get_format(name)


@pytest.mark.parametrize("name", ["int4", "int4_g", "int4_g64x", "int04_g64", "int4_c64", "uint4_g64"])
def test_other_names_are_unknown(name):
    with pytest.raises(FormatError, match="unknown format"):
        get_format(name)


@pytest.mark.parametrize(
    ("name", "columns", "text"),
    [
        ("int4_g128", 4000, "tensor has 4000 columns, not a multiple of 128; use int4_g32"),
        ("int4_g64m", 1000, "use int4_cm"),
        ("int3_g256", 384, "use int3_g128"),
    ],
)
def test_group_that_does_not_divide_names_the_alternative(name, columns, text):
    with pytest.raises(FormatError, match=text):
        fmt(name).quantize(np.zeros((2, columns), dtype=np.float32))


# The grids, by the slow loop.


@pytest.mark.parametrize("name", NAMES)
def test_numpy_reference_is_the_slow_loop(name):
    f = fmt(name)
    columns = 2 * f.group_size if f.group_size > 0 else 40
    w = heavy_tailed(3, columns)
    params = f.fit(w)
    codes = f.encode(w, params)
    decoded = f.decode(codes, params)
    groups = {0: 1, -1: 1}.get(f.group_size, 2)
    n = columns // groups
    for row in range(3):
        for g in range(groups):
            at = (0, 0) if f.group_size == -1 else (row, g)
            members = w if f.group_size == -1 else w[row, g * n : (g + 1) * n]
            scale, offset = affine_loops.minmax_grid(members.ravel().tolist(), f.width, f.kind, f.wide)
            assert float(params["scale"][at]) == scale
            if f.kind != "s":
                assert float(params["zero" if f.kind == "" else "min"][at]) == offset
            for i in range(g * n, (g + 1) * n):
                assert codes[row, i] == affine_loops.encode(float(w[row, i]), scale, offset, f.width, f.kind)
                assert decoded[row, i] == affine_loops.decode(int(codes[row, i]), scale, offset, f.kind)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("columns", [768, 1536])
def test_native_gives_the_bytes_of_the_reference(name, columns, isa):
    f = fmt(name)
    w = heavy_tailed(19, columns, seed=columns)
    w[0] = 0
    w[1] = 0.37
    w[2] = -w[3]
    w[4, ::2] = -0.0
    w[5] *= 1e-6  # subnormal scales
    params = f.fit(w)
    codes = f.encode(w, params)
    expected = f.pack(codes, params)
    got = f.quantize(w)
    for field, values in expected.fields.items():
        assert got.fields[field].dtype == values.dtype
        assert got.fields[field].tobytes() == values.tobytes(), field
    assert f.dequantize(got).tobytes() == f.decode(codes, params).tobytes()


@pytest.mark.parametrize("columns", [1, 3, 7, 8, 9, 17, 100, 255, 257, 1000])
@pytest.mark.parametrize("name", ["int3_c", "int4_cs", "int5_cm", "int8_t", "int4_tm"])
def test_rows_of_any_length(name, columns, isa):
    f = fmt(name)
    w = heavy_tailed(5, columns) + np.float32(0.01)
    params = f.fit(w)
    expected = f.pack(f.encode(w, params), params)
    got = f.quantize(w)
    assert {k: v.tobytes() for k, v in got.fields.items()} == {k: v.tobytes() for k, v in expected.fields.items()}
    clipped = f.quantize_clipped(w)
    assert squared_error(f, clipped, w) <= squared_error(f, got, w)


def test_native_scale_rounding_is_float16_rounding_upwards_when_subnormal(isa):
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [np.exp(rng.uniform(np.log(1e-12), np.log(65000), 20000)), 2.0 ** np.arange(-40, 16), [2.0**-14 - 2.0**-26, 65519.9, 2049, 2051]]
    )
    x = x.astype(np.float32)
    w = np.zeros((x.size, 16), dtype=np.float32)
    w[:, 3] = x  # min 0, max x, one step: scale = x
    got = fmt("int1_g16m").quantize(w).fields["scale"][:, 0]
    nearest = x.astype(np.float16)
    with np.errstate(over="ignore"):
        above = np.nextafter(nearest, np.float16(np.inf))
    expected = np.where((x < 2.0**-14) & (nearest.astype(np.float32) < x), above, nearest)
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("name", "ends", "zero"), [("int4_g16", (-5.0, 10.0), 5), ("int4_g16s", (-7.5, 7.5), 8), ("int4_g16m", (-5.0, 10.0), 5)]
)
def test_halves_go_to_even(name, ends, zero, isa):
    """A group whose scale is 1 and that holds exact halves."""
    f = fmt(name)
    halves = [-4.5, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5]
    w = np.array([[*ends, *halves, 0.0, -0.0]], dtype=np.float32)
    even = [-4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6]
    # Without an integer zero it is w - min that is rounded: -4.5 is 0.5 above -5 and goes to 0.
    codes = [round(half + 5) for half in halves] if f.kind == "m" else [value + zero for value in even]
    params = f.fit(w)
    assert params["scale"].tolist() == [[1.0]]
    assert f.encode(w, params)[0, 2:14].tolist() == codes
    assert f.unpack(f.quantize(w))[0][0, 2:14].tolist() == codes


# Special groups.


@pytest.mark.parametrize("name", ["int1_g16", "int2_g16", "int4_g16", "int4_g16s", "int4_g16m", "int8_g16"])
def test_all_zero_group_decodes_to_plus_zero(name, isa):
    f = fmt(name)
    for zero in (0.0, -0.0):
        w = np.full((2, 32), zero, dtype=np.float32)
        for stored in (f.quantize(w), f.quantize_clipped(w)):
            assert f.dequantize(stored).tobytes() == np.zeros((2, 32), dtype=np.float32).tobytes()
            assert not stored.fields["scale"].any()


@pytest.mark.parametrize(
    "name", ["int2_g16", "int4_g16", "int4_g16s", "int4_g16m", "int6_g16", "int8_g16", "int8_g16m", "int4_g16f", "int4_g16mf"]
)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.1, -0.1, 3e-5, 1234.5])
def test_constant_group(name, value, isa):
    f = fmt(name)
    w = np.full((1, 16), value, dtype=np.float32)
    params = f.fit(w)
    step = float(params["scale"][0, 0])
    # '' and 'm' hold an end of the range exactly but for float16 (2^-11 of it, 2^-24 when subnormal); 's' rounds to half a step.
    slack = abs(value) * 2.0**-11 * 1.01 + f.max_code * 2.0**-24
    bound = 0.5 * step + slack if f.kind == "s" else slack
    assert np.abs(f.dequantize(f.quantize(w)) - w).max() <= bound
    assert np.abs(f.dequantize(f.quantize_clipped(w)) - w).max() <= bound


def test_one_outlier_takes_the_range_and_clip_gives_it_up(isa):
    f = fmt("int3_g64")
    w = np.random.default_rng(3).standard_normal((1, 64)).astype(np.float32)
    w[0, 5] = 6.0
    plain, clipped = f.quantize(w), f.quantize_clipped(w)
    assert f.dequantize(plain)[0, 5] == pytest.approx(6, rel=0.1)
    assert squared_error(f, clipped, w) < 0.8 * squared_error(f, plain, w)
    weighted = f.quantize_clipped(w, np.where(np.arange(64) == 5, 1e-6, 1).astype(np.float32))
    others = np.arange(64) != 5
    assert np.square(f.dequantize(weighted) - w)[0, others].sum() < 0.6 * np.square(f.dequantize(clipped) - w)[0, others].sum()


@pytest.mark.parametrize("name", ["int4_g16", "int4_g16s", "int4_g16m", "int8_c", "int8_t", "int4_g16f", "int4_g16sf", "int4_g16mf"])
@pytest.mark.parametrize("size", [1e-8, 1e-12, 1e-20, 1e-38, 1e-45])
def test_tiny_weights_never_give_nan(name, size, isa):
    f = fmt(name)
    w = (np.random.default_rng(0).standard_normal((2, 32)) * size).astype(np.float32)
    for stored in (f.quantize(w), f.quantize_clipped(w)):
        decoded = f.dequantize(stored)
        assert np.isfinite(decoded).all()
        assert np.abs(decoded - w).max() <= 2.0**-25 + np.abs(w).max() * 2.0**-10  # half of float16's smallest step


@pytest.mark.parametrize("name", ["int4_g16", "int4_g16s", "int4_g16m", "int4_c", "int4_t"])
@pytest.mark.parametrize("value", [2e6, 3e38])
def test_scale_beyond_float16_names_the_alternative(name, value, isa):
    f = fmt(name)
    w = np.zeros((1, 16), dtype=np.float32)
    w[0, 0], w[0, 1] = value, -1
    for call in (f.fit, f.quantize, f.quantize_clipped):
        with pytest.raises(FormatError, match=rf"scale is beyond 65504, the largest float16; use {name}f \(float32 scales\), bf16 or f32"):
            call(w)


@pytest.mark.parametrize("name", ["int4_g16f", "int4_g16sf", "int4_g16mf", "int4_cf", "int4_tf"])
def test_float32_scales_reach_further_until_they_do_not(name, isa):
    f = fmt(name)
    w = np.zeros((1, 16), dtype=np.float32)
    w[0, 0], w[0, 1] = 2e6, -1
    for stored in (f.quantize(w), f.quantize_clipped(w)):
        assert np.abs(f.dequantize(stored) - w).max() <= 2e6 / 15 * 1.01
    w[0, 0], w[0, 1] = 3e38, -3e38
    for call in (f.fit, f.quantize, f.quantize_clipped):
        with pytest.raises(FormatError, match=r"scale is beyond 3\.40282e\+38, the largest float32; use f32"):
            call(w)


def test_minimum_beyond_float16_is_refused():
    w = np.linspace(-70000, -69000, 16, dtype=np.float32)[None]
    for call in (fmt("int4_g16m").fit, fmt("int4_g16m").quantize):
        with pytest.raises(FormatError, match="minimum is beyond -65504, the largest float16; use int4_g16mf"):
            call(w)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["int4_g16", "int4_g16s", "int4_g16m"])
def test_native_survives_non_finite_weights(name, bad, isa):
    w = heavy_tailed(4, 32)
    w[1, 3] = bad
    w[2] = bad
    for search, single in itertools.product((False, True), (False, True)):
        kind = {"": "asymmetric", "s": "symmetric", "m": "minimum"}[fmt(name).kind]
        scale, offset = _native.affine_fit(w, 16, kind, 15, None, search, single)
        packed = _native.affine_encode(w, scale, offset, 2, kind == "minimum", 4, 15)
        assert packed.shape == (4, 16)
        clean = _native.affine_fit(w[[0, 3]], 16, kind, 15, None, search, single)[0]
        assert np.array_equal(scale[[0, 3]], clean)


# The search.


def squared_error(f: AffineFormat, stored, w, h=1.0) -> float:
    return float((h * np.square(f.dequantize(stored).astype(np.float64) - w)).sum())


@pytest.mark.parametrize("name", NAMES)
def test_clip_is_never_worse_than_min_max_and_mostly_better(name, isa):
    f = fmt(name)
    w = heavy_tailed(8, 768)
    h = np.exp(np.random.default_rng(1).standard_normal(768)).astype(np.float32)
    before, after, weighted = f.quantize(w), f.quantize_clipped(w), f.quantize_clipped(w, h)
    assert squared_error(f, after, w) < squared_error(f, before, w)
    assert squared_error(f, weighted, w, h) < squared_error(f, before, w, h)
    assert squared_error(f, weighted, w, h) <= squared_error(f, after, w, h) * 1.01  # both are local minima


@pytest.mark.parametrize("name", ["int2_g32", "int3_g32", "int4_g32", "int2_g32s", "int3_g32s", "int4_g32s", "int3_g32f"])
@pytest.mark.parametrize("weighted", [False, True])
def test_clip_is_as_good_as_trying_every_range(name, weighted, isa):
    f = fmt(name)
    w = heavy_tailed(4, 32, seed=7)
    h = np.exp(np.random.default_rng(2).standard_normal(32)).astype(np.float32) if weighted else np.ones(32, dtype=np.float32)
    stored = f.quantize_clipped(w, h if weighted else None)
    ratios = [0.97**k for k in range(0, 40, 2)]
    brute = sum(affine_loops.best_clipped_error(row.tolist(), h.tolist(), f.width, f.kind, ratios) for row in w)
    assert squared_error(f, stored, w, h) <= 1.01 * brute


def test_clip_finds_a_grid_that_fits_exactly(isa):
    f = fmt("int4_g64")
    codes = np.random.default_rng(0).integers(0, 16, (4, 64))
    codes[:, :2] = [0, 15]
    w = ((codes - 5) * np.float32(0.0625)).astype(np.float32)
    stored = f.quantize_clipped(w)
    assert np.array_equal(f.dequantize(stored), w)
    assert np.array_equal(f.unpack(stored)[0], codes)


def test_importance_of_zero_changes_nothing_but_is_no_error(isa):
    f = fmt("int4_g16")
    w = heavy_tailed(2, 32)
    h = np.zeros(32, dtype=np.float32)
    assert f.quantize_clipped(w, h).fields["codes"].tobytes() == f.quantize(w).fields["codes"].tobytes()


@pytest.mark.parametrize("name", ["int4_g64", "int3_g64s", "int2_g64m", "int4_t", "int5_c", "int4_g64sf", "int2_g64mf"])
def test_every_isa_and_thread_count_finds_the_same_grid(name):
    f = fmt(name)
    w = heavy_tailed(33, 640)
    h = np.exp(np.random.default_rng(1).standard_normal(640)).astype(np.float32)
    before = _native.threads()
    seen = set()
    try:
        for name_of_isa in _native.isas():
            for threads in (1, 2, 3):
                _native.force_isa(name_of_isa)
                _native.set_threads(threads)
                seen.add(b"".join(a.tobytes() for a in f.quantize_clipped(w, h).fields.values()))
    finally:
        _native.force_isa("")
        _native.set_threads(before)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("importance", "text"),
    [
        (np.ones(31), r"shape \(31,\); need one value per column, \(32,\)"),
        (np.ones((1, 32)), r"shape \(1, 32\)"),
        (np.full(32, -1.0), "holds -1.0; need finite values >= 0"),
        (np.full(32, np.nan), "holds nan"),
    ],
)
def test_clip_refuses_bad_importance(importance, text):
    with pytest.raises(FormatError, match=text):
        fmt("int4_g16").quantize_clipped(np.ones((1, 32), dtype=np.float32), importance)


def test_min_max_refuses_importance():
    for call in (fmt("int4_g16").quantize, fmt("int4_g16").fit):
        with pytest.raises(FormatError, match="takes no importance; use the method clip"):
            call(np.ones((1, 32), dtype=np.float32), np.ones(32, dtype=np.float32))
