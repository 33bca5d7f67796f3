"""What configs are turned into: rotations against transformers' own, sizes, and every refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tersor.errors import ModelError
from tersor.models import ARCHITECTURES, spec_of
from tersor.models.rope import SCALINGS, rope_of
from tiny import tiny_config

SCALED = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn bounds": {"factor": 8.0, "original_max_position_embeddings": 512, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn scaled": {"factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 0.7},
    "yarn deepseek": {"factor": 4.0, "original_max_position_embeddings": 1024, "mscale": 0.8, "mscale_all_dim": 1.1},
}


def config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """Returns a tiny config of this architecture with changes; those that are None are left out."""
    merged = tiny_config(kind, 64, 128, 2, 4, 2, True) | changes
    return {key: value for key, value in merged.items() if value is not ...}


@pytest.mark.parametrize("case", SCALED)
@pytest.mark.parametrize("spelling", ["rope_type", "type", "rope_parameters"])
def test_scaled_rotations_are_those_of_transformers(case: str, spelling: str) -> None:
    name, settings = case.split()[0], SCALED[case]
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "max_position_embeddings": 4096}
    oracle = transformers.LlamaConfig(**sizes, rope_theta=5e5, rope_scaling={"rope_type": name, **settings})
    inv_freq, scale = ROPE_INIT_FUNCTIONS[name](oracle)
    if spelling == "rope_parameters":
        ours = sizes | {"rope_parameters": {"rope_type": name, "rope_theta": 5e5, **settings}}
    else:
        ours = sizes | {"rope_theta": 5e5, "rope_scaling": {spelling: name, **settings}}
    got = rope_of(ours, 128)
    np.testing.assert_allclose(got.inv_freq, inv_freq.numpy(), rtol=1e-6)
    assert got.inv_freq.dtype == np.float32 and got.scale == pytest.approx(scale, rel=1e-12)


def test_every_scaling_has_a_case() -> None:
    assert {case.split()[0] for case in SCALED} | {"default"} == set(SCALINGS)


def test_a_missing_original_context_is_the_context() -> None:
    settings = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    base = {"rope_theta": 1e4, "max_position_embeddings": 2048}
    given = rope_of(base | {"rope_scaling": settings | {"original_max_position_embeddings": 2048}}, 64)
    np.testing.assert_array_equal(rope_of(base | {"rope_scaling": settings}, 64).inv_freq, given.inv_freq)


def test_yarn_stretches_the_context() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert spec_of(config("qwen2", rope_scaling=scaling)).context == 8192
    assert spec_of(config("qwen2")).context == 2048


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_gemma3_has_two_rotations(spelling: str) -> None:
    if spelling == "old":
        changes: dict[str, Any] = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    else:
        full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
        nested = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        changes = {"rope_theta": ..., "rope_local_base_freq": ..., "rope_parameters": nested}
    layers = spec_of(config("gemma3_text", num_hidden_layers=7, layer_types=..., **changes)).layers
    assert [layer.window for layer in layers] == [16, 16, 16, 16, 16, 0, 16]
    exponents = np.arange(0, 16, 2) / 16
    np.testing.assert_allclose(layers[0].rope.inv_freq, 1e4**-exponents, rtol=1e-6)
    np.testing.assert_allclose(layers[5].rope.inv_freq, 1e6**-exponents / 8, rtol=1e-6)


def test_gemma3_rotations_by_default() -> None:
    gone = dict.fromkeys(("rope_theta", "rope_local_base_freq"), ...)
    sliding, full = spec_of(config("gemma3_text", **gone)).layers
    np.testing.assert_allclose([sliding.rope.inv_freq[1], full.rope.inv_freq[1]], [1e4 ** (-1 / 8), 1e6 ** (-1 / 8)], rtol=1e-6)


def test_layers_with_a_window() -> None:
    def windows(kind: str, **changes: Any) -> list[int]:
        return [layer.window for layer in spec_of(config(kind, num_hidden_layers=4, **changes)).layers]

    assert windows("llama") == [0, 0, 0, 0]
    assert windows("mistral", sliding_window=9) == [9, 9, 9, 9]
    assert windows("mistral", sliding_window=None) == [0, 0, 0, 0]
    assert windows("mistral") == [4096] * 4
    assert windows("qwen2", sliding_window=9, max_window_layers=3) == [0, 0, 0, 0]
    assert windows("qwen2", sliding_window=9, max_window_layers=3, use_sliding_window=True) == [0, 0, 0, 9]
    assert windows("gemma2", layer_types=...) == [16, 0, 16, 0]
    kinds = ["full_attention"] * 3 + ["sliding_attention"]
    assert windows("gemma2", layer_types=kinds) == windows("gemma3_text", layer_types=kinds) == [0, 0, 0, 16]


def test_defaults_are_those_of_transformers() -> None:
    gone = dict.fromkeys(("tie_word_embeddings", "rms_norm_eps", "num_key_value_heads", "head_dim"), ...)
    for kind in ARCHITECTURES:
        oracle = transformers.CONFIG_MAPPING[kind]()
        got = spec_of(config(kind, **gone) | {"num_key_value_heads": 2})
        assert got.tied == oracle.tie_word_embeddings and got.norm_eps == oracle.rms_norm_eps, kind
    for kind in ("qwen3", "gemma2", "gemma3_text"):
        assert spec_of(config(kind, **gone)).head_dim == transformers.CONFIG_MAPPING[kind]().head_dim
    assert (spec_of(config(**gone)).head_dim, spec_of(config(**gone)).kv_heads) == (16, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "unknown architecture 'mamba'; known: gemma2, gemma3_text, llama, mistral, qwen2, qwen3"),
        ({"model_type": ...}, "unknown architecture 'None'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "unknown rope scaling 'longrope'; known: default, dynamic, linear, llama3, yarn"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling: factor is None; need a number > 0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope scaling: factor is '2'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}}, "is not above low_freq"),
        ({"rope_scaling": 3}, "rope scaling is 3; need an object"),
        ({"rope_parameters": [1]}, "rope scaling is"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_act": "relu"}, "unknown activation 'relu'; known: gelu_pytorch_tanh, silu, swish"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0; need an integer in"),
        ({"vocab_size": 1 << 40}, "vocab_size is 1099511627776"),
        ({"vocab_size": "320"}, "vocab_size is '320'"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers is 5000; at most 4096"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": ...}, "not a multiple of num_attention_heads 5; give head_dim"),
        ({"head_dim": 15}, "head_dim is 15; rotary embeddings need an even one"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'; need a number >= 0"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; need true or false"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ({"model_type": "gemma2", "layer_types": ["full_attention", "linear"]}, "unknown kind 'linear'"),
        ({"model_type": "gemma2", "layer_types": 5}, "layer_types is 5; need a list"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "only causal models"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        spec_of(config(**changes))
    assert message in str(caught.value)
