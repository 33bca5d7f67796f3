"""hqq against slow loops from the paper, and what it keeps."""

import numpy as np
import pytest

from tersor.errors import FormatError, RecipeError
from tersor.formats import FORMATS, get_format
from tersor.methods.hqq import HqqOptions, hqq

ENCODERS = [name for name, f in FORMATS.items() if f.can_encode]
SERVED = [
    n
    for n in ENCODERS
    if n in ("q4_1", "q5_1") or (n.startswith("int") and not n.startswith("int8_row") and not n.endswith(("s", "so", "sf", "sfo")))
]


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, size=shape) * 0.05).astype(np.float32)


def miss(name: str, tensor, w: np.ndarray, p: float = 0.7) -> np.ndarray:
    return (np.abs(FORMATS[name].dequantize(tensor).astype(np.float64) - w) ** p).sum(axis=-1)


def loops(group: list[float], bits: int, options: HqqOptions) -> float:
    """The minimum of one group of the minimum form, in float64, one number at a time."""
    top = 2**bits - 1
    minimum = float(np.float16(min(group)))
    scale = float(np.float16((max(group) - minimum) / top))
    best, least, beta = minimum, np.inf, options.beta
    for _ in range(options.rounds + 1):
        codes = [min(top, max(0, round((w - minimum) / scale))) for w in group]
        misses = [(w - (q * scale + minimum)) / scale for w, q in zip(group, codes)]
        error = sum(abs(x) ** options.p for x in misses)
        if error < least:
            best, least = minimum, error
        zero = 0.0
        for w, q, x in zip(group, codes, misses):
            shrunk = np.sign(x) * max(0.0, abs(x) - abs(x) ** (options.p - 1) / beta) if x else 0.0
            zero += (q - (w / scale - shrunk)) / len(group)
        minimum = float(np.float16(-zero * scale))
        beta *= options.kappa
    return best


@pytest.mark.parametrize("bits", [2, 4])
def test_minima_are_those_of_the_loops(bits):
    f = get_format(f"int{bits}_g64m")
    w, options = weights(4, 192), HqqOptions()
    _, params = f.unpack(hqq(w, f, None, options))
    expected = [[loops(row[g : g + 64].tolist(), bits, options) for g in (0, 64, 128)] for row in w]
    np.testing.assert_allclose(params["min"].astype(float), expected, rtol=2e-3, atol=1e-6)
    assert not np.array_equal(params["min"], f.fit(w)["min"])


@pytest.mark.parametrize("name", SERVED)
def test_no_row_gets_worse_in_the_norm_that_is_minimized(name):
    f = FORMATS[name]
    w = weights(2, 3, 768)
    kept = w.copy()
    tensor = hqq(w, f)
    assert tensor.format == name and tensor.shape == w.shape and np.array_equal(w, kept)
    rtn = f.pack(*(lambda p: (f.encode(w.reshape(6, 768), p), p))(f.fit(w.reshape(6, 768))), w.shape)
    after, before = miss(name, tensor, w), miss(name, rtn, w)
    if f.group_size <= 0 and not f.row_independent:
        after, before = after.sum(), before.sum()
    if f.groups(768) == 1:  # the steps of groups weigh alike, so only a row of one group compares exactly
        assert (after <= before * (1 + 1e-5)).all()
    else:
        assert after.sum() <= before.sum() * (1 + 1e-5)


def test_minima_and_zeros_between_the_codes_gain_clearly():
    w = weights(64, 768)
    for name in ("int2_g32m", "int3_g64m", "int2_g32z", "int3_g64z"):
        assert miss(name, hqq(w, FORMATS[name]), w).sum() < 0.97 * miss(name, FORMATS[name].quantize(w), w).sum()


@pytest.mark.parametrize("name", [n for n in ENCODERS if n not in SERVED])
def test_formats_without_a_zero_are_refused(name):
    with pytest.raises(FormatError, match=f"hqq:{name.removesuffix('o')}: no zero or minimum"):
        hqq(weights(2, 768), FORMATS[name])


def test_shapes_and_decode_only_formats_are_refused():
    with pytest.raises(FormatError, match="iq1_s can be decoded but not encoded"):
        hqq(weights(2, 256), get_format("iq1_s"))
    with pytest.raises(FormatError, match="65 columns, not a multiple of 64"):
        hqq(weights(2, 65), get_format("int4_g64"))


@pytest.mark.parametrize("bad", [{"p": 1.0}, {"p": 0.0}, {"beta": 0.0}, {"kappa": 0.9}, {"rounds": 0}])
def test_bad_options_are_refused(bad):
    with pytest.raises(RecipeError, match=r"hqq: .*need"):
        HqqOptions(**bad)


def test_a_group_of_zeros_stays_zero():
    w = weights(2, 128)
    w[0, :64] = 0
    for name in ("int4_g64", "int4_g64m", "int4_g64z"):
        f = get_format(name)
        assert not f.dequantize(hqq(w, f))[0, :64].any()
