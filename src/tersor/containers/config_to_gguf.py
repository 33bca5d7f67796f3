"""Hugging Face's config.json -> GGUF's architecture keys.

Source: llama.cpp conversion/{base,llama,qwen,gemma}.py. Both spellings of rope settings are read (transformers 4: rope_theta and
rope_scaling; 5: rope_parameters). What GGUF has no key for is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tersor.containers.gguf_file import KeyValue
from tersor.containers.gguf_keys import LOCAL_ROPE_BASE, SCALED_BY_WIDTH, SIZES, WINDOW_PERIOD, config_number, config_size, layer_types_of
from tersor.containers.gguf_names import GGUFArchitecture, architecture_of
from tersor.containers.gguf_rope import rope_factors
from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError
from tersor.tensor import Array


def write_metadata(where: str, config: Mapping[str, Any]) -> tuple[dict[str, KeyValue], Array | None]:
    """Returns (the architecture's key-values, the rope_freqs tensor or None) of a config.json.

    Raises ContainerError for what GGUF has no key for, instead of dropping it.
    """
    if "text_config" in config:
        raise ContainerError(f"{where}: a multimodal config (text_config); only text models can be written as GGUF so far")
    architecture = architecture_of(where, config.get("model_type"))
    prefix, head_dim = architecture.name, _head_dim(where, config)
    pairs: dict[str, KeyValue] = {"general.architecture": ("str", prefix), "general.type": ("str", "model")}
    if name := str(config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]:
        pairs["general.name"] = ("str", name)
    pairs |= {f"{prefix}.{key}": ("u32", config_size(where, config, name)) for key, name in SIZES.items()}
    kv_heads = "num_attention_heads" if config.get("num_key_value_heads") is None else "num_key_value_heads"
    pairs[f"{prefix}.attention.head_count_kv"] = ("u32", config_size(where, config, kv_heads))
    pairs[f"{prefix}.attention.key_length"] = ("u32", head_dim)
    pairs[f"{prefix}.attention.value_length"] = ("u32", head_dim)
    pairs[f"{prefix}.rope.dimension_count"] = ("u32", head_dim)
    pairs[f"{prefix}.attention.layer_norm_rms_epsilon"] = ("f32", config_number(where, config, "rms_norm_eps", 1e-6))
    pairs[f"{prefix}.vocab_size"] = ("u32", config_size(where, config, "vocab_size"))
    rope, freqs = _write_rope(where, prefix, config, head_dim)
    return pairs | rope | _write_attention(where, architecture, config, head_dim), freqs


def _head_dim(where: str, config: Mapping[str, Any]) -> int:
    if config.get("head_dim") is not None:
        return config_size(where, config, "head_dim")
    return config_size(where, config, "hidden_size") // config_size(where, config, "num_attention_heads")


def _rope_settings(where: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Returns (rope settings of the full layers with rope_theta, the local layers' base or None) from either spelling."""
    given, scaling = config.get("rope_parameters"), config.get("rope_scaling") or {}
    if given is None:
        return {"rope_theta": config.get("rope_theta"), **_mapping(where, scaling)}, config.get("rope_local_base_freq")
    if "full_attention" in _mapping(where, given):
        return dict(_mapping(where, given["full_attention"])), _mapping(where, given.get("sliding_attention") or {}).get("rope_theta")
    return dict(given), config.get("rope_local_base_freq")


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ContainerError(f"{where}: config.json's rope settings are {shorten(value)}, need an object")
    return value


def _write_rope(where: str, prefix: str, config: Mapping[str, Any], head_dim: int) -> tuple[dict[str, KeyValue], Array | None]:
    settings, local = _rope_settings(where, config)
    theta = config_number(where, settings, "rope_theta", 1e6 if prefix == "gemma3" else 1e4)
    pairs: dict[str, KeyValue] = {f"{prefix}.rope.freq_base": ("f32", theta)}
    if (
        prefix == "gemma3"
        and (base := config_number(where, {"rope_local_base_freq": local}, "rope_local_base_freq", LOCAL_ROPE_BASE)) != LOCAL_ROPE_BASE
    ):
        pairs[f"{prefix}.rope.freq_base_swa"] = ("f32", base)
    context = config_size(where, config, "max_position_embeddings")
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if settings.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ContainerError(f"{where}: partial_rotary_factor cannot be written as GGUF for {prefix}")
    if kind == "llama3" and prefix != "gemma3":
        return pairs, rope_factors(where, settings, theta, head_dim, context)
    if kind == "longrope" and settings.get("short_factor") == settings.get("long_factor") and settings.get("attention_factor") == 1.0:
        return pairs, _listed_factors(where, settings["long_factor"], head_dim)
    if kind == "linear":
        pairs[f"{prefix}.rope.scaling.type"] = ("str", "linear")
        pairs[f"{prefix}.rope.scaling.factor"] = ("f32", config_number(where, settings, "factor"))
    elif kind == "yarn" and not any(settings.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim")):
        pairs[f"{prefix}.rope.scaling.type"] = ("str", "yarn")
        pairs[f"{prefix}.rope.scaling.factor"] = ("f32", config_number(where, settings, "factor"))
        original = int(config_number(where, settings, "original_max_position_embeddings", context))
        pairs[f"{prefix}.rope.scaling.original_context_length"] = ("u32", original)
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            if (value := config_number(where, settings, key, default)) != default:
                pairs[f"{prefix}.rope.scaling.yarn_{key}"] = ("f32", value)
    elif kind != "default":
        raise ContainerError(
            f"{where}: rope scaling {shorten(kind)!r} with these settings has no place in GGUF; known: default, linear, llama3, yarn"
        )
    return pairs, None


def _listed_factors(where: str, listed: Any, head_dim: int) -> Array:
    """Returns the divisors that `llama3_scaling` could only list."""
    if not isinstance(listed, list) or len(listed) != head_dim // 2 or not all(isinstance(f, (int, float)) and f > 0 for f in listed):
        raise ContainerError(f"{where}: long_factor is {shorten(listed)}, needs {head_dim // 2} numbers above 0")
    return np.array(listed, np.float32)


def _write_attention(where: str, architecture: GGUFArchitecture, config: Mapping[str, Any], head_dim: int) -> dict[str, KeyValue]:
    """Returns windows and soft caps; refuses what the architecture's readers would ignore."""
    prefix = architecture.name
    window = config.get("sliding_window")
    if not prefix.startswith("gemma"):
        if prefix.startswith("qwen") and config.get("use_sliding_window") and window:
            raise ContainerError(f"{where}: GGUF's {prefix} has no sliding window (use_sliding_window is true)")
        has = config.get("model_type") == "mistral" and window
        return {f"{prefix}.attention.sliding_window": ("u32", config_size(where, config, "sliding_window"))} if has else {}
    layers, heads = config_size(where, config, "num_hidden_layers"), config_size(where, config, "num_attention_heads")
    need = config["hidden_size"] // heads if layers == SCALED_BY_WIDTH[prefix] else head_dim
    if config.get("query_pre_attn_scalar", need) != need:
        raise ContainerError(
            f"{where}: query_pre_attn_scalar is {config['query_pre_attn_scalar']}; GGUF's {prefix} with {layers} layers always means {need}"
        )
    pairs: dict[str, KeyValue] = {
        f"{prefix}.attention.sliding_window": ("u32", config_size(where, {"sliding_window": 4096, **config}, "sliding_window"))
    }
    types = config.get("layer_types")
    if types is None:
        types = layer_types_of(
            layers, config_size(where, {"sliding_window_pattern": WINDOW_PERIOD[prefix], **config}, "sliding_window_pattern")
        )
    if not isinstance(types, list) or len(types) != layers:
        raise ContainerError(f"{where}: config.json's layer_types is {shorten(types)}, needs one type for each of {layers} layers")
    period = _period(where, types)
    if period != WINDOW_PERIOD[prefix] and types != layer_types_of(layers, WINDOW_PERIOD[prefix]):
        pairs[f"{prefix}.attention.sliding_window_pattern"] = ("u32", period)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            pairs[f"{prefix}.{key}"] = ("f32", config_number(where, config, key))
        elif prefix == "gemma2":
            raise ContainerError(f"{where}: {key} is {config.get(key)}; GGUF's gemma2 always has one")
    return pairs


def _period(where: str, types: Sequence[str]) -> int:
    """Returns p when exactly every p-th layer is full attention (len + 1 when none is)."""
    period = types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1
    if list(types) != layer_types_of(len(types), period):
        raise ContainerError(f"{where}: layer_types has no regular period, which GGUF needs (every p-th layer full_attention)")
    return period
