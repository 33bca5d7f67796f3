"""rotate: Q is orthogonal, and the rotated model is the same function, in our engine and in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import VOCABULARY, tiny_model

from tersor.containers import CONTAINERS, open_checkpoint
from tersor.engine import load
from tersor.errors import ContainerError, ModelError, RecipeError
from tersor.formats import get_format
from tersor.methods.rotate import RotateOptions, rotated, rotation
from tersor.models import ARCHITECTURES

TOKENS = np.random.default_rng(1).integers(0, VOCABULARY, 40).astype(np.int32)
REFUSED = ("gemma2", "gemma3_text")
MODELS = {
    "llama": ("llama", {}, {}),  # tied, 64 channels
    "llama_biases": ("llama", {"tie": False, "hidden": 72}, {"attention_bias": True, "mlp_bias": True}),
    "llama_odd": ("llama", {"hidden": 66, "heads": 3, "kv_heads": 1, "tie": False}, {}),
    "mistral": ("mistral", {"hidden": 48}, {"sliding_window": 16}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"tie": False}, {}),
}


def model(path: Path, name: str, **more) -> Path:
    kind, sizes, config = MODELS[name]
    made = tiny_model(path, kind, **sizes, **more)
    if not config:
        return made
    stored = json.loads((made / "config.json").read_text()) | config
    if config.get("mlp_bias"):
        add_biases(made, stored)
    (made / "config.json").write_text(json.dumps(stored))
    return made


def add_biases(path: Path, config: dict) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    rng = np.random.default_rng(5)
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        tensors[name.replace(".weight", ".bias")] = rng.standard_normal(len(tensors[name])).astype(np.float32) * np.float32(0.1)
    save_file(tensors, path / "model.safetensors")


def logits(checkpoint) -> np.ndarray:
    m = load(checkpoint, activations="float", kv="f32")
    return m.head(m.forward(TOKENS, m.new_cache(len(TOKENS))))


def values(checkpoint, name: str, rows: slice | None = None) -> np.ndarray:
    tensor = checkpoint.read(name, rows)
    return get_format(tensor.format).dequantize(tensor)


@pytest.mark.parametrize("kind, n", [("hadamard", n) for n in (1, 2, 12, 36, 64, 66, 99, 576, 960)] + [("random", n) for n in (1, 36, 99)])
def test_rotation_is_orthogonal(kind, n):
    q = rotation(n, kind, 3).apply(np.eye(n, dtype=np.float32)).astype(np.float64)
    assert np.abs(q @ q.T - np.eye(n)).max() < 1e-6
    if kind == "hadamard" and n not in (66, 99):  # a Hadamard matrix: all entries as small as can be
        assert np.abs(np.abs(q) * n**0.5 - 1).max() < 1e-6


def test_random_rotation_is_not_biased_towards_a_sign():
    first = [rotation(6, "random", seed).factors[0][0, 0] for seed in range(200)]
    assert abs(np.mean(first)) < 4 * np.std(first) / 200**0.5 and np.min(first) < -0.5 < 0.5 < np.max(first)


def test_seed_decides():
    x = np.random.default_rng(0).standard_normal((2, 48)).astype(np.float32)
    for kind in ("hadamard", "random"):
        assert np.array_equal(rotation(48, kind, 1).apply(x), rotation(48, kind, 1).apply(x))
        assert not np.allclose(rotation(48, kind, 1).apply(x), rotation(48, kind, 2).apply(x))


def test_parts_and_rows_are_rotated_alike(monkeypatch):
    x = np.random.default_rng(0).standard_normal((7, 36)).astype(np.float32)
    whole = rotation(36).apply(x)
    monkeypatch.setattr("tersor.methods.rotate._PART_VALUES", 100)
    np.testing.assert_allclose(rotation(36).apply(x), whole, rtol=1e-6)


def test_factors_are_applied_as_their_kronecker_product():
    x = np.random.default_rng(0).standard_normal((7, 156)).astype(np.float32)
    q = rotation(156)
    assert [len(f) for f in q.factors] == [39, 4]
    dense = q.factors[0]
    for factor in q.factors[1:]:
        dense = np.kron(dense, factor)
    np.testing.assert_allclose(q.apply(x), (x * q.signs) @ dense, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_function_is_the_same(tmp_path, name, kind):
    with open_checkpoint(model(tmp_path / "m", name)) as source:
        want = logits(source)
        view = rotated(source, RotateOptions(kind, 7))
        np.testing.assert_allclose(logits(view), want, rtol=0, atol=2e-5 * np.abs(want).max())
        weight = "model.layers.0.mlp.down_proj.weight"
        assert np.abs(values(view, weight) - values(source, weight)).max() > 0.05  # and yet it is another model
        assert (values(view, "model.layers.1.post_attention_layernorm.weight") == 1).all()


def test_transformers_loads_what_was_rotated(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    path = model(tmp_path / "m", "qwen2", dtype="bf16")
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(torch.from_numpy(TOKENS).long()[None]).logits[0].numpy()
        with rotated(open_checkpoint(path)) as view:
            writer = CONTAINERS["huggingface"].create(tmp_path / "r", view.description, list(view.tensors.values()))
            with writer:
                for tensor in view.tensors:
                    writer.write(tensor, view.read(tensor))
        turned = AutoModelForCausalLM.from_pretrained(tmp_path / "r", dtype=torch.float32)
        got = turned(torch.from_numpy(TOKENS).long()[None]).logits[0].numpy()
    assert not turned.config.tie_word_embeddings
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_rows_are_those_of_the_whole(tmp_path):
    with rotated(open_checkpoint(model(tmp_path / "m", "llama_biases"))) as view:
        for name, info in view.tensors.items():
            whole = view.read(name)
            assert whole.format == "f32" and whole.shape == info.shape and whole.nbytes == info.nbytes
            part = view.read(name, slice(1, 5))
            if len(info.shape) == 2:
                np.testing.assert_allclose(part.fields["values"], whole.fields["values"][1:5], rtol=1e-5, atol=1e-7)
        assert view.read("model.norm.weight", slice(0, 1)).shape == (1, 72)
        view.release()


def test_rows_of_a_format_that_mixes_rows(tmp_path):
    path = model(tmp_path / "m", "llama")
    from tersor import quantize

    quantize(path, tmp_path / "q", "rtn:int8_t, embed=keep")
    with rotated(open_checkpoint(tmp_path / "q")) as view:
        name = "model.layers.0.mlp.gate_proj.weight"
        np.testing.assert_allclose(values(view, name, slice(2, 9)), values(view, name)[2:9], rtol=1e-5, atol=1e-7)


def test_a_tied_head_is_untied_and_the_cost_is_told(tmp_path):
    with rotated(open_checkpoint(model(tmp_path / "m", "llama", dtype="f16"))) as view:
        assert view.description.config["tie_word_embeddings"] is False and "lm_head.weight" in view.tensors
        assert f"lm_head.weight is {VOCABULARY * 64} weights more" in view.note


def test_a_tied_head_stays_after_a_constant_norm(tmp_path):
    path = model(tmp_path / "m", "llama", change={"model.norm.weight": np.full(64, 1.5, np.float32)})
    with open_checkpoint(path) as source:
        view = rotated(source)
        assert view.description.config["tie_word_embeddings"] is True and "lm_head.weight" not in view.tensors and view.note == ""
        want = logits(source)
        np.testing.assert_allclose(logits(view), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_an_outlier_channel_is_spread(tmp_path):
    with open_checkpoint(
        model(tmp_path / "m", "llama", change={"model.layers.0.input_layernorm.weight": np.r_[50, np.ones(63)]})
    ) as source:
        w = values(rotated(source), "model.layers.0.self_attn.q_proj.weight")
    assert np.abs(w).max() < 6 * w.std()  # it was 50 to 1


def test_every_architecture_is_turned_or_refused_here():
    assert {kind for kind, _, _ in MODELS.values()} | {*REFUSED} == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", REFUSED)
def test_norms_that_do_not_commute_are_refused(tmp_path, kind):
    with (
        open_checkpoint(tiny_model(tmp_path / "m", kind)) as source,
        pytest.raises(ModelError, match=f"rotate cannot turn {kind}: the norms"),
    ):
        rotated(source)


def test_unknown_kind_and_tensor(tmp_path):
    with open_checkpoint(tiny_model(tmp_path / "m")) as source:
        with pytest.raises(RecipeError, match="rotate: unknown kind 'fourier'; known: hadamard, random"):
            rotated(source, RotateOptions("fourier"))
        with pytest.raises(ContainerError, match="no tensor 'model-9'"):
            rotated(source).read("model-9")
