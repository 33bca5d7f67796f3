"""Packed weights and `linear`: every format, every kernel, every instruction set of this CPU, ragged sizes, 1 to 3 threads.

The oracle is the format's own decoding (which tests of the formats pin to other packages) and the definition of 8-bit
activations, in numpy. First every single weight is read back out of the packed panels by multiplying with unit vectors; then
products of random inputs are compared with those weights, where only float32 sums may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from oracles import llm_int8_loops
from tersor import _native, ops
from tersor.errors import FormatError
from tersor.formats import FORMATS, get_format
from tersor.ops import reference
from tersor.tensor import QuantizedTensor

EPS = 2.0**-24  # half a unit in the last place of float32
ROWS = 37  # two panels of 16 and a ragged one

# Their table is rounded to 15 bits (nf4: by at most 7.1e-5 of a value) and absmax to float16's 11 when packed; fp8_b128 is decoded to
# float16.
FLOATS = {"f32", "f16", "bf16", "e4m3"}  # kernels that do not round activations
AS_HALF = {"nf4", "fp4", "nf4_dq", "fp4_dq", "fp8_b128"}

# One format per kernel and columns that it can have; odd ones where the format allows.
KERNELS = {
    "u1x64": ("binary_g64", (64, 320)),
    "u1x128": ("q1_0", (128, 384)),
    "u2x16": ("int2_g16s", (16, 48)),
    "u2x64": ("q2_0", (64, 320)),
    "u2x256": ("tq2_0", (256, 512)),
    "u2x16nibblemin": ("q2_k", (256, 512)),
    "u3x16": ("int3_g16s", (16, 48)),
    "u3x16super": ("q3_k", (256, 512)),
    "u4x32": ("q4_0", (32, 96, 288)),
    "u4x32min": ("q4_1", (32, 96, 288)),
    "u4x256zero": ("int4_c", (1, 7, 33, 100, 300)),
    "u4x64zero": ("int4_g64", (64, 320)),
    "u4x16min": ("int4_g16m", (16, 48)),
    "u4x16zero": ("int4_g48", (48, 144)),
    "u4x32supermin": ("q4_k", (256, 512)),
    "u4x64single": ("int4_g64sf", (64, 320)),
    "u4x64singlezero": ("int4_g64f", (64, 320)),
    "u4x64singlemin": ("int4_g64mf", (64, 320)),
    "u4x16single": ("int4_g48sf", (48, 144)),
    "u3x16singlemin": ("int3_g16mf", (16, 48)),
    "u5x32": ("q5_0", (32, 96)),
    "u5x32min": ("q5_1", (32, 96)),
    "u5x16min": ("int5_g16m", (16, 48)),
    "u5x32supermin": ("q5_k", (256, 512)),
    "u6x256zero": ("int6_c", (1, 7, 33, 100)),
    "u6x16": ("int6_g16s", (16, 48)),
    "u6x16zero": ("int6_g16", (16, 48)),
    "u6x16super": ("q6_k", (256, 512)),
    "s8x256": ("int8_row", (1, 7, 33, 100, 300)),
    "s8x256min": ("int8_cm", (1, 7, 33, 100)),
    "s8x256zero": ("int8_c", (1, 7, 33, 100)),
    "s8x256singlemin": ("int8_cmf", (1, 7, 33, 100)),
    "s8x16singlezero": ("int8_g16f", (16, 48)),
    "s8x32": ("q8_0", (32, 96)),
    "s8x16": ("int8_g16s", (16, 48)),
    "s8x16min": ("int8_g16m", (16, 48)),
    "s8x16zero": ("int8_g16", (16, 48)),
    "t4x32": ("iq4_nl", (32, 96)),
    "t4x16": ("nvfp4", (64, 192)),
    "t4x32super": ("iq4_xs", (256, 512)),
    "t4x16super": ("iq2_s", (256, 512)),
    "t4finex64": ("nf4", (64, 320)),
    "f32": ("f32", (1, 7, 33, 300)),
    "f16": ("f16", (1, 7, 33, 300)),
    "bf16": ("bf16", (1, 7, 33, 300)),
    "e4m3": ("fp8_c", (1, 7, 33, 300)),
}
OTHERS = {"nvfp4_gs": "t4x16", "int4_g64z": "u4x64singlemin", "int8_cz": "s8x256singlemin", "fp8_t": "e4m3", "fp8_b128": "f16"}


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU in turn."""
    _native.force_isa(request.param)
    yield request.param
    _native.force_isa("")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = _native.threads()
    _native.set_threads(2)
    yield
    _native.set_threads(before)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make(name: str, rows: int, columns: int, seed: int = 1) -> QuantizedTensor:
    """A tensor of this format: quantized random weights, or random blocks with modest scales where nothing encodes."""
    fmt = get_format(name)
    if fmt.can_encode:
        return fmt.quantize(normal(seed, rows, columns) * np.float32(0.1))
    rng = np.random.default_rng(seed)
    blocks = np.empty((0, fmt.nbytes((1, columns))), np.uint8)
    while len(blocks) < rows:  # random bytes may hold infinite scales
        more = rng.integers(0, 256, (4 * rows, blocks.shape[1]), dtype=np.uint8)
        values = fmt.dequantize(QuantizedTensor(name, (len(more), columns), {"blocks": more}))
        largest = np.abs(values).max(axis=1)
        blocks = np.concatenate([blocks, more[np.isfinite(largest) & (largest > 0) & (largest < 3e4)]])
    return QuantizedTensor(name, (rows, columns), {"blocks": blocks[:rows].copy()})


def fine(x: np.ndarray) -> np.ndarray:
    """x as up to 16 rows see it (codes of 1 and 2 bits excepted): per row and 32 values q = rint(x * (16256 / absmax)), times
    absmax / 16256, in float32."""
    return _rounded(x, np.float32(127 * 128))


def coarse(x: np.ndarray) -> np.ndarray:
    """x as 17 and more rows see it: q = rint(x * (127 / absmax)), but as `fine` in outliers: 32 values whose absmax^2 is more
    than 8 times the mean of the row's."""
    largest = np.stack([np.abs(x[:, i : i + 32]).max(axis=1) for i in range(0, x.shape[1], 32)], axis=1).astype(np.float64)
    outlier = largest**2 > 8 * np.mean(largest**2, axis=1, keepdims=True)
    return np.where(np.repeat(outlier, 32, axis=1)[:, : x.shape[1]], fine(x), _rounded(x, np.float32(127)))


def brain(x: np.ndarray) -> np.ndarray:
    """x in bfloat16, as 17 and more rows see it where there are matrix tiles: 8 significant bits, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def many(isa: str) -> Callable[[np.ndarray], np.ndarray]:
    """How 17 and more rows are seen."""
    return brain if isa == "amx" else coarse


def _rounded(x: np.ndarray, most: np.float32) -> np.ndarray:
    out = np.zeros_like(x)
    for start in range(0, x.shape[1], 32):
        part = x[:, start : start + 32]
        largest = np.abs(part).max(axis=1, keepdims=True)
        inverse = most / np.where(largest > 1e-30, largest, np.float32(np.inf))
        out[:, start : start + 32] = np.rint(part * inverse) * (largest / most)
    return out


def weights_inside(weight: ops.Weight, rows: int) -> np.ndarray:
    """The matrix that the packed weight multiplies by, (rows, columns) float64, through products of `rows` rows at a time: with
    16, 127 quantizes to 16256 / 128; with more it is an outlier when there are more than 8 chunks, else 127 times 1."""
    inputs = np.zeros((-weight.columns % rows + weight.columns, weight.columns), np.float32)
    np.fill_diagonal(inputs, 127)
    products = [ops.linear(inputs[i : i + rows], weight) for i in range(0, len(inputs), rows)]
    return np.concatenate(products)[: weight.columns].T.astype(np.float64) / 127


def columns_of(name: str) -> int:
    group = get_format(name).group_size
    return 2 * group if group > 0 else 75


@pytest.mark.parametrize("rows", [16, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_of_every_format(name: str, rows: int, isa: str) -> None:
    tensor = make(name, ROWS, columns_of(name))
    want = get_format(name).dequantize(tensor).astype(np.float64)
    weight = ops.pack([tensor])
    got = weights_inside(weight, rows)
    span = np.abs(want).max(axis=1, keepdims=True)
    bound = np.abs(want) * (2.0**-11 + 7.2e-5) + 2.0**-25 if name in AS_HALF else 8 * span * EPS
    if isa == "amx" and rows > 16 and weight.kernel.split()[1] not in FLOATS:
        bound = bound + np.abs(want) * 2.0**-8
    assert (np.abs(got - want) <= bound).all(), np.abs(got - want).max()


@pytest.mark.parametrize("name", FORMATS)
def test_float_activations_decode_exactly(name: str) -> None:
    tensor = make(name, ROWS, columns_of(name))
    weight = ops.pack([tensor], activations="float")
    got = ops.linear(np.eye(weight.columns, dtype=np.float32), weight).T
    np.testing.assert_array_equal(got, get_format(name).dequantize(tensor))


@pytest.mark.parametrize("name", FORMATS)
def test_embed_decodes_exactly(name: str) -> None:
    tensor = make(name, ROWS, columns_of(name))
    tokens = np.array([0, 36, 5, 5], np.int32)
    values = get_format(name).dequantize(tensor)[tokens]
    np.testing.assert_array_equal(ops.embed(tensor, tokens), values)
    np.testing.assert_array_equal(ops.embed(tensor, tokens, 1.7), values * np.float32(1.7))


def unaligned(x: np.ndarray) -> np.ndarray:
    """A copy of x that starts four bytes after any alignment."""
    space = np.empty(x.size + 1, np.float32)
    out = space[1:].reshape(x.shape)
    out[...] = x
    return out


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel(kernel: str, isa: str) -> None:
    name, sizes = KERNELS[kernel]
    for columns in sizes:
        weight = ops.pack([make(name, ROWS, columns)])
        assert weight.kernel == f"{isa} {kernel}"
        floats = name in ("f32", "f16", "bf16", "fp8_c")
        w = weights_inside(weight, 16) if name in AS_HALF else get_format(name).dequantize(make(name, ROWS, columns)).astype(np.float64)
        x = unaligned(normal(2, 33, columns))
        # Without a dot product in 16 bits this saturates: the largest codes times the largest activations.
        x[0] = np.abs(x[0]).max()
        x[1, columns // 2] *= 100  # an outlier
        few = coarse if kernel[:2] in ("u1", "u2") else fine  # what up to 16 rows see
        for rounded, counts in ((few, (1, 2, 3, 4, 5, 6, 7, 8, 9, 16)), (many(isa), (17, 24, 33))):
            inputs = (x if floats else rounded(x)).astype(np.float64)
            want = inputs @ (weights_inside(weight, 40) if rounded is brain and not floats else w).T
            # Each group's or column's term is rounded a few times, then added; offsets and minima cancel against terms up
            # to 8 times larger.
            bound = 8 * (columns / 16 + 8) * EPS * (np.abs(inputs).sum(axis=1, keepdims=True) * np.abs(w).max(axis=1))
            largest = ops.linear(x[: counts[-1]], weight)
            assert (np.abs(largest - want[: counts[-1]]) <= bound[: counts[-1]]).all(), (
                columns,
                np.abs(largest - want[: counts[-1]]).max(),
            )
            for n in counts:
                for threads in (1, 2, 3):
                    _native.set_threads(threads)
                    np.testing.assert_array_equal(ops.linear(unaligned(x[:n]), weight), largest[:n])


@pytest.mark.parametrize("name", OTHERS)
def test_kernels_that_formats_share(name: str) -> None:
    assert ops.pack([make(name, ROWS, columns_of(name))]).kernel.split()[1] == OTHERS[name]


def test_fp8_with_a_nan_is_multiplied_as_floats(isa: str) -> None:
    tensor = make("fp8_c", ROWS, 64)
    tensor.fields["codes"][3, 5] = 0x7F
    weight = ops.pack([tensor])
    assert weight.kernel.endswith(" f32")
    assert np.flatnonzero(np.isnan(ops.linear(normal(1, 1, 64), weight))[0]).tolist() == [3]


@pytest.mark.parametrize(("name", "columns"), [("q4_1", 1568), ("f16", 1555), ("fp8_c", 1555), ("f32", 700), ("int8_c", 1555)])
def test_many_rows_and_columns(name: str, columns: int, isa: str) -> None:
    """More rows than a block, more columns than a block, and more panels than threads."""
    tensor = make(name, 70, columns)
    x = normal(3, 203, columns)
    inputs = x if name[0] == "f" else many(isa)(x)
    weight = ops.pack([tensor])
    w = weights_inside(weight, 40) if many(isa) is brain else get_format(name).dequantize(tensor).astype(np.float64)
    want = inputs.astype(np.float64) @ w.T
    got = ops.linear(x, weight)
    # Rounding errors of columns / 16 to columns additions of either sign: a few square roots of their number.
    bound = 8 * np.sqrt(columns) * EPS * np.abs(inputs).max(axis=1, keepdims=True) * np.sqrt(columns) * 0.5
    assert (np.abs(got - want) <= bound).all(), np.abs(got - want).max()


@pytest.mark.parametrize("n", [5, 29])
def test_neighbours_of_one_format_are_one_part(n: int, isa: str) -> None:
    tensors = [make("q4_k", rows, 256, rows) for rows in (20, 16, 37)]
    joined = ops.pack(tensors)
    assert joined.kernel == f"{isa} u4x32supermin"
    x = normal(1, n, 256)
    np.testing.assert_array_equal(ops.linear(x, joined), np.concatenate([ops.linear(x, ops.pack([t])) for t in tensors], axis=1))


@pytest.mark.parametrize(("name", "columns"), [("q4_0", 2048), ("q2_k", 2048), ("q3_k", 2048), ("q4_k", 2048), ("q5_k", 2048),
                                               ("q6_k", 2048), ("q8_0", 2048), ("iq4_xs", 2048), ("int4_g128", 2048)])  # fmt: skip
def test_packed_size_is_the_files(name: str, columns: int) -> None:
    """What a decoded token reads: at most 4 % more than the file holds (k-quants keep 6-bit scales in bytes)."""
    tensor = make(name, 64, columns)
    assert ops.pack([tensor]).nbytes <= 1.04 * tensor.nbytes + 4 * 64


def test_parts_bias_and_residual(isa: str) -> None:
    tensors = [make("q4_1", 20, 96, 1), make("q8_0", 16, 96, 2), make("f16", 5, 96, 3), make("bf16", 3, 96, 4)]
    bias, x, residual = normal(6, 44), normal(7, 5, 96), normal(8, 5, 44)
    plain = np.concatenate([ops.linear(x, ops.pack([t])) for t in tensors], axis=1)
    weight = ops.pack(tensors, bias)
    assert (weight.rows, weight.columns, weight.kernel) == (44, 96, f"{isa} u4x32min+s8x32+f16+bf16")
    assert weight.nbytes >= sum(t.nbytes for t in tensors)
    np.testing.assert_array_equal(ops.linear(x, weight), plain + bias)
    np.testing.assert_array_equal(ops.linear(x, weight, residual), plain + bias + residual)
    np.testing.assert_array_equal(ops.linear(x, ops.pack(tensors), residual), plain + residual)


ROUNDINGS = {"int8_token": None, "int8_static": 0.02, "llm_int8": None}


def with_outliers(n: int, columns: int) -> np.ndarray:
    x = normal(9, n, columns)
    x[1::2, :: max(1, columns // 3)] *= np.float32(30)
    x[2::5] = 0
    return x


@pytest.mark.parametrize("activations", ROUNDINGS)
@pytest.mark.parametrize(
    ("name", "columns"),
    [("int8_row", 300), ("int8_cs", 33), ("int4_g32", 96), ("q2_k", 256), ("nf4", 64), ("int8_csf", 33), ("int4_g32sf", 96)],
)
def test_one_scale_for_a_row(name: str, columns: int, activations: str, isa: str) -> None:
    tensor, scale = make(name, ROWS, columns), ROUNDINGS[activations]
    weight = ops.pack([tensor], activations=activations, scale=scale)
    assert weight.kernel.endswith({"int8_token": " by token", "int8_static": " by tensor", "llm_int8": " outliers apart"}[activations])
    x = with_outliers(40, columns)
    want = reference.linear(x, reference.pack([tensor], activations=activations, scale=scale))
    # Fixed-point outliers are half a step of 15 bits off, and as large as 100; the table of nf4 has 15 bits.
    atol = (1e-4 if name != "nf4" else 2e-2) * np.abs(x).max(axis=1, keepdims=True).clip(1)
    for n in (1, 16, 17, 40):
        got = ops.linear(np.ascontiguousarray(x[:n]), weight)
        assert (np.abs(got - want[:n]) <= atol[:n]).all(), np.abs(got - want[:n]).max()
        alone = [ops.linear(x[i : i + 1], weight) for i in range(n)] if activations == "llm_int8" else [got]
        np.testing.assert_array_equal(got, np.concatenate(alone))  # a token's result does not depend on those beside it


@pytest.mark.parametrize("threshold", [6.0])
def test_llm_int8_against_the_paper(threshold: float, isa: str) -> None:
    """Token by token, and for a batch whose outliers are in the same columns; where they are not, the paper keeps more in 16 bits."""
    w = normal(1, 18, 70)
    tensor = get_format("int8_row").quantize(w)
    codes, constants = llm_int8_loops.quantize_rows(w.astype(float).tolist())
    np.testing.assert_array_equal(tensor.fields["codes"], codes)
    x = normal(2, 20, 70).clip(-4, 4)
    x[:, [3, 40, 41, 69]] = np.sign(x[:, [3, 40, 41, 69]]) * (6 + 20 * np.abs(x[:, [3, 40, 41, 69]]))
    want, outliers = llm_int8_loops.decomposed_product(x.astype(float).tolist(), codes, constants, threshold)
    assert outliers == [3, 40, 41, 69]
    weight = ops.pack([tensor], activations="llm_int8")
    for n in (1, 20):
        np.testing.assert_allclose(ops.linear(np.ascontiguousarray(x[:n]), weight), want[:n], rtol=0, atol=0.03)
    plain = ops.linear(x, ops.pack([tensor], activations="int8_token"))
    assert np.abs(plain - want).max() > 10 * np.abs(ops.linear(x, weight) - want).max()
    x[5, 7] = 7  # of one token only
    want, outliers = llm_int8_loops.decomposed_product(x[5:6].astype(float).tolist(), codes, constants, threshold)
    assert outliers == [3, 7, 40, 41, 69]
    np.testing.assert_allclose(ops.linear(x, weight)[5:6], want, rtol=0, atol=0.03)


def test_static_scales_cut_off(isa: str) -> None:
    tensor = get_format("int8_row").quantize(np.eye(32, dtype=np.float32))
    x = np.linspace(-3, 3, 32, dtype=np.float32)[None].repeat(20, axis=0)
    for rows in (1, 20):
        got = ops.linear(x[:rows], ops.pack([tensor], activations="int8_static", scale=1 / 127))
        np.testing.assert_allclose(got, np.rint(x[:rows].clip(-1, 1) * 127) / 127, atol=1e-6)


def test_zeros_tiny_and_huge_inputs(isa: str) -> None:
    tensor = make("q4_0", 16, 64)
    weight, w = ops.pack([tensor]), get_format("q4_0").dequantize(tensor).astype(np.float64)
    x = normal(1, 1, 64)
    assert not ops.linear(np.zeros((2, 64), np.float32), weight).any()
    assert not ops.linear(x * np.float32(1e-36), weight).any()  # below 1e-30 a group counts as zero
    for scale in (1e-25, 1e30):
        y = x * np.float32(scale)
        np.testing.assert_allclose(ops.linear(y, weight), fine(y).astype(np.float64) @ w.T, rtol=0, atol=1e-4 * scale)
    assert np.isfinite(ops.linear(x, ops.pack([QuantizedTensor("q4_0", (16, 64), {"blocks": np.zeros((16, 36), np.uint8)})]))).all()


def test_scales_beyond_float16(isa: str) -> None:
    """MXFP4's powers of two and LLM.int8()'s float32 absmax exceed float16 either way; packing factors them out."""
    mxfp4, int8_row = make("mxfp4", 16, 64), make("int8_row", 16, 64)
    for power in (-100, -30, 30, 100):
        blocks = mxfp4.fields["blocks"].copy()
        blocks[:, [0, 17]] += np.uint8(power % 256)  # the exponents of the two blocks of a row
        scaled = {"codes": int8_row.fields["codes"], "scb": int8_row.fields["scb"] * np.float32(2.0**power)}
        for tensor in (QuantizedTensor("mxfp4", (16, 64), {"blocks": blocks}), QuantizedTensor("int8_row", (16, 64), scaled)):
            want = get_format(tensor.format).dequantize(tensor).astype(np.float64)
            np.testing.assert_allclose(weights_inside(ops.pack([tensor]), 16), want, rtol=1e-6, atol=1e-8 * 2.0**power)


def test_float32_scales_of_any_size_are_kept(isa: str) -> None:
    """Neighbouring groups of 1e-30 and 1e20, which no factor of the row brings into float16."""
    tensor = make("int4_g32sf", 16, 64)
    scale = tensor.fields["scale"] * np.array([[1e-30, 1e20]], np.float32)
    wide = QuantizedTensor("int4_g32sf", (16, 64), {**tensor.fields, "scale": scale})
    want = get_format("int4_g32sf").dequantize(wide).astype(np.float64)
    for rows in (16, 40):
        halves = isa == "amx" and rows > 16
        np.testing.assert_allclose(weights_inside(ops.pack([wide]), rows), want, rtol=2.0**-8 if halves else 1e-6, atol=0)


def test_absmax_beyond_float16(isa: str) -> None:
    tensor = get_format("nf4").quantize(normal(1, 16, 64) * np.float32(1e6))
    want = get_format("nf4").dequantize(tensor).astype(np.float64)
    np.testing.assert_allclose(weights_inside(ops.pack([tensor]), 16), want, rtol=2.0**-11 + 7.2e-5)


def test_bad_arguments() -> None:
    weight = ops.pack([make("q8_0", 16, 64)])
    with pytest.raises(FormatError, match="unknown activations 'int4'; known: float, int8, int8_static, int8_token, llm_int8"):
        ops.pack([make("q8_0", 16, 64)], activations="int4")
    for activations, scale in (("int8_static", None), ("int8_token", 0.1), ("float", 0.1)):
        with pytest.raises(FormatError, match=f"activations {activations}: scale is .*; int8_static needs one"):
            ops.pack([make("q8_0", 16, 64)], activations=activations, scale=scale)
    for scale in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(FormatError, match=r"activations int8_static: scale .*; need a positive number"):
            ops.pack([make("q8_0", 16, 64)], activations="int8_static", scale=scale)
    with pytest.raises(ValueError, match="pack: rounding 'row', need groups, token, tensor or outlier"):
        _native.pack([ops._stored(make("q8_0", 16, 64))], None, "row", 0.0)
    with pytest.raises(ValueError, match="pack: threshold 0, need a positive number"):
        _native.pack([ops._stored(make("q8_0", 16, 64))], None, "outlier", 0.0)
    with pytest.raises(ValueError, match="pack: columns: got 32, need 64"):
        ops.pack([make("q8_0", 16, 64), make("q8_0", 16, 32)])
    with pytest.raises(ValueError, match="pack: bias: got 15, need 16"):
        ops.pack([make("q8_0", 16, 64)], np.zeros(15, np.float32))
    with pytest.raises(ValueError, match="pack: no tensors"):
        ops.pack([])
    with pytest.raises(ValueError, match="linear: columns of x: got 63, need 64"):
        ops.linear(np.zeros((2, 63), np.float32), weight)
    with pytest.raises(ValueError, match="linear: rows of residual: got 1, need 2"):
        ops.linear(np.zeros((2, 64), np.float32), weight, np.zeros((1, 16), np.float32))
    with pytest.raises(ValueError, match="linear: columns of residual: got 15, need 16"):
        ops.linear(np.zeros((2, 64), np.float32), weight, np.zeros((2, 15), np.float32))
    with pytest.raises(ValueError, match="q8_0: bytes of a row of blocks: got 67, need 68"):
        ops.pack([QuantizedTensor("q8_0", (16, 64), {"blocks": np.zeros((16, 67), np.uint8)})])
    with pytest.raises(ValueError, match="q8_0: rows of blocks: got 15, need 16"):
        ops.pack([QuantizedTensor("q8_0", (16, 64), {"blocks": np.zeros((15, 68), np.uint8)})])
    with pytest.raises(ValueError, match="q8_0: field 'blocks' is missing"):
        ops.pack([QuantizedTensor("q8_0", (16, 64), {})])
    with pytest.raises(ValueError, match="embed: token 16, need 0 to 15"):
        ops.embed(make("q8_0", 16, 64), np.array([0, 16], np.int32))
    with pytest.raises(ValueError, match="embed: token -1, need 0 to 15"):
        ops.embed(make("q8_0", 16, 64), np.array([-1], np.int32))
