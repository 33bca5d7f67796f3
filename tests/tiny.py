"""Tiny random models as Hugging Face directories, written with numpy and tokenizers only.

    path = tiny_model(tmp_path / "m")                       # llama, 2 layers, hidden 64, float32, one file
    path = tiny_model(tmp_path / "m", "qwen3", dtype="bf16", shards=3, hidden=256)
    path = tiny_model(tmp_path / "m", change={"model.norm.weight": bad})   # replace tensors after the draw

The safetensors bytes are laid down by hand, so that a test may also write what a library would refuse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = "A tiny tokenizer reads this line: the quick brown fox jumps over the lazy dog, 0123456789 times; def f(x): return x + 1\n" * 4


def tiny_model(
    path: Path,
    model_type: str = "llama",
    *,
    hidden: int = 64,
    intermediate: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    tie: bool = True,
    dtype: str = "f32",
    shards: int = 1,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    change: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes a random model of this architecture with tokenizer and chat template into path; returns path.

    dtype: f32, f16 or bf16. config: entries added to config.json. change: tensors that replace the drawn ones.
    """
    path.mkdir(parents=True, exist_ok=True)
    settings = tiny_config(model_type, hidden, intermediate, layers, heads, kv_heads, tie) | dict(config or {})
    settings["dtype"] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype]
    tensors = tiny_tensors(settings, seed) | dict(change or {})
    write_shards(path, tensors, dtype, shards)
    (path / "config.json").write_text(json.dumps(settings, indent=2))
    (path / "tokenizer.json").write_text(tokenizer_json())
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|im_start|>",
                "eos_token": "<|im_end|>",
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return path


def tiny_config(model_type: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tie: bool) -> dict[str, Any]:
    """Returns config.json as a dict, with every key that the architecture needs."""
    config: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tie,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
    }
    if model_type.startswith("gemma"):
        config |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": hidden // heads, "sliding_window": 16}
        config["layer_types"] = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    if model_type == "gemma2":
        config |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if model_type == "gemma3_text":
        config |= {"rope_local_base_freq": 10000.0, "rope_theta": 1000000.0}
    return config


def tiny_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor by its Hugging Face name."""
    kind, d, f, hd = config["model_type"], config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv, v = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd, config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for i in range(config["num_hidden_layers"]):
        block: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (q, d),
            "self_attn.k_proj.weight": (kv, d),
            "self_attn.v_proj.weight": (kv, d),
            "self_attn.o_proj.weight": (d, q),
            "post_attention_layernorm.weight": (d,),
            "mlp.gate_proj.weight": (f, d),
            "mlp.up_proj.weight": (f, d),
            "mlp.down_proj.weight": (d, f),
        }
        if kind == "qwen2":
            block |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
        if kind in ("qwen3", "gemma3_text"):
            block |= {"self_attn.q_norm.weight": (hd,), "self_attn.k_norm.weight": (hd,)}
        if kind.startswith("gemma"):
            block |= {"pre_feedforward_layernorm.weight": (d,), "post_feedforward_layernorm.weight": (d,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (d,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def tiny_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random float32 weights: matrices N(0, 1/in), norms near 1 (near 0 for gemma, which adds the 1), biases small."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tiny_shapes(config).items():
        draw = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            tensors[name] = draw / np.sqrt(np.float32(shape[1]))
        elif name.endswith("bias") or config["model_type"].startswith("gemma"):
            tensors[name] = draw * np.float32(0.1)
        else:
            tensors[name] = 1 + draw * np.float32(0.1)
    return tensors


def write_shards(path: Path, tensors: Mapping[str, np.ndarray], dtype: str = "f32", shards: int = 1) -> None:
    """Writes tensors as model.safetensors, or as several shards with their index."""
    names = list(tensors)
    if shards == 1:
        (path / "model.safetensors").write_bytes(safetensors_bytes(tensors, dtype))
        return
    index = {}
    for i, part in enumerate(np.array_split(np.arange(len(names)), shards)):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        chosen = {names[j]: tensors[names[j]] for j in part}
        (path / file).write_bytes(safetensors_bytes(chosen, dtype))
        index |= dict.fromkeys(chosen, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def safetensors_bytes(tensors: Mapping[str, np.ndarray], dtype: str = "f32") -> bytes:
    """Returns a safetensors file: u64 length of the header, JSON header padded to 8 bytes, then the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = []
    end = 0
    for name, values in tensors.items():
        raw = _as_dtype(values, dtype).tobytes()
        header[name] = {"dtype": dtype.upper(), "shape": list(values.shape), "data_offsets": [end, end + len(raw)]}
        end += len(raw)
        data.append(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data)


def _as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """Returns float32 values as float32, float16, or the bits of bfloat16 (rounded to even)."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values, {"f32": np.float32, "f16": np.float16}[dtype])


@lru_cache(maxsize=1)
def tokenizer_json() -> str:
    """Returns a byte-level BPE tokenizer (GPT-2's pre-tokenizer) of VOCABULARY tokens as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer.to_str()
