"""MLX directories as mlx decodes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tersor.tensor import Array
from tersor.verification.reader import Reader


class MLXReader(Reader):
    """mlx.core.load and mlx.core.dequantize, the scales widened to float32 first."""

    package = "mlx"
    modules = ("mlx.core",)

    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        """Yields (name, values) of every tensor: float32, in the logical shape."""
        import mlx.core as mx

        default = json.loads((path / "config.json").read_text()).get("quantization", {})
        stored: dict[str, mx.array] = {}
        for file in sorted(path.glob("model*.safetensors")):
            loaded = mx.load(str(file))
            assert isinstance(loaded, dict)
            stored |= loaded
        quantized = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
        for name in list(stored):
            module, _, part = name.rpartition(".")
            if module not in quantized or part == "bias":
                yield name, np.array(stored.pop(name).astype(mx.float32))
            elif part == "weight":
                own = default.get(module, default)
                scales, biases = stored[f"{module}.scales"].astype(mx.float32), stored[f"{module}.biases"].astype(mx.float32)
                packed, mode = stored.pop(name), own.get("mode", "affine")
                yield name, np.array(mx.dequantize(packed, scales, biases, own["group_size"], own["bits"], mode))
