"""What of a calibrated run is trained with torch: a block's roundings (autoround), its scales and norms (tune), all of them (distill)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tersor.formats import Format
from tersor.methods.autoround import AutoroundOptions, autoround_block
from tersor.methods.tune import TuneOptions, tune_block
from tersor.models.spec import DecoderSpec
from tersor.tensor import Array, QuantizedTensor
from tersor.training import require_torch

if TYPE_CHECKING:
    from tersor.training.descent import Descent


def round_block(
    spec: DecoderSpec,
    index: int,
    inputs: Array,
    targets: Array,
    weights: Mapping[str, Array],
    formats: Mapping[str, Format],
    options: AutoroundOptions | None,
) -> tuple[dict[str, QuantizedTensor], Descent]:
    """Returns the matrices of block `index`, by their full names, rounded so that its outputs are nearest to the targets.

    inputs, targets: (n, s, hidden) float32. weights: every tensor of the block as float32, by full name; formats: of its matrices.
    """
    require_torch("autoround")
    import torch

    from tersor.training.decoder import run_block

    prefix = f"model.layers.{index}."
    vectors = {name.removeprefix(prefix): torch.from_numpy(w) for name, w in weights.items() if name not in formats}

    def forward(x: Any, product: Callable[..., Any]) -> Any:
        return run_block(spec, spec.layers[index], x, product, vectors.__getitem__)

    matrices = {name.removeprefix(prefix): weights[name] for name in formats}
    short = {name.removeprefix(prefix): format for name, format in formats.items()}
    tensors, descent = autoround_block(forward, inputs, targets, matrices, short, options)
    return {prefix + name: tensor for name, tensor in tensors.items()}, descent


def tuned_block(
    spec: DecoderSpec,
    index: int,
    inputs: Array,
    targets: Array,
    tensors: Mapping[str, QuantizedTensor],
    vectors: Mapping[str, Array],
    options: TuneOptions | None,
) -> tuple[dict[str, QuantizedTensor], dict[str, Array], Descent]:
    """Returns (tensors, vectors) of block `index`, by their full names, with the same codes and trained float values."""
    require_torch("tune")
    from tersor.training.decoder import run_block

    prefix = f"model.layers.{index}."

    def forward(x: Any, product: Callable[..., Any], vector: Callable[[str], Any]) -> Any:
        return run_block(spec, spec.layers[index], x, product, vector)

    def short(named: Mapping[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(prefix): value for name, value in named.items()}

    new, floats, descent = tune_block(forward, inputs, targets, short(tensors), short(vectors), options)
    return {prefix + n: t for n, t in new.items()}, {prefix + n: v for n, v in floats.items()}, descent
