"""Qwen3, the dense ones: RMS norms on every head of q and k, no biases (Qwen team, 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tersor.models.qwen2 import qwen_layers
from tersor.models.spec import DecoderSpec, dense_spec, flag


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Returns the decoder of a `qwen3` config. attention_bias puts biases on q, k, v and o."""
    bias = flag(config, "attention_bias")
    config = {"head_dim": 128, **config}
    return replace(dense_spec(config, qwen_layers(config), tied=False), qk_norm=True, qkv_bias=bias, output_bias=bias)
