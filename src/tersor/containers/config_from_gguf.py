"""GGUF's architecture keys -> Hugging Face's config.json.

Source: llama.cpp src/models/*.cpp `load_arch_hparams` (defaults when a key is absent). Rope settings are written in transformers 4's
spelling (rope_theta, rope_scaling), which version 5 understands too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tersor.containers.gguf_file import KeyValue
from tersor.containers.gguf_keys import LOCAL_ROPE_BASE, MAX_SIZE, SCALED_BY_WIDTH, SIZES, WINDOW_PERIOD, layer_types_of
from tersor.containers.gguf_names import ARCHITECTURES, GGUFArchitecture
from tersor.containers.gguf_rope import llama3_scaling
from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError, unknown
from tersor.tensor import Array


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
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_SIZE:
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
    """Returns the file's architecture. Raises ContainerError for an unknown one, listing the known, and for a file that is no model."""
    _, name = metadata.get("general.architecture", ("str", None))
    kind = metadata.get("general.type", ("str", "model"))[1]
    if name is None and kind != "model":
        what = (
            "an importance matrix, no model; give it to tersor quantize as --calib" if kind == "imatrix" else f"{shorten(kind)}, no model"
        )
        raise ContainerError(f"{where} is {what}")
    if name not in ARCHITECTURES:
        raise ContainerError(f"{where}: {unknown('architecture', shorten(name), ARCHITECTURES)}")
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
    config |= {name: keys.size(key) for key, name in SIZES.items()}
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
    by_width = layers == SCALED_BY_WIDTH[architecture.name]
    out = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if by_width else config["head_dim"],
        "sliding_window": window or 4096,
        "layer_types": layer_types_of(layers, keys.size("attention.sliding_window_pattern", WINDOW_PERIOD[architecture.name])),
        "final_logit_softcapping": keys.get("final_logit_softcapping") and keys.number("final_logit_softcapping"),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping") and keys.number("attn_logit_softcapping"),
    }
    if architecture.name == "gemma2":  # llama.cpp's defaults, src/llama-hparams.h
        out["final_logit_softcapping"] = out["final_logit_softcapping"] or 30.0
        out["attn_logit_softcapping"] = out["attn_logit_softcapping"] or 50.0
    else:
        out["rope_local_base_freq"] = keys.number("rope.freq_base_swa", LOCAL_ROPE_BASE)
    return out


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
