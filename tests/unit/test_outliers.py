"""Formats with outlier columns in float16: what is stored, which columns, products against loops from the paper, hostile fields."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from oracles import llm_int8_loops
from tersor import _native, ops
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.engine import load
from tersor.errors import ContainerError, FormatError, RecipeError
from tersor.formats import get_format
from tersor.formats.outliers import OutlierFormat
from tersor.methods import METHODS
from tersor.ops import reference
from tersor.pipeline import quantize
from tersor.tensor import Array, InputStatistics, QuantizedTensor
from tiny import tiny_model

TOKENS = np.random.default_rng(0).integers(3, 300, (4, 48), dtype=np.int32)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def format_of(name: str) -> OutlierFormat:
    found = get_format(name)
    assert isinstance(found, OutlierFormat)
    return found


def statistics(x: Array) -> InputStatistics:
    gram = x.astype(np.float64).T @ x / len(x)
    return InputStatistics(len(x), np.diagonal(gram).astype(np.float32), np.abs(x).mean(0), np.abs(x).max(0), gram)


def stored(f: OutlierFormat, w: Array, outliers: list[int]) -> QuantizedTensor:
    """w with these columns apart."""
    rest = [column for column in range(w.shape[1]) if column not in outliers]
    return f.of(f.plain.quantize(w[:, rest]), w, np.array(outliers, np.int32))


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU in turn."""
    _native.force_isa(request.param)
    yield request.param
    _native.force_isa("")


# --- what is stored -------------------------------------------------------------------------------------------------------


def test_columns_lie_where_the_layout_says() -> None:
    """By hand: 5 columns, 1 and 3 apart; row 0 has absmax 127, row 1 absmax 254 in the others."""
    w = np.array([[127, 1000, -64, 0.1, 1], [254, -2000, 2, 65504, -128]], np.float32)
    tensor = stored(format_of("int8_row_x2"), w, [1, 3])
    assert tensor.fields["codes"].tolist() == [[127, -64, 1], [127, 1, -64]]
    assert tensor.fields["scb"].tolist() == [[127], [254]]
    assert tensor.fields["outliers"].tolist() == [1, 3] and tensor.fields["outliers"].dtype == np.int32
    assert tensor.fields["outlier"].tolist() == [[1000, float(np.float16(0.1))], [-2000, 65504]]
    assert tensor.nbytes == 2 * 3 + 2 * 4 + 2 * 4 + 2 * 2 * 2 == get_format("int8_row_x2").nbytes((2, 5))
    want = np.array([[127, 1000, -64, np.float16(0.1), 1], [254, -2000, 2, 65504, -128]])
    np.testing.assert_allclose(get_format("int8_row_x2").dequantize(tensor), want, rtol=1e-6)


def test_which_columns() -> None:
    f, w = format_of("int8_row_x3"), random(6, 40)
    w[:, [7, 30, 31]] *= 5
    assert f.fit(w)["outliers"].tolist() == [7, 30, 31]  # the largest sums of squares
    assert f.largest(np.array([1, 2, 1, 5, 1, 1], np.float32)).tolist() == [0, 1, 3]  # of equal ones the first
    clipped, plain = (np.square(f.dequantize(t) - w).sum() for t in (f.quantize_clipped(w), f.quantize(w)))
    assert clipped <= plain


@pytest.mark.parametrize("name", ["int8_row_x0", "int8_row_x", "int8_row_x06", "int8_cs_x4", "int8_row_x-1"])
def test_names_without_such_a_format_are_unknown(name: str) -> None:
    with pytest.raises(FormatError, match="unknown format"):
        get_format(name)


def test_too_many_columns_are_refused() -> None:
    for name in ("int8_row_x1025", "int8_row_x" + "9" * 300):
        with pytest.raises(FormatError, match=r"columns apart; need 1 to 1024"):
            get_format(name)
    with pytest.raises(FormatError, match="int8_row_x6: layer has 6 columns, not more than the 6 apart; use f16"):
        get_format("int8_row_x6").check((4, 6), "layer")


BAD = {
    "beyond": ("outliers", np.array([1, 40], np.int32), r"outliers are \[1, 40\]...; need rising columns in 0..39"),
    "below": ("outliers", np.array([-1, 4], np.int32), r"need rising columns in 0..39"),
    "twice": ("outliers", np.array([4, 4], np.int32), r"need rising columns"),
    "falling": ("outliers", np.array([5, 4], np.int32), r"need rising columns"),
    "overflow": ("outliers", np.array([-(2**31), 2**31 - 1], np.int32), r"need rising columns"),
    "too few": ("outliers", np.array([4], np.int32), r"outliers are int32 \(1,\); need int32 \(2,\)"),
    "wide": ("outliers", np.array([4, 5], np.int64), r"outliers are int64 \(2,\); need int32"),
    "float32": ("outlier", np.zeros((3, 2), np.float32), r"outlier is float32 \(3, 2\), codes \(3, 38\); need float16 \(3, 2\)"),
    "short": ("outlier", np.zeros((2, 2), np.float16), r"outlier is float16 \(2, 2\)"),
    "codes": ("codes", np.zeros((3, 40), np.int8), r"codes \(3, 40\); need float16 \(3, 2\) and \(3, 38\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_fields_that_do_not_fit_each_other_are_refused(what: str) -> None:
    f, (field, value, message) = format_of("int8_row_x2"), BAD[what]
    tensor = f.quantize(random(3, 40))
    bad = QuantizedTensor(tensor.format, tensor.shape, {**tensor.fields, field: value})
    for use in (f.dequantize, f.unpack, lambda t: ops.pack([t])):
        with pytest.raises(FormatError, match=f"int8_row_x2: .*{message}"):
            use(bad)


# --- products -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["int8_token", "llm_int8"])
@pytest.mark.parametrize("threads", [1, 3])
def test_products_are_the_papers(activations: str, threads: int, isa: str) -> None:
    """Equation 8, with the outlier columns of section 3.2 in the first and last place and side by side."""
    w, x, outliers = random(18, 70), random(20, 70, seed=2).clip(-4, 4), [0, 40, 41, 69]
    w[:, outliers] = (w[:, outliers] * 40).astype(np.float16)
    x[:, outliers] *= 25
    x[3, 7], x[9, 12] = 9, -30  # outliers of one token that no calibration saw
    x[5] = 0
    threshold = 6.0 if activations == "llm_int8" else None
    want = np.array(llm_int8_loops.stored_product(x.astype(float).tolist(), w.astype(float).tolist(), outliers, threshold))
    tensor = stored(format_of("int8_row_x4"), w, outliers)
    weight = ops.pack([tensor], activations=activations)
    before = _native.threads()
    try:
        _native.set_threads(threads)
        for n in (1, 16, 17, 20):
            got = ops.linear(np.ascontiguousarray(x[:n]), weight)
            # float32 sums of numbers up to 5e4; fixed-point inputs of 15 bits beyond the threshold
            np.testing.assert_allclose(got, want[:n], rtol=0, atol=0.02 if threshold else 0.005)
    finally:
        _native.set_threads(before)
    plain = ops.linear(x, ops.pack([get_format("int8_row").quantize(w)], activations=activations))
    assert np.abs(plain - want).max() > 100 * np.abs(ops.linear(x, weight) - want).max()


@pytest.mark.parametrize("activations", ["int8", "int8_token", "llm_int8", "float"])
@pytest.mark.parametrize(("columns", "count"), [(7, 6), (33, 1), (96, 16), (300, 37)])
def test_products_agree_with_the_reference(columns: int, count: int, activations: str, isa: str) -> None:
    """Parts, bias and residual; inputs of columns apart a thousand times larger than the others do not touch the others' scales."""
    f, outliers = format_of(f"int8_row_x{count}"), sorted(np.random.default_rng(columns).permutation(columns)[:count].tolist())
    tensors = [stored(f, random(rows, columns, seed=rows), outliers) for rows in (37, 5)]
    x, bias, residual = random(40, columns, seed=3), random(42, seed=4), random(40, 42, seed=5)
    x[:, outliers] *= 1000
    plain = np.setdiff1d(np.arange(columns), outliers)
    others = max((np.abs(x[:, plain]) @ np.abs(f.dequantize(t)[:, plain]).T).max() for t in tensors)  # the largest sum of magnitudes
    weight = ops.pack(tensors, bias, activations)
    assert (weight.rows, weight.columns) == (42, columns) and f"&f16x{count}" in weight.kernel
    assert weight.nbytes >= sum(t.nbytes for t in tensors)
    rounded = reference.pack(tensors, bias, activations)
    for n in (1, 16, 17, 40):
        inputs = np.ascontiguousarray(x[:n])
        got = ops.linear(inputs, weight, np.ascontiguousarray(residual[:n]))
        want = reference.linear(inputs, rounded, residual[:n])
        # Matrix tiles round both factors of the other columns to 8 bits, the reference activations to 8.
        halves = 2.0**-6 * others if isa == "amx" and activations == "int8" and n > 16 else 0
        np.testing.assert_allclose(got, want, rtol=0, atol=2.0**-21 * 1000 * count**0.5 * 16 + halves)
        y = np.ascontiguousarray(residual[:n])
        _native.linear(inputs, weight, y, y)  # in place
        np.testing.assert_array_equal(y, got)
    alone = np.concatenate([ops.linear(x[i : i + 1], weight, residual[i : i + 1]) for i in range(16)])
    np.testing.assert_array_equal(ops.linear(x[:16], weight, residual[:16]), alone)


def test_different_columns_are_multiplied_as_floats() -> None:
    f, x = format_of("int8_row_x2"), random(3, 64, seed=3)
    tensors = [stored(f, random(16, 64), [1, 2]), stored(f, random(8, 64, seed=1), [1, 3])]
    weight = ops.pack(tensors)
    assert "f16" in weight.kernel and "&" not in weight.kernel
    want = x.astype(np.float64) @ np.concatenate([f.dequantize(t) for t in tensors]).T
    assert np.abs(ops.linear(x, weight) - want).max() < 2.0**-9 * np.abs(want).max()


def test_the_kernel_refuses_columns_apart_that_do_not_fit() -> None:
    plain = ops._stored(get_format("int8_row").quantize(random(16, 60)))
    order = np.arange(64, dtype=np.int32)

    def apart(rows: int, columns: int, dtype: str = "f16") -> object:
        return ops._stored(get_format(dtype).quantize(random(rows, columns)))

    good = _native.pack([plain], None, "groups", 0.0, order, [apart(16, 4)])
    assert good.columns == 64
    for tensors, given, message in (
        ([apart(16, 4)], None, "4 columns apart; they need an order"),
        ([apart(16, 3)], order, "order: got 64, need 63"),
        ([apart(15, 4)], order, "rows of columns apart: got 15, need 16"),
        ([apart(8, 4), apart(8, 3)], order, "columns apart: got 3, need 4"),
        ([apart(8, 4), apart(8, 4, "bf16")], order, "are bf16 and f16, need one float format"),
        ([ops._stored(get_format("int8_row").quantize(random(16, 4)))], order, "are int8_row and int8_row, need one float format"),
        ([apart(16, 4)], np.zeros(64, np.int32), "order is no permutation"),
    ):
        with pytest.raises(ValueError, match=f"pack: .*{message}"):
            _native.pack([plain], None, "groups", 0.0, given, tensors)


# --- the methods ----------------------------------------------------------------------------------------------------------


def test_llm_int8_is_the_papers() -> None:
    """The columns of the largest inputs as they are, the others absmax of their own: section 3.1 on what section 3.2 leaves."""
    w, x = random(7, 50), random(64, 50, seed=1)
    x[10, [4, 44]] = 60, -70  # one token is enough
    x[:, 9] *= 9  # the third
    x[:, 20] = 3  # large in the mean
    f = format_of("int8_row_x3")
    tensor = METHODS["llm_int8"].run(w.reshape(7, 50), f, statistics(x))
    assert tensor.fields["outliers"].tolist() == [4, 9, 44]
    rest = [column for column in range(50) if column not in (4, 9, 44)]
    codes, constants = llm_int8_loops.quantize_rows(w[:, rest].astype(float).tolist())
    np.testing.assert_array_equal(tensor.fields["codes"], codes)
    np.testing.assert_array_equal(tensor.fields["scb"][:, 0], np.float32(constants))
    np.testing.assert_array_equal(tensor.fields["outlier"], w[:, [4, 9, 44]].astype(np.float16))


def test_llm_int8_needs_inputs_for_it() -> None:
    f, w, run = format_of("int8_row_x3"), random(7, 50), METHODS["llm_int8"].run
    with pytest.raises(FormatError, match="llm_int8:int8_row_x3: no inputs were seen, but calibration says which of 50 columns"):
        run(w, f)
    with pytest.raises(FormatError, match="inputs of 49 columns were seen"):
        run(w, f, statistics(random(8, 49)))
    assert METHODS["rtn"].run(w, f).format == "int8_row_x3"


def test_gptq_rounds_the_others_alone() -> None:
    w, x, f = random(24, 96), random(400, 96, seed=1) * np.exp(random(96, seed=2)), format_of("int8_row_x4")
    tensor = METHODS["gptq"].run(w, f, statistics(x))
    outliers = tensor.fields["outliers"]
    assert outliers.tolist() == sorted(np.argsort(-np.abs(x).max(0))[:4].tolist())
    rest = np.setdiff1d(np.arange(96), outliers)
    plain = METHODS["gptq"].run(np.ascontiguousarray(w[:, rest]), f.plain, statistics(np.ascontiguousarray(x[:, rest])))
    np.testing.assert_array_equal(tensor.fields["codes"], plain.fields["codes"])


# --- through files --------------------------------------------------------------------------------------------------------


def test_a_model_is_calibrated_written_read_and_run(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "m", hidden=128)
    np.save(tmp_path / "tokens.npy", TOKENS)
    with pytest.raises(RecipeError, match="llm_int8 needs calibration data; give --calib"):
        quantize(source, tmp_path / "o", "llm_int8:int8_row_x6", to="onnx")
    calibration = {"calib": tmp_path / "tokens.npy", "samples": 4, "seqlen": 48, "force": True}
    result = quantize(source, tmp_path / "o", "llm_int8:int8_row_x6", to="onnx", **calibration)
    assert result.verification is not None and not result.verification.faults
    checkpoint = open_checkpoint(tmp_path / "o")
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    columns = [checkpoint.read(name).fields["outliers"].tolist() for name in names]
    assert columns[0] == columns[1] == columns[2]
    for name, info in checkpoint.tensors.items():
        if name.endswith("_proj.weight"):
            assert info.format == "int8_row_x6" and checkpoint.read(name).nbytes == info.nbytes
    model, exact = load(tmp_path / "o"), load(source, activations="float")
    assert any("&f16x6" in kernel for kernel in model.kernels)
    a, b = (m.head(m.forward(TOKENS[0], m.new_cache(64))) for m in (model, exact))
    assert np.sqrt(np.mean(np.square(a - b))) < 0.03 * b.std()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A biased tiny model in ONNX."""
    folder = tmp_path_factory.mktemp("o")
    source = tiny_model(folder / "m", "qwen2", hidden=128, layers=1)
    result = quantize(source, folder / "o", "rtn:int8_row_x6", to="onnx")
    assert result.verification is not None and not result.verification.faults
    return folder / "o"


Q = "model.layers.0.self_attn.q_proj"
HOSTILE = {
    "no codes": (f"{Q}.qweight", None, r"qweight and outlier are \[None, '?\[\d+, 6\]'?\], need \(rows, columns\) each"),
    "one axis": (f"{Q}.outlier", lambda a: a.reshape(-1), r"need \(rows, columns\) each"),
    "short scb": (f"{Q}.scb", lambda a: a[1:], "q_proj.scb' is type 1"),
    "wide order": (f"{Q}.outliers", lambda a: a.astype(np.uint8), "q_proj.outliers' is type 2"),
    "float32 columns": (f"{Q}.outlier", lambda a: a.astype(np.float32), "q_proj.outlier' is type 1"),
    "falling": (f"{Q}.outliers", lambda a: a[::-1], r"need rising columns in 0..127; the file is damaged"),
    "beyond": (f"{Q}.outliers", lambda a: a + np.int32(128), r"need rising columns in 0..127; the file is damaged"),
    "other rest": (f"{Q}.rest", lambda a: a[::-1], "rest and outliers do not name every column once"),
    "code": (f"{Q}.qweight", lambda a: np.full_like(a, -128), "holds the code -128"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_graphs_are_refused(what: str, written: Path, tmp_path: Path) -> None:
    name, edit, message = HOSTILE[what]
    shutil.copytree(written, tmp_path / "o")
    model = onnx.load(tmp_path / "o" / "model.onnx", load_external_data=False)
    old = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    array = onnx.numpy_helper.to_array(old, str(tmp_path / "o"))
    model.graph.initializer.remove(old)
    if edit is not None:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(edit(array)), name))
    (tmp_path / "o" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ContainerError, match=message), open_checkpoint(tmp_path / "o") as checkpoint:
        checkpoint.read(f"{Q}.weight")


def test_onnx_looks_no_rows_up_in_it(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match=r"embed_tokens.weight is int8_row_x6, of which onnx looks no rows up; keep it in float"):
        quantize(tiny_model(tmp_path / "m", hidden=128), tmp_path / "o", "rtn:int8_row_x6, embed=rtn:int8_row_x6", to="onnx")


@pytest.mark.parametrize("container", [name for name in CONTAINERS if name != "onnx"])
def test_other_containers_refuse_it(container: str, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match=f"{container} cannot hold int8_row_x6 of model.*; onnx can: use --to onnx"):
        quantize(tiny_model(tmp_path / "m", hidden=128), tmp_path / "o", "rtn:int8_row_x6", to=container)
