"""tersor's kernels inside transformers' models. Importing this registers the quantizer.

    from tersor.integrations.transformers import TersorConfig, load

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TersorConfig("clip:int4_g64s"))   # float, quantized on loading
    model = load(path)                                      # whatever tersor opens: its numbers, as they are stored

`load` is a function of its own, since transformers' from_pretrained goes by the quant_method that config.json names (gptq, awq,
compressed-tensors, ...) and refuses a TersorConfig for it. It gives transformers a state dict whose tensors stand for the checkpoint's
(QuantizedWeight), so that naming, tying, buffers and missing weights stay transformers' business, and no weight is ever a float.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from tersor.containers import open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.errors import ModelError
from tersor.formats import get_format
from tersor.integrations.linear import TersorLinear
from tersor.integrations.matrix import Matrix
from tersor.integrations.quantizer import TersorConfig, TersorQuantizer
from tersor.integrations.weight import QuantizedWeight
from tersor.recipe import KEEP
from tersor.threads import set_threads


def load(
    source: str | Path | Checkpoint,
    *,
    activations: str = "int8",
    threads: int | None = None,
    attn_implementation: str | None = None,
    auto_class: Any = AutoModelForCausalLM,
) -> Any:
    """Returns transformers' model of a checkpoint, its matrices multiplied by tersor's kernels. Other arguments as of tersor.load.

    source: whatever tersor.load opens; it stays open as long as the model lives, for the matrices are read again where their values are
    needed (gradients, saving). auto_class: one of transformers' Auto classes. The model computes in float32.
    Raises ContainerError and ModelError as tersor.load does, ModelError for weights that the architecture lacks or has no place for.
    """
    set_threads(threads)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    description = checkpoint.description
    config = _config(checkpoint)
    state = {name: _tensor(checkpoint, name, activations) for name in checkpoint.tensors}
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        model_class = type(auto_class.from_config(config))
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        quantization_config=TersorConfig(KEEP, activations),
        output_loading_info=True,
        dtype=torch.float32,
        **options,
    )
    lacking = sorted(report["missing_keys"]) or sorted(report["unexpected_keys"])
    if lacking:
        what = "lacks" if report["missing_keys"] else "holds"
        raise ModelError(
            f"{checkpoint.path}: {what} {lacking[0]} and {len(lacking) - 1} more, unlike {type(model).__name__}; see auto_class"
        )
    checkpoint.release()
    model.name_or_path = str(checkpoint.path)
    if "generation_config.json" in description.files and model.can_generate():
        model.generation_config = GenerationConfig.from_dict(json.loads(description.files["generation_config.json"]))
    return model


def _config(checkpoint: Checkpoint) -> Any:
    """Returns transformers' configuration. Raises ModelError for a model_type that it does not know."""
    fields = {key: value for key, value in checkpoint.description.config.items() if key not in ("dtype", "torch_dtype")}
    try:
        return AutoConfig.for_model(**fields)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{checkpoint.path}: transformers makes no configuration of its config: {error}") from error


def _tensor(checkpoint: Checkpoint, name: str, activations: str) -> torch.Tensor:
    """Returns a matrix as what stands for it, anything else as float32."""
    if len(checkpoint.tensors[name].shape) == 2:
        return QuantizedWeight(Matrix.from_checkpoint(checkpoint, name, activations))
    tensor = checkpoint.read(name)
    return torch.from_numpy(get_format(tensor.format).dequantize(tensor).copy())


__all__ = ["TersorConfig", "TersorLinear", "TersorQuantizer", "load"]
