"""Formats with an order of columns: what is stored, what GPTQ makes of it, and that products follow it."""

import numpy as np
import pytest

from tersor import _native, ops
from tersor.errors import FormatError
from tersor.formats import get_format
from tersor.formats.ordered import OrderedFormat
from tersor.methods.gptq import GptqOptions, gptq
from tersor.tensor import InputStatistics, QuantizedTensor


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def statistics(x: np.ndarray) -> InputStatistics:
    gram = x.astype(np.float64).T @ x / len(x)
    return InputStatistics(len(x), np.diagonal(gram).astype(np.float32), np.abs(x).mean(0), np.abs(x).max(0), gram)


def ordered(name: str) -> OrderedFormat:
    f = get_format(name)
    assert isinstance(f, OrderedFormat)
    return f


def test_columns_are_decoded_where_the_order_says() -> None:
    """By hand: 32 columns in two groups of 16; group 0 holds the odd columns at scale 1, group 1 the even ones at scale 2."""
    f = ordered("int4_g16so")
    order = np.array([*range(1, 32, 2), *range(0, 32, 2)], np.int32)
    stored = (np.arange(32) % 16).astype(np.uint8)  # code of each place
    params = {"scale": np.array([[1, 2]], np.float16)}
    tensor = f.of(f.plain.pack(stored[None], params), order)
    want = np.empty(32, np.float32)
    for place in range(32):
        want[order[place]] = (place % 16 - 8) * (1 if place < 16 else 2)
    np.testing.assert_array_equal(f.dequantize(tensor)[0], want)
    codes, _ = f.unpack(tensor)
    assert [codes[0, order[place]] for place in range(32)] == stored.tolist()


def test_groups_hold_columns_of_like_importance_by_rising_number() -> None:
    f = ordered("int4_g32o")
    h = np.arange(64, dtype=np.float32)
    assert f.order_of(random(3, 64), h).tolist() == [*range(32, 64), *range(32)]
    w = random(3, 64)
    w[:, ::2] *= 10
    assert f.order_of(w).tolist() == [*range(0, 64, 2), *range(1, 64, 2)]


@pytest.mark.parametrize("name", ["int4_g32o", "int3_g32so"])
def test_gptq_is_gptq_of_the_ordered_columns(name: str) -> None:
    f, w = ordered(name), random(24, 96)
    x = random(400, 96, seed=1) * np.exp(random(96, seed=2))
    given, options = statistics(x), GptqOptions(search=False, refine=0)
    tensor = gptq(w, f, given, options)
    order = tensor.fields["order"]
    assert np.array_equal(order, f.sorted_groups(np.argsort(-given.mean_square, kind="stable")))
    plain = gptq(np.ascontiguousarray(w[:, order]), f.plain, statistics(x[:, order]), options)
    assert all(np.array_equal(tensor.fields[key], plain.fields[key]) for key in plain.fields)
    neighbours = gptq(w, f.plain, given, options)

    def miss(t: QuantizedTensor) -> float:
        return float(np.square(x @ (get_format(t.format).dequantize(t) - w).T).sum())

    assert miss(tensor) < miss(neighbours)  # columns of unlike importance: the reason to order them


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_a_product_takes_its_inputs_in_order(rows: int, activations: str) -> None:
    f, x = ordered("int4_g32o"), random(rows, 192, seed=3)
    a, b = f.quantize(random(40, 192)), f.quantize(random(24, 192))
    b = QuantizedTensor(b.format, b.shape, {**b.fields, "order": a.fields["order"]})
    y = ops.linear(x, ops.pack([a, b], activations=activations))
    order = a.fields["order"]
    plain = ops.pack([f.split(a)[0], f.split(b)[0]], activations=activations)
    np.testing.assert_array_equal(y, ops.linear(np.ascontiguousarray(x[:, order]), plain))
    want = x.astype(np.float64) @ np.concatenate([f.dequantize(a), f.dequantize(b)]).T.astype(np.float64)
    assert np.abs(y - want).max() < (1e-4 if activations == "float" else 0.02) * np.abs(want).max()


def test_neighbours_of_other_orders_are_multiplied_as_floats() -> None:
    f, x = ordered("int4_g32o"), random(3, 64, seed=3)
    a, b = f.quantize(random(16, 64)), f.quantize(random(16, 64, seed=9))
    assert not np.array_equal(a.fields["order"], b.fields["order"])
    weight = ops.pack([a, b])
    assert "f16" in weight.kernel
    want = x.astype(np.float64) @ np.concatenate([f.dequantize(a), f.dequantize(b)]).T
    assert np.abs(ops.linear(x, weight) - want).max() < 2.0**-9 * np.abs(want).max()


@pytest.mark.parametrize("order", [[0] * 64, [-1, *range(63)], [*range(63)], [*range(1, 65)]])
def test_an_order_that_is_no_permutation_is_refused_by_the_kernel(order: list[int]) -> None:
    plain = get_format("int4_g32").quantize(random(16, 64))
    fields = {name: np.ascontiguousarray(a).reshape(16, -1).view(np.uint8) for name, a in plain.fields.items()}
    with pytest.raises(ValueError, match="pack: order"):
        _native.pack([(plain.format, 16, 64, fields)], None, "groups", 0.0, np.array(order, np.int32))


def test_names_without_such_a_format_are_unknown() -> None:
    for name in ("int4_co", "int4_g64mo", "int4_g64oo"):
        with pytest.raises(FormatError, match="unknown format"):
            get_format(name)
    with pytest.raises(FormatError, match="need a multiple of 16"):
        get_format("int4_g40o")
