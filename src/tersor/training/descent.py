"""The loop that every training here shares: steps with a decaying rate, judged on data held out from them, the best state kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Descent:
    """What a training did to its held-out loss. kept: the step whose state was kept, 0 = the start: training made it worse."""

    before: float
    after: float
    kept: int
    steps: int


class Adam:
    """Adam (Kingma & Ba, arXiv 1412.6980, algorithm 1) on parameters measured in units of their own.

    Every parameter is counted in `units` of its own size, so that rate is a relative change per step whatever the parameter is.
    Deviation: the first moment is not divided by 1 - beta1^t. The first steps are then a tenth, two tenths, .. of a step long; a
    whole step along the sign of one batch's noise, in all of a model's scales at once, nearly doubled the divergence of a 135M model.
    """

    def __init__(self, parameters: Sequence[Tensor], units: Sequence[Tensor], rates: Sequence[float]) -> None:
        """units: of each parameter, broadcastable to it, 0 = never moves. rates: relative change of each in a full step."""
        self._parts = [(p, u, r, torch.zeros_like(p), torch.zeros_like(p)) for p, u, r in zip(parameters, units, rates)]
        self._steps = 0

    def step(self, factor: float, beta1: float = 0.9, beta2: float = 0.95) -> None:
        """Moves every parameter by factor * rate against its gradient, which is cleared. beta2 suits some tens to hundreds of steps."""
        self._steps += 1
        with torch.no_grad():
            for p, unit, rate, first, second in self._parts:
                assert p.grad is not None
                gradient = p.grad * unit
                p.grad = None
                first.lerp_(gradient, 1 - beta1)
                second.lerp_(gradient.square(), 1 - beta2)
                deviation = (second / (1 - beta2**self._steps)).sqrt()
                p -= factor * rate * unit * (first / deviation).nan_to_num(0, 0, 0)


def cosine(step: int, steps: int) -> float:
    """Returns the factor of the rate: half a cosine from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def linear(step: int, steps: int) -> float:
    """Returns the factor of the rate: from 1 down to 0 in a line, as SignRound does."""
    return 1 - step / steps


def descend(steps: int, move: Callable[[int], None], judge: Callable[[], float], parameters: Sequence[Tensor], checks: int) -> Descent:
    """Runs move(0) .. move(steps - 1) and leaves the parameters at the best of the states judged.

    judge: the loss on data that no move sees; asked at the start and `checks` times, evenly, the last after the last step.
    """
    before = best = judge()
    kept, state = 0, [p.detach().clone() for p in parameters]
    due = {round(steps * (i + 1) / checks) for i in range(checks)}
    for step in range(steps):
        move(step)
        if step + 1 in due:
            loss = judge()
            if loss < best:
                best, kept, state = loss, step + 1, [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, s in zip(parameters, state):
            p.copy_(s)
    return Descent(before, best, kept, steps)


def split(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Returns (train, held out), indices of n samples: at least one of each. share: of the held-out part."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = min(n - 1, max(1, round(n * share)))
    return order[held:], order[:held]


def batches(train: Tensor, steps: int, size: int, seed: int) -> list[Tensor]:
    """Returns the samples of each step: as many shuffled epochs as it takes."""
    generator = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    while sum(len(part) for part in order) < steps * size:
        order.append(train[torch.randperm(len(train), generator=generator)])
    return list(torch.split(torch.cat(order)[: steps * size], size)) if steps else []
