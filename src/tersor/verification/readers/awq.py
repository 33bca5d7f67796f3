"""AWQ directories as compressed-tensors converts them (entrypoints/convert/converters/autoawq.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tersor.tensor import Array
from tersor.verification.reader import Reader


class AWQReader(Reader):
    """Unpacks with compressed-tensors' AutoAWQConverter, and dequantizes with its scheme."""

    package = "compressed-tensors"
    modules = ("torch", "compressed_tensors")

    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        """Yields (name, float32 values) of every tensor."""
        import torch
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
        from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
        from compressed_tensors.quantization.lifecycle.forward import dequantize
        from safetensors import safe_open

        config = json.loads((path / "config.json").read_text())["quantization_config"]
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
            parts = {key: files[key].get_tensor(key) for key in (name, f"{module}.qzeros", f"{module}.scales") if key in files}
            columns = parts[name].shape[0]
            size = columns if config["group_size"] == -1 else config["group_size"]
            converter = AutoAWQConverter.from_autoawq_config({**config, "group_size": size})
            quantization = converter.update_config(None)
            tensors = converter.process(parts)
            shape = torch.Size(tensors[f"{module}.weight_shape"].tolist())
            scale = tensors[f"{module}.weight_scale"].to(torch.float32)
            zero = tensors.get(f"{module}.weight_zero_point")
            weight = dequantize(
                unpack_from_int32(tensors[f"{module}.weight_packed"], 4, shape),
                scale,
                None if zero is None else unpack_from_int32(zero, 4, scale.shape, packed_dim=0),
                quantization.config_groups["config_group_0"].weights,
            )
            yield f"{module}.weight", weight.to(torch.float32).numpy()
