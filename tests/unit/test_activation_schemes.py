"""Ways to round inputs, on tiny models: planted outliers, calibrated scales, and what a file must have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.outliers import Planted

from tersor.calibration.input_scales import input_scales
from tersor.containers import open_checkpoint
from tersor.engine import load
from tersor.errors import FormatError, ModelError
from tersor.formats import get_format
from tersor.methods import METHODS
from tersor.models import spec_of
from tersor.tensor import ActivationScheme, Array
from tiny import tiny_model

TOKENS = np.random.default_rng(0).integers(3, 300, (3, 40), dtype=np.int32)


def logits(source: object, activations: str) -> Array:
    model = load(source, activations=activations, kv="f32")  # type: ignore[arg-type]
    return model.head(model.forward(TOKENS[0], model.new_cache(64)))


def distance(a: Array, b: Array) -> float:
    return float(np.sqrt(np.mean(np.square(a - b))) / b.std())


def test_planted_outliers_are_rounded_apart(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model(tmp_path / "m", hidden=128))
    columns = [5, 40, 41]
    truth = logits(Planted(checkpoint, columns, 64), "float")
    np.testing.assert_allclose(truth, logits(checkpoint, "float"), rtol=0, atol=2e-5 * np.abs(truth).max())  # the same function
    weights = Planted(checkpoint, columns, 64, "int8_g32")
    exact = logits(weights, "float")
    apart, plain = (distance(logits(weights, how), exact) for how in ("llm_int8", "int8_token"))
    assert apart < 0.05 and plain > 5 * apart, (apart, plain)


def test_input_scales_are_what_the_layers_read(tmp_path: Path) -> None:
    """With min-max nothing is cut off: no token of the calibration text has a larger input, and one has just that."""
    checkpoint = open_checkpoint(tiny_model(tmp_path / "m"))
    spec = spec_of(checkpoint.description.config)
    done = []
    scales = input_scales(spec, checkpoint.read, TOKENS, progress=lambda layer, layers: done.append((layer, layers)))
    assert done == [(1, 2), (2, 2)] and len(scales) == 14
    embedding = get_format("f32").dequantize(checkpoint.read("model.embed_tokens.weight"))
    norm = get_format("f32").dequantize(checkpoint.read("model.layers.0.input_layernorm.weight"))
    x = embedding[TOKENS.reshape(-1)].astype(np.float64)
    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + spec.norm_eps) * norm
    for name in ("q_proj", "k_proj", "v_proj"):
        assert scales[f"model.layers.0.self_attn.{name}"] == pytest.approx(np.abs(x).max() / 127, rel=1e-6)
    assert (
        input_scales(spec, checkpoint.read, TOKENS, "percentile", 90.0)["model.layers.1.mlp.down_proj"]
        < 0.7 * (scales["model.layers.1.mlp.down_proj"])
    )


def test_calibrated_scales_run(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model(tmp_path / "m"))
    scales = input_scales(spec_of(checkpoint.description.config), checkpoint.read, TOKENS)
    weights = Planted(checkpoint, [], 1, "int8_g32")
    weights.description = replace(weights.description, activations=ActivationScheme(scales))
    assert 0 < distance(logits(weights, "int8_static"), logits(weights, "float")) < 0.1
    weights.description = replace(weights.description, activations=ActivationScheme())
    with pytest.raises(ModelError, match="has no calibrated input scales, which activations int8_static need"):
        logits(weights, "int8_static")


def test_llm_int8_is_absmax_by_row_and_nothing_else() -> None:
    w = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    method = METHODS["llm_int8"].run
    tensor = method(w, get_format("int8_row"))
    largest = np.abs(w).max(axis=1, keepdims=True)
    np.testing.assert_array_equal(tensor.fields["codes"], np.rint(w / largest * np.float32(127)))
    np.testing.assert_array_equal(tensor.fields["scb"], largest)
    assert method(w, get_format("int8_cs")).format == "int8_cs"
    with pytest.raises(FormatError, match=r"llm_int8:int4_g64: LLM\.int8\(\) has 8-bit rows"):
        method(w, get_format("int4_g64"))
