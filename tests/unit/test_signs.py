"""binary, ternary and int8_row: the exact least-squares fits against trying everything, and rows of int8."""

import numpy as np
import pytest

from tersor.errors import FormatError
from tersor.formats import get_format, signs


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, (rows, columns)) * 0.1).astype(np.float32)


def squared_error(name: str, w: np.ndarray, h: np.ndarray | float, importance: np.ndarray | None) -> float:
    f = get_format(name)
    return float((h * np.square(f.dequantize(f.quantize(w, importance)).astype(np.float64) - w)).sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_binary_scale_is_the_best_of_all(weighted):
    w = weights(1, 32)
    h = np.random.default_rng(1).uniform(0.1, 3, 32) if weighted else np.ones(32)
    best = min(float((h * (np.where(w[0] >= 0, s, -s) - w[0]) ** 2).sum()) for s in np.linspace(0, np.abs(w).max(), 20001))
    assert squared_error("binary_g32", w, h, h if weighted else None) <= best * 1.0001


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_ternary_scale_is_the_best_of_all(weighted, seed):
    w = weights(1, 32, seed)
    h = np.random.default_rng(1).uniform(0.1, 3, 32) if weighted else np.ones(32)
    scales = np.linspace(1e-6, np.abs(w).max(), 20001)[:, None]
    levels = np.clip(np.rint(w / scales), -1, 1) * scales
    best = float((h * (levels - w) ** 2).sum(axis=1).min())
    assert squared_error("ternary_g32", w, h, h if weighted else None) <= best * 1.0001


def test_bytes_by_hand():
    w = np.array([[1, -1, 1, 1, -1, -1, -1, 1] * 2], dtype=np.float32) * 0.5
    binary = get_format("binary_g16").quantize(w)
    assert binary.fields["codes"].tolist() == [[0b10001101, 0b10001101]]
    assert binary.fields["scale"].tolist() == [[0.5]]
    w[0, :4] = [0.5, 0, -0.0, -0.5]
    ternary = get_format("ternary_g16").quantize(w)
    assert ternary.fields["codes"][0, 0] == 0b00_01_01_10  # q3 q2 q1 q0 = 0, 1, 1, 2
    assert np.array_equal(get_format("ternary_g16").dequantize(ternary), w)


@pytest.mark.parametrize("name", signs.EXAMPLES)
def test_native_decoding_is_the_reference(name):
    f = get_format(name)
    stored = f.quantize(weights(9, 256))
    assert f.dequantize(stored).tobytes() == f.decode(*f.unpack(stored)).tobytes()


@pytest.mark.parametrize("name", ["binary_g16", "ternary_g16"])
def test_zero_and_tiny_and_huge_groups(name):
    f = get_format(name)
    assert not f.dequantize(f.quantize(np.zeros((2, 32), dtype=np.float32))).any()
    tiny = (np.random.default_rng(0).standard_normal((2, 32)) * 1e-9).astype(np.float32)
    assert np.abs(f.dequantize(f.quantize(tiny))).max() <= 2.0**-24
    with pytest.raises(FormatError, match=r"beyond float16's 65504; use nf4 \(float32 scales\), bf16 or f32"):
        f.quantize(np.full((1, 16), 1e5, dtype=np.float32))


@pytest.mark.parametrize("name", ["binary_g16", "ternary_g16"])
def test_importance_of_zero_falls_back_to_the_plain_fit(name):
    f = get_format(name)
    w = weights(2, 16)
    zero = f.quantize(w, np.zeros(16, dtype=np.float32))
    assert zero.fields["scale"].tobytes() == f.quantize(w).fields["scale"].tobytes()
    with pytest.raises(FormatError, match="need one value per column"):
        f.quantize(w, np.ones(15, dtype=np.float32))


@pytest.mark.parametrize(("columns", "text"), [(96, "use ternary_g32"), (40, "use int2_c")])
def test_columns_that_do_not_divide(columns, text):
    with pytest.raises(FormatError, match=text):
        get_format("ternary_g64").quantize(np.zeros((1, columns), dtype=np.float32))


def test_many_rows_in_parts_are_the_rows_one_by_one(monkeypatch):
    monkeypatch.setattr("tersor.formats.format.PART_VALUES", 200)
    w = weights(7, 64)
    for name in ("ternary_g64", "binary_g32", "int8_row"):
        f = get_format(name)
        stored = f.quantize(w)
        for row in range(7):
            alone = f.quantize(w[row : row + 1])
            assert all(np.array_equal(alone.fields[k][0], stored.fields[k][row]) for k in alone.fields)


def test_int8_row_is_absmax_over_127():
    w = np.array([[127.0, -64.4, 0.5, 1.5], [0, 0, 0, 0], [-1e-40, 0, 1e-40, 0], [3e38, -3e38, 1, 0]], dtype=np.float32)
    f = get_format("int8_row")
    stored = f.quantize(w)
    assert stored.fields["codes"].dtype == np.int8
    assert stored.fields["codes"].tolist() == [[127, -64, 0, 2], [0, 0, 0, 0], [-127, 0, 127, 0], [127, -127, 0, 0]]
    assert stored.fields["scb"].tolist() == [[127.0], [0.0], [float(np.float32(1e-40))], [float(np.float32(3e38))]]
    assert f.dequantize(stored)[0].tolist() == [127.0, -64.0, 0.0, 2.0]
