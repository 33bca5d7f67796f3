"""tune: after rounding, trains what stays float (scales and minima, norm weights, biases) against the float model. Codes stay.

    tune_block    least |block(x) - target|^2 of one block, in the loop that quantizes block by block
    tune_model    least KL(float model || quantized model) over next tokens, all blocks at once, when every block is quantized

A file costs not one byte more by it. Sources: EfficientQAT (arXiv 2407.11062): step sizes trained block by block (section 3.2),
then end to end with fixed codes (E2E-QP, section 3.3), here with the float model's distribution as the target instead of the
text, so that a few tens of thousands of tokens suffice; norm tweaking (arXiv 2309.02784). Optimized by Adam in relative units
with a cosine rate. What is kept is the best state on samples held out from training, the untrained one among the candidates:
tune never makes the held-out figure worse, and says when training did. Needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from tersor.errors import ModelError, RecipeError
from tersor.methods.autoround import check_precision, check_samples
from tersor.models.spec import DecoderSpec, expected_tensors
from tersor.tensor import Array, QuantizedTensor
from tersor.training import require_torch

if TYPE_CHECKING:
    from tersor.training.blockwise import ForwardWithVectors
    from tersor.training.descent import Descent


@dataclass(frozen=True)
class TuneOptions:
    """How long and how fast.

    epochs: passes over the samples that train. rate, vector_rate: relative change per step of scales and minima, of norms and
    biases, times 2^-B for codes of B bits: coarse grids are further off and bear larger steps (0.05: 0.3 % at 4 bits, 1.2 % at 2).
    batch_tokens: tokens of one step; micro_tokens: of them at once in memory (tune_model). held_out: share of the samples
    that only judges; checks: how often they do (tune_model). precision: of the products, f32 | bf16.
    """

    epochs: float = 1.0
    rate: float = 0.05
    vector_rate: float = 0.05
    batch_tokens: int = 1024
    micro_tokens: int = 2048
    held_out: float = 1 / 16
    checks: int = 4
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_tokens, self.micro_tokens, self.checks) <= 0 or not 0 < self.held_out < 1:
            raise RecipeError(
                f"tune: epochs {self.epochs}, batch_tokens {self.batch_tokens}, micro_tokens {self.micro_tokens}, checks {self.checks}, "
                f"held_out {self.held_out}; need all above 0, and held_out below 1"
            )
        if not 0 <= self.rate < inf or not 0 <= self.vector_rate < inf:
            raise RecipeError(f"tune: rate {self.rate}, vector_rate {self.vector_rate}; need finite numbers >= 0")
        check_precision("tune", self.precision)


def tune_block(
    forward: ForwardWithVectors,
    inputs: Array,
    targets: Array,
    tensors: Mapping[str, QuantizedTensor],
    vectors: Mapping[str, Array],
    options: TuneOptions | None = None,
    seed: int = 0,
) -> tuple[dict[str, QuantizedTensor], dict[str, Array], Descent]:
    """Returns (tensors, vectors) of one block with the same codes and trained float values, and what that did to the held-out error.

    forward: (x, product, vector) -> outputs, as training.decoder.run_block. inputs, targets: (n, s, hidden) float32, n >= 2: what
    the quantized part before gives, what the float block gave. tensors, vectors: by the names that forward asks for.
    Deterministic by seed at a given number of torch threads. Raises ModelError for samples that do not fit or a training that
    diverged, RecipeError without torch.
    """
    require_torch("tune")
    from tersor.training.blockwise import tune_values

    check_samples("tune", inputs, targets)
    return tune_values(forward, inputs, targets, tensors, vectors, options or TuneOptions(), seed)


def tune_model(
    spec: DecoderSpec,
    original: Callable[[str], QuantizedTensor],
    tensors: Mapping[str, QuantizedTensor],
    vectors: Mapping[str, Array],
    tokens: Array,
    options: TuneOptions | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, QuantizedTensor], dict[str, Array], Descent]:
    """Returns (tensors, vectors) of the whole model with the same codes and trained float values, and what that did to the
    held-out KL divergence in nats.

    original: name -> tensor of the float model. tensors: every matrix as quantized, by its full name, the embedding and the head
    too, which are used but not trained. vectors: every norm weight and bias, float32. tokens: (n, s) int, n >= 2 calibration
    sequences. progress: called with (steps done, steps in all). Memory: the float32 embedding, the heads and the blocks' basis
    (1 byte a weight; 4 for 8 bits and k-quants) besides the activations of micro_tokens tokens through all blocks.
    Deterministic by seed at a given number of torch threads. Raises ModelError for samples or tensors that do not fit or a
    training that diverged, RecipeError without torch.
    """
    require_torch("tune")
    from tersor.training.distill import distill

    if tokens.ndim != 2 or len(tokens) < 2 or tokens.min(initial=0) < 0 or tokens.max(initial=0) >= spec.vocab_size:
        raise ModelError(
            f"tune: tokens {tokens.shape}; need (n, s) ids in 0..{spec.vocab_size - 1} with n >= 2 sequences, since some are held out"
        )
    missing = [name for name in expected_tensors(spec) if name not in tensors and name not in vectors]
    if missing:
        raise ModelError(f"tune: {missing[0]} is missing among the quantized tensors and vectors; give every tensor of the model")
    return distill(spec, original, tensors, vectors, tokens, options or TuneOptions(), seed, progress)
