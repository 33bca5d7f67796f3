"""GPTQ directories as gptqmodel's plain torch kernel decodes them (nn_modules/qlinear/torch.py), with its reading of the config."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from tersor.tensor import Array
from tersor.verification.reader import Reader


class GPTQReader(Reader):
    """Builds each layer as gptqmodel's loader does: `dynamic` asked, zeros brought from v1 to v2, then dequantized in float32.

    gptqmodel talks on stdout, which is the caller's; it is sent to stderr.
    """

    package = "gptqmodel"
    modules = ("torch", "gptqmodel")

    def missing(self) -> str | None:
        """Returns why the reader cannot be used here, None when it can."""
        with redirect_stdout(sys.stderr):
            return super().missing()

    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        """Yields (name, float32 values) of every tensor."""
        import torch
        from safetensors import safe_open

        with redirect_stdout(sys.stderr):
            from gptqmodel import QuantizeConfig

            config = QuantizeConfig.from_pretrained(str(path))
        files: dict[str, Any] = {}
        for file in sorted(path.glob("*.safetensors")):
            opened: Any = safe_open(file, framework="pt")
            files |= dict.fromkeys(opened.keys(), opened)
        for name, file in files.items():
            module, _, part = name.rpartition(".")
            if f"{module}.qweight" not in files or part == "bias":
                yield name, file.get_tensor(name).to(torch.float32).numpy()
            elif part == "qweight":
                keys = ("qweight", "qzeros", "scales") + ("g_idx",) * (f"{module}.g_idx" in files)
                buffers = {key: files[f"{module}.{key}"].get_tensor(f"{module}.{key}") for key in keys}
                with redirect_stdout(sys.stderr):
                    values = _decoded(config, module, buffers)
                yield f"{module}.weight", values


def _decoded(config: Any, module: str, buffers: Mapping[str, Any]) -> Array:
    """Returns a layer's weights, (rows, in) float32. buffers: its stored tensors, by gptqmodel's names."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    bits, size, symmetric, act_order = (
        config.dynamic_get(module, key, getattr(config, key)) for key in ("bits", "group_size", "sym", "desc_act")
    )
    columns, rows = buffers["qweight"].shape[0] * 32 // bits, buffers["qweight"].shape[1]
    layer = TorchLinear(bits, size, symmetric, act_order, columns, rows, register_buffers=True)
    layer.load_state_dict({"g_idx": layer.g_idx, **buffers})
    if config.format == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer.scales = layer.scales.to(torch.float32)
    layer.eval()
    values: Array = layer.dequantize_weight().T.contiguous().to(torch.float32).numpy()
    return values
