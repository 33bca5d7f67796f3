"""compressed-tensors directories, decompressed by the package of that name, scheme by scheme as its own config says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tersor.tensor import Array
from tersor.verification.reader import Reader
from tersor.verification.readers.huggingface import stored_tensors


class CompressedTensorsReader(Reader):
    """The compressed-tensors package, asked for float32: it computes in the scale's type, or bfloat16 for FP4, when left alone."""

    package = "compressed-tensors"
    modules = ("compressed_tensors", "safetensors", "torch")

    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        config = _config(path)
        modules: dict[str, dict[str, Any]] = {}
        for name, tensor in stored_tensors(path):
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = tensor
        for module in list(modules):
            state = modules.pop(module)
            if "weight_scale" in state:
                yield f"{module}.weight", _decompressed(module, state, config)
                state = {part: state[part] for part in ("bias",) if part in state}
            for part, tensor in state.items():
                yield f"{module}.{part}", tensor.float().numpy()


def _config(path: Path) -> Any:
    """Returns the package's QuantizationConfig. It knows no actorder any more, which older versions wrote for weight_g_idx."""
    from compressed_tensors.quantization import QuantizationConfig

    stored = json.loads((path / "config.json").read_text())["quantization_config"]
    for group in stored["config_groups"].values():
        if isinstance(group, dict) and (group.get("weights") or {}).get("actorder") in ("group", "dynamic", True):
            del group["weights"]["actorder"]
    return QuantizationConfig.model_validate({key: value for key, value in stored.items() if key in QuantizationConfig.model_fields})


def _decompressed(name: str, state: dict[str, Any], config: Any) -> Array:
    """Returns one module's weight, float32."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.utils.match import match_targets

    kind = torch.nn.Embedding if name.endswith("embed_tokens") else torch.nn.Linear
    schemes = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    with torch.device("meta"):
        matched = match_targets(name, kind(1, 1), schemes)
    if not matched:
        raise ValueError(f"{name} is stored quantized, but no config group targets it")
    scheme = schemes[matched[0]]
    own = scheme.format or (config.format if config.format != "mixed-precision" else None) or infer_module_format(kind, scheme)
    compressor = BaseCompressor.get_value_from_registry(getattr(own, "value", own))
    if "fp4" not in str(getattr(own, "value", own)):
        if "weight_g_idx" in state:
            return _ordered(state, scheme.weights)
        wide = state | {"weight_scale": state["weight_scale"].float()}
        weight: Array = compressor.decompress(wide, scheme)["weight"].numpy()
        return weight
    rows, half = state["weight_packed"].shape
    values = unpack_fp4_from_uint8(state["weight_packed"], rows, 2 * half, dtype=torch.float32)
    scale = compressor._decompress_scale(state["weight_scale"], torch.float32)
    global_scale = state.get("weight_global_scale")
    decoded: Array = dequantize(values, scale, None, scheme.weights, torch.float32, global_scale).numpy()
    return decoded


def _ordered(state: dict[str, Any], weights: Any) -> Array:
    """Returns a weight with weight_g_idx. The package unpacks it; which group a column has, its newer versions do not ask."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    shape, scale, groups = state["weight_shape"], state["weight_scale"].float(), state["weight_g_idx"].long()
    codes = unpack_from_int32(state["weight_packed"], weights.num_bits, shape).float()
    if not weights.symmetric:
        zeros = unpack_from_int32(state["weight_zero_point"], weights.num_bits, (shape[0], scale.shape[-1]), packed_dim=0)
        codes -= zeros.float()[:, groups]
    decoded: Array = (codes * scale[:, groups]).numpy()
    return decoded
