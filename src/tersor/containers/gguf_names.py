"""How GGUF names and orders tensors, per architecture, and how Hugging Face does.

Source: llama.cpp gguf-py/gguf/tensor_mapping.py (names); conversion/llama.py `permute`, conversion/gemma.py (the 1 of the norms).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError, unknown
from tersor.tensor import Array, QuantizedTensor

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_TWO_NORMS = {"post_attention_layernorm": "ffn_norm"}
_SANDWICH = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class GGUFArchitecture:
    """An architecture as GGUF knows it.

    name:       `general.architecture`, and the prefix of its keys.
    layer:      Hugging Face's names within a layer -> GGUF's.
    interleaved: q and k rows are stored with the two halves of each head interleaved (ggml's "normal" rope), where Hugging Face
                 keeps the halves apart (rotate-half, "neox").
    norm_shift: what GGUF adds to the norm weights (gemma computes with 1 + weight; GGUF stores the sum).
    """

    name: str
    model_type: str
    class_name: str
    layer: Mapping[str, str]
    interleaved: bool = False
    norm_shift: float = 0.0


ARCHITECTURES = {
    "llama": GGUFArchitecture("llama", "llama", "LlamaForCausalLM", _LAYER | _TWO_NORMS, interleaved=True),
    "qwen2": GGUFArchitecture("qwen2", "qwen2", "Qwen2ForCausalLM", _LAYER | _TWO_NORMS),
    "qwen3": GGUFArchitecture("qwen3", "qwen3", "Qwen3ForCausalLM", _LAYER | _TWO_NORMS | _QK_NORM),
    "gemma2": GGUFArchitecture("gemma2", "gemma2", "Gemma2ForCausalLM", _LAYER | _SANDWICH, norm_shift=1.0),
    "gemma3": GGUFArchitecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", _LAYER | _SANDWICH | _QK_NORM, norm_shift=1.0),
}
# Hugging Face's model_type -> architecture. Mistral is a llama to GGUF.
MODEL_TYPES = {a.model_type: a for a in ARCHITECTURES.values()} | {"mistral": ARCHITECTURES["llama"]}

ROPE_FREQS = "rope_freqs.weight"


def architecture_of(where: str, model_type: object) -> GGUFArchitecture:
    """Returns the architecture of a Hugging Face model_type. Raises ContainerError that lists the known ones."""
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ContainerError(f"{where}: {unknown('model_type', shorten(model_type), MODEL_TYPES)}; GGUF can hold only these so far")
    return MODEL_TYPES[model_type]


def to_hugging_face(architecture: GGUFArchitecture, name: str) -> str | None:
    """Returns the Hugging Face name of a GGUF tensor, None when the architecture has no such tensor."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    for hugging_face, gguf in _TOP.items():
        if stem == gguf:
            return f"{hugging_face}.{kind}"
    blk, _, rest = stem.partition(".")
    number, _, part = rest.partition(".")
    found = next((h for h, g in architecture.layer.items() if g == part), None)
    if blk != "blk" or not number.isdecimal() or found is None:
        return None
    return f"model.layers.{int(number)}.{found}.{kind}"


def to_gguf(architecture: GGUFArchitecture, name: str) -> str | None:
    """Returns the GGUF name of a Hugging Face tensor, None when the architecture has no such tensor."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in _TOP:
        # gemma2's readers always take the embedding for the head, and reject a file with a head of its own
        return None if (architecture.name, stem) == ("gemma2", "lm_head") else f"{_TOP[stem]}.{kind}"
    if not stem.startswith("model.layers."):
        return None
    number, _, part = stem.removeprefix("model.layers.").partition(".")
    if not number.isdecimal() or part not in architecture.layer:
        return None
    return f"blk.{int(number)}.{architecture.layer[part]}.{kind}"


def permuted_heads(architecture: GGUFArchitecture, name: str, config: Mapping[str, Any]) -> int:
    """Returns the number of heads whose rows change order between GGUF and Hugging Face for this tensor, 0 for none."""
    if not architecture.interleaved:
        return 0
    if ".self_attn.q_proj." in name:
        return int(config["num_attention_heads"])
    if ".self_attn.k_proj." in name:
        return int(config["num_attention_heads" if config.get("num_key_value_heads") is None else "num_key_value_heads"])
    return 0


def rows_from_gguf(rows: int, heads: int) -> Array:
    """Returns for every Hugging Face row the GGUF row that holds it, (rows,) int64.

    Within a head of size 2n, Hugging Face row s*n + j (half s, pair j) is GGUF row 2j + s.
    """
    order: Array = np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return order


def rows_to_gguf(rows: int, heads: int) -> Array:
    """Returns for every GGUF row the Hugging Face row that goes there, (rows,) int64: the inverse of `rows_from_gguf`."""
    order: Array = np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return order


def reorder(tensor: QuantizedTensor, order: Array) -> QuantizedTensor:
    """Returns the tensor with its rows (a vector: its values) in this order. Acts on packed rows: nothing is requantized."""
    if len(tensor.shape) == 1:
        return QuantizedTensor(tensor.format, tensor.shape, {"values": tensor.fields["values"][:, order]})
    return QuantizedTensor(tensor.format, (len(order), *tensor.shape[1:]), {key: field[order] for key, field in tensor.fields.items()})
