"""Static scales of inputs: a float model reads calibration tokens, layer by layer, and an observer looks at what its linear layers read."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tersor import ops
from tersor.calibration.observers import PERCENTILE, MagnitudeHistogram
from tersor.formats import get_format
from tersor.models.layer import LayerVectors, add_product, has_bias, mix, read_vectors
from tersor.models.spec import GROUPS, DecoderSpec
from tersor.tensor import Array, QuantizedTensor


def input_scales(
    spec: DecoderSpec,
    read: Callable[[str], QuantizedTensor],
    tokens: Array,
    observer: str = "minmax",
    percentile: float = PERCENTILE,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Returns the scale of every linear layer's input but the head's, by module name, for ActivationScheme.

    read: name -> tensor, of any format: it is decoded and run in float32. tokens: (samples, length) int32. progress: called with
    (layers done, layers in all). Linear layers that share an input share its scale. In memory are one layer and the hidden
    states, samples * length * hidden_size float32. Raises what MagnitudeHistogram raises.
    """

    def vector(name: str) -> Array:
        tensor = read(name)
        return get_format(tensor.format).dequantize(tensor).reshape(-1)

    embedding = read("model.embed_tokens.weight")
    hidden = [ops.embed(embedding, np.ascontiguousarray(sample, np.int32), spec.embedding_scale) for sample in tokens]
    scales: dict[str, float] = {}
    for index in range(len(spec.layers)):
        prefix = f"model.layers.{index}."
        weights = []
        for group, names in enumerate(GROUPS):
            bias = np.concatenate([vector(f"{prefix}{name}.bias") for name in names]) if has_bias(spec, group) else None
            weights.append(ops.pack([read(f"{prefix}{name}.weight") for name in names], bias, "float"))
        seen = [MagnitudeHistogram(f"{prefix}{names[0]}") for names in GROUPS]
        vectors = read_vectors(spec, index, vector)
        hidden = [_run(spec, vectors, weights, x, seen) for x in hidden]
        for names, histogram in zip(GROUPS, seen):
            scale = histogram.scale(observer, percentile)
            scales |= {f"{prefix}{name}": scale for name in names}
        if progress is not None:
            progress(index + 1, len(spec.layers))
    return scales


def _run(s: DecoderSpec, v: LayerVectors, weights: list[ops.Weight], x: Array, seen: list[MagnitudeHistogram]) -> Array:
    """Returns x, (n, hidden), after a layer whose matrices are `weights`, and counts the four inputs of its products."""

    def product_input(group: int, values: Array) -> Array:
        seen[group].add(values)
        return values

    cache = ops.KVCache(1, s.kv_heads, s.head_dim, len(x), "f32")
    joined = ops.linear(product_input(0, ops.rms_norm(x, v.norm, s.norm_eps)), weights[0])
    x = add_product(ops, s, x, product_input(1, mix(ops, s, v, joined, 0, cache)), weights[1], v.after_attention)
    joined = ops.linear(product_input(2, ops.rms_norm(x, v.mlp_norm, s.norm_eps)), weights[2])
    return add_product(ops, s, x, product_input(3, ops.gated(joined, s.activation)), weights[3], v.after_mlp)
