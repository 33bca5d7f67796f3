"""What reading and writing GGUF's architecture keys share: the plain sizes, llama.cpp's defaults, and checked access to config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError

# src/models/gemma2.cpp, gemma3.cpp: these layer counts are the 27B models, whose queries are scaled by hidden_size / heads.
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
WINDOW_PERIOD = {"gemma2": 2, "gemma3": 6}
LOCAL_ROPE_BASE = 10_000.0
MAX_SIZE = 1 << 31

SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}


def layer_types_of(layers: int, period: int) -> list[str]:
    """Returns layer_types where every period-th layer sees everything (llama-hparams.cpp, set_swa_pattern)."""
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]


def config_size(where: str, config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_SIZE:
        raise ContainerError(f"{where}: config.json's {name} is {shorten(value)}, needs an integer in [1, 2^31)")
    return value


def config_number(where: str, settings: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Returns a positive finite number of config.json; absent or null: the default."""
    value = settings.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ContainerError(f"{where}: config.json's {name} is {shorten(value)}, needs a number above 0")
    return float(value)
