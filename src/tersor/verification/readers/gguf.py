"""GGUF files, read and decoded by ggml's own gguf package; names and row orders translated back by transformers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tersor.tensor import Array
from tersor.verification.reader import Reader


class GGUFPackageReader(Reader):
    """The gguf package, with transformers' table of names and its undoing of llama's row order and gemma's norms."""

    package = "gguf"
    modules = ("gguf", "torch", "transformers")

    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        from gguf import GGUFReader
        from gguf.quants import dequantize
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        parts = _parts(path)
        first: Any = GGUFReader(parts[0])
        architecture = _value(first, "general.architecture")
        names = _hugging_face_names(first, architecture)
        heads = _value(first, f"{architecture}.attention.head_count")
        kv_heads = _value(first, f"{architecture}.attention.head_count_kv", heads)
        config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        undo: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        processor = undo(config=config)
        for part in parts:
            reader: Any = GGUFReader(part)
            for tensor in reader.tensors:
                if tensor.name == "rope_freqs.weight":
                    continue
                shape = tuple(int(n) for n in reversed(tensor.shape))
                stem, _, suffix = tensor.name.rpartition(".")
                values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
                yield f"{names[stem]}.{suffix}", processor.process(weights=values, name=tensor.name).weights


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
    """Returns {GGUF name: Hugging Face name}, both without `.weight`, of the modules of the transformers model of this architecture."""
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = int(_value(reader, f"{architecture}.block_count"))
    model_type = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, num_hidden_layers=layers)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    table = get_tensor_name_map(next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), layers)
    stems = {name.rpartition(".")[0] for name in model.state_dict()}
    return {gguf: stem for stem in stems if (gguf := table.get_name(stem)) is not None}
