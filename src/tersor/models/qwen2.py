"""Qwen2 and Qwen2.5: Llama with biases on q, k and v (Yang et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tersor.models.rope import rope_of
from tersor.models.spec import DecoderSpec, Layer, dense_spec, flag, head_dim, layer_count, layer_kinds, number, size


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Returns the decoder of a `qwen2` config."""
    return replace(dense_spec(config, qwen_layers(config), tied=False), qkv_bias=True)


def qwen_layers(config: Mapping[str, Any]) -> list[Layer]:
    """Returns the layers: a sliding window from layer max_window_layers on, when use_sliding_window says so."""
    rope = rope_of(config, head_dim(config))
    if not flag(config, "use_sliding_window") or config.get("sliding_window") is None:
        return [Layer(0, rope)] * layer_count(config)
    first = int(number(config, "max_window_layers", 28))
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(layer_count(config))]
    window = size(config, "sliding_window")
    return [Layer(window if kind == "sliding_attention" else 0, rope) for kind in layer_kinds(config, default)]
