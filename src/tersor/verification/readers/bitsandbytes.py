"""bitsandbytes directories as the bitsandbytes package decodes them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tersor.tensor import Array
from tersor.verification.reader import Reader
from tersor.verification.readers.shards import stored_tensors

_STATE = ".quant_state.bitsandbytes__"


class BitsAndBytesReader(Reader):
    """QuantState and dequantize_4bit, asked for float32; int8_vectorwise_dequant, (q * SCB) * (1/127) in float32."""

    package = "bitsandbytes"
    modules = ("torch", "safetensors", "bitsandbytes")

    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        """Yields (name, values) of every tensor: float32, in the logical shape."""
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

        with stored_tensors(path) as (names, get):
            known = set(names)
            states = {name.partition(_STATE)[0] for name in names if _STATE in name}
            for name in names:
                owner, _, part = name.rpartition(".")
                if owner in states or _STATE in name or part in ("SCB", "weight_format"):
                    continue  # a part of another
                if name in states:
                    parts = {other: get(other) for other in names if other.startswith(f"{name}.")}
                    state = QuantState.from_dict(parts, torch.device("cpu"))
                    state.dtype = torch.float32
                    yield name, dequantize_4bit(get(name), state).numpy()
                elif part == "weight" and f"{owner}.SCB" in known:
                    yield name, int8_vectorwise_dequant(get(name), get(f"{owner}.SCB")).numpy()
                else:
                    yield name, get(name).float().numpy()
