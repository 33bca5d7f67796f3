"""HQQ directories as the hqq package decodes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tersor.tensor import Array
from tersor.verification.reader import Reader
from tersor.verification.readers.shards import stored_tensors

if TYPE_CHECKING:
    import torch

_PARTS = (
    *("scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
)


class HQQReader(Reader):
    """Quantizer.dequantize with float32 as its compute type.

    Its own loader evaluates stored text (`compute_dtype`) as Python; that one is never called here, the numbers are handed over.
    """

    package = "hqq"
    modules = ("torch", "safetensors", "hqq.core.quantize")

    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        """Yields (name, values) of every tensor: float32, in the logical shape."""
        with stored_tensors(path) as (names, get):
            quantized = {name.removesuffix(".W_q") for name in names if name.endswith(".W_q")}
            for name in names:
                module, _, part = name.rpartition(".")
                if module in quantized and part == "W_q":
                    yield f"{module}.weight", _decoded(module, get).numpy()
                elif module not in quantized or part not in _PARTS:
                    yield name, get(name).float().numpy()


def _decoded(module: str, get: Callable[[str], torch.Tensor]) -> torch.Tensor:
    import torch
    from hqq.core.quantize import Quantizer

    packing = bytes(get(f"{module}.packing").tolist()).decode()
    meta = {
        "nbits": get(f"{module}.nbits").item(),
        "group_size": get(f"{module}.group_size").item(),
        "axis": get(f"{module}.axis").item(),
        "shape": torch.Size(get(f"{module}.shape").tolist()),
        "scale": get(f"{module}.scale").float(),
        "zero": get(f"{module}.zero").float(),
        "packing": packing,
        "view_as_float": bool(get(f"{module}.view_as_float").item()),
        "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
        "compute_dtype": torch.float32,
    }
    decoded: torch.Tensor = Quantizer.dequantize(get(f"{module}.W_q"), meta)
    return decoded
