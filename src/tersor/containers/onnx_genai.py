"""genai_config.json: what onnxruntime-genai wants to know of the folder that it runs.

Source: microsoft/onnxruntime-genai src/python/py/models/builders/base.py (make_genai_config), src/models/model_type.h (`type`).
"""

from __future__ import annotations

import json
from typing import Any

from tersor.containers.onnx_file import MODEL
from tersor.models.spec import DecoderSpec
from tersor.tensor import ModelDescription

# Positions for which its cache has room unless the user asks for more: it takes the memory at once.
MAX_LENGTH = 4096


def genai_config(spec: DecoderSpec, description: ModelDescription) -> dict[str, Any]:
    """Returns genai_config.json. Special tokens are generation_config.json's, or else config.json's; what neither says is left out."""
    given = {**description.config, **_generation(description)}
    eos = given.get("eos_token_id")
    pad = given.get("pad_token_id")
    if pad is None:
        pad = eos[0] if isinstance(eos, list) and eos else eos
    tokens = {"bos_token_id": given.get("bos_token_id"), "eos_token_id": eos, "pad_token_id": pad}
    past = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    present = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": spec.head_dim,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": len(spec.layers),
        "num_key_value_heads": spec.kv_heads,
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask", **past},
        "outputs": {"logits": "logits", **present},
    }
    model = {"type": description.config["model_type"], "context_length": spec.context, "vocab_size": spec.vocab_size, "decoder": decoder}
    search = {"max_length": min(spec.context, MAX_LENGTH), "past_present_share_buffer": True}
    search |= {key: given[key] for key in ("do_sample", "temperature", "top_k", "top_p") if given.get(key) is not None}
    return {"model": model | {key: token for key, token in tokens.items() if token is not None}, "search": search}


def _generation(description: ModelDescription) -> dict[str, Any]:
    """Returns generation_config.json without its nulls; empty when there is none or it is damaged."""
    try:
        found = json.loads(description.files.get("generation_config.json", b"{}"))
    except ValueError:
        return {}
    return {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else {}
