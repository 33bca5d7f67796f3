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
from functools import cached_property, partial
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
    """A plain layer: its modules, the matrices of those that share an input, joined, and what must stay as it is."""

    attention: Any
    norms: tuple[Any, Any]
    inputs: tuple[Any, Any, Any]  # q, k and v
    output: Any
    down: Any
    qkv: Joined
    gate_up: Joined
    activation: str
    held: tuple[tuple[dict[str, Any], str, Any], ...]  # (dict, key, value): modules and parameters in the dicts of their modules
    hooks: tuple[dict[Any, Any], ...]
    step: step.Step = field(default_factory=step.Step)

    def intact(self) -> bool:
        """Returns whether everything is still the one that was there, and nobody wants to see the modules' inputs or outputs."""
        for owner, name, value in self.held:
            if owner.get(name) is not value:
                return False
        return not any(self.hooks)

    @cached_property
    def heads(self) -> tuple[int, int, int]:
        """How many heads, how many key-value heads, and head_dim."""
        dim = self.attention.head_dim
        return self.inputs[0].out_features // dim, self.inputs[1].out_features // dim, dim

    @cached_property
    def vectors(self) -> tuple[torch.Tensor, ...]:
        """The parameters that are no matrices."""
        return tuple(value for _, _, value in self.held if type(value) is torch.nn.Parameter)

    def norm(self, index: int) -> tuple[Array, float]:
        """Returns the weight of a norm, its offset added, and eps."""
        offset, eps = self.norms[index].tersor_norm
        weight = self.norms[index]._parameters["weight"].detach().numpy()
        return (weight if offset == 0 else weight + np.float32(offset)), eps

    def bias(self, rows: int) -> Array | None:
        """Returns the biases of q, k and v as every row of a matrix, None when there are none."""
        biases = [layer._parameters["bias"] for layer in self.inputs]
        if all(bias is None for bias in biases):
            return None
        parts = [np.zeros(m.out_features, np.float32) if b is None else b.detach().numpy() for m, b in zip(self.inputs, biases)]
        return np.tile(np.concatenate(parts), (rows, 1))


class _Pass:
    """What all layers of a forward pass share: the attention function, and cos and sin as step.Step and `_heads` want them."""

    def __init__(self, rope: Any, config: Any, head_dim: int) -> None:
        self.rope, self.config = rope, config
        name = config.__dict__.get("_attn_implementation_internal")  # the property would say the same, slowly
        functions: Any = ALL_ATTENTION_FUNCTIONS
        self.attend = functions.get(name)  # None when it is the module's own (eager)
        self.tables = step.tables(rope, head_dim) if self.attend is sdpa_attention_forward else None

    @cached_property
    def halves(self) -> tuple[Array, Array]:
        """cos and signed sin, (1 or sequences, tokens, 1, 2, head_dim / 2)."""
        cos, sin = (table.numpy().reshape(*table.shape[:2], 1, 2, -1) for table in self.rope)
        return cos, sin * np.array([[-1], [1]], np.float32)


_last: _Pass | None = None


def _pass_of(rope: Any, attention: Any) -> _Pass:
    global _last
    last = _last
    if last is None or last.rope is not rope or last.config is not attention.config:
        last = _last = _Pass(rope, attention.config, attention.head_dim)
    return last


def replace_layers(model: torch.nn.Module) -> int:
    """Lets the plain decoder layers of the model run as the file's docstring says, where no gradient is needed; returns how many."""
    replaced = 0
    for layer in model.modules():
        places = _places(layer)
        if places is not None:
            replaced += _replace(layer, places)
    return replaced


def _places(layer: Any) -> tuple[tuple[Any, str, Any], ...] | None:
    """Returns (parent, name, module) of all that a plain layer consists of, q, k and v first; None when it is none."""
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
    activation = _activation(layer.mlp.act_fn)
    if qkv is None or gate_up is None or activation is None:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    modules = tuple(module for _, _, module in places)
    held = [(parent._modules, name, module) for parent, name, module in places]
    held += [(module._parameters, name, value) for module in modules for name, value in module._parameters.items()]
    layer.tersor_plain = Plain(
        attention=attention,
        norms=(layer.input_layernorm, layer.post_attention_layernorm),
        inputs=(attention.q_proj, attention.k_proj, attention.v_proj),
        output=attention.o_proj,
        down=mlp.down_proj,
        qkv=qkv[0],
        gate_up=gate_up[0],
        activation=activation,
        held=tuple(held),
        hooks=tuple(hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)),
    )
    if not _agrees(layer):
        del layer.tersor_plain
        return False
    layer.forward = partial(_forward, layer)  # which can be pickled
    return True


def _activation(module: Any) -> str | None:
    """Returns what the native kernel calls an activation, None when it has none that gives the same. On its own, since silu and gelu
    are close to each other where a layer's gates are small."""
    x = np.linspace(-8, 8, 257, dtype=np.float32)
    try:
        with torch.no_grad():
            meant = module(torch.from_numpy(x)).numpy()
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return None
    for name in ("silu", "gelu_tanh"):
        y = np.empty((1, 257), np.float32)
        _native.gated(np.concatenate([x, np.ones(257, np.float32)])[None], name, y)
        if meant.shape == x.shape and np.abs(meant - y).max() <= 1e-5:
            return name
    return None


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
    now = None
    if x.dtype is torch.float32 and not torch.is_grad_enabled() and plain.intact() and x.numel():
        now = _pass_of(position_embeddings, attention)
        if now.tables is not None and attention_mask is None and past_key_values is not None and not (kwargs and kwargs.keys() - _IGNORED):
            stepped = _step(plain, x, past_key_values, now.tables)
            if stepped is not None:
                return stepped
    if now is None or now.attend is None:
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
    n, dim = x.numel() // x.shape[-1], x.shape[-1]
    before = x.detach().contiguous().numpy().reshape(n, dim)
    normed = np.empty((n, dim), np.float32)
    _norm(plain, 0, before, normed)
    joined = ops.linear(normed, plain.qkv.packed)
    q, k, v = _heads(plain, joined.reshape(*x.shape[:2], -1, attention.head_dim), now.halves)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, attention.layer_idx)
    if position_ids is not None:
        kwargs["position_ids"] = position_ids
    mixed, _ = now.attend(attention, q, k, v, attention_mask, dropout=0.0, scaling=attention.scaling, use_cache=use_cache, **kwargs)
    between = ops.linear(mixed.reshape(n, -1).numpy(), plain.output._parameters["weight"].matrix.packed, before)
    _norm(plain, 1, between, normed)
    halves = ops.linear(normed, plain.gate_up.packed)
    gated = np.empty((n, halves.shape[1] // 2), np.float32)
    _native.gated(halves, plain.activation, gated)
    return torch.from_numpy(ops.linear(gated, plain.down._parameters["weight"].matrix.packed, between)).view(x.shape)


def _step(plain: Plain, x: torch.Tensor, cache: Any, tables: tuple[Array, Array]) -> torch.Tensor | None:
    """Returns the layer's output for a token of each sequence, None when step.py or the cache are not made for it."""
    n, tokens, _ = x.shape
    if tokens != 1 or n > step.ROWS or len(tables[0]) not in (1, n):
        return None
    _, kv_heads, head_dim = plain.heads
    found = memory_of(cache, plain.attention.layer_idx, (n, kv_heads, head_dim))
    if found is None:
        return None
    layer, memory = found
    y = plain.step.run(plain, x.detach() if x.requires_grad else x, memory, *tables)
    memory.grow(layer)
    return y


def _norm(plain: Plain, index: int, x: Array, y: Array) -> None:
    weight, eps = plain.norm(index)
    _native.rms_norm(x, weight, eps, y)


def _heads(plain: Plain, joined: Array, rope: tuple[Array, Array]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns q, k and v, (sequences, heads, tokens, head_dim), q and k rotated. joined: (sequences, tokens, all heads, head_dim)."""
    dim, start, ends = joined.shape[-1], 0, []
    for layer in plain.inputs:
        end = start + layer.out_features // dim
        bias = layer._parameters["bias"]
        if bias is not None:
            joined[:, :, start:end] += bias.detach().numpy().reshape(-1, dim)
        ends.append(end)
        start = end
    cos, sin = rope
    halves = joined[:, :, : ends[1]].reshape(*joined.shape[:2], ends[1], 2, dim // 2)
    turned = halves * cos
    turned += halves[..., ::-1, :] * sin
    both = torch.from_numpy(turned.reshape(*joined.shape[:2], ends[1], dim)).transpose(1, 2)
    values = torch.from_numpy(joined[:, :, ends[1] :]).transpose(1, 2)
    return both[:, : ends[0]], both[:, ends[0] :], values
