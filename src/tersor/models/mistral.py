"""Mistral 7B and its like: Llama with a sliding window in every layer (Jiang et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tersor.models.rope import rope_of
from tersor.models.spec import DecoderSpec, Layer, dense_spec, head_dim, layer_count, size


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """Returns the decoder of a `mistral` config. sliding_window: null = none (v0.2 and later); 4096 when not given."""
    window = 0 if "sliding_window" in config and config["sliding_window"] is None else size(config, "sliding_window", 4096)
    layer = Layer(window, rope_of(config, head_dim(config)))
    return dense_spec(config, [layer] * layer_count(config), tied=False)
