"""Affine integers with a float zero: the formula by loops, hand cases, what is refused."""

import numpy as np
import pytest

from tersor.errors import FormatError
from tersor.formats import get_format
from tersor.formats.packing import pack_bits
from tersor.tensor import QuantizedTensor


@pytest.mark.parametrize(("name", "dtype"), [("int3_g16z", np.float16), ("int3_g16zf", np.float32)])
def test_decode_is_the_formula(name: str, dtype: type) -> None:
    f = get_format(name)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (4, 48), dtype=np.uint8)
    scale, zero = (rng.uniform(0.1, 4, (4, 3)).astype(dtype) for _ in range(2))
    tensor = QuantizedTensor(f.name, (4, 48), {"codes": pack_bits(codes, 3), "scale": scale, "zero": zero})
    w = f.dequantize(tensor)
    for i in range(4):
        for j in range(48):
            want = np.float32(np.float32(codes[i, j]) - np.float32(zero[i, j // 16])) * np.float32(scale[i, j // 16])
            assert w[i, j] == want


def test_a_hand_case() -> None:
    """[-1, 2] in 2 bits: scale 1, zero 1; [-1, 2.75]: scale 1.25, zero 0.8 rounded to float16."""
    f = get_format("int2_g16z")
    w = np.linspace(-1, 2, 16, dtype=np.float32)[None]
    params = f.fit(w)
    assert params["scale"][0, 0] == 1 and params["zero"][0, 0] == 1
    assert f.encode(w, params)[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3]
    w = np.linspace(-1, 2.75, 16, dtype=np.float32)[None]
    assert f.fit(w)["scale"][0, 0] == 1.25 and f.fit(w)["zero"][0, 0] == np.float16(0.8)


def test_refusals() -> None:
    with pytest.raises(FormatError, match="7-bit codes"):
        get_format("int7_g64z")
    with pytest.raises(FormatError, match="multiple of 16"):
        get_format("int4_g24z")
    with pytest.raises(FormatError, match=r"int1_g16z: .* beyond 65504, the largest float16; use int1_g16zf"):
        get_format("int1_g16z").quantize(np.full((1, 16), 1e9, np.float32))
