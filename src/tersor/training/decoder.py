"""The decoder of models/decoder.py in torch, for training: the same operations from the same DecoderSpec, with gradients.

A block is a function of two callbacks, so that whoever calls it decides what a product is (float, quantized with trainable
scales, observed by a calibration):

    product(name, x)   x W^T for the block's matrix `self_attn.q_proj.weight`, ..., without its bias
    vector(name)       a norm's weight or a bias, `input_layernorm.weight`, ...

The residual stream stays float32; what products return may be bfloat16, and attention runs in that type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from tersor.models.rope import Rope
from tersor.models.spec import DecoderSpec, Layer

Product = Callable[[str, Tensor], Tensor]
Vector = Callable[[str], Tensor]


def run_block(spec: DecoderSpec, layer: Layer, x: Tensor, product: Product, vector: Vector) -> Tensor:
    """Returns the hidden states after one block, (n, s, hidden) float32. x: n sequences of s tokens, (n, s, hidden) float32.

    Products are asked for in the order of `linear_groups`; those of a group get the same tensor.
    """
    mixed = _attention(spec, layer, _norm(spec, x, vector("input_layernorm.weight")), product, vector)
    x = x + (_norm(spec, mixed, vector("post_attention_layernorm.weight")) if spec.sandwich else mixed)
    before = "pre_feedforward_layernorm.weight" if spec.sandwich else "post_attention_layernorm.weight"
    y = _feed_forward(spec, _norm(spec, x, vector(before)), product, vector)
    return x + (_norm(spec, y, vector("post_feedforward_layernorm.weight")) if spec.sandwich else y)


def final_norm(spec: DecoderSpec, x: Tensor, weight: Tensor) -> Tensor:
    """Returns what the head multiplies. x: (..., hidden) float32; weight: `model.norm.weight`."""
    return _norm(spec, x, weight)


def logits_of(spec: DecoderSpec, hidden: Tensor, head: Tensor) -> Tensor:
    """Returns float32 logits, (..., vocab). hidden: after the final norm; head: (vocab, hidden), whose type multiplies."""
    logits = (hidden.to(head.dtype) @ head.T).float()
    return spec.final_softcap * torch.tanh(logits / spec.final_softcap) if spec.final_softcap > 0 else logits


def _norm(spec: DecoderSpec, x: Tensor, weight: Tensor) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * (weight + offset) over the last axis, float32."""
    return F.rms_norm(x.float(), weight.shape, weight + spec.norm_offset, spec.norm_eps)


def _linear(name: str, x: Tensor, product: Product, vector: Vector, bias: bool) -> Tensor:
    """Returns x W^T (+ bias)."""
    y = product(f"{name}.weight", x)
    return y + vector(f"{name}.bias").to(y.dtype) if bias else y


def _attention(s: DecoderSpec, layer: Layer, x: Tensor, product: Product, vector: Vector) -> Tensor:
    """Returns softmax(scale q k^T) v Wo of normed states x, (n, s, hidden)."""

    def heads(name: str, count: int, norm: str | None) -> Tensor:
        y = _linear(f"self_attn.{name}", x, product, vector, s.qkv_bias).view(*x.shape[:2], count, s.head_dim)
        if norm is not None and s.qk_norm:
            y = _norm(s, y, vector(f"self_attn.{norm}.weight")).to(y.dtype)
        return y.transpose(1, 2)  # (n, heads, s, head_dim)

    q, k, v = heads("q_proj", s.heads, "q_norm"), heads("k_proj", s.kv_heads, "k_norm"), heads("v_proj", s.kv_heads, None)
    cos, sin = _angles(layer.rope, x.shape[1])
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    share = s.heads // s.kv_heads
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    mixed = _softmax_attention(s, layer.window, q, k, v)
    return _linear("self_attn.o_proj", mixed.transpose(1, 2).flatten(2), product, vector, s.output_bias)


def _softmax_attention(s: DecoderSpec, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns causal attention, (n, heads, s, head_dim); window 0: all keys before."""
    length = q.shape[2]
    if s.attention_softcap == 0 and not 0 < window < length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=s.attention_scale)
    at = torch.arange(length, device=q.device)
    distance = at[:, None] - at
    visible = (distance >= 0) & (distance < (window or length))
    if s.attention_softcap == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=s.attention_scale)
    scores = (q @ k.transpose(-1, -2)).float() * s.attention_scale
    scores = s.attention_softcap * torch.tanh(scores / s.attention_softcap)
    return torch.softmax(scores.masked_fill(~visible, -torch.inf), -1).to(v.dtype) @ v


def _feed_forward(s: DecoderSpec, x: Tensor, product: Product, vector: Vector) -> Tensor:
    """Returns act(gate) * up Wdown of normed states x."""
    gate = _linear("mlp.gate_proj", x, product, vector, s.mlp_bias)
    up = _linear("mlp.up_proj", x, product, vector, s.mlp_bias)
    act = F.silu(gate) if s.activation == "silu" else F.gelu(gate, approximate="tanh")
    return _linear("mlp.down_proj", act * up, product, vector, s.mlp_bias)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x, (n, heads, s, head_dim), its pairs (i, i + head_dim/2) rotated as ops.rope does."""
    low, high = x.chunk(2, -1)
    cos, sin = cos.to(x.device, x.dtype), sin.to(x.device, x.dtype)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


@lru_cache(maxsize=16)
def _angles(rope: Rope, length: int) -> tuple[Tensor, Tensor]:
    """Returns cos and sin times the rotation's scale, (length, head_dim/2) float32."""
    angles = (torch.arange(length, dtype=torch.float32)[:, None] * torch.from_numpy(rope.inv_freq)).double()
    return (angles.cos() * rope.scale).float(), (angles.sin() * rope.scale).float()
