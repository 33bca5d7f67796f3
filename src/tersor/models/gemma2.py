"""Gemma 2: norms around attention and MLP, soft caps, every other layer with a sliding window (Gemma team, 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tersor.errors import ModelError
from tersor.models.rope import rope_of
from tersor.models.spec import DecoderSpec, Layer, dense_spec, flag, layer_count, layer_kinds, number, size


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Returns the decoder of a `gemma2` config. Missing soft caps are 50 for scores and 30 for logits; null is none."""
    config = {"head_dim": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **config}
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(layer_count(config))]
    rope = rope_of(config, size(config, "head_dim"))
    window = size(config, "sliding_window", 4096)
    layers = [Layer(window if kind == "sliding_attention" else 0, rope) for kind in layer_kinds(config, default)]
    return gemma_spec(config, layers)


def gemma_spec(config: Mapping[str, Any], layers: list[Layer]) -> DecoderSpec:
    """Returns what Gemma 2 and 3 have in common: norms of weight + 1, embeddings times sqrt(hidden_size), attention
    scaled by query_pre_attn_scalar^-0.5, tied embeddings unless the config says otherwise."""
    if flag(config, "use_bidirectional_attention"):
        raise ModelError("config.json: use_bidirectional_attention is true; only causal models can be run")
    dense = dense_spec(config, layers, tied=True, activation=config.get("hidden_activation") or "gelu_pytorch_tanh")
    bias = flag(config, "attention_bias")
    return replace(
        dense,
        qkv_bias=bias,
        output_bias=bias,
        sandwich=True,
        norm_offset=1.0,
        embedding_scale=dense.hidden_size**0.5,
        attention_scale=size(config, "query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=number(config, "attn_logit_softcapping", 0.0),
        final_softcap=number(config, "final_logit_softcapping", 0.0),
    )
