"""nf4 and fp4: the tables from their definitions, and every stored byte against what bitsandbytes stored (tests/golden)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from oracles import lookup_loops
from tersor.errors import FormatError
from tersor.formats import get_format, lookup
from tersor.formats.lookup import DoubleLookupFormat, LookupFormat, dynamic_map, nearest

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "bitsandbytes_4bit.json").read_text())


def golden_weights() -> np.ndarray:
    """The tensor of tests/golden/make_bitsandbytes.py."""
    rows, columns = GOLDEN["shape"]
    values = [((i * 2654435761 % 2**32) / 2**32 - 0.5) * (1 + i // 64 * 37 % 11) for i in range(rows * columns)]
    return np.array(values).astype(np.float32).reshape(rows, columns)


def floats(texts: list[str]) -> np.ndarray:
    return np.array([float.fromhex(text) for text in texts], dtype=np.float32)


def lookup_format(name: str) -> LookupFormat:
    found = get_format(name)
    assert isinstance(found, LookupFormat)
    return found


def test_nf4_is_the_quantile_construction():
    # The published values came from float32 quantiles: 2e-7 is a few of its units in the last place.
    assert np.abs(lookup.NF4 - np.array(lookup_loops.nf4_table())).max() < 2e-7


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_tables_are_bitsandbytes(name):
    assert np.array_equal(lookup.TABLES[name], floats(GOLDEN[name]["table"]))


def test_fp4_is_its_bit_pattern():
    assert np.array_equal(lookup.FP4, np.array(lookup_loops.fp4_table(), dtype=np.float32))


def test_dynamic_map_is_bitsandbytes():
    assert dynamic_map().tobytes() == floats(GOLDEN["dynamic_map"]).tobytes()
    assert (np.diff(dynamic_map()) > 0).all()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_and_absmax_are_bitsandbytes(name):
    stored = get_format(name).quantize(golden_weights())
    assert stored.fields["codes"].tobytes()[:64].hex() == GOLDEN[name]["first_codes"]
    assert hashlib.sha256(stored.fields["codes"].tobytes()).hexdigest() == GOLDEN[name]["codes_sha256"]
    assert hashlib.sha256(stored.fields["absmax"].tobytes()).hexdigest() == GOLDEN[name]["absmax_sha256"]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_double_quantization_is_bitsandbytes(name):
    f = get_format(f"{name}_dq")
    assert isinstance(f, DoubleLookupFormat)
    stored = f.quantize(golden_weights())
    golden = GOLDEN[name]
    # The mean is taken in float64 here and in float32 there: a unit in the last place apart at most.
    assert stored.fields["nested_offset"] == pytest.approx(float.fromhex(golden["nested_offset"]), rel=2e-7)
    assert stored.fields["nested_absmax"] == pytest.approx(floats(golden["nested_absmax"]), rel=1e-6)
    codes = stored.fields["absmax"].ravel().astype(int)
    theirs = np.frombuffer(bytes.fromhex(golden["nested_codes"]), dtype=np.uint8).astype(int)
    # Their CPU kernel finds codes through a table of 2^16 cells, so a value that close to halfway may go either way.
    scaled = (f.absmax(golden_weights()).ravel() - stored.fields["nested_offset"]) / np.repeat(stored.fields["nested_absmax"], 256)
    halfway = (dynamic_map()[codes] + dynamic_map()[theirs]) / 2
    assert (np.abs(codes - theirs) <= 1).all()
    assert (np.abs(scaled - halfway)[codes != theirs] < 2.0**-16).all()
    assert (codes == theirs).mean() > 0.99
    same = codes[:16] == theirs[:16]
    assert f.unnest(stored.fields).ravel()[:16][same] == pytest.approx(floats(golden["absmax"])[same], rel=1e-6)


@pytest.mark.parametrize("table", [lookup.NF4, lookup.FP4, dynamic_map()], ids=["nf4", "fp4", "dynamic"])
def test_nearest_is_the_slow_loop(table):
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-1.1, 1.1, 500), table, [0.0, -0.0, 1e-9, -1e-9]]).astype(np.float32)
    levels = [float(v) for v in table]
    codes = nearest(values, table)
    for value, code in zip(values, codes):
        assert levels[code] == levels[lookup_loops.nearest_index(float(value), levels)]


def test_halfway_goes_to_the_lower_level_and_zero_to_code_zero():
    assert nearest(np.array([(lookup.NF4[7] + lookup.NF4[8]) / np.float32(2)]), lookup.NF4).tolist() == [7]
    assert nearest(np.array([0.0, -0.0], dtype=np.float32), lookup.FP4).tolist() == [0, 0]


def test_first_value_is_in_the_high_nibble():
    w = np.zeros((1, 64), dtype=np.float32)
    w[0, 0], w[0, 1] = -1.0, 1.0
    assert get_format("nf4").quantize(w).fields["codes"][0, :2].tolist() == [0x0F, 0x77]


@pytest.mark.parametrize("name", lookup.EXAMPLES)
def test_native_gives_the_bytes_of_the_reference(name):
    f = lookup_format(name)
    w = (np.random.default_rng(0).standard_normal((37, 192)) * np.exp(np.random.default_rng(1).standard_normal((37, 1)) * 20)).astype(
        np.float32
    )
    w[0] = 0
    w[1] = 0.5
    w[2, ::3] = -0.0
    params = f.fit(w)
    codes = f.encode(w, params)
    expected = f.pack(codes, params)
    got = f.quantize(w)
    assert {k: v.tobytes() for k, v in got.fields.items()} == {k: v.tobytes() for k, v in expected.fields.items()}
    assert f.dequantize(got).tobytes() == f.decode(codes, params).tobytes()


@pytest.mark.parametrize("name", lookup.EXAMPLES)
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 1.0, 1e30, 3e38])
def test_any_size_of_weights_stays_finite(name, scale):
    f = get_format(name)
    w = (np.random.default_rng(0).uniform(-1, 1, (4, 128)) * scale).astype(np.float32)
    decoded = f.dequantize(f.quantize(w))
    assert np.isfinite(decoded).all()
    # Half of the widest gap of nf4 is 0.152 of the absmax, of fp4 0.167; double quantization adds 7 % of a spread-out absmax.
    assert np.abs(decoded - w).max() <= 0.25 * scale + 1e-38


def test_zero_decodes_to_zero_in_every_block():
    for name in lookup.EXAMPLES:
        w = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)
        w[:, ::2] = 0
        w[1] = 0
        assert not get_format(name).dequantize(get_format(name).quantize(w))[w == 0].any()


def test_bits_per_weight():
    assert get_format("nf4").bits_per_weight() == 4.5
    assert get_format("fp4_dq").bits_per_weight() == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize(("columns", "text"), [(96, "use int4_g32"), (80, "use int4_g16"), (65, "use int4_c")])
def test_columns_that_are_no_multiple_of_64(columns, text):
    with pytest.raises(FormatError, match=f"{columns} columns, not a multiple of 64; {text}"):
        get_format("nf4").quantize(np.zeros((2, columns), dtype=np.float32))


def test_clip_of_double_quantization_lowers_the_error():
    w = np.random.default_rng(0).standard_t(4, (16, 512)).astype(np.float32)
    for name in lookup.EXAMPLES:
        f = get_format(name)
        plain, clipped = (np.square(f.dequantize(t) - w).sum() for t in (f.quantize(w), f.quantize_clipped(w)))
        assert clipped < 0.98 * plain
