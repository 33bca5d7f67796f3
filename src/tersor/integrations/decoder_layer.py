"""transformers' plain decoder layers with fewer calls: the products joined, norm, activation and residual in the native kernels.

    a = norm(x); q, k, v = rope(a Wqkv); x = x + attention(q, k, v) Wo; b = norm(x); x = x + (act(b Wgate) * (b Wup)) Wdown

Most of a token's time is Python's, not the products', when each of a layer's thirty torch calls goes through modules of their own.
The key-value cache, the mask and the attention function stay transformers'. A layer is taken for a plain one when its children are
named as Llama's and its own forward gives the same on random input; the modules stay, only the layer's forward is replaced, and it
goes back to the layer's own whenever a gradient, an adapter, a hook or eager attention asks for it. Single tokens without a mask,
which is most of what `generate` asks for, take one native call (step.py) on a cache that grows in place (growing.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from types import MethodType
from typing import Any

import numpy as np
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tersor import _native, ops
from tersor.errors import TersorError
from tersor.integrations import step
from tersor.integrations.growing import memory_of
from tersor.integrations.linear import Joined, TersorLinear
from tersor.integrations.weight import QuantizedWeight
from tersor.tensor import Array

TOLERANCE = 2e-2  # relative: inputs of products are rounded to 15 bits, and sums differ before that; a wrong formula is off by 1
_CHILDREN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_IGNORED = {"output_attentions", "output_hidden_states", "is_causal"}  # of the arguments that sdpa attention of one token may be given
_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(eq=False)
class Plain:
    """A plain layer. places: (parent, name, child) of every module that is gone round, q, k and v first; weights: their parameters
    likewise; joined: of qkv and of gate and up."""

    places: tuple[tuple[Any, str, Any], ...]
    weights: tuple[tuple[Any, str, Any], ...]
    attention: Any
    norms: tuple[Any, Any]
    output: Any
    down: Any
    qkv: Joined
    gate_up: Joined
    activation: str
    step: step.Step = field(default_factory=step.Step)

    def intact(self) -> bool:
        """Returns whether every module is still the one that was there, and nobody wants to see its inputs or outputs."""
        for parent, name, child in self.places:
            own = child.__dict__
            if parent.__dict__["_modules"].get(name) is not child or own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return False
        return all(module.__dict__["_parameters"].get(name) is weight for module, name, weight in self.weights)

    @cached_property
    def heads(self) -> tuple[int, int, int]:
        """Returns how many heads, how many key-value heads, and head_dim."""
        dim = self.attention.head_dim
        q, k = (layer.out_features // dim for _, _, layer in self.places[:2])
        return q, k, dim

    def norm(self, index: int) -> tuple[Array, float]:
        """Returns the weight of a norm, its offset added, and eps."""
        offset, eps = self.norms[index].tersor_norm
        weight = self.norms[index]._parameters["weight"].detach().numpy()
        return (weight if offset == 0 else weight + np.float32(offset)), eps

    def biases(self) -> list[Any]:
        """Returns the bias of q, k and v, each a parameter or None."""
        return [layer._parameters["bias"] for _, _, layer in self.places[:3]]

    def bias(self, rows: int) -> Array | None:
        """Returns the biases of q, k and v as the rows of a matrix, None when there are none."""
        if all(bias is None for bias in self.biases()):
            return None
        parts = [
            np.zeros(layer.out_features, np.float32) if bias is None else bias.detach().numpy()
            for bias, (_, _, layer) in zip(self.biases(), self.places)
        ]
        return np.tile(np.concatenate(parts), (rows, 1))

    def vectors(self) -> list[torch.Tensor]:
        """Returns the parameters that are no matrices."""
        return [norm._parameters["weight"] for norm in self.norms] + [bias for bias in self.biases() if bias is not None]


class _Rope:
    """cos and sin of the last forward pass, which all its layers share, as `_heads` and step.Step want them."""

    def __init__(self) -> None:
        self._last: tuple[Any, Array, Array] | None = None
        self._last_step: tuple[Any, int, tuple[Array, Array] | None] | None = None

    def tables(self, rope: Any) -> tuple[Array, Array]:
        """Returns cos and signed sin, (1 or sequences, tokens, 1, 2, head_dim / 2). rope: what transformers' layers are given."""
        last = self._last
        if last is None or last[0] is not rope:
            cos, sin = (table.numpy().reshape(*table.shape[:2], 1, 2, -1) for table in rope)
            last = self._last = (rope, cos, sin * np.array([[-1], [1]], np.float32))
        return last[1], last[2]

    def of_step(self, rope: Any, head_dim: int) -> tuple[Array, Array] | None:
        """Returns step.tables."""
        last = self._last_step
        if last is None or last[0] is not rope or last[1] != head_dim:
            last = self._last_step = (rope, head_dim, step.tables(rope, head_dim))
        return last[2]


_rope = _Rope()


def replace_layers(model: torch.nn.Module) -> int:
    """Lets the plain decoder layers of the model run as the file's docstring says, where no gradient is needed; returns how many."""
    replaced = 0
    for layer in model.modules():
        places = _places(layer)
        if places is not None:
            replaced += _replace(layer, places)
    return replaced


def _places(layer: Any) -> tuple[tuple[Any, str, Any], ...] | None:
    """Returns the modules that a plain layer consists of, None when it is none."""
    attention, mlp = layer._modules.get("self_attn"), layer._modules.get("mlp")
    if attention is None or mlp is None or set(layer._modules) != {"self_attn", "mlp", *_NORMS}:
        return None
    if set(attention._modules) != set(_CHILDREN[0]) or set(mlp._modules) != {*_CHILDREN[1], "act_fn"}:
        return None
    linears = [(parent, name, parent._modules[name]) for parent, names in zip((attention, mlp), _CHILDREN) for name in names]
    if any(type(m) is not TersorLinear or not isinstance(m.weight, QuantizedWeight) for _, _, m in linears):
        return None
    alone = [m for _, name, m in linears if name in ("o_proj", "gate_proj", "up_proj", "down_proj")]
    if any(m.bias is not None for m in alone) or any(not hasattr(layer._modules[name], "tersor_norm") for name in _NORMS):
        return None
    norms = [(layer, name, layer._modules[name]) for name in _NORMS]
    return (*linears, *norms, (layer, "self_attn", attention), (layer, "mlp", mlp), (mlp, "act_fn", mlp._modules["act_fn"]))


def _replace(layer: Any, places: tuple[tuple[Any, str, Any], ...]) -> bool:
    qkv, gate_up = layer.self_attn.q_proj.joined, layer.mlp.gate_proj.joined
    if qkv is None or gate_up is None:
        return False
    weights = tuple((m, name, weight) for _, _, m in places for name, weight in m._parameters.items())
    for activation in ("silu", "gelu_tanh"):
        attention, mlp = layer.self_attn, layer.mlp
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        layer.tersor_plain = Plain(places, weights, attention, norms, attention.o_proj, mlp.down_proj, qkv[0], gate_up[0], activation)
        if _agrees(layer):
            layer.forward = MethodType(_forward, layer)
            return True
    del layer.tersor_plain
    return False


def _agrees(layer: Any) -> bool:
    """Returns whether our forward gives what the layer's own gives, for 5 random tokens and 2 sequences."""
    rng = np.random.default_rng(0)
    dim, head_dim = layer.self_attn.q_proj.in_features, getattr(layer.self_attn, "head_dim", 0)
    if not isinstance(head_dim, int) or head_dim <= 0 or head_dim % 2:
        return False
    x = torch.from_numpy(rng.standard_normal((2, 5, dim), np.float32))
    angle = np.tile(rng.uniform(0, 6, (1, 5, head_dim // 2)), 2).astype(np.float32)
    rope = torch.from_numpy(np.cos(angle)), torch.from_numpy(np.sin(angle))
    try:
        with torch.no_grad():
            meant = type(layer).forward(layer, x, position_embeddings=rope)
            ours = _forward(layer, x, position_embeddings=rope)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, TersorError):
        return False  # it takes or does something else
    if not isinstance(meant, torch.Tensor) or meant.shape != ours.shape:
        return False
    change = (meant - x).abs().max()
    return bool((meant - ours).abs().max() <= TOLERANCE * change)


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
    **kwargs: Any,
) -> Any:
    plain: Plain = self.tersor_plain
    x, attention = hidden_states, plain.attention
    attend = _attention_function(attention.config)
    if torch.is_grad_enabled() or x.dtype is not torch.float32 or attend is None or not x.numel() or not plain.intact():
        return type(self).forward(
            self,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    if attend is sdpa_attention_forward and attention_mask is None and past_key_values is not None and not kwargs.keys() - _IGNORED:
        stepped = _step(plain, x, past_key_values, position_embeddings)
        if stepped is not None:
            return stepped
    n, dim = x.numel() // x.shape[-1], x.shape[-1]
    before = x.detach().contiguous().numpy().reshape(n, dim)
    normed = np.empty((n, dim), np.float32)
    _norm(plain.norms[0], before, normed)
    joined = ops.linear(normed, plain.qkv.packed)
    q, k, v = _heads(plain, joined.reshape(*x.shape[:2], -1, attention.head_dim), position_embeddings)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, attention.layer_idx)
    if position_ids is not None:
        kwargs["position_ids"] = position_ids
    mixed, _ = attend(attention, q, k, v, attention_mask, dropout=0.0, scaling=attention.scaling, use_cache=use_cache, **kwargs)
    between = ops.linear(mixed.reshape(n, -1).numpy(), plain.output._parameters["weight"].matrix.packed, before)
    _norm(plain.norms[1], between, normed)
    halves = ops.linear(normed, plain.gate_up.packed)
    gated = np.empty((n, halves.shape[1] // 2), np.float32)
    _native.gated(halves, plain.activation, gated)
    return torch.from_numpy(ops.linear(gated, plain.down._parameters["weight"].matrix.packed, between)).view(x.shape)


def _step(plain: Plain, x: torch.Tensor, cache: Any, rope: Any) -> torch.Tensor | None:
    """Returns the layer's output for a token of each sequence, None when step.py or the cache are not made for it."""
    n, tokens, dim = x.shape
    if tokens != 1 or n > step.ROWS:
        return None
    _, kv_heads, head_dim = plain.heads
    tables = _rope.of_step(rope, head_dim)
    if tables is None or len(tables[0]) not in (1, n):
        return None
    found = memory_of(cache, plain.attention.layer_idx, (n, kv_heads, head_dim))
    if found is None:
        return None
    layer, memory = found
    y = plain.step.run(plain, x.detach().numpy().reshape(n, dim), memory, *tables)
    memory.grow(layer)
    return torch.from_numpy(y).view(n, 1, dim)


def _attention_function(config: Any) -> Any:
    """Returns the function that transformers' attention would call, None when that is the module's own (eager)."""
    name = config.__dict__.get("_attn_implementation_internal")  # the property is slow, and would be read in every layer
    functions: Any = ALL_ATTENTION_FUNCTIONS
    return functions.get(name)


def _norm(norm: Any, x: Array, y: Array) -> None:
    offset, eps = norm.tersor_norm
    weight = norm._parameters["weight"].detach().numpy()
    _native.rms_norm(x, weight if offset == 0 else weight + np.float32(offset), eps, y)


def _heads(plain: Plain, joined: Array, rope: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns q, k and v, (sequences, heads, tokens, head_dim), q and k rotated. joined: (sequences, tokens, all heads, head_dim)."""
    dim, start, ends = joined.shape[-1], 0, []
    for _, _, layer in plain.places[:3]:
        end = start + layer.out_features // dim
        bias = layer._parameters["bias"]
        if bias is not None:
            joined[:, :, start:end] += bias.detach().numpy().reshape(-1, dim)
        ends.append(end)
        start = end
    cos, sin = _rope.tables(rope)
    halves = joined[:, :, : ends[1]].reshape(*joined.shape[:2], ends[1], 2, dim // 2)
    turned = halves * cos
    turned += halves[..., ::-1, :] * sin
    both = torch.from_numpy(turned.reshape(*joined.shape[:2], ends[1], dim)).transpose(1, 2)
    values = torch.from_numpy(joined[:, :, ends[1] :]).transpose(1, 2)
    return both[:, : ends[0]], both[:, ends[0] :], values
