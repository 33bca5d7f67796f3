"""autoround: which neighbour each weight is rounded to, and how far each group's range is clipped, by signed gradients on a block.

    least over V, alpha, beta:  |block(x; w_hat(V, alpha, beta)) - target|^2        V in [-1/2, 1/2], alpha and beta in [0, 1]
    V <- clip(V - rate * sign(d loss / d V)), alpha and beta alike; rate from 1 / iterations down to 0 in a line

Source: SignRound (arXiv 2309.05516, equations 3 to 5; rates and the clip factors as in its code). The rounding that is kept is the
best on samples held out from the steps, round-to-nearest among the candidates, so that no block gets worse there by it.
Affine integers train all three; other formats only V, on the grid of the clip search. Needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tersor.errors import ModelError, RecipeError
from tersor.formats import Format
from tersor.methods.rtn import require_encoder
from tersor.tensor import Array, QuantizedTensor
from tersor.training import require_torch

if TYPE_CHECKING:
    from tersor.training.blockwise import Forward
    from tersor.training.descent import Descent


@dataclass(frozen=True)
class AutoroundOptions:
    """How long and how fast. rate: of V, alpha and beta per iteration, 0 = 1 / iterations; batch_tokens: of an iteration;
    held_out: share of the samples that only judges; precision: of the products, f32 | bf16 (about 1.6 times faster where a CPU has it).
    """

    iterations: int = 200
    rate: float = 0.0
    batch_tokens: int = 1024
    held_out: float = 0.1
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch_tokens < 1 or not 0 <= self.rate <= 1 or not 0 < self.held_out < 1:
            raise RecipeError(
                f"autoround: iterations {self.iterations}, batch_tokens {self.batch_tokens}, rate {self.rate}, held_out {self.held_out}; "
                "need iterations >= 1, batch_tokens >= 1, rate in 0..1, held_out between 0 and 1"
            )
        check_precision("autoround", self.precision)


def autoround_block(
    forward: Forward,
    inputs: Array,
    targets: Array,
    weights: Mapping[str, Array],
    formats: Mapping[str, Format],
    options: AutoroundOptions | None = None,
    importance: Mapping[str, Array] | None = None,
    seed: int = 0,
) -> tuple[dict[str, QuantizedTensor], Descent]:
    """Returns the block's matrices rounded so that its outputs are nearest to the targets, and what that did to the held-out error.

    forward: (x, product) -> outputs, the block as a function of its products (training.decoder.run_block with its vectors bound).
    inputs, targets: (n, s, hidden) float32, n >= 2 sequences: what the quantized part before gives, what the float block gave.
    weights: {name as product is asked for: (rows, in) float32}; formats: of the same names. importance: (in,) per name, for the
    grid of formats that are not affine. Deterministic by seed at a given number of torch threads.
    Raises FormatError for formats that cannot be encoded or do not fit, ModelError for too few or unequal samples, RecipeError
    without torch.
    """
    require_torch("autoround")
    from tersor.training.blockwise import choose_rounding

    check_samples("autoround", inputs, targets)
    for name, w in weights.items():
        require_encoder(formats[name], "autoround")
        formats[name].check(w.shape, name)
    return choose_rounding(forward, inputs, targets, weights, formats, options or AutoroundOptions(), importance or {}, seed)


def check_samples(method: str, inputs: Array, targets: Array) -> None:
    """Raises ModelError unless there are two or more sequences with a target of the same shape each, all finite."""
    if inputs.ndim != 3 or inputs.shape != targets.shape or len(inputs) < 2:
        raise ModelError(
            f"{method}: inputs {inputs.shape}, targets {targets.shape}; need the same (n, s, hidden) with n >= 2 sequences, "
            "since some are held out from training"
        )
    if not (np.isfinite(inputs).all() and np.isfinite(targets).all()):
        raise ModelError(f"{method}: the block's inputs or targets hold NaN or infinity; look for the layer that made them")


def check_precision(method: str, precision: str) -> None:
    """Raises RecipeError for an unknown precision."""
    if precision not in ("f32", "bf16"):
        raise RecipeError(f"{method}: unknown precision {precision!r}; known: bf16, f32")
