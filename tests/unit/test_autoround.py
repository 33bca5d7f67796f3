"""autoround against slow loops on one linear layer, and on a whole block."""

from functools import partial

import numpy as np
import pytest
import torch

from oracles import autoround_loops
from tersor.containers import open_checkpoint
from tersor.errors import FormatError, ModelError, RecipeError
from tersor.formats import FORMATS, get_format
from tersor.methods import autoround
from tersor.methods.autoround import AutoroundOptions, autoround_block
from tersor.models import spec_of
from tersor.training.decoder import run_block
from tiny import tiny_model

EXACT = AutoroundOptions(iterations=8, rate=0.03, batch_tokens=24, held_out=0.5, precision="f32")


def layer(x, product):
    return product("w", x)


def problem(rows: int = 32, columns: int = 32, tokens: int = 24):
    """One linear layer, its correlated inputs twice (so that the samples that train and those that judge are the same), its outputs."""
    rng = np.random.default_rng(3)
    w = (rng.standard_t(5, size=(rows, columns)) * 0.05).astype(np.float32)
    x = (rng.standard_normal((tokens, 8)) @ rng.standard_normal((8, columns))).astype(np.float32)
    y = (x.astype(np.float64) @ w.T.astype(np.float64)).astype(np.float32)
    return w, x, y, np.stack([x, x]), np.stack([y, y])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_affine_codes_and_grids_are_those_of_the_slow_loops(bits):
    w, x, y, inputs, targets = problem()
    f = get_format(f"int{bits}_g16")
    tensors, descent = autoround_block(layer, inputs, targets, {"w": w}, {"w": f}, EXACT)
    codes, params = f.unpack(tensors["w"])
    expected = autoround_loops.tune_affine(w, x, y, bits, 16, EXACT.iterations, EXACT.rate)
    assert codes.tolist() == expected[0]
    assert params["scale"].astype(float).tolist() == expected[1]
    assert params["zero"].tolist() == expected[2]
    assert descent.after < descent.before and descent.kept > 0


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl", "ternary_g32"])
def test_other_formats_choose_the_neighbours_of_the_slow_loops(name):
    w, x, y, inputs, targets = problem()
    f = get_format(name)
    tensors, _ = autoround_block(layer, inputs, targets, {"w": w}, {"w": f}, EXACT)
    _, params = f.unpack(f.quantize_clipped(w))
    count = 3 if name.startswith("ternary") else 16
    levels = np.sort(np.stack([f.decode(np.full(w.shape, k, np.uint8), params) for k in range(count)], axis=-1), axis=-1)
    assert np.array_equal(
        f.dequantize(tensors["w"]), autoround_loops.tune_levels(w, levels, x, y, EXACT.iterations, EXACT.rate).astype(np.float32)
    )


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.can_encode and f.bits <= 4])
def test_no_format_gets_worse_where_it_is_judged(name):
    rng = np.random.default_rng(5)
    w = (rng.standard_t(5, size=(256, 256)) * 0.05).astype(np.float32)
    if not FORMATS[name].fits(w.shape):
        w = (rng.standard_t(5, size=(96, 96)) * 0.05).astype(np.float32)
    x = (rng.standard_normal((4, 64, 12)) @ rng.standard_normal((12, w.shape[1]))).astype(np.float32)
    options = AutoroundOptions(iterations=6, rate=0.05, precision="f32", held_out=0.25)
    tensors, descent = autoround_block(layer, x, x @ w.T, {"w": w}, {"w": FORMATS[name]}, options)
    assert tensors["w"].format == name and tensors["w"].shape == w.shape
    assert tensors["w"].nbytes == FORMATS[name].nbytes(w.shape)
    assert descent.after <= descent.before
    assert descent.after < 0.999 * descent.before or FORMATS[name].bits > 3  # a few steps are enough to find something at 1 to 3 bits


def block(tmp_path, seed: int = 0):
    """A block of a tiny model as (spec, forward with its vectors bound, inputs, targets, weights)."""
    with open_checkpoint(tiny_model(tmp_path / "m")) as checkpoint:
        spec = spec_of(checkpoint.description.config)
        read = {
            name.removeprefix("model.layers.0."): np.array(get_format(info.format).dequantize(checkpoint.read(name)))
            for name, info in checkpoint.tensors.items()
            if name.startswith("model.layers.0.")
        }
    vectors = {name: torch.from_numpy(a) for name, a in read.items() if a.ndim == 1}
    weights = {name: a for name, a in read.items() if a.ndim == 2}
    forward = partial(_run, spec, vectors)
    inputs = np.random.default_rng(seed).standard_normal((8, 16, spec.hidden_size)).astype(np.float32)
    with torch.no_grad():
        targets = forward(torch.from_numpy(inputs), lambda name, x: x @ torch.from_numpy(weights[name]).T).numpy()
    return forward, inputs, targets, weights


def _run(spec, vectors, x, product):
    return run_block(spec, spec.layers[0], x, product, vectors.__getitem__)


def test_a_block_gets_nearer_to_its_outputs_than_by_rounding_to_nearest(tmp_path):
    forward, inputs, targets, weights = block(tmp_path)
    f = get_format("int3_g32")
    options = AutoroundOptions(iterations=40, batch_tokens=96, held_out=0.25)
    tensors, descent = autoround_block(forward, inputs, targets, weights, dict.fromkeys(weights, f), options)

    def error(quantized):
        with torch.no_grad():
            y = forward(torch.from_numpy(inputs), lambda name, x: x @ torch.from_numpy(np.array(f.dequantize(quantized[name]))).T).numpy()
        return float(np.square(y - targets).sum())

    assert descent.kept > 0
    assert error(tensors) < 0.8 * error({name: f.quantize(w) for name, w in weights.items()})


def test_same_seed_same_bytes_another_seed_others(tmp_path):
    forward, inputs, targets, weights = block(tmp_path)

    def run(seed):
        options = AutoroundOptions(iterations=5, rate=0.1, batch_tokens=32)
        tensors, _ = autoround_block(forward, inputs, targets, weights, dict.fromkeys(weights, get_format("int2_g32")), options, seed=seed)
        return b"".join(field.tobytes() for t in tensors.values() for field in t.fields.values())

    assert run(0) == run(0) != run(1)


def test_float_formats_are_cast(tmp_path):
    forward, inputs, targets, weights = block(tmp_path)
    formats = {name: get_format("int2_g32" if "mlp" in name else "bf16") for name in weights}
    tensors, _ = autoround_block(forward, inputs, targets, weights, formats, AutoroundOptions(iterations=2))
    assert {t.format for t in tensors.values()} == {"int2_g32", "bf16"}


def test_bad_input_is_refused(tmp_path):
    w, *_ = problem()
    x = np.zeros((2, 4, 32), np.float32)
    f = {"w": get_format("int4_g32")}
    with pytest.raises(ModelError, match=r"autoround: inputs \(1, 4, 32\), .*n >= 2"):
        autoround_block(layer, x[:1], x[:1], {"w": w}, f)
    with pytest.raises(ModelError, match="inputs or targets hold NaN"):
        autoround_block(layer, x * np.nan, x, {"w": w}, f)
    with pytest.raises(FormatError, match="can be decoded but not encoded"):
        autoround_block(layer, x, x, {"w": w}, {"w": get_format("iq1_s")})
    with pytest.raises(FormatError, match=r"w has 32 columns, not a multiple of 64"):
        autoround_block(layer, x, x, {"w": w}, {"w": get_format("int4_g64")})
    with pytest.raises(RecipeError, match=r"iterations 0.*need iterations >= 1"):
        AutoroundOptions(iterations=0)
    with pytest.raises(RecipeError, match="unknown precision 'f16'; known: bf16, f32"):
        AutoroundOptions(precision="f16")


def test_missing_torch_names_the_extra(monkeypatch):
    monkeypatch.setattr("tersor.training.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"autoround: needs torch.*pip install 'tersor\[torch\]'"):
        autoround.autoround_block(layer, np.zeros((2, 1, 1), np.float32), np.zeros((2, 1, 1), np.float32), {}, {})
