"""A layer of transformers' DynamicCache that grows in place, where torch.cat would copy all keys and values for every token.

    memory   [ 0 .. length | room ]   (sequences, kv_heads, capacity, head_dim) float32, keys and values each
    layer.keys, layer.values          its first `length` positions, new views after every token

What the cache shows is what it would show anyway, except that its tensors are views with gaps. A token is only ever written behind the
views that were made last; whoever holds earlier ones sees no change. When the layer's tensors are no longer these very views (it
was cropped, reordered for beams, copied, updated by others), they are copied into new memory, as torch.cat would.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64  # positions at least, and half of what is held, so that a token's share of all copying is bounded


class Memory:
    """Keys and values of one layer, and the views of them that the layer holds."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copies what a layer holds, (sequences, kv_heads, length, head_dim)."""
        self.length = keys.shape[2]
        capacity = self.length + max(ROOM, self.length // 2)
        self._both = tuple(torch.empty(*t.shape[:2], capacity, t.shape[3]) for t in (keys, values))
        for whole, held in zip(self._both, (keys, values)):
            whole[:, :, : self.length] = held
        self.views: tuple[torch.Tensor, torch.Tensor] | None = None
        self.keys, self.values = (whole.numpy() for whole in self._both)

    def full(self) -> bool:
        """Returns whether there is no room for a token."""
        return bool(self.length == self.keys.shape[2])

    def grow(self, layer: Any) -> None:
        """Shows the layer one more position, which has been written."""
        self.length += 1
        keys, values = self._both
        layer.keys, layer.values = self.views = keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length)

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles None: the copy of the layer has copies of the views."""
        return type(None), ()


def memory_of(cache: Any, index: int, shape: tuple[int, int, int]) -> tuple[Any, Memory] | None:
    """Returns a layer of the cache and its memory, with room for a token; None for a layer that is empty or not one that grows by
    concatenation. shape: sequences, kv_heads and head_dim of what is to come."""
    if type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
        return None
    layer: Any = cache.layers[index]
    if type(layer) is not DynamicLayer or not layer.is_initialized:
        return None
    return _memory_of(layer, shape)


def _memory_of(layer: Any, shape: tuple[int, int, int]) -> tuple[Any, Memory] | None:
    memory: Memory | None = layer.__dict__.get("tersor_memory")
    keys, values = layer.keys, layer.values
    if memory is not None and memory.views is not None and keys is memory.views[0] and values is memory.views[1] and not memory.full():
        sequences, kv_heads, _, head_dim = memory.keys.shape
        return (layer, memory) if (sequences, kv_heads, head_dim) == shape else None
    for held in (keys, values):
        if held.dtype is not torch.float32 or held.ndim != 4 or (*held.shape[:2], held.shape[3]) != shape or held.requires_grad:
            return None
    if keys.shape != values.shape or not keys.shape[2] or keys.device.type != "cpu":
        return None
    layer.tersor_memory = memory = Memory(keys, values)
    return layer, memory
