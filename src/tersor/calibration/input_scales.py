"""Static scales of inputs: a model reads calibration tokens, layer by layer, and an observer looks at what its linear layers read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tersor import ops
from tersor.calibration.blocks import DecoderWalk, Rows
from tersor.calibration.observers import PERCENTILE, MagnitudeHistogram
from tersor.formats import get_format
from tersor.models.layer import has_bias, read_vectors
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
    (layers done, layers in all). Linear layers that share an input share its scale. In memory is one layer; the hidden states lie
    in temporary files. Raises what MagnitudeHistogram raises.
    """

    def vector(name: str) -> Array:
        tensor = read(name)
        return get_format(tensor.format).dequantize(tensor).reshape(-1)

    scales: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:

        def rows(name: str, width: int) -> Rows:
            return Rows(Path(folder, name), width)

        states, embedding, length = rows("0", spec.hidden_size), read("model.embed_tokens.weight"), tokens.shape[1]
        for i, sample in enumerate(tokens):
            states.write(i * length, ops.embed(embedding, np.ascontiguousarray(sample, np.int32), spec.embedding_scale))
        for index in range(len(spec.layers)):
            prefix = f"model.layers.{index}."
            biases = [
                np.concatenate([vector(f"{prefix}{name}.bias") for name in names]) if has_bias(spec, group) else None
                for group, names in enumerate(GROUPS)
            ]
            after = rows(str(index + 1), spec.hidden_size)
            vectors = read_vectors(spec, index, vector)
            walk = DecoderWalk(spec, index, vectors, biases, states, after, tokens.shape, rows, batch=1)
            for names in walk.groups:
                modules = [name.removesuffix(".weight") for name in names]
                histogram = MagnitudeHistogram(modules[0])
                for x in walk.inputs():
                    histogram.add(x)
                scales |= dict.fromkeys(modules, histogram.scale(observer, percentile))
                walk.advance([read(name) for name in names])
            states.path.unlink()
            states = Rows(after.path, spec.hidden_size)
            if progress is not None:
                progress(index + 1, len(spec.layers))
        states.close()
    return scales
