"""Every member of ARCHITECTURES against transformers: tiny random models, float32, on more tokens than the window holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tersor import _native
from tersor.engine import load
from tersor.models import ARCHITECTURES, expected_tensors, linear_groups, spec_of

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 24}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64}
CASES = {
    "llama": ("LlamaConfig", {}),
    "llama_tied_biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama_head_dim": ("LlamaConfig", {"head_dim": 40, "num_key_value_heads": 1}),
    "llama_llama3": ("LlamaConfig", {"rope_scaling": LLAMA3}),
    "llama_linear": ("LlamaConfig", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama_dynamic": ("LlamaConfig", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama_yarn": ("LlamaConfig", {"rope_scaling": YARN}),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "mistral_no_window": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3_bias": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
    # caps small enough to bend these logits
    "gemma2": ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 7, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
}
TOKENS = np.random.default_rng(1).integers(0, SIZES["vocab_size"], 200).astype(np.int32)
# Logits here span about 15; float32 sums of up to 96 terms through 7 layers differ by a few 1e-5 between two orders.
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A model directory and transformers' logits on TOKENS, (200, vocab)."""
    kind, settings = CASES[request.param]
    config = getattr(transformers, kind)(**{**SIZES, **settings})
    config._attn_implementation = "eager"  # the one that knows soft caps
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # matrices large enough that attention is far from uniform; norms away from 1 (gemma: weight + 1)
            mean = 1.0 if p.ndim == 1 and name.endswith("weight") and not kind.startswith("Gemma") else 0.0
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 1.5 / p.shape[-1] ** 0.5) + mean)
        logits = model(torch.from_numpy(TOKENS).long()[None]).logits[0].numpy()
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path, logits


def test_every_architecture_has_a_case() -> None:
    assert {getattr(transformers, kind).model_type for kind, _ in CASES.values()} == set(ARCHITECTURES)


def test_logits_are_those_of_transformers(case: tuple[Path, np.ndarray]) -> None:
    path, want = case
    model = load(path, activations="float", kv="f32")
    got = model.head(model.forward(TOKENS, model.new_cache(len(TOKENS))))
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_decoding_with_the_cache_equals_prefill(case: tuple[Path, np.ndarray]) -> None:
    path, want = case
    model = load(path, activations="float", kv="f32")
    cache = model.new_cache(len(TOKENS))
    steps = [TOKENS[:37], *TOKENS[37:60, None], TOKENS[60:]]  # a window is crossed in each of the three parts
    got = np.concatenate([model.head(model.forward(step, cache)) for step in steps])
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def test_threads_do_not_change_a_bit(case: tuple[Path, np.ndarray]) -> None:
    path, _ = case
    before = _native.threads()
    try:
        results = []
        for threads in (1, 2):
            model = load(path, threads=threads)
            results.append(model.head(model.forward(TOKENS, model.new_cache(len(TOKENS)))))
    finally:
        _native.set_threads(before)
    np.testing.assert_array_equal(results[0], results[1])


def test_half_precision_cache_is_close(case: tuple[Path, np.ndarray]) -> None:
    path, want = case
    model = load(path, activations="float", kv="f16")
    got = model.head(model.forward(TOKENS, model.new_cache(len(TOKENS))))
    error = np.abs(got - want)
    # keys and values carry relative errors of 2^-11; scores of up to about 30 turn them into 1.5 % of a probability
    assert 0 < error.max() < 0.2 and np.sqrt(np.mean(error**2)) < 0.02


def test_expected_tensors_are_those_that_transformers_saves(case: tuple[Path, np.ndarray]) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig

    path, _ = case
    spec = spec_of(AutoConfig.from_pretrained(path).to_dict())
    with safe_open(path / "model.safetensors", "np") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert expected_tensors(spec) == stored
    linear = [name for group in linear_groups(spec) for name in group]
    matrices = {name for name, shape in stored.items() if len(shape) == 2} - {"model.embed_tokens.weight", "lm_head.weight"}
    assert len(linear) == len(set(linear)) and set(linear) == matrices
