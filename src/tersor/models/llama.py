"""Llama 2 and 3, and all that share its form: SmolLM2, TinyLlama, ... (Touvron et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tersor.models.rope import rope_of
from tersor.models.spec import DecoderSpec, Layer, dense_spec, flag, head_dim, layer_count


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Returns the decoder of a `llama` config. attention_bias puts biases on q, k, v and o; mlp_bias on the MLP's three."""
    layer = Layer(window=0, rope=rope_of(config, head_dim(config)))
    bias = flag(config, "attention_bias")
    return replace(
        dense_spec(config, [layer] * layer_count(config), tied=False),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=flag(config, "mlp_bias"),
    )
