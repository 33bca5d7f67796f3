"""ggml's blocks against gguf-py, against ggml's own C code (golden values), and against slow searches written here."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from tersor import _native
from tersor.errors import FormatError
from tersor.formats import get_format, ggml, ggml_blocks

ENCODABLE = tuple(ggml_blocks.BLOCKS)
BY_EXTREMES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "mxfp4")
SEARCHED = tuple(name for name in ENCODABLE if name not in BY_EXTREMES)
NOT_IN_GGUF_PY = ("q1_0", "q2_0")  # gguf-py cannot decode these two: golden values and loops below
DECODE_ONLY = tuple(name for name in ggml.EXAMPLES if name not in ENCODABLE)
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])

# Bits per weight of llama.cpp's own table (tools/quantize/README.md, ggml-common.h comments).
BITS = {
    "q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "q8_0": 8.5, "q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5,
    "q6_k": 6.5625, "iq4_nl": 4.5, "iq4_xs": 4.25, "tq1_0": 1.6875, "tq2_0": 2.0625, "mxfp4": 4.25, "iq1_s": 1.5625, "iq1_m": 1.75,
    "iq2_xxs": 2.0625, "iq2_xs": 2.3125, "iq2_s": 2.5625, "iq3_xxs": 3.0625, "iq3_s": 3.4375, "nvfp4": 4.5, "q1_0": 1.125, "q2_0": 2.25,
}  # fmt: skip


def weights(rows, columns, seed=0):
    """Values of a trained layer's kind: normal, rows of different size, a few outliers."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)) * np.exp(rng.standard_normal((rows, 1)))
    w[rng.random((rows, columns)) < 0.002] *= 8
    return (0.02 * w).astype(np.float32)


def importances(columns, seed=1):
    return np.exp(1.5 * np.random.default_rng(seed).standard_normal(columns)).astype(np.float32)


def error(name, w, importance=None, weight=1.0):
    f = get_format(name)
    return float((weight * (f.dequantize(f.quantize(w, importance)).astype(np.float64) - w) ** 2).sum())


def same_bits(a, b):
    assert a.dtype == b.dtype == np.float32
    return (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))


@pytest.fixture
def threads_restored():
    before = _native.threads()
    yield
    _native.set_threads(before)


def weird_blocks(name, n):
    """Random bytes; in a part of the blocks every two-byte word is an infinity, NaN, zero or subnormal float16."""
    f = get_format(name)
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 256, (n, f.block_bytes), dtype=np.uint8)
    words = blocks[: n // 4, : f.block_bytes // 2 * 2].view(np.uint16)
    odd = np.array([0x7C00, 0xFC00, 0x7E01, 0xFDFF, 0x0000, 0x8000, 0x0001, 0x83FF], np.uint16)
    replace = rng.random(words.shape) < 0.3
    words[replace] = rng.choice(odd, replace.sum())
    return blocks


# ---- Decoding ----


@pytest.mark.parametrize("name", [n for n in ggml.EXAMPLES if n not in NOT_IN_GGUF_PY])
def test_decode_equals_gguf_bit_for_bit(name):
    f = get_format(name)
    kind = GGMLQuantizationType[name.upper()]
    assert GGML_QUANT_SIZES[kind] == (f.group_size, f.block_bytes)
    blocks = weird_blocks(name, 2000)  # enough that every row of every IQ grid occurs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = gguf.quants.dequantize(blocks, kind)
    assert same_bits(_native.ggml_decode(name, blocks, f.group_size), expected).all()


def test_every_type_of_gguf_is_known():
    scalars = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}  # the last two never stand in files
    assert {t.name.lower() for t in GGML_QUANT_SIZES if t.name not in scalars} <= set(ggml.EXAMPLES)


@pytest.mark.parametrize("name", ggml.EXAMPLES)
def test_decode_of_a_hand_made_block_equals_ggml_in_c(name):
    golden = json.loads((Path(__file__).parents[1] / "golden" / "ggml_blocks.json").read_text())[name]
    block = np.frombuffer(bytes.fromhex(golden["block"]), np.uint8)[None]
    expected = np.frombuffer(bytes.fromhex(golden["values"]), "<f4")[None]
    assert same_bits(_native.ggml_decode(name, block, expected.size), expected).all()


def test_q1_0_and_q2_0_decode_by_their_definition():
    for name, bits, values in (("q1_0", 1, 128), ("q2_0", 2, 64)):
        blocks = np.random.default_rng(4).integers(0, 256, (9, 18), dtype=np.uint8)
        blocks[:, 1] &= 0x3B  # finite scales
        out = _native.ggml_decode(name, blocks, values)
        for r, block in enumerate(blocks):
            d = np.frombuffer(block[:2].tobytes(), "<f2")[0].astype(np.float32)
            stream = int.from_bytes(block[2:].tobytes(), "little")
            for i in range(values):
                q = stream >> bits * i & (1 << bits) - 1
                assert out[r, i] == (d * (2 * q - 1) if bits == 1 else d * (q - 1))


@pytest.mark.parametrize("name", ENCODABLE)
def test_reference_decodes_like_native_and_packs_what_it_unpacked(name):
    f = get_format(name)
    blocks = weird_blocks(name, 256).reshape(32, -1)
    columns = 8 * f.group_size
    in_blocks = blocks.reshape(32, 8, -1)
    codes, params = ggml_blocks.unpack(name, in_blocks)
    assert codes.dtype == np.uint8 and codes.shape == (32, 8, f.group_size)
    assert all(p.shape[:2] == (32, 8) for p in params.values())
    native = _native.ggml_decode(name, blocks, columns)
    assert same_bits(ggml_blocks.decode(name, codes, params).reshape(32, columns), native).all()
    packed = ggml_blocks.pack(name, codes, params)
    if name == "tq1_0":  # 256 bytes stand for 243 groups of trits: only the values come back
        assert same_bits(_native.ggml_decode(name, packed.reshape(32, -1), columns), native).all()
    else:
        assert (packed == in_blocks).all()


# ---- Encoding ----


@pytest.mark.parametrize("name", BY_EXTREMES)
def test_encode_without_importance_gives_the_bytes_of_gguf(name):
    f = get_format(name)
    w = weights(40, 7 * f.group_size)
    w[0], w[1], w[2], w[3], w[4, ::2] = 0, -0.0, 0.7, -3.5, 0
    w[5, 11], w[6] = 40000, w[6] * 1e-6
    w[7, : f.group_size : 2], w[7, 1 : f.group_size : 2] = 1.5, -1.5  # ties for the extreme
    w[8] = np.round(w[8] * 100) / 4  # ties for the rounding
    expected = gguf.quants.quantize(w, GGMLQuantizationType[name.upper()])
    assert (f.quantize(w).fields["blocks"] == expected).all()


# Without importance the types of BY_EXTREMES round on the scale before it is rounded to float16, as ggml does.
@pytest.mark.parametrize(
    ("name", "weighted"), [(name, weighted) for name in ENCODABLE for weighted in (False, True) if weighted or name not in BY_EXTREMES]
)
def test_reference_encodes_native_params_to_the_native_codes(name, weighted):
    f = get_format(name)
    w = weights(9, 5 * f.group_size)
    w[3], w[4, 10:] = 0, -0.0
    importance = importances(w.shape[1]) if weighted else None
    stored = f.quantize(w, importance)
    codes, params = f.unpack(stored)
    assert (f.encode(w, params) == codes).all()
    fitted = f.fit(w, importance)
    assert fitted.keys() == params.keys() and all((fitted[k] == params[k]).all() for k in params)
    assert (f.pack(f.encode(w, fitted), fitted).fields["blocks"] == stored.fields["blocks"]).all()


@pytest.mark.parametrize("name", ENCODABLE)
def test_encode_is_nearest_on_the_grid(name):
    """Whatever the parameters: no other code is nearer than the chosen one, beyond the rounding of the reciprocal."""
    f = get_format(name)
    w = weights(2, f.group_size)
    params = f.fit(w, np.ones(f.group_size, np.float32))
    chosen = np.abs(f.decode(f.encode(w, params), params) - w)
    kind = ggml_blocks.BLOCKS[name]
    codes = {"tq1_0": range(3), "tq2_0": range(3), "q8_0": range(1, 256)}  # level 2 of TQ2_0 and -128 of Q8_0 are never written
    for code in codes.get(name, range(len(kind.levels))):
        other = np.abs(f.decode(np.full(w.shape, code, np.uint8), params) - w)
        assert (chosen <= other * (1 + 1e-5) + 1e-9).all()


@pytest.mark.parametrize("name", ENCODABLE)
def test_blocks_do_not_depend_on_their_neighbours(name):
    f = get_format(name)
    n, importance = 19, importances(19 * f.group_size)  # more than two vectors of lanes, and a rest
    w = weights(3, n * f.group_size)
    whole = f.quantize(w).fields["blocks"].reshape(3, n, -1)
    parts = [f.quantize(np.ascontiguousarray(part)).fields["blocks"] for part in np.split(w, n, axis=1)]
    assert (whole == np.stack(parts, axis=1)).all()
    one_row = f.quantize(w[1:2], importance).fields["blocks"]
    assert (one_row == f.quantize(w, importance).fields["blocks"][1:2]).all()


@pytest.mark.parametrize("weighted", (False, True), ids=("plain", "importance"))
@pytest.mark.parametrize("name", ENCODABLE)
def test_same_bytes_for_any_thread_count_and_instruction_set(name, weighted, threads_restored):
    f = get_format(name)
    w = weights(13, 3 * f.group_size)
    importance = importances(w.shape[1]) if weighted else None
    results = set()
    try:
        for isa in _native.isas():
            _native.force_isa(isa)
            for threads in (1, 2, 3):
                _native.set_threads(threads)
                results.add(f.quantize(w, importance).fields["blocks"].tobytes())
    finally:
        _native.force_isa("")
    assert len(results) == 1


@pytest.mark.parametrize("weighted", (False, True), ids=("plain", "importance"))
@pytest.mark.parametrize("name", ENCODABLE)
def test_special_blocks(name, weighted):
    f = get_format(name)
    n = f.group_size
    importance = importances(n) if weighted else None

    def decoded(w):
        return f.dequantize(f.quantize(np.asarray(w, np.float32).reshape(1, n), importance))[0]

    assert (decoded(np.zeros(n)) == 0).all()
    assert (decoded(np.full(n, -0.0)) == 0).all()
    for constant in (0.03, -0.03):  # one value of the grid: float16 scales and small integers hit it well, MXFP4's powers of two badly
        rms = np.sqrt(np.average((decoded(np.full(n, constant)) - constant) ** 2, weights=importance))
        assert rms <= 0.03 * (1 / 4 if name == "mxfp4" else 1 / 32)
    outlier = np.full(n, 1e-4)
    outlier[n // 2] = 3
    assert abs(decoded(outlier)[n // 2] - 3) <= 3 / 7
    assert np.isfinite(decoded(np.full(n, 1e-20))).all()
    assert np.isfinite(decoded(np.linspace(-6e4, 6e4, n))).all()


@pytest.mark.parametrize("name", ENCODABLE)
def test_weights_that_are_no_numbers_do_no_harm(name):
    """The pipeline refuses them; the encoder must end, stay within its memory, and leave other blocks alone."""
    f = get_format(name)
    w = weights(8, 3 * f.group_size)
    clean = f.quantize(w).fields["blocks"].reshape(8, 3, -1)
    bad = w.copy()
    for row, value in enumerate((np.nan, np.inf, -np.inf, 1e38, -1e38)):
        bad[row, row :: f.group_size * 2 + 1] = value
    bad[5, : f.group_size] = np.nan
    for importance in (None, np.ones(bad.shape[1], np.float32)):
        out = _native.ggml_encode(name, bad, importance).reshape(8, 3, -1)
        if importance is None:
            assert (out[5, 1:] == clean[5, 1:]).all() and (out[6:] == clean[6:]).all()


# ---- The search ----


def least_error_of_scales(w, importance, levels, half):
    """Slow: every scale of a fine grid, both signs, rounded to float16 when half; nearest level by comparing all."""
    best = np.inf
    top = np.abs(w).max()
    for scale in np.concatenate([top / np.linspace(0.3 * np.abs(levels).max(), 1.25 * np.abs(levels).max(), 1500)] * 2):
        for s in (scale, -scale):
            s = np.float64(np.float16(s)) if half else s
            best = min(best, (importance * np.square(w[:, None] - s * levels).min(axis=1)).sum())
    return best


@pytest.mark.parametrize(
    "name, levels",
    [
        ("q4_0", np.arange(-8, 8)),
        ("q5_0", np.arange(-16, 16)),
        ("iq4_nl", IQ4),
        ("tq2_0", np.arange(-1, 2)),
        ("q8_0", np.arange(-127, 128)),
    ],
)
def test_searched_scale_is_near_the_best_of_a_fine_grid(name, levels):
    f = get_format(name)
    w = weights(4, f.group_size, seed=5)
    importance = importances(f.group_size)
    ours = [error(name, row[None], importance, importance) for row in w]
    best = [least_error_of_scales(row.astype(np.float64), importance, levels, half=True) for row in w]
    # With 8 bits the error jumps about from one float16 scale to the next.
    assert sum(ours) <= (1.06 if name == "q8_0" else 1.02) * sum(best)


def test_searched_affine_block_is_near_the_best_of_a_fine_grid():
    w, importance = weights(3, 32, seed=6), importances(32)
    ours, best = 0.0, 0.0
    for row in w.astype(np.float64):
        ours += error("q4_1", row[None].astype(np.float32), importance, importance)
        least, span = np.inf, row.max() - row.min()
        for low in row.min() + span * np.linspace(-0.05, 0.25, 60):
            for step in (row.max() - low) / np.linspace(11, 16, 60):
                q = np.clip(np.round((row - low) / step), 0, 15)
                root = np.sqrt(importance)
                line = np.linalg.lstsq(np.stack([q * root, root], axis=1), row * root, rcond=None)[0]
                least = min(least, (importance * (q * line[0] + line[1] - row) ** 2).sum())
        best += least
    assert ours <= 1.03 * best


def k_quant_by_min_max(w, top, top_scale, sub):
    """The k-quant of the textbook: minimum and range of a sub-block, scales to integers of the largest. Returns the values."""
    x = w.astype(np.float64).reshape(-1, 256 // sub, sub)
    low = np.minimum(x.min(axis=-1), 0)
    scale, minimum = (x.max(axis=-1) - low) / top, -low
    d = scale.max(axis=-1, keepdims=True) / top_scale
    dmin = minimum.max(axis=-1, keepdims=True) / top_scale
    step, offset = (np.round(scale / d) * d)[..., None], (np.round(minimum / dmin) * dmin)[..., None]
    q = np.clip(np.round((x + offset) / np.where(step == 0, 1, step)), 0, top)
    return (q * step - offset).reshape(w.shape)


@pytest.mark.parametrize(
    "name, top, top_scale, sub, gain",
    [("q2_k", 3, 15, 16, 0.62), ("q4_k", 15, 63, 32, 0.87), ("q5_k", 31, 63, 32, 0.92)],
)
def test_affine_k_quants_gain_much_over_min_max(name, top, top_scale, sub, gain):
    w = weights(8, 1024)
    assert error(name, w, np.ones(1024, np.float32)) <= gain * float(np.square(k_quant_by_min_max(w, top, top_scale, sub) - w).sum())


@pytest.mark.parametrize("name", [n for n in ENCODABLE if n != "tq1_0"])
def test_importance_lowers_the_error_that_it_weighs(name):
    columns = 512
    w, importance = weights(6, columns), importances(512)
    flat = np.ones(columns, np.float32)
    assert error(name, w, importance, importance) < error(name, w, flat, importance)
    assert error(name, w, importance, importance) < error(name, w, None, importance)
    assert error(name, w, flat) <= 1.03 * error(name, w)  # both are local searches


@pytest.mark.parametrize("name", ENCODABLE)
def test_scale_of_the_importance_does_not_matter_and_zeros_are_allowed(name):
    f = get_format(name)
    w = weights(3, 2 * f.group_size)
    importance = importances(w.shape[1])
    expected = f.quantize(w, importance).fields["blocks"]
    assert (f.quantize(w, importance * np.float32(2**40)).fields["blocks"] == expected).all()
    assert (f.quantize(w, importance * np.float32(2**-60)).fields["blocks"] == expected).all()
    none = f.quantize(w, np.zeros(w.shape[1], np.float32)).fields["blocks"]
    assert (none == f.quantize(w).fields["blocks"]).all()
    half = np.ones(w.shape[1], np.float32)
    half[: f.group_size] = 0
    assert np.abs(f.dequantize(f.quantize(w, half)) - w).max() <= 1.1 * np.abs(w).max()
    half[f.group_size :: 2] = 0
    assert error(name, w, half, half) <= error(name, w, np.ones_like(half), half)


# ---- The interface ----


@pytest.mark.parametrize("name", ggml.EXAMPLES)
def test_bits_per_weight_are_exact(name):
    f = get_format(name)
    assert f.bits_per_weight((7, 4096)) == BITS[name]
    assert f.nbytes((2, 3, 512)) == 6 * 512 * BITS[name] / 8


@pytest.mark.parametrize("name", ENCODABLE)
def test_shapes_of_one_and_three_axes(name):
    f = get_format(name)
    vector = weights(1, 2 * f.group_size)[0]
    stored = f.quantize(vector)
    assert stored.shape == vector.shape and f.dequantize(stored).shape == vector.shape
    cube = weights(6, f.group_size).reshape(2, 3, f.group_size)
    assert (f.dequantize(f.quantize(cube)) == f.dequantize(f.quantize(cube.reshape(6, -1))).reshape(cube.shape)).all()


def test_columns_that_do_not_fit_name_an_alternative():
    with pytest.raises(FormatError, match=r"^q4_k: blk has 576 columns, not a multiple of 256; use q4_1 or q5_0 \(blocks of 32\)$"):
        get_format("q4_k").check((4, 576), "blk")
    with pytest.raises(FormatError, match=r"^q6_k: tensor has 288 columns, not a multiple of 256; use q8_0 \(blocks of 32\)$"):
        get_format("q6_k").quantize(np.zeros((1, 288), np.float32))
    with pytest.raises(FormatError, match=r"^q8_0: tensor has 80 columns, .*; use an integer format with groups of 16, such as int8_g16$"):
        get_format("q8_0").fit(np.zeros((1, 80), np.float32))
    with pytest.raises(FormatError, match=r"^q8_0: tensor has 50 columns, .*; use f16 or bf16$"):
        get_format("q8_0").encode(np.zeros((1, 50), np.float32), {})
    for name in ggml._BLOCKS_OF_32:
        for other in get_format(name).alternative(96).removeprefix("use ").removesuffix(" (blocks of 32)").split(" or "):
            assert get_format(other).fits((1, 96))


@pytest.mark.parametrize("name", DECODE_ONLY)
def test_decode_only_types_refuse_to_encode_and_name_others(name):
    f = get_format(name)
    w = np.zeros((1, f.group_size), np.float32)
    calls = (lambda: f.quantize(w), lambda: f.fit(w), lambda: f.encode(w, {}), lambda: f.pack(w, {}), lambda: f.unpack(None))
    for call in (*calls, lambda: f.decode(w, {})):
        with pytest.raises(FormatError, match=rf"^{name}: can only be decoded; to write a file of about this size use (.*)$") as refused:
            call()
    for other in str(refused.value).rsplit(" use ")[-1].split(" or "):
        assert get_format(other).can_encode


@pytest.mark.parametrize("bad", ([1, -1], [1, np.nan], [1, np.inf]))
def test_bad_importance_is_refused(bad):
    with pytest.raises(FormatError, match=r"q4_0: importance holds .*need finite values >= 0"):
        get_format("q4_0").quantize(np.zeros((1, 32), np.float32), np.resize(np.array(bad, np.float32), 32))
    with pytest.raises(FormatError, match=r"q4_0: importance has shape \(31,\)"):
        get_format("q4_0").quantize(np.zeros((1, 32), np.float32), np.ones(31, np.float32))


def test_values_beyond_float16_are_refused():
    with pytest.raises(FormatError, match=r"^q4_k: tensor holds 70000, beyond the 65504 of float16 scales; use bf16 or f32$"):
        get_format("q4_k").quantize(np.full((1, 256), -70000, np.float32))


def test_native_functions_check_what_python_should_have_checked():
    block = np.zeros((1, 18), np.uint8)
    with pytest.raises(ValueError, match="unknown ggml type 'q9'"):
        _native.ggml_decode("q9", block, 32)
    with pytest.raises(ValueError, match="33 columns, not a multiple of 32"):
        _native.ggml_decode("q4_0", block, 33)
    with pytest.raises(ValueError, match="rows of 18 bytes, need 36"):
        _native.ggml_decode("q4_0", block, 64)
    with pytest.raises(ValueError, match="not a multiple"):
        _native.ggml_decode("q4_0", block, -32)
    with pytest.raises(ValueError, match="can only be decoded"):
        _native.ggml_encode("iq1_s", np.zeros((1, 256), np.float32), None)
    with pytest.raises(ValueError, match="3 importances for 32 columns"):
        _native.ggml_encode("q4_0", np.zeros((1, 32), np.float32), np.ones(3, np.float32))


def test_environment_forces_the_instruction_set():
    code = "import sys; from tersor import _native; sys.stdout.write(_native.isa())"
    done = subprocess.run([sys.executable, "-c", code], env={"TERSOR_ISA": "scalar"}, capture_output=True, text=True, check=True)
    assert done.stdout == "scalar"
