"""GGUF's architecture keys <-> Hugging Face's config.json.

Source: llama.cpp conversion/{base,llama,qwen,gemma}.py (what is written), src/models/*.cpp `load_arch_hparams` (defaults when a key
is absent). Both spellings of rope settings are read (transformers 4: rope_theta and rope_scaling; 5: rope_parameters); the first,
which both versions understand, is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tersor.containers.gguf_file import KeyValue
from tersor.containers.gguf_names import ARCHITECTURES, GGUFArchitecture, architecture_of
from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError, unknown
from tersor.tensor import Array

# src/models/gemma2.cpp, gemma3.cpp: these layer counts are the 27B models, whose queries are scaled by hidden_size / heads.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
_WINDOW_PERIOD = {"gemma2": 2, "gemma3": 6}
_LOCAL_ROPE_BASE = 10_000.0
_MAX_SIZE = 1 << 31

_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}


class _Keys:
    """The metadata of one file with checked access. Keys are given without the architecture's prefix."""

    def __init__(self, where: str, prefix: str, metadata: Mapping[str, KeyValue]) -> None:
        self.where, self.prefix, self._metadata = where, prefix, metadata

    def get(self, key: str) -> Any:
        """Returns the value, None when absent."""
        return self._metadata.get(f"{self.prefix}.{key}", (None, None))[1]

    def size(self, key: str, default: int | None = None) -> int:
        """Returns a positive integer. An array (one value per layer) must be constant."""
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_SIZE:
            raise ContainerError(f"{self.where}: {self.prefix}.{key} is {shorten(value)}, needs one integer in [1, 2^31); convert again")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Returns a positive finite number."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ContainerError(f"{self.where}: {self.prefix}.{key} is {shorten(value)}, needs a number above 0; convert again")
        # The shortest decimal that is this float32: 1e-05 again, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if self._metadata[f"{self.prefix}.{key}"][0] == "f32" else float(value)


def read_architecture(where: str, metadata: Mapping[str, KeyValue]) -> GGUFArchitecture:
    """Returns the file's architecture. Raises ContainerError for an unknown one, listing the known, and for part of a split model."""
    _, name = metadata.get("general.architecture", ("str", None))
    if name not in ARCHITECTURES:
        raise ContainerError(f"{where}: {unknown('architecture', shorten(name), ARCHITECTURES)}")
    if metadata.get("split.count", ("u16", 0))[1] > 1:
        raise ContainerError(f"{where}: is one part of a split model; join the parts with `llama-gguf-split --merge` first")
    return ARCHITECTURES[name]


def read_config(
    where: str,
    architecture: GGUFArchitecture,
    metadata: Mapping[str, KeyValue],
    shapes: Mapping[str, tuple[int, ...]],
    rope_freqs: Array | None,
) -> dict[str, Any]:
    """Returns config.json. shapes: of all tensors by Hugging Face name; rope_freqs: the tensor of that name, or None.

    The size of the vocabulary is the embedding's number of rows: some files pad it, some cut it.
    """
    keys = _Keys(where, architecture.name, metadata)
    if len(shapes.get("model.embed_tokens.weight", ())) != 2:
        raise ContainerError(f"{where}: has no matrix token_embd.weight; it holds no complete model")
    config: dict[str, Any] = {"model_type": architecture.model_type, "architectures": [architecture.class_name]}
    config |= {name: keys.size(key) for key, name in _SIZES.items()}
    if config["num_hidden_layers"] > len(shapes):
        raise ContainerError(
            f"{where}: announces {config['num_hidden_layers']} layers but holds {len(shapes)} tensors; the file is damaged"
        )
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = keys.size("attention.head_count_kv", heads)
    config["head_dim"] = keys.size("attention.key_length", keys.size("rope.dimension_count", config["hidden_size"] // heads or 1))
    config["vocab_size"] = shapes["model.embed_tokens.weight"][0]
    config["rms_norm_eps"] = keys.number("attention.layer_norm_rms_epsilon")
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    if architecture.name == "llama":  # the others' biases go without saying
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
        config["mlp_bias"] = "model.layers.0.mlp.gate_proj.bias" in shapes
    config |= _token_ids(where, metadata, config["vocab_size"])
    config |= _read_rope(keys, config, rope_freqs)
    config |= _read_attention(keys, architecture, config)
    _check_heads(where, architecture, config, shapes)
    return config


def _check_heads(where: str, architecture: GGUFArchitecture, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ContainerError when the rows of q or k, whose order is about to be changed, are not heads x head_dim."""
    for name, shape in shapes.items():
        for part, key in ((".self_attn.q_proj.", "num_attention_heads"), (".self_attn.k_proj.", "num_key_value_heads")):
            rows = shape[-1] if name.endswith(".bias") else shape[0]
            if part in name and (rows != config[key] * config["head_dim"] or config["head_dim"] % 2):
                raise ContainerError(
                    f"{where}: {name} has {rows} rows, but {architecture.name}'s keys announce {config[key]} heads of {config['head_dim']};"
                    " the file is damaged"
                )


def _token_ids(where: str, metadata: Mapping[str, KeyValue], vocab_size: int) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    out = {}
    for key, name in names.items():
        _, value = metadata.get(f"tokenizer.ggml.{key}_token_id", ("u32", None))
        if value is None:
            continue
        if not isinstance(value, int) or not 0 <= value < vocab_size:
            raise ContainerError(
                f"{where}: tokenizer.ggml.{key}_token_id is {shorten(value)}, the vocabulary has {vocab_size}; it is damaged"
            )
        out[name] = value
    return out


def _read_attention(keys: _Keys, architecture: GGUFArchitecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns activation, windows, soft caps and query scale."""
    window = keys.get("attention.sliding_window") and keys.size("attention.sliding_window")
    if not architecture.name.startswith("gemma"):
        out: dict[str, Any] = {"hidden_act": "silu"}
        if architecture.name == "llama" and window:  # only mistral has one; llama.cpp does not write it, we do
            out |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
        return out
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    by_width = layers == _SCALED_BY_WIDTH[architecture.name]
    out = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if by_width else config["head_dim"],
        "sliding_window": window or 4096,
        "layer_types": _layer_types(layers, keys.size("attention.sliding_window_pattern", _WINDOW_PERIOD[architecture.name])),
        "final_logit_softcapping": keys.get("final_logit_softcapping") and keys.number("final_logit_softcapping"),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping") and keys.number("attn_logit_softcapping"),
    }
    if architecture.name == "gemma2":  # llama.cpp's defaults, src/llama-hparams.h
        out["final_logit_softcapping"] = out["final_logit_softcapping"] or 30.0
        out["attn_logit_softcapping"] = out["attn_logit_softcapping"] or 50.0
    else:
        out["rope_local_base_freq"] = keys.number("rope.freq_base_swa", _LOCAL_ROPE_BASE)
    return out


def _layer_types(layers: int, period: int) -> list[str]:
    """Returns layer_types where every period-th layer sees everything (llama-hparams.cpp, set_swa_pattern)."""
    return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]


def _read_rope(keys: _Keys, config: Mapping[str, Any], rope_freqs: Array | None) -> dict[str, Any]:
    """Returns rope_theta and rope_scaling."""
    theta = keys.number("rope.freq_base", 1_000_000.0 if keys.prefix == "gemma3" else 10_000.0)
    if keys.size("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise ContainerError(
            f"{keys.where}: rope turns {keys.get('rope.dimension_count')} of {config['head_dim']} dimensions; all are needed"
        )
    out: dict[str, Any] = {"rope_theta": theta}
    kind = keys.get("rope.scaling.type")
    if rope_freqs is not None:
        out["rope_scaling"] = llama3_scaling(rope_freqs, theta, config["max_position_embeddings"])
    elif kind == "linear":
        out["rope_scaling"] = {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    elif kind == "yarn":
        original = keys.size("rope.scaling.original_context_length", config["max_position_embeddings"])
        scaling = {"rope_type": "yarn", "factor": keys.number("rope.scaling.factor"), "original_max_position_embeddings": original}
        scaling["beta_fast"] = keys.number("rope.scaling.yarn_beta_fast", 32.0)
        scaling["beta_slow"] = keys.number("rope.scaling.yarn_beta_slow", 1.0)
        out["rope_scaling"] = scaling
    elif kind not in (None, "none"):
        raise ContainerError(f"{keys.where}: {unknown('rope scaling', shorten(kind), ['none', 'linear', 'yarn'])}")
    return out


def rope_factors(where: str, scaling: Mapping[str, Any], theta: float, head_dim: int, context: int) -> Array:
    """Returns the divisors of the rope frequencies, (head_dim/2,) float32, that rope_type llama3 means.

    With wavelength L: 1 where L < original/high, factor where L > original/low, and in between
    1 / ((1 - s)/factor + s), s = (original/L - low) / (high - low). Source: transformers modeling_rope_utils.py,
    `_compute_llama3_parameters`; llama.cpp conversion/llama.py.
    """
    factor, low, high = (_number(where, scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _number(where, scaling, "original_max_position_embeddings", context)
    if high <= low:
        raise ContainerError(f"{where}: rope scaling llama3 needs high_freq_factor {high} above low_freq_factor {low}")
    turns = original * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def llama3_scaling(factors: Array, theta: float, context: int) -> dict[str, Any]:
    """Returns the rope_scaling whose divisors these are: llama3 when its formula gives them, or else longrope, which lists them.

    GGUF keeps only the divisors. The settings of all published Llama 3 models are tried first, then those that fit: only
    original/low and original/high can be told from the divisors, and low is taken as 1.
    """
    factor = _snap(float(factors.max()))
    for high, original in ((4.0, 8192), *_fitted_llama3(factors, theta)):
        found = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
        found["original_max_position_embeddings"] = original
        if np.allclose(rope_factors("", found, theta, 2 * len(factors), context), factors, rtol=1e-4):
            return found
    listed = [float(f) for f in factors]
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_factor": listed,
        "long_factor": listed,
        "original_max_position_embeddings": context,
    }


def _fitted_llama3(factors: Array, theta: float) -> list[tuple[float, int]]:
    """Returns [(high, original)] that fit the blended divisors, with low = 1; empty when fewer than two are blended.

    From s = original/(high - 1) * turns_per_position - 1/(high - 1), a straight line.
    """
    factor = float(factors.max())
    if factor <= 1:
        return []
    turns_per_position = theta ** -(np.arange(len(factors)) / len(factors)) / (2 * math.pi)
    smooth = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    if between.sum() < 2:
        return []
    slope, offset = np.polyfit(turns_per_position[between], smooth[between], 1)
    return [(_snap(1 - 1 / offset), round(_snap(-slope / offset)))] if offset < 0 < slope else []


def _snap(value: float) -> float:
    """Returns the nearest integer when it is within the noise of float32 factors, or else the value."""
    return float(round(value)) if abs(value - round(value)) < 1e-3 * abs(value) else value


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
    pairs |= {f"{prefix}.{key}": ("u32", _config_size(where, config, name)) for key, name in _SIZES.items()}
    kv_heads = "num_attention_heads" if config.get("num_key_value_heads") is None else "num_key_value_heads"
    pairs[f"{prefix}.attention.head_count_kv"] = ("u32", _config_size(where, config, kv_heads))
    pairs[f"{prefix}.attention.key_length"] = ("u32", head_dim)
    pairs[f"{prefix}.attention.value_length"] = ("u32", head_dim)
    pairs[f"{prefix}.rope.dimension_count"] = ("u32", head_dim)
    pairs[f"{prefix}.attention.layer_norm_rms_epsilon"] = ("f32", _number(where, config, "rms_norm_eps", 1e-6))
    pairs[f"{prefix}.vocab_size"] = ("u32", _config_size(where, config, "vocab_size"))
    rope, freqs = _write_rope(where, prefix, config, head_dim)
    return pairs | rope | _write_attention(where, architecture, config, head_dim), freqs


def _config_size(where: str, config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < _MAX_SIZE:
        raise ContainerError(f"{where}: config.json's {name} is {shorten(value)}, needs an integer in [1, 2^31)")
    return value


def _number(where: str, settings: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Returns a positive finite number of config.json; absent or null: the default."""
    value = settings.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ContainerError(f"{where}: config.json's {name} is {shorten(value)}, needs a number above 0")
    return float(value)


def _head_dim(where: str, config: Mapping[str, Any]) -> int:
    if config.get("head_dim") is not None:
        return _config_size(where, config, "head_dim")
    return _config_size(where, config, "hidden_size") // _config_size(where, config, "num_attention_heads")


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
    theta = _number(where, settings, "rope_theta", 1e6 if prefix == "gemma3" else 1e4)
    pairs: dict[str, KeyValue] = {f"{prefix}.rope.freq_base": ("f32", theta)}
    if (
        prefix == "gemma3"
        and (base := _number(where, {"rope_local_base_freq": local}, "rope_local_base_freq", _LOCAL_ROPE_BASE)) != _LOCAL_ROPE_BASE
    ):
        pairs[f"{prefix}.rope.freq_base_swa"] = ("f32", base)
    context = _config_size(where, config, "max_position_embeddings")
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if settings.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ContainerError(f"{where}: partial_rotary_factor cannot be written as GGUF for {prefix}")
    if kind == "llama3" and prefix != "gemma3":
        return pairs, rope_factors(where, settings, theta, head_dim, context)
    if kind == "longrope" and settings.get("short_factor") == settings.get("long_factor") and settings.get("attention_factor") == 1.0:
        return pairs, _listed_factors(where, settings["long_factor"], head_dim)
    if kind == "linear":
        pairs[f"{prefix}.rope.scaling.type"] = ("str", "linear")
        pairs[f"{prefix}.rope.scaling.factor"] = ("f32", _number(where, settings, "factor"))
    elif kind == "yarn" and not any(settings.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim")):
        pairs[f"{prefix}.rope.scaling.type"] = ("str", "yarn")
        pairs[f"{prefix}.rope.scaling.factor"] = ("f32", _number(where, settings, "factor"))
        original = int(_number(where, settings, "original_max_position_embeddings", context))
        pairs[f"{prefix}.rope.scaling.original_context_length"] = ("u32", original)
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            if (value := _number(where, settings, key, default)) != default:
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
        return {f"{prefix}.attention.sliding_window": ("u32", _config_size(where, config, "sliding_window"))} if has else {}
    layers, heads = _config_size(where, config, "num_hidden_layers"), _config_size(where, config, "num_attention_heads")
    need = config["hidden_size"] // heads if layers == _SCALED_BY_WIDTH[prefix] else head_dim
    if config.get("query_pre_attn_scalar", need) != need:
        raise ContainerError(
            f"{where}: query_pre_attn_scalar is {config['query_pre_attn_scalar']}; GGUF's {prefix} with {layers} layers always means {need}"
        )
    pairs: dict[str, KeyValue] = {
        f"{prefix}.attention.sliding_window": ("u32", _config_size(where, {"sliding_window": 4096, **config}, "sliding_window"))
    }
    types = config.get("layer_types")
    if types is None:
        types = _layer_types(
            layers, _config_size(where, {"sliding_window_pattern": _WINDOW_PERIOD[prefix], **config}, "sliding_window_pattern")
        )
    if not isinstance(types, list) or len(types) != layers:
        raise ContainerError(f"{where}: config.json's layer_types is {shorten(types)}, needs one type for each of {layers} layers")
    period = _period(where, types)
    if period != _WINDOW_PERIOD[prefix] and types != _layer_types(layers, _WINDOW_PERIOD[prefix]):
        pairs[f"{prefix}.attention.sliding_window_pattern"] = ("u32", period)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            pairs[f"{prefix}.{key}"] = ("f32", _number(where, config, key))
        elif prefix == "gemma2":
            raise ContainerError(f"{where}: {key} is {config.get(key)}; GGUF's gemma2 always has one")
    return pairs


def _period(where: str, types: Sequence[str]) -> int:
    """Returns p when exactly every p-th layer is full attention (len + 1 when none is)."""
    period = types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1
    if list(types) != _layer_types(len(types), period):
        raise ContainerError(f"{where}: layer_types has no regular period, which GGUF needs (every p-th layer full_attention)")
    return period
