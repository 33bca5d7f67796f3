"""models/folding: factors per channel move from a producer to its readers, and the model stays the same function."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import VOCABULARY, tiny_model, write_shards

from tersor.containers import open_checkpoint
from tersor.engine import load
from tersor.formats import get_format
from tersor.models import ARCHITECTURES, linear_groups, spec_of
from tersor.models.folding import apply_scale, head_fold, layer_folds, residual

TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, 40).astype(np.int32)
BIASES = {"attention_bias": True, "mlp_bias": True}


def read_all(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {
            name: get_format(i.format).dequantize(checkpoint.read(name)).reshape(i.shape).copy() for name, i in checkpoint.tensors.items()
        }


def logits(path: Path) -> np.ndarray:
    m = load(path, activations="float", kv="f32")
    return m.head(m.forward(TOKENS, m.new_cache(len(TOKENS))))


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "llama_biases"])
def test_function_is_the_same_with_any_scale_in_every_fold(tmp_path, kind):
    path = tiny_model(tmp_path / "m", kind.removesuffix("_biases"), heads=4, kv_heads=2, tie=False)
    config = json.loads((path / "config.json").read_text())
    tensors = read_all(path)
    rng = np.random.default_rng(2)
    if kind == "llama_biases":
        config |= BIASES
        (path / "config.json").write_text(json.dumps(config))
        tensors |= {
            n[:-6] + "bias": rng.standard_normal(len(w)).astype(np.float32) for n, w in tensors.items() if n.endswith("_proj.weight")
        }
        write_shards(path, tensors)
    want = logits(path)
    spec = spec_of(config)
    folds = [fold for i in range(len(spec.layers)) for fold in layer_folds(spec, i)] + [head_fold(spec)]
    before = dict(tensors)
    for fold in folds:
        scale = np.exp(rng.standard_normal(fold.columns // fold.sharing)).astype(np.float32)
        changed = apply_scale(fold, tensors, scale[fold.sources])
        assert set(changed) == {*fold.readers, *fold.producer}
        tensors |= changed
    write_shards(path, tensors)
    np.testing.assert_allclose(logits(path), want, rtol=0, atol=3e-5 * np.abs(want).max())
    untouched = [n for n in tensors if np.array_equal(tensors[n], before[n])]
    assert "model.norm.weight" not in untouched and not any(n.endswith("_proj.weight") for n in untouched)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_readers_are_the_groups_that_share_an_input(tmp_path, kind):
    spec = spec_of(json.loads((tiny_model(tmp_path / "m", kind) / "config.json").read_text()))
    assert tuple(fold.readers for i in range(len(spec.layers)) for fold in layer_folds(spec, i)) == linear_groups(spec)
    assert head_fold(spec) is None  # tied: the embedding reads the same rows
    stream = residual(spec)
    linears = {name for group in linear_groups(spec) for name in group}
    assert set(stream.readers) | {n for n in stream.writers if n.endswith("weight")} == linears
    assert not set(stream.readers) & set(stream.writers)


def test_sources_of_grouped_queries(tmp_path):
    spec = spec_of(json.loads((tiny_model(tmp_path / "m", heads=4, kv_heads=2, hidden=8) / "config.json").read_text()))
    assert layer_folds(spec, 0)[1].sources.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]  # heads 0 and 1 read kv head 0, values of 2 channels
    assert layer_folds(spec, 0)[0].sources.tolist() == list(range(8))


def test_impossible_scales_are_caught(tmp_path):
    spec = spec_of(json.loads((tiny_model(tmp_path / "m", hidden=8) / "config.json").read_text()))
    fold, tensors = layer_folds(spec, 0)[1], read_all(tmp_path / "m")
    for bad in (np.zeros(8), np.full(8, np.nan), np.ones(4)):
        with pytest.raises(AssertionError, match="no positive number"):
            apply_scale(fold, tensors, bad)
    with pytest.raises(AssertionError, match="different scales"):
        apply_scale(fold, tensors, np.arange(1, 9))
