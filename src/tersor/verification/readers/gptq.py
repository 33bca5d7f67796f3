"""GPTQ directories as gptqmodel's plain torch kernel decodes them (nn_modules/qlinear/torch.py), with its reading of the config."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tersor.tensor import Array
from tersor.verification.reader import Reader


class GPTQReader(Reader):
    """Builds each layer as gptqmodel's loader does: `dynamic` asked, zeros brought from v1 to v2, then dequantized in float32."""

    package = "gptqmodel"
    modules = ("torch", "gptqmodel")

    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        """Yields (name, float32 values) of every tensor."""
        import torch
        from gptqmodel import QuantizeConfig
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
        from safetensors import safe_open

        config = QuantizeConfig.from_pretrained(str(path))
        files: dict[str, Any] = {}
        for file in sorted(path.glob("*.safetensors")):
            opened: Any = safe_open(file, framework="pt")
            files |= dict.fromkeys(opened.keys(), opened)
        for name, file in files.items():
            module, _, part = name.rpartition(".")
            if f"{module}.qweight" not in files or part == "bias":
                yield name, file.get_tensor(name).to(torch.float32).numpy()
                continue
            if part != "qweight":
                continue
            buffers = {key: files[f"{module}.{key}"].get_tensor(f"{module}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")}
            bits, size, symmetric, act_order = (
                config.dynamic_get(module, key, getattr(config, key)) for key in ("bits", "group_size", "sym", "desc_act")
            )
            columns, rows = len(buffers["g_idx"]), buffers["qweight"].shape[1]
            layer = TorchLinear(bits, size, symmetric, act_order, columns, rows, register_buffers=True)
            layer.load_state_dict(buffers)
            if config.format == "gptq":
                convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
            layer.scales = layer.scales.to(torch.float32)
            layer.eval()
            yield f"{module}.weight", layer.dequantize_weight().T.contiguous().to(torch.float32).numpy()
