"""What every member of FORMATS keeps: one suite, so a new format is tested by being in the table."""

from collections.abc import Iterable

import numpy as np
import pytest

from tersor import _native
from tersor.errors import FormatError
from tersor.formats import FORMATS, Format, get_format
from tersor.tensor import QuantizedTensor

COLUMNS = 768  # a multiple of every group size in FORMATS
ENCODERS = [name for name, f in FORMATS.items() if f.can_encode]
DECODERS = [name for name, f in FORMATS.items() if not f.can_encode]
FLOATS = ("f32", "f16", "bf16")
GROUPED = [name for name in ENCODERS if name not in FLOATS]


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    """Heavy-tailed values of the size of a language model's, with a row of zeros when there are several."""
    w = (np.random.default_rng(seed).standard_t(5, size=shape) * 0.05).astype(np.float32)
    if len(shape) > 1 and shape[0] > 2:
        w[1] = 0
    return w


def stored_bytes(tensor: QuantizedTensor) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (field.dtype.str, field.shape, field.tobytes()) for name, field in tensor.fields.items()}


@pytest.fixture
def two_threads():
    before = _native.threads()
    yield
    _native.set_threads(before)


@pytest.mark.parametrize("name", FORMATS)
def test_name_leads_back_to_an_equal_format(name):
    f = FORMATS[name]
    assert f.name == name == name.lower()
    assert get_format(name) == f == get_format(name.upper())
    assert hash(get_format(name)) == hash(f)
    assert repr(f) == f"<format {name}>"


def test_unknown_names_list_the_known_ones():
    for name in ("zzz", "", "what_64"):
        with pytest.raises(FormatError, match=r"unknown format .*known: .*int4_g64.*q4_k.*intB_gN"):
            get_format(name)


@pytest.mark.parametrize(("name", "like"), [("q9_k", "q4_k"), ("int4", "int4_g64"), ("nf5", "nf4"), ("fp8", "fp8_c"), ("Q4", "q4_0")])
def test_a_name_that_is_nearly_known_gets_the_nearest(name, like):
    with pytest.raises(FormatError, match=rf"unknown format '{name}'; perhaps .*\b{like}\b.*docs/formats.md"):
        get_format(name)


@pytest.mark.parametrize("name", FORMATS)
def test_layout_is_drawn_and_names_every_field(name):
    f = FORMATS[name]
    layout = f.layout()
    assert layout.endswith("\n") and len(layout.splitlines()) >= 1
    assert all(len(line) <= 140 for line in layout.splitlines())
    if f.can_encode and name not in FLOATS:
        assert "w = " in layout
        fields = set(f.quantize(weights(2, COLUMNS)).fields) - {"blocks"}  # ggml's one field holds the drawn block
        assert all(field in layout for field in fields)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("shape", [(COLUMNS,), (1, COLUMNS), (7, COLUMNS), (2, 3, 2 * COLUMNS)])
def test_bytes_are_announced_exactly(name, shape):
    f = FORMATS[name]
    tensor = f.quantize(weights(*shape))
    assert tensor.format == name
    assert tensor.shape == shape
    assert tensor.nbytes == f.nbytes(shape)
    assert tensor.bits_per_weight == f.bits_per_weight(shape)
    decoded = f.dequantize(tensor)
    assert decoded.shape == shape and decoded.dtype == np.float32


@pytest.mark.parametrize("name", ENCODERS)
def test_first_axis_of_every_field_is_the_row(name):
    f = FORMATS[name]
    tensor = f.quantize(weights(5, COLUMNS))
    assert all(field.flags.c_contiguous for field in tensor.fields.values())
    if f.row_independent:
        assert all(field.shape[0] == 5 and field.ndim == 2 for field in tensor.fields.values())


@pytest.mark.parametrize("name", ENCODERS)
def test_rows_are_independent_when_declared(name):
    f = FORMATS[name]
    w = weights(6, COLUMNS)
    whole = f.quantize(w)
    if not f.row_independent:
        w[0] *= 100  # then another row's bytes change
        assert any(whole.fields[k].tobytes() != f.quantize(w).fields[k].tobytes() for k in whole.fields)
        return
    for part in (slice(0, 1), slice(2, 5)):
        alone = f.quantize(w[part])
        rows = QuantizedTensor(name, (part.stop - part.start, COLUMNS), {k: v[part] for k, v in whole.fields.items()})
        assert stored_bytes(alone) == stored_bytes(rows)
        assert f.dequantize(rows).tobytes() == f.dequantize(whole)[part].tobytes()


@pytest.mark.parametrize("name", ENCODERS)
def test_unpack_and_pack_give_the_same_bytes(name):
    f = FORMATS[name]
    tensor = f.quantize(weights(4, COLUMNS))
    codes, params = f.unpack(tensor)
    assert codes.shape == (4, COLUMNS)
    assert stored_bytes(f.pack(codes, params)) == stored_bytes(tensor)
    assert f.pack(codes, params, (2, 2, COLUMNS)).shape == (2, 2, COLUMNS)
    assert np.array_equal(f.decode(codes, params), f.dequantize(tensor))


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_lead_with_rows_and_groups(name):
    f = FORMATS[name]
    params = f.fit(weights(4, COLUMNS))
    if f.row_independent:
        assert all(values.shape[:2] == (4, f.groups(COLUMNS)) for values in params.values())


@pytest.mark.parametrize("name", GROUPED)
def test_encode_takes_the_nearest_code(name):
    """No other code decodes nearer: with the spacing of the levels this is the half-step bound."""
    f = FORMATS[name]
    w = weights(3, COLUMNS, seed=3)
    params = f.fit(w)
    codes = f.encode(w, params)
    error = np.abs(f.decode(codes, params) - w)
    for code in every_code(f):
        other = np.abs(f.decode(np.full_like(codes, code), params) - w)
        # A tie may go either way by a rounding of the division; 1e-5 of the error is far above that and far below a step.
        assert (error <= other * (1 + 1e-5) + 1e-12).all(), code


def every_code(f: Format) -> Iterable[int]:
    if f.name.startswith("int8_row"):
        return range(-127, 128)
    if f.name.startswith("fp8"):
        return [code for code in range(256) if code & 127 != 127]  # NaN
    return range(round(2**f.bits)) if not f.name.startswith("ternary") else range(3)


@pytest.mark.parametrize("name", GROUPED)
def test_quantize_stores_the_nearest_codes_of_its_parameters(name):
    f = FORMATS[name]
    w = weights(3, COLUMNS, seed=4)
    params = f.fit(w)
    nearest = float(np.square(f.decode(f.encode(w, params), params) - w).sum())
    stored = float(np.square(f.dequantize(f.quantize(w)) - w).sum())
    # Q4_1, Q5_1 and Q8_0 keep gguf's bytes, whose codes come from the scale before float16 rounding: 2^-11 of the largest
    # code, 255 for Q8_0, is an eighth of a step, so of the few codes that differ none errs by more than 0.5 + 1/8 steps.
    assert nearest * (1 - 1e-6) <= stored <= nearest * (1.05 if name in ("q4_1", "q5_1", "q8_0") else 1 + 1e-6)


@pytest.mark.parametrize("name", ENCODERS)
def test_any_number_of_threads_stores_the_same_bytes(name, two_threads):
    f = FORMATS[name]
    w = weights(70, COLUMNS)
    seen = []
    for threads in (1, 2, 3):
        _native.set_threads(threads)
        tensor = f.quantize(w)
        seen.append((stored_bytes(tensor), f.dequantize(tensor).tobytes()))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("name", FORMATS)
def test_importance_is_used_or_refused(name):
    f = FORMATS[name]
    w = weights(4, COLUMNS, seed=5)
    h = np.exp(2 * np.random.default_rng(6).standard_normal(COLUMNS)).astype(np.float32)
    if not f.can_encode:
        return
    if not f.uses_importance:
        for call in (f.quantize, f.fit):
            with pytest.raises(FormatError, match=f"{name}: .*takes no importance"):
                call(w, h)
        return
    weighted, plain = f.quantize(w, h), f.quantize(w, np.ones(COLUMNS, dtype=np.float32))
    assert float((h * np.square(f.dequantize(weighted) - w)).sum()) < float((h * np.square(f.dequantize(plain) - w)).sum())
    for bad in (h[:-1], -h, np.full(COLUMNS, np.nan, dtype=np.float32)):
        with pytest.raises(FormatError, match="need"):
            f.quantize(w, bad)


@pytest.mark.parametrize("name", FORMATS)
def test_shapes_that_do_not_fit_are_refused(name):
    f = FORMATS[name]
    if f.group_size > 1:
        assert not f.fits((2, f.group_size + 1))
        with pytest.raises(FormatError, match=rf"{name}: layer has {f.group_size + 1} columns, not a multiple of {f.group_size}; "):
            f.check((2, f.group_size + 1), "layer")
    assert f.fits((2, COLUMNS))
    f.check((2, COLUMNS))
    for empty in ((0, COLUMNS), (2, 0), ()):
        with pytest.raises(FormatError, match="need at least one value"):
            f.check(empty)


@pytest.mark.parametrize("name", [name for name in ENCODERS if FORMATS[name].group_size > 1])
def test_the_alternative_that_is_named_fits(name):
    f = FORMATS[name]
    for columns in (4000, 1000, 576, 96, 80):
        if f.fits((2, columns)):
            continue
        words = f.alternative(columns).replace(",", " ").split()
        formats = [word for word in words if is_format(word)]
        assert formats
        assert all(get_format(word).fits((2, columns)) for word in formats), (columns, formats)


def is_format(word: str) -> bool:
    try:
        get_format(word)
    except FormatError:
        return False
    return True


@pytest.mark.parametrize("name", ENCODERS)
def test_read_only_and_strided_arrays_are_taken(name):
    f = FORMATS[name]
    wide = weights(3, 2 * COLUMNS)
    strided = wide[:, ::2]
    strided.flags.writeable = False
    tensor = f.quantize(strided)
    assert stored_bytes(tensor) == stored_bytes(f.quantize(strided.copy()))
    for field in tensor.fields.values():
        field.flags.writeable = False
    assert np.isfinite(f.dequantize(tensor)).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_zeros_of_either_sign_decode_to_zero(name):
    f = FORMATS[name]
    for zero in (0.0, -0.0):
        tensor = f.quantize(np.full((2, COLUMNS), zero, dtype=np.float32))
        assert not f.dequantize(tensor).any()


@pytest.mark.parametrize("name", GROUPED)
def test_one_outlier_stays_finite_and_in_its_row(name):
    f = FORMATS[name]
    w = weights(3, COLUMNS)
    w[2, 5] = 1000.0
    decoded = f.dequantize(f.quantize(w))
    assert np.isfinite(decoded).all()
    if f.row_independent:
        assert decoded[0].tobytes() == f.dequantize(f.quantize(w[:1]))[0].tobytes()


@pytest.mark.parametrize("name", DECODERS)
def test_decode_only_formats_say_so(name):
    f = FORMATS[name]
    w = weights(2, COLUMNS)
    for call in (lambda: f.quantize(w), lambda: f.fit(w), lambda: f.quantize_clipped(w)):
        with pytest.raises(FormatError, match=f"{name}: can only be decoded"):
            call()
    blocks = np.random.default_rng(0).integers(0, 255, (3, f.nbytes((1, COLUMNS))), dtype=np.uint8)
    assert f.dequantize(QuantizedTensor(name, (3, COLUMNS), {"blocks": blocks})).shape == (3, COLUMNS)


@pytest.mark.parametrize("name", FORMATS)
def test_bits_per_weight_include_everything(name):
    f = FORMATS[name]
    assert f.bits_per_weight((4096, 4096)) == f.nbytes((4096, 4096)) * 8 / 4096**2
    assert f.bits_per_weight((4096, 4096)) >= f.bits - 0.01 or name == "tq1_0"  # 5 trits in 8 bits is above log2(3) too


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("int4_g128", 4 + 16 / 128 + 4 / 128), ("int4_g64s", 4.25), ("int4_g64m", 4.5), ("int3_g32", 3 + 16 / 32 + 3 / 32)),
        *(("int8_c", 8 + (16 + 8) / 4096), ("int8_cs", 8 + 16 / 4096), ("int4_t", 4 + (16 + 8) / 4096**2), ("int8_row", 8 + 32 / 4096)),
        ("int8_row_x16", 8 + 8 * 16 / 4096 + 32 / 4096 + 8 * 4 * 16 / 4096**2),
        *(("binary_g64", 1.25), ("ternary_g128", 2.125), ("nf4", 4.5), ("fp4", 4.5), ("f16", 16.0), ("bf16", 16.0), ("f32", 32.0)),
        *(("q4_0", 4.5), ("q4_1", 5.0), ("q5_0", 5.5), ("q5_1", 6.0), ("q8_0", 8.5), ("q2_k", 2.625), ("q3_k", 3.4375)),
        *(("q4_k", 4.5), ("q5_k", 5.5), ("q6_k", 6.5625), ("iq4_nl", 4.5), ("iq4_xs", 4.25), ("tq1_0", 1.6875), ("tq2_0", 2.0625)),
        *(("mxfp4", 4.25), ("nvfp4", 4.5), ("iq1_s", 1.5625), ("iq1_m", 1.75), ("iq2_xxs", 2.0625), ("iq2_xs", 2.3125)),
        *(("fp8_c", 8 + 32 / 4096), ("fp8_t", 8 + 32 / 4096**2), ("fp8_b128", 8 + 32 / 128**2), ("nvfp4_gs", 4.5 + 32 / 4096**2)),
        *(("iq2_s", 2.5625), ("iq3_xxs", 3.0625), ("iq3_s", 3.4375), ("q1_0", 1.125), ("q2_0", 2.25)),
    ],
)
def test_bits_per_weight_by_hand(name, bits):
    assert get_format(name).bits_per_weight((4096, 4096)) == pytest.approx(bits, abs=1e-12)
