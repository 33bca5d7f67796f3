"""The frozen records that cross borders between formats, methods, containers and kernels. Imports nothing of tersor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Params = Mapping[str, Array]


@dataclass(frozen=True)
class QuantizedTensor:
    """One tensor as stored numbers: the only thing that methods, containers and kernels share.

    format: a name of FORMATS (`q4_k`, `int4_g128`, `nf4`; the float formats `f32`, `f16`, `bf16` count as formats too).
    shape:  logical shape (..., in); the rows are the product of all but the last.
    fields: the format's packed arrays by name, laid out as docs/formats.md says. For row-independent formats
            the first axis of every field is the row, so rows may be sliced, joined and permuted.
    """

    format: str
    shape: tuple[int, ...]
    fields: Mapping[str, Array]

    @property
    def rows(self) -> int:
        """Number of rows: the product of all axes but the last; a vector is one row."""
        return prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Length of the last axis, along which groups run."""
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all fields: codes, scales, zeros and metadata of the tensor."""
        return sum(a.nbytes for a in self.fields.values())

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight, with everything that is stored."""
        return 8.0 * self.nbytes / prod(self.shape)


@dataclass(frozen=True)
class InputStatistics:
    """What calibration tokens say about the inputs x of the linear layers that share them. Sums were made in float64.

    tokens:      how many inputs were seen, n.
    mean_square: mean of x^2, (in,) float32: the importance of a column's squared error. mean_abs, absmax: of |x|, likewise.
    gram:        H = X^T X / n, (in, in) float64, or None where only the rest was asked for.
    cross:       Y^T X / n, (in, in) float64, y being the input of the same token in the unquantized model; None unless asked for.
    outputs:     what errors of the layer's outputs cost together: blocks along the diagonal of a matrix G, (rows, rows) float each, in
                 the order of the outputs (training/fisher.py); empty unless asked for. gram and cross then weigh the tokens likewise.
    """

    tokens: int
    mean_square: Array
    mean_abs: Array
    absmax: Array
    gram: Array | None = None
    cross: Array | None = None
    outputs: tuple[Array, ...] = ()

    @property
    def importance(self) -> Array:
        """The weight of each column's squared error, (in,) float32."""
        return self.mean_square


OUTPUT_BLOCK = 2048  # outputs whose errors are weighed together: all of a layer that has no more, else those of each 2,048 neighbours


def output_blocks(outputs: int) -> list[int]:
    """Returns the sizes of the blocks of InputStatistics.outputs for a layer with so many outputs."""
    return [min(OUTPUT_BLOCK, outputs - begin) for begin in range(0, outputs, OUTPUT_BLOCK)]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a container announces it, before any of its bytes are read. name: the Hugging Face name."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class ActivationScheme:
    """How a file wants the inputs of its quantized linear layers rounded at run time: to symmetric integers in 8 bits (W8A8, W4A8).

    scales: None = dynamic, one scale per token, from the token itself; else static, from calibration: module name (a weight's
    name without `.weight`) -> scale > 0 of the whole input, x ~ round(x / scale) * scale.
    """

    scales: Mapping[str, float] | None = None


@dataclass(frozen=True)
class ModelDescription:
    """All of a model but its tensors, in Hugging Face terms, whatever container it came from.

    config:   config.json as a dict, without `quantization_config`.
    files:    the other small files by name (tokenizer.json, tokenizer_config.json, generation_config.json,
              chat_template.jinja, ...), as bytes.
    metadata: key-values of the source container with no Hugging Face counterpart, carried over verbatim when the
              target container is of the same kind (for GGUF: all key-values, as {key: (value_type, value)}).
    provenance: how a quantized model was made, plain values: recipe, calibration (Samples.provenance, Imatrix.provenance). Empty otherwise.
    activations: what the source says about rounding inputs, None if nothing; only compressed-tensors can say it.
    """

    config: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    activations: ActivationScheme | None = None
