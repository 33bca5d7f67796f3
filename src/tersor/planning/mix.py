"""Which format each tensor gets, so that the loss is least and the bytes fit a budget: a knapsack with one choice per tensor, exactly.

Dynamic programming over bytes (Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, section 11.5): least[b] of the first t tensors in
at most b units is the least over t's candidates of their loss + the least of the tensors before in the units that are left. A unit is the
greatest common divisor of all sizes, or, where that would make more than UNITS of them, a UNITS-th of the budget, sizes rounded up:
then it is the best mix of a budget up to a unit a tensor smaller, and never above the true one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TypeVar

import numpy as np

from tersor.errors import RecipeError

Key = TypeVar("Key", str, tuple[str, ...])  # of one tensor, or of several that get one format together
UNITS = 1 << 16  # of the budget, at most: a table of as many losses, and a byte per unit and tensor


@dataclass(frozen=True)
class Candidate:
    """A format that a tensor might get: its bytes, and what it is predicted to cost, in any unit that adds up over tensors."""

    format: str
    nbytes: int
    loss: float


def choose(candidates: Mapping[Key, Sequence[Candidate]], budget: int) -> dict[Key, Candidate]:
    """Returns one candidate per name, with the least sum of losses among all mixes of at most `budget` bytes.

    Raises RecipeError when even the smallest candidates are more than the budget.
    """
    smallest = sum(min(c.nbytes for c in options) for options in candidates.values())
    if smallest > budget:
        raise RecipeError(f"budget of {budget} bytes; need at least {smallest}, the smallest format of every tensor; allow smaller formats")
    sizes = [c.nbytes - min(o.nbytes for o in options) for options in candidates.values() for c in options]
    room = min(budget - smallest, sum(max(c.nbytes for c in options) for options in candidates.values()) - smallest)
    unit = max(gcd(*sizes), -(-room // UNITS), 1)
    units = room // unit
    least, taken = np.zeros(units + 1), []
    for options in candidates.values():
        base = min(c.nbytes for c in options)
        totals = np.full((len(options), units + 1), np.inf)
        for row, c in zip(totals, options):
            extra = -(-(c.nbytes - base) // unit)
            if extra <= units:
                row[extra:] = least[: units + 1 - extra] + c.loss
        taken.append(totals.argmin(axis=0).astype(np.uint8))
        least = totals.min(axis=0)
    chosen, left = {}, units
    for name, best in zip(reversed(list(candidates)), reversed(taken)):
        options = candidates[name]
        c = chosen[name] = options[best[left]]
        left -= -(-(c.nbytes - min(o.nbytes for o in options)) // unit)
    return {name: chosen[name] for name in candidates}
