"""GGUF files, read and decoded by ggml's own gguf package, with its own table of names.

Two things that llama.cpp's converter does to weights are undone here: q and k of the llama family have their rows in pairs, and gemma's
norms hold 1 + w. Source: ggml-org/llama.cpp conversion/{llama,gemma}.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tersor.tensor import Array
from tersor.verification.reader import Reader

# How transformers' decoders name their modules; the gguf package knows which of them an architecture has.
_MODULES = ("model.embed_tokens", "model.norm", "lm_head")
_BLOCK_MODULES = (
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
    *(f"{place}_layernorm" for place in ("input", "post_attention", "pre_feedforward", "post_feedforward")),
)


class GGUFPackageReader(Reader):
    """The gguf package; numpy is all that it needs."""

    package = "gguf"
    modules = ("gguf",)

    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        from gguf import GGUFReader
        from gguf.quants import dequantize

        parts = _parts(path)
        first: Any = GGUFReader(parts[0])
        architecture = _value(first, "general.architecture")
        names = _hugging_face_names(first, architecture)
        heads = int(_value(first, f"{architecture}.attention.head_count"))
        kv_heads = int(_value(first, f"{architecture}.attention.head_count_kv", heads))
        for part in parts:
            reader: Any = GGUFReader(part)
            for tensor in reader.tensors:
                if tensor.name == "rope_freqs.weight":
                    continue
                shape = tuple(int(n) for n in reversed(tensor.shape))
                stem, _, suffix = tensor.name.rpartition(".")
                values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
                yield f"{names[stem]}.{suffix}", _undone(values, tensor.name, architecture, heads, kv_heads)


def _parts(path: Path) -> list[Path]:
    """Returns the files of a model: one, or all parts of a split one."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    return [path.with_name(f"{match[1]}-{number:05d}-of-{match[2]}.gguf") for number in range(1, int(match[2]) + 1)]


def _value(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _hugging_face_names(reader: Any, architecture: str) -> dict[str, str]:
    """Returns {GGUF name: Hugging Face name}, both without `.weight`, of all modules that the architecture has."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    layers = int(_value(reader, f"{architecture}.block_count"))
    table = get_tensor_name_map(next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), layers)
    blocks = (f"model.layers.{i}.{part}" for i in range(layers) for part in _BLOCK_MODULES)
    names = {gguf: stem for stem in (*_MODULES, *blocks) if (gguf := table.get_name(stem)) is not None}
    return {"output": "lm_head", **names}  # the package leaves out a head that an architecture always ties


def _undone(values: Array, name: str, architecture: str, heads: int, kv_heads: int) -> Array:
    """Returns a tensor as Hugging Face has it."""
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        less: Array = values - np.float32(1)
        return less
    part = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", name)
    if architecture != "llama" or part is None:
        return values
    count = heads if part[1] == "q" else kv_heads
    pairs = values.reshape(count, values.shape[0] // count // 2, 2, *values.shape[1:])
    halves: Array = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
    return halves
