"""Who produces what a linear layer reads: where a factor per channel, or a rotation, can move without changing the function.

    norm -> q, k, v    norm -> gate, up    norm -> head        y = W diag(g) n    = (W diag(s)) (diag(g / s) n)
    rows of up -> down (through act(gate) * up)                y = W (a * U n)    = (W diag(s)) (a * (diag(1/s) U) n)
    rows of v  -> o    (attention mixes positions only)        o's heads that share a head of k and v share its factors

All of it follows from the DecoderSpec. Sources: SmoothQuant (arXiv 2211.10438, section 4), AWQ (arXiv 2306.00978, section 4),
SliceGPT (arXiv 2401.15024, theorem 1) for the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tersor.models.spec import GROUPS, DecoderSpec
from tersor.tensor import Array


@dataclass(frozen=True)
class Fold:
    """Linear layers that read the same input, and what produces it channel by channel.

    readers:  names of their weights, each (out, columns).
    producer: names of the tensors whose outputs are divided when the readers' columns are multiplied: a norm's weight (is_norm),
              or a linear's weight and, where there is one, its bias.
    sharing:  columns that one output of the producer feeds, `stride` apart: heads / kv_heads for v -> o, else 1.
    norm_offset: what a norm adds to its weight.
    """

    readers: tuple[str, ...]
    producer: tuple[str, ...]
    is_norm: bool
    columns: int
    sharing: int = 1
    stride: int = 1
    norm_offset: float = 0.0

    @property
    def sources(self) -> Array:
        """The producer's output that feeds each column, (columns,) int64."""
        column = np.arange(self.columns)
        return column // (self.sharing * self.stride) * self.stride + column % self.stride

    def by_output(self, scale: Array) -> Array:
        """Returns the scale of each of the producer's outputs, float32. scale: (columns,) > 0, equal for columns of one source."""
        s, sources = np.asarray(scale, dtype=np.float32), self.sources
        assert s.shape == (self.columns,) and np.isfinite(s).all() and (s > 0).all(), f"{self.readers[0]}: a scale is no positive number"
        outputs = np.empty(self.columns // self.sharing, np.float32)
        outputs[sources] = s
        assert np.array_equal(outputs[sources], s), f"{self.readers[0]}: columns that one output feeds have different scales"
        return outputs


@dataclass(frozen=True)
class Residual:
    """What touches the residual stream. readers: weight -> the norm before it; writers: weights and biases that are added to it."""

    readers: Mapping[str, str]
    writers: tuple[str, ...]


def layer_folds(spec: DecoderSpec, index: int) -> tuple[Fold, ...]:
    """Returns the folds of one layer in the order in which their readers run: q k v, o, gate up, down."""
    prefix, hidden = f"model.layers.{index}.", spec.hidden_size
    qkv, o, gate_up, down = (tuple(f"{prefix}{name}.weight" for name in group) for group in GROUPS)
    before = prefix + "input_layernorm.weight"
    before_mlp = prefix + ("pre_feedforward_layernorm.weight" if spec.sandwich else "post_attention_layernorm.weight")
    return (
        Fold(qkv, (before,), True, hidden, norm_offset=spec.norm_offset),
        Fold(
            o,
            _linear(prefix + "self_attn.v_proj", spec.qkv_bias),
            False,
            spec.heads * spec.head_dim,
            spec.heads // spec.kv_heads,
            spec.head_dim,
        ),
        Fold(gate_up, (before_mlp,), True, hidden, norm_offset=spec.norm_offset),
        Fold(down, _linear(prefix + "mlp.up_proj", spec.mlp_bias), False, spec.intermediate_size),
    )


def head_fold(spec: DecoderSpec) -> Fold | None:
    """Returns the fold of the final norm into the head; None when the head is the embedding, which others read too."""
    if spec.tied:
        return None
    return Fold(("lm_head.weight",), ("model.norm.weight",), True, spec.hidden_size, norm_offset=spec.norm_offset)


def residual(spec: DecoderSpec) -> Residual:
    """Returns the readers and writers of the residual stream, but for the embedding, which begins it, and a tied head."""
    layers = range(len(spec.layers))
    folds = [fold for i in layers for fold in layer_folds(spec, i)]
    head = head_fold(spec)
    readers = {name: fold.producer[0] for fold in (*folds, *((head,) if head else ())) if fold.is_norm for name in fold.readers}
    writers = [
        name
        for i in layers
        for linear, bias in (("self_attn.o_proj", spec.output_bias), ("mlp.down_proj", spec.mlp_bias))
        for name in _linear(f"model.layers.{i}.{linear}", bias)
    ]
    return Residual(readers, tuple(writers))


def apply_scale(fold: Fold, tensors: Mapping[str, Array], scale: Array) -> dict[str, Array]:
    """Returns the fold's readers and producer, float32, as the same function with the readers' columns multiplied by scale.

    tensors: holds at least those of the fold, float32. scale: (columns,) > 0, finite, equal for columns of one source.
    """
    s, by_output = np.asarray(scale, dtype=np.float32), fold.by_output(scale)
    changed: dict[str, Array] = {name: tensors[name] * s for name in fold.readers}
    offset = np.float32(fold.norm_offset)
    for name in fold.producer:
        values = tensors[name]
        if fold.is_norm:
            changed[name] = (values + offset) / by_output - offset
        else:
            changed[name] = values / (by_output[:, None] if values.ndim == 2 else by_output)
    return changed


def _linear(name: str, bias: bool) -> tuple[str, ...]:
    """Returns the names of a linear's tensors."""
    return (f"{name}.weight", f"{name}.bias") if bias else (f"{name}.weight",)
