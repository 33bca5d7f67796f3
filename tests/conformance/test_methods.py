"""What every member of METHODS keeps, on every format that can be encoded."""

import numpy as np
import pytest

from tersor import _native
from tersor.errors import FormatError, RecipeError
from tersor.formats import FORMATS
from tersor.methods import METHODS, get_method
from tersor.tensor import InputStatistics

COLUMNS = 768
ENCODERS = [name for name, f in FORMATS.items() if f.can_encode]


SOME_FORMATS = {"llm_int8", "hqq"}  # refuse some formats; tested in tests/unit/test_activation_schemes.py and test_hqq.py
DATA_FREE = [name for name, method in METHODS.items() if method.stage == "round" and method.needs == "nothing" and name not in SOME_FORMATS]


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(5, size=shape) * 0.05).astype(np.float32)


def importance(seed: int = 1) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).standard_normal(COLUMNS)).astype(np.float32)


def statistics(h: np.ndarray) -> InputStatistics:
    return InputStatistics(1, h, np.sqrt(np.abs(h)), np.sqrt(np.abs(h)))


def run(method: str, w: np.ndarray, name: str, h: np.ndarray | None = None):
    return METHODS[method].run(w, FORMATS[name], None if h is None else statistics(h))


def error(name: str, tensor, w: np.ndarray, h: np.ndarray | float = 1.0) -> float:
    return float((h * np.square(FORMATS[name].dequantize(tensor).astype(np.float64) - w)).sum())


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("method", DATA_FREE)
def test_result_is_a_tensor_of_the_format(method, name):
    w = weights(2, 3, COLUMNS)
    kept = w.copy()
    tensor = run(method, w, name)
    assert tensor.format == name and tensor.shape == w.shape
    assert tensor.nbytes == FORMATS[name].nbytes(w.shape)
    assert np.array_equal(w, kept)  # the input is not written to
    if (method, FORMATS[name].bits) != ("rtn", 1) or name.startswith("binary"):  # one-bit min-max keeps nothing but the extremes
        assert error(name, tensor, w) < np.square(w.astype(np.float64)).sum()  # better than storing zeros


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("method", DATA_FREE)
def test_any_number_of_threads_gives_the_same_bytes(method, name):
    before = _native.threads()
    w = weights(9, COLUMNS)
    seen = set()
    try:
        for threads in (1, 2, 3):
            _native.set_threads(threads)
            seen.add(b"".join(field.tobytes() for field in run(method, w, name).fields.values()))
    finally:
        _native.set_threads(before)
    assert len(seen) == 1


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if not f.can_encode])
@pytest.mark.parametrize("method", DATA_FREE)
def test_decode_only_formats_are_refused(method, name):
    with pytest.raises(FormatError, match=f"{name}.* decoded"):
        run(method, weights(2, COLUMNS), name)


@pytest.mark.parametrize("name", [name for name in ENCODERS if FORMATS[name].group_size > 1])
@pytest.mark.parametrize("method", DATA_FREE)
def test_shapes_that_do_not_fit_are_refused(method, name):
    with pytest.raises(FormatError, match=f"{name}: tensor has 1000 columns|{name}: tensor has 1001 columns"):
        run(method, weights(2, 1000 if 1000 % FORMATS[name].group_size else 1001), name)


@pytest.mark.parametrize("name", ENCODERS)
def test_clip_is_never_worse_than_rtn(name):
    w = weights(6, COLUMNS)
    w[3, 100] = 3.0
    plain, clipped = run("rtn", w, name), run("clip", w, name)
    # Double quantization rounds the chosen absmax again; all else compares what is stored.
    assert error(name, clipped, w) <= error(name, plain, w) * (1 if not name.endswith("_dq") else 1.02)


@pytest.mark.parametrize("name", ENCODERS)
def test_clip_minds_importance(name):
    w, h = weights(6, COLUMNS), importance()
    weighted, plain = run("clip", w, name, h), run("clip", w, name)
    if name in ("f32", "f16", "bf16"):
        assert error(name, weighted, w) == error(name, plain, w)
        return
    assert error(name, weighted, w, h) < error(name, plain, w, h) * 1.001
    if not name.startswith("int8_row") and name not in ("int8_g64z", "int8_cz"):  # with 255 levels the whole range is best either way
        assert any(weighted.fields[k].tobytes() != plain.fields[k].tobytes() for k in plain.fields)


@pytest.mark.parametrize("name", ENCODERS)
def test_clip_refuses_bad_importance(name):
    w = weights(2, COLUMNS)
    if name in ("f32", "f16", "bf16"):
        return
    for bad in (importance()[:-1], -importance(), np.full(COLUMNS, np.inf, dtype=np.float32)):
        with pytest.raises(FormatError, match=r"importance .*need"):
            run("clip", w, name, bad)


@pytest.mark.parametrize("name", ENCODERS)
def test_rtn_minds_importance_where_its_grid_is_a_search(name):
    w, h = weights(6, COLUMNS), importance()
    weighted, plain = run("rtn", w, name, h), run("rtn", w, name)
    if FORMATS[name].uses_importance:
        assert error(name, weighted, w, h) < error(name, plain, w, h)
    else:
        assert all(weighted.fields[k].tobytes() == plain.fields[k].tobytes() for k in plain.fields)


def test_unknown_method_lists_the_known():
    assert get_method("clip") is METHODS["clip"]
    with pytest.raises(RecipeError, match="unknown method 'gptp'; known: autoround, awq, clip, distill, gptq, hqq"):
        get_method("gptp")
