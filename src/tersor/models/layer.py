"""One layer of a decoder in pieces: the four inputs of its linear layers, and what becomes of their products.

    0  norm(x)                      q_proj, k_proj, v_proj
    1  attention(rope(q), k, v)     o_proj                    x = x + [norm](its product)
    2  norm(x)                      gate_proj, up_proj
    3  act(gate) * up               down_proj                 x = x + [norm](its product)

The decoder runs the pieces one after the other; calibration stops at each to look at the input and to exchange the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tersor import ops
from tersor.models.spec import DecoderSpec, Layer
from tersor.ops.program import LayerOps
from tersor.tensor import Array


@dataclass(frozen=True)
class LayerVectors:
    """What of a layer is no matrix. Norm weights are (d,) or (head_dim,) float32 with the offset added; None = no such norm."""

    spec: Layer
    norm: Array
    mlp_norm: Array
    q_norm: Array | None
    k_norm: Array | None
    after_attention: Array | None
    after_mlp: Array | None


def read_vectors(s: DecoderSpec, index: int, read: Callable[[str], Array]) -> LayerVectors:
    """Returns the norms of layer `index`. read: Hugging Face name -> float32 values, without the offset."""
    prefix = f"model.layers.{index}."

    def norm(name: str, present: bool = True) -> Array | None:
        return read(f"{prefix}{name}.weight") + np.float32(s.norm_offset) if present else None

    # In a sandwich post_attention_layernorm is what it says; elsewhere it is the name of the norm before the MLP.
    before, before_mlp = norm("input_layernorm"), norm("pre_feedforward_layernorm" if s.sandwich else "post_attention_layernorm")
    assert before is not None and before_mlp is not None
    return LayerVectors(
        spec=s.layers[index],
        norm=before,
        mlp_norm=before_mlp,
        q_norm=norm("self_attn.q_norm", s.qk_norm),
        k_norm=norm("self_attn.k_norm", s.qk_norm),
        after_attention=norm("post_attention_layernorm", s.sandwich),
        after_mlp=norm("post_feedforward_layernorm", s.sandwich),
    )


def has_bias(s: DecoderSpec, group: int) -> bool:
    """Returns whether the linear layers of a group of GROUPS have biases."""
    return (s.qkv_bias, s.output_bias, s.mlp_bias, s.mlp_bias)[group]


def mix(o: LayerOps, s: DecoderSpec, v: LayerVectors, joined: Array, index: int, cache: ops.KVCache) -> Array:
    """Returns attention, (n, heads * head_dim), and appends keys and values. joined: q, k and v, (n, (heads + 2 kv_heads) * head_dim)."""
    by_head = joined.reshape(len(joined), s.heads + 2 * s.kv_heads, s.head_dim)
    rotated, rope = s.heads + s.kv_heads, v.spec.rope
    q, k, values = by_head[:, : s.heads], by_head[:, s.heads : rotated], by_head[:, rotated:]  # views
    if v.q_norm is None or v.k_norm is None:
        o.rope(by_head[:, :rotated], cache.length, rope.inv_freq, rope.scale)
    else:
        q = o.rms_norm(q, v.q_norm, s.norm_eps)
        k = o.rms_norm(k, v.k_norm, s.norm_eps)
        o.rope(q, cache.length, rope.inv_freq, rope.scale)
        o.rope(k, cache.length, rope.inv_freq, rope.scale)
    o.append(cache, index, k, values)
    return o.attention(q, cache, index, s.attention_scale, s.attention_softcap, v.spec.window)


def add_product(o: LayerOps, s: DecoderSpec, x: Array, branch: Array, weight: ops.Weight, norm: Array | None) -> Array:
    """Returns x + branch W^T, the product normed first where there is a norm."""
    if norm is None:
        return o.linear(branch, weight, x)
    o.add(x, o.rms_norm(o.linear(branch, weight), norm, s.norm_eps))
    return x
