"""Gemma 3, its text decoder: five layers with a sliding window, then a global one; q and k norms (Gemma team, 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tersor.models.gemma2 import gemma_spec
from tersor.models.rope import rope_of
from tersor.models.spec import DecoderSpec, Layer, layer_count, layer_kinds, size


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Returns the decoder of a `gemma3_text` config. Global and sliding layers have rotations of their own: base 10^6
    with the config's scaling, and base 10^4 without."""
    config = {"head_dim": 256, **config}
    pattern = size(config, "sliding_window_pattern", 6)
    default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layer_count(config))]
    dim = size(config, "head_dim")
    full = Layer(0, rope_of(config, dim, "full_attention", theta=1e6))
    sliding = Layer(
        size(config, "sliding_window", 4096), rope_of(config, dim, "sliding_attention", theta_key="rope_local_base_freq", theta=1e4)
    )
    layers = [sliding if kind == "sliding_attention" else full for kind in layer_kinds(config, default)]
    return replace(gemma_spec(config, layers), qk_norm=True)
