"""The same numbers in another format: bit for bit, or None."""

import numpy as np
import pytest

from tersor.formats import FORMATS, get_format
from tersor.formats.exact import alternatives, exactly


def weights(rows: int = 6, columns: int = 512, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.1).astype(np.float32)


PAIRS = [
    *(("int4_g32s", "q4_0"), ("q4_0", "int4_g32s"), ("int4_g128s", "q4_0"), ("int4_cs", "q4_0"), ("int4_ts", "int4_cs")),
    *(("q4_1", "int4_g32m"), ("int4_g64m", "q4_1"), ("q5_0", "int5_g32s"), ("int5_g64s", "q5_0"), ("q5_1", "int5_g32m")),
    *(("q8_0", "int8_g32s"), ("int8_g128s", "q8_0"), ("int4_g64s", "int4_g64"), ("int4_g64", "int4_g64z"), ("int3_g64s", "int3_g64z")),
    *(("int4_g64so", "int4_g64o"), ("ternary_g64", "int2_g64s"), ("ternary_g32", "int2_g32"), ("binary_g64", "int1_g64m")),
    *(("int4_g64s", "int4_g64so"), ("q4_0", "int4_g32"), ("int4_ts", "int4_g64s")),
    *(("int4_g64", "int4_g64mf"), ("int4_g64sf", "int4_g32f"), ("int8_csf", "int8_g32zf"), ("int4_g64sfo", "int4_g64fo")),
]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_values_are_the_same_to_the_bit(source: str, target: str) -> None:
    tensor = get_format(source).quantize(weights())
    made = exactly(tensor, target)
    assert made is not None and (made.format, made.shape) == (target, tensor.shape)
    want = get_format(source).dequantize(tensor)
    assert get_format(target).dequantize(made).tobytes() == (want + np.float32(0)).tobytes() or np.array_equal(
        get_format(target).dequantize(made), want
    )
    assert made.nbytes == get_format(target).nbytes(made.shape)
    assert target in alternatives(source) or target.endswith("so")  # nobody needs an order that is none


def test_zeros_in_the_middle_make_a_symmetric_tensor() -> None:
    tensor = exactly(get_format("int4_g64s").quantize(weights()), "int4_g64")
    assert tensor is not None
    back = exactly(tensor, "int4_g64s")
    assert back is not None and back.fields["codes"].tobytes() == tensor.fields["codes"].tobytes()
    assert exactly(get_format("int4_g64").quantize(weights() + np.float32(0.1)), "int4_g64s") is None


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("int4_g32s", "int4_g64s"),
        ("int4_g64o", "int4_g64"),
        ("int4_g64s", "int3_g64s"),
        ("nf4", "int4_g64"),
        ("q4_k", "int4_g32m"),
        ("q4_0", "nf4"),
        ("int4_g64sf", "int4_g64s"),
        ("int4_g64mf", "int4_g64m"),
        ("int4_cf", "q4_0"),
    ],
)
def test_what_does_not_agree_is_none(source: str, target: str) -> None:
    w = weights()
    w[:, ::3] *= 4  # columns of unlike range, so that an order means something
    assert exactly(get_format(source).quantize(w), target) is None


@pytest.mark.parametrize("name", ["int4_g64", "int3_g32s", "int4_g64m", "int4_g64z", "int4_g64so", "int8_cs", "int4_t"])
def test_float32_scales_that_are_float16_numbers_change_back(name: str) -> None:
    half = get_format(name).quantize(weights())
    wide = exactly(half, f"{name.removesuffix('o')}f{'o' * name.endswith('o')}")
    assert wide is not None and wide.fields["scale"].dtype == np.float32 and name in alternatives(wide.format)
    back = exactly(wide, name)
    assert back is not None and {k: v.tobytes() for k, v in back.fields.items()} == {k: v.tobytes() for k, v in half.fields.items()}


def test_minima_that_float16_rounds_are_none() -> None:
    """int4 with a float16 minimum has -zero * scale only where that product is a float16."""
    tensor = get_format("int4_g64").quantize(weights())
    zero, scale = get_format("int4_g64").unpack(tensor)[1]["zero"], tensor.fields["scale"]
    minimum = -(zero.astype(np.float32) * scale.astype(np.float32))
    assert (exactly(tensor, "int4_g64m") is None) == (not np.array_equal(minimum, minimum.astype(np.float16).astype(np.float32)))
    assert exactly(tensor, "int4_g64m") is None


@pytest.mark.parametrize("name", FORMATS)
def test_alternatives_are_formats_and_what_they_give_is_equal(name: str) -> None:
    if not FORMATS[name].can_encode:
        assert list(alternatives(name)) == []
        return
    w = weights(3, 768)
    tensor = FORMATS[name].quantize(w)
    for other in alternatives(name):
        made = exactly(tensor, other)
        assert other != name and get_format(other).name == other
        assert made is None or np.array_equal(get_format(other).dequantize(made), FORMATS[name].dequantize(tensor))
    assert exactly(tensor, name) is tensor
