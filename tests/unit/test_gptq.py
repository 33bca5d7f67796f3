"""gptq against the paper's loops, least squares and brute force."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from oracles import gptq_loops
from tersor import _native
from tersor.errors import FormatError, ModelError, RecipeError
from tersor.formats import FORMATS, get_format, ordered, outliers
from tersor.formats.grid import basis, free_parameters, grid_of
from tersor.methods import feedback
from tersor.methods.gptq import GptqOptions, asymmetric_target, gptq
from tersor.methods.hessian import Damped, factorize
from tersor.methods.refine import _State, refine
from tersor.tensor import InputStatistics

ENCODERS = [name for name, f in FORMATS.items() if f.can_encode]
CODED = [name for name in ENCODERS if name not in ("f32", "f16", "bf16")]
PLAIN = GptqOptions(search=False, refine=0)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(5, size=shape) * 0.05).astype(np.float32)


def inputs(n: int, tokens: int = 1000, seed: int = 1) -> np.ndarray:
    """Inputs whose columns are correlated and of unlike size."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((n, n)) * np.exp(-np.arange(n) / 40)[:, None]
    return rng.standard_normal((tokens, n)) @ mix + 0.3 * rng.standard_normal((tokens, n))


def statistics(x: np.ndarray, cross: np.ndarray | None = None) -> InputStatistics:
    gram = x.T @ x / len(x)
    mean_abs, absmax = np.abs(x).mean(axis=0).astype(np.float32), np.abs(x).max(axis=0).astype(np.float32)
    return InputStatistics(len(x), np.diag(gram).astype(np.float32), mean_abs, absmax, gram, cross)


def objective(name: str, tensor, w: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """e H e^T of every row, in float64."""
    errors = FORMATS[name].dequantize(tensor).astype(np.float64) - w
    return np.einsum("rc,cd,rd->r", errors, gram, errors)


def tables(f, params, rows: int, columns: int) -> np.ndarray:
    """(codes, rows, columns): what every code decodes to, by the format's own decode; codes that are not written are infinite."""
    low, high = (-127, 127) if f.name == "int8_row" else (0, {"q8_0": 255, "tq1_0": 2, "tq2_0": 2}.get(f.name, 2 ** round(f.bits) - 1))
    if f.name.startswith("ternary"):
        high = 2
    dtype = np.int8 if low < 0 else np.uint8
    return np.stack([f.decode(np.full((rows, columns), c, dtype=dtype), params) for c in range(low, high + 1)])


# Some of every family; columns wide enough for several groups and for tiles that end inside a group.
ORACLE = ("int4_g64s", "int3_g32", "int2_g32m", "int4_g96", "int8_c", "int4_t", "int1_g32m", "nf4", "fp4", "q4_0", "q5_1", "iq4_nl")
ORACLE += ("mxfp4", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs", "tq2_0", "binary_g64", "ternary_g32", "int8_row")


@pytest.mark.parametrize("name", ORACLE)
@pytest.mark.parametrize("search", [False, True])
def test_codes_are_those_of_the_papers_algorithm(name, search):
    f = FORMATS[name]
    rows, columns = 3, 512 if f.group_size == 256 else 192
    w, calibration = weights(rows, columns), statistics(inputs(columns))
    size = columns if f.group_size <= 0 else f.group_size

    def fit(group, importance):
        w32 = np.ascontiguousarray(group, dtype=np.float32)
        if not f.row_independent:
            importance = np.diag(calibration.gram)
        params = feedback.fit(f, w32, importance, search)
        values = tables(f, params, *group.shape)
        return lambda column: values[:, :, column]

    codes, _ = f.unpack(gptq(w, f, calibration, GptqOptions(search=search, refine=0, damp=0.01)))
    expected = gptq_loops.gptq(w, calibration.gram, 0.01, size, fit)
    if name == "int8_row":
        expected -= 127
    if name in ("fp4", "mxfp4"):  # two codes stand for 0
        codes, expected = np.where(codes == 8, 0, codes), np.where(expected == 8, 0, expected)
    assert np.array_equal(codes, expected)


@pytest.mark.parametrize("name", ["int4_g64s", "q4_k", "nf4", "int3_g32m"])
def test_act_order_is_the_papers_algorithm_on_columns_by_falling_diagonal(name):
    f = get_format(name)
    columns = 256
    w, calibration = weights(3, columns), statistics(inputs(columns))
    params = f.unpack(gptq(w, f, calibration, GptqOptions(refine=0, damp=0.01)))[1]  # of the first pass
    values = tables(f, params, *w.shape)
    order = np.argsort(-np.diag(calibration.gram), kind="stable")
    expected = gptq_loops.gptq(w, calibration.gram, 0.01, columns, lambda *_: lambda k: values[:, :, k], order)
    codes, kept = f.unpack(gptq(w, f, calibration, GptqOptions(act_order=True, refine=0, damp=0.01)))
    assert np.array_equal(codes, expected)
    assert all(np.array_equal(kept[p], params[p]) for p in params)


@pytest.mark.parametrize("name", [name for name in CODED if name not in (*ordered.EXAMPLES, *outliers.EXAMPLES)])
def test_the_grid_is_what_decode_says(name):
    f = FORMATS[name]
    w = weights(3, 768)
    codes, params = f.unpack(f.quantize(w))
    grid = grid_of(f, params, 3)
    level = {int(c): v for c, v in zip(grid.codes, grid.levels)}
    values = np.array([[level[int(c)] for c in row] for row in codes], dtype=np.float32)
    size = 768 // grid.step.shape[1]
    spanned = np.repeat(grid.step, size, axis=1) * values + np.repeat(grid.offset, size, axis=1)
    if name == "int8_row":  # decoded in bitsandbytes' order, (q * scb) * (1 / 127)
        np.testing.assert_allclose(spanned, f.decode(codes, params), rtol=3 * 2.0**-24)
    elif (getattr(f, "wide", False) and "zero" in f.layout()) or name.endswith("sf"):  # both products are rounded, of up to 2^B steps
        most = 2.0**-23 * f.max_code * np.repeat(grid.step, size, axis=1)
        assert (np.abs(spanned - f.decode(codes, params)) <= most).all()
    else:
        assert np.array_equal(spanned, f.decode(codes, params))
    assert (np.diff(grid.levels) > 0).all()
    names = free_parameters(f)
    if names:
        parts = [
            np.repeat(params[p].astype(np.float32), 768 // params[p].shape[1], axis=1) * b for p, b in zip(names, basis(f, codes, params))
        ]
        np.testing.assert_allclose(sum(parts), f.decode(codes, params), rtol=1e-4, atol=1e-6)


def test_the_factor_is_that_of_the_damped_hessian_in_its_order():
    gram = statistics(inputs(96)).gram
    order = np.random.default_rng(0).permutation(96)
    factor = factorize(gram, order, 0.01, "test")
    upper = np.triu(factor.feedback(slice(0, 96), slice(0, 96)).astype(np.float64))
    damped = gram + 0.01 * np.trace(gram) / 96 * np.eye(96)
    np.testing.assert_allclose(upper * factor.diagonal @ upper.T, damped[np.ix_(order, order)], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(factor.solve(gram), np.linalg.solve(damped, gram.T).T, atol=1e-8)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_format_gets_less_than_rtn_and_refinement_never_raises_it(name):
    f = FORMATS[name]
    w, calibration = weights(2, 4, 768), statistics(inputs(768))
    kept = w.copy()
    rtn, plain, full = (
        f.quantize(w),
        gptq(w, f, calibration, GptqOptions(refine=0, damp=0.01)),
        gptq(w, f, calibration, GptqOptions(damp=0.01, refine=3)),
    )
    assert full.format == name and full.shape == w.shape and full.nbytes == f.nbytes(w.shape) and np.array_equal(w, kept)
    damped = calibration.gram + 0.01 * np.trace(calibration.gram) / 768 * np.eye(768)
    of = [objective(name, as_matrix(t), w.reshape(8, 768), damped) for t in (rtn, plain, full)]
    if name not in CODED:
        assert of[0].sum() == of[2].sum()
        return
    assert of[1].sum() < 0.5 * of[0].sum()
    assert of[2].sum() < 0.9 * of[1].sum()
    if f.row_independent and not name.endswith("_dq"):
        assert (of[2] <= of[1] * (1 + 1e-5)).all()


def as_matrix(tensor):
    """The tensor with its rows in one axis."""
    return replace(tensor, shape=(tensor.rows, tensor.columns))


@pytest.mark.parametrize("name", ["int4_g64", "q2_k", "nf4_dq", "int4_t"])
def test_any_number_of_threads_gives_the_same_bytes(name):
    before = _native.threads()
    w, calibration = weights(33, 512), statistics(inputs(512))
    seen = set()
    try:
        for threads in (1, 2, 3):
            _native.set_threads(threads)
            seen.add(b"".join(field.tobytes() for field in gptq(w, get_format(name), calibration).fields.values()))
    finally:
        _native.set_threads(before)
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["int4_g64s", "q3_k", "nf4", "int4_t"])
def test_every_instruction_set_gives_the_same_bytes(name):
    w, calibration = weights(33, 512), statistics(inputs(512))
    seen = set()
    try:
        for isa in _native.isas():
            _native.force_isa(isa)
            seen.add(b"".join(field.tobytes() for field in gptq(w, get_format(name), calibration).fields.values()))
    finally:
        _native.force_isa("")
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["int4_g64s", "q3_k", "nf4"])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_format_without_a_grid_is_rounded_by_its_own_encode(name, act_order, monkeypatch):
    f = get_format(name)
    w, calibration = weights(3, 256), statistics(inputs(256))
    options = GptqOptions(act_order=act_order, refine=0)
    expected = gptq(w, f, calibration, options)
    monkeypatch.setattr(feedback, "grid_of", lambda *_: None)
    monkeypatch.setattr("tersor.methods.refine.grid_of", lambda *_: None)
    got = gptq(w, f, calibration, options)
    assert all(np.array_equal(got.fields[k], expected.fields[k]) for k in expected.fields)
    refined = gptq(w, f, calibration, replace(options, refine=3))  # as it is without a grid
    assert all(np.array_equal(refined.fields[k], expected.fields[k]) for k in expected.fields)


@pytest.mark.parametrize("name", ["int3_g32", "q4_k", "nf4", "mxfp4"])
def test_a_sweep_of_descent_is_that_of_the_loops(name):
    f = get_format(name)
    columns = 256 if name == "q4_k" else 96
    if name == "nf4":
        columns = 128
    w, gram = weights(1, columns), statistics(inputs(columns)).gram
    codes, params = f.unpack(f.quantize(w))
    values = tables(f, params, *w.shape)
    expected = gptq_loops.descend(w.astype(np.float64), gram, lambda k: values[:, :, k], codes.astype(int))
    got, gradient = _State(w, f, codes, params, Damped(gram, 0.0)).descended()
    assert not np.array_equal(codes, expected)
    zero = lambda c: np.where(c == 8, 0, c) if name == "mxfp4" else c  # noqa: E731
    assert np.array_equal(zero(got), zero(expected))
    errors = f.decode(got, params).astype(np.float64) - w
    np.testing.assert_allclose(gradient, errors @ gram, rtol=1e-3, atol=1e-4 * np.abs(errors @ gram).max())


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (16, 32), (1, 128), (2, 128), (3, 128)])
@pytest.mark.parametrize("name", ["int4_g32", "int2_g32", "int3_g32m"])
def test_refinement_of_small_matrices_never_raises_the_objective(name, rows, columns):
    f = get_format(name)
    for seed in range(8):
        generator = np.random.default_rng(seed)
        w = generator.standard_normal((rows, columns)).astype(np.float32)
        gram = statistics(inputs(columns)).gram
        codes, params = f.unpack(gptq(w, f, statistics(inputs(columns)), GptqOptions(refine=0)))
        of = []
        for c, p in ((codes, params), refine(w, f, codes, params, Damped(gram, 0.01), 2)):
            errors = f.decode(c, p).astype(np.float64) - w
            of.append(np.einsum("rc,cd,rd->r", errors, gram + 0.01 * np.eye(columns), errors))
        assert (of[1] <= of[0] * (1 + 1e-5)).all() and of[1].sum() < of[0].sum()


@pytest.mark.parametrize("name", ["int3_g32", "int4_g64m", "nf4", "q4_k", "q3_k", "int8_row", "ternary_g64"])
def test_stored_floats_are_the_least_squares_solution(name):
    f = get_format(name)
    x = inputs(512, 2000)
    w = weights(2, 512)
    codes, params = f.unpack(f.quantize(w))
    names = free_parameters(f)
    units = params[names[0]].shape[1]
    solved, _ = _State(w, f, codes, params, Damped(x.T @ x / len(x), 0.0)).solved()
    spans = basis(f, codes, params)
    for row in range(2):
        design = [np.where(np.arange(512) // (512 // units) == u, span[row], 0) @ x.T for span in spans for u in range(units)]
        theta, *_ = np.linalg.lstsq(np.array(design).T, x @ w[row], rcond=None)
        got = np.concatenate([solved[p][row].ravel() for p in names])
        np.testing.assert_allclose(got, theta, rtol=5e-3, atol=2e-4 * np.abs(theta).max())


@pytest.mark.parametrize("name", ["int3_g32", "int4_g64m", "nf4", "q4_k", "q3_k", "int8_row", "ternary_g64", "int8_t"])
def test_refinement_knows_its_gradient_and_objective_without_making_them_anew(name):
    f, x, w = get_format(name), inputs(512, 2000), weights(4, 512)
    gram = x.T @ x / len(x)
    damped = gram + 0.1 * np.eye(512)
    codes, params = f.unpack(f.quantize(w))
    state = _State(w, f, codes, params, Damped(gram, 0.1))

    def errors():
        return f.decode(state.codes, state.params).astype(np.float64) - w

    start = state.objective.sum()
    state.descend()
    assert not np.array_equal(state.codes, codes)
    bound = 512 * 2**-24 * np.abs(errors() @ damped).max()  # float32, 512 additions
    np.testing.assert_allclose(state.gradient, errors() @ damped, atol=bound)
    state.solve()
    expected = np.einsum("ri,ij,rj->r", errors(), damped, errors())
    if not f.row_independent:  # its rows change together, so only the sum is known
        np.testing.assert_allclose(state.objective.sum(), expected.sum(), rtol=1e-4)
    else:
        np.testing.assert_allclose(state.objective, expected, rtol=1e-4)
    assert state.objective.sum() < start
    np.testing.assert_allclose(state.gradient, errors() @ damped, atol=bound)


def test_the_asymmetric_target_is_the_least_squares_solution():
    x = inputs(64, 600)
    unquantized = x + 0.1 * np.random.default_rng(5).standard_normal(x.shape)
    w = weights(5, 64)
    calibration = statistics(x, unquantized.T @ x / len(x))
    factor = factorize(calibration.gram, np.arange(64), 1e-10, "test")
    best, *_ = np.linalg.lstsq(x, unquantized @ w.T.astype(np.float64), rcond=None)
    got = asymmetric_target(w, calibration.gram, calibration.cross, factor, 1.0)
    np.testing.assert_allclose(got, best.T, atol=1e-5)
    half = asymmetric_target(w, calibration.gram, calibration.cross, factor, 0.5)
    np.testing.assert_allclose(half, (w + best.T) / 2, atol=1e-5)


def test_asymmetric_brings_the_outputs_nearer_to_the_unquantized_models():
    x = inputs(256, 2000)
    unquantized = x * 1.05 + 0.3 * np.random.default_rng(5).standard_normal(x.shape)
    w, f = weights(8, 256), get_format("int4_g64")
    calibration = statistics(x, unquantized.T @ x / len(x))

    def miss(share: float) -> float:
        w_hat = f.dequantize(gptq(w, f, calibration, GptqOptions(asymmetric=share)))
        return float(np.square(unquantized @ w.T - x @ w_hat.T).sum())

    assert miss(1.0) < miss(0.5) < miss(0.0)


def test_damping_grows_until_the_hessian_is_positive_definite():
    x = inputs(64, 20)  # rank 20 of 64
    gram = x.T @ x / 20 - 1e-2 * np.trace(x.T @ x / 20) / 64 * np.eye(64)
    factor = factorize(gram, np.arange(64), 1e-4, "test")
    assert factor.damp == pytest.approx(0.1)
    assert factorize(statistics(inputs(64)).gram, np.arange(64), 1e-4, "test").damp == 1e-4


def test_a_column_without_inputs_keeps_its_weight():
    x = inputs(128)
    x[:, 70] = 0
    w, f = weights(4, 128), get_format("int4_g64")
    w_hat = f.dequantize(gptq(w, f, statistics(x)))
    assert (np.abs(w_hat - w)[:, 70] < 0.05).all() and np.abs(w_hat[:, 70]).max() > 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g: None, "no Hessian"),
        (lambda g: g[:-1, :-1], r"shape \(63, 63\); need \(64, 64\)"),
        (lambda g: np.where(np.eye(64) > 0, np.nan, g), "not finite"),
        (lambda g: np.zeros_like(g), "only zeros"),
        (lambda g: g - 100 * np.eye(64) * np.diag(g).max(), "its diagonal holds -"),
        (lambda g: np.ones_like(g) * 9 - 8 * np.eye(64) + 99 * np.eye(64, k=1) + 99 * np.eye(64, k=-1), "even with 1 times"),
    ],
)
def test_bad_hessians_are_refused(change, text):
    calibration = statistics(inputs(64))
    calibration = replace(calibration, gram=change(calibration.gram))
    with pytest.raises(ModelError, match=f"gptq:int4_g64: .*{text}"):
        gptq(weights(2, 64), get_format("int4_g64"), calibration)


def test_no_statistics_are_refused():
    with pytest.raises(ModelError, match="no Hessian"):
        gptq(weights(2, 64), get_format("int4_g64"), None)


def test_formats_that_do_not_fit_are_refused():
    with pytest.raises(FormatError, match="iq1_s can be decoded but not encoded"):
        gptq(weights(2, 256), get_format("iq1_s"), statistics(inputs(256)))
    with pytest.raises(FormatError, match="65 columns, not a multiple of 64"):
        gptq(weights(2, 65), get_format("int4_g64"), statistics(inputs(65)))


@pytest.mark.parametrize("bad", [{"damp": 0.0}, {"damp": 2.0}, {"refine": -1}, {"asymmetric": 1.5}])
def test_bad_options_are_refused(bad):
    with pytest.raises(RecipeError, match=f"gptq: {next(iter(bad))}=.*need"):
        GptqOptions(**bad)


def test_refinement_changes_nothing_when_the_codes_are_exact():
    f = get_format("int4_g64")
    w = f.dequantize(f.quantize(weights(4, 128)))
    codes, params = f.unpack(f.quantize(w))
    again, kept = refine(w, f, codes, params, Damped(statistics(inputs(128)).gram, 0.1), 5)
    assert np.array_equal(codes, again) and all(np.array_equal(params[p], kept[p]) for p in params)


def moments(n: int, seed: int = 3) -> np.ndarray:
    """Second moments of outputs' gradients that are correlated, (n, n) float32."""
    g = inputs(n, tokens=4 * n, seed=seed)
    return (g.T @ g / len(g)).astype(np.float32)


@pytest.mark.parametrize("name", ["int4_g64s", "int3_g32", "q4_k", "iq4_nl", "int8_row"])
def test_rows_make_up_for_the_rows_before_them(name, monkeypatch):
    """Each four rows beside the least of tr(G E H E^T) over the rows to come, solved from its definition, and rounded by plain GPTQ."""
    monkeypatch.setattr(sys.modules["tersor.methods.gptq"], "OUTPUT_ROWS", 4)  # the package has a function of this name
    f, columns = FORMATS[name], 256
    w, calibration = weights(14, columns), statistics(inputs(columns))
    outputs = moments(8), moments(6, seed=4)
    found = gptq(w, f, replace(calibration, outputs=outputs), GptqOptions(fisher=True))
    decoded, wanted, first = f.dequantize(found), [], 0
    for g in outputs:
        damped = g.astype(np.float64) + 0.1 * np.mean(np.diagonal(g)) * np.eye(len(g))
        for begin in range(0, len(g), 4):
            rest, end = slice(begin, None), min(begin + 4, len(g))
            before = w[first : first + begin].astype(np.float64) - decoded[first : first + begin]
            shift = np.linalg.solve(damped[rest, rest], damped[rest, :begin] @ before)[: end - begin]
            target = (w[first + begin : first + end] + shift).astype(np.float32)
            wanted.append(f.dequantize(gptq(target, f, calibration)))
        first += len(g)
    assert np.mean(np.isclose(decoded, np.concatenate(wanted), rtol=1e-4, atol=1e-6)) > 0.98  # a tie may fall the other way


@pytest.mark.parametrize("options", [GptqOptions(fisher=True), GptqOptions(fisher=True, act_order=True)])
@pytest.mark.parametrize("name", ["int3_g32", "q3_k", "nf4", "nf4_dq"])
def test_outputs_that_count_together_cost_less_together(name, options):
    f, columns, rows = FORMATS[name], 256, 200
    w, calibration, g = weights(rows, columns), statistics(inputs(columns)), moments(rows)
    errors = []
    for outputs in ((), (g,)):
        e = f.dequantize(gptq(w, f, replace(calibration, outputs=outputs), options)).astype(np.float64) - w
        errors.append(float(np.sum((g @ e) * (e @ calibration.gram))))
    if f.row_independent:
        assert errors[1] < 0.8 * errors[0], errors
    else:
        assert errors[1] == errors[0]  # rows that share parameters are rounded as one


@pytest.mark.parametrize("name", ["int4_g64so", "int8_row_x6"])
def test_columns_in_another_order_or_apart_keep_what_outputs_cost(name):
    f, columns, g = FORMATS[name] if name in FORMATS else get_format(name), 256, moments(96)
    w, calibration = weights(96, columns), statistics(inputs(columns))
    errors = []
    for outputs in ((), (g,)):
        e = f.dequantize(gptq(w, f, replace(calibration, outputs=outputs), GptqOptions(fisher=True))).astype(np.float64) - w
        errors.append(float(np.sum((g @ e) * (e @ calibration.gram))))
    assert errors[1] < 0.8 * errors[0], errors


def test_outputs_that_no_gradient_reaches_count_alike():
    f, w, calibration = FORMATS["int4_g64s"], weights(40, 128), statistics(inputs(128))
    half = gptq(w, f, replace(calibration, outputs=(np.zeros((20, 20), np.float32), moments(20))), GptqOptions(fisher=True))
    apart = gptq(w[:20], f, calibration, GptqOptions(fisher=True))
    assert np.array_equal(f.dequantize(half)[:20], f.dequantize(apart))


def test_outputs_of_another_layer_are_refused():
    with pytest.raises(ModelError, match=r"gradients were measured for 7 outputs; need 8, one for each row"):
        gptq(weights(8, 64), FORMATS["int4_g64s"], replace(statistics(inputs(64)), outputs=(moments(7),)), GptqOptions(fisher=True))
