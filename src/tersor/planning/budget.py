"""The recipe that fits a budget at the least predicted divergence: sensitivity.py judges the formats, mix.py chooses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tersor.errors import FormatError
from tersor.formats import get_format
from tersor.methods import get_method
from tersor.methods.method import Step
from tersor.planning.mix import Candidate, choose
from tersor.planning.sensitivity import Sensitivity
from tersor.recipe import Choice, Recipe, Rule, is_edge
from tersor.tensor import Array, QuantizedTensor

GGUF_FORMATS = ("q3_k", "iq4_xs", "iq4_nl", "q4_0", "q4_k", "q4_1", "q5_k", "q5_0", "q5_1", "q6_k", "q8_0")  # the smallest first


def candidates(w: Array, uses: Sequence[Sensitivity], formats: Sequence[str]) -> list[Candidate]:
    """Returns the formats that fit w, (out, in) float32, with the divergence that each is predicted to cause, in nats per token.

    Weights are rounded by the search for clipped ranges, with the inputs' share of the last use as importance. uses: as of
    sensitivity.measure. Raises FormatError when none of the formats fits.
    """
    importance = (uses[-1].h / max(float(uses[-1].h.max()), 1e-300)).astype(np.float32)
    found = []
    for format in (get_format(name) for name in formats):
        if format.fits(w.shape):
            error = format.dequantize(format.quantize_clipped(w, importance)).reshape(w.shape) - w
            found.append(Candidate(format.name, format.nbytes(w.shape), sum(use.divergence(error) for use in uses)))
    if not found:
        raise FormatError(f"none of {', '.join(formats)} fits {w.shape[-1]} columns; allow a format of smaller groups, like q8_0 or q4_0")
    return found


def recipe_within(
    budget: int,
    original: Callable[[str], QuantizedTensor],
    sensitivities: Mapping[str, tuple[Sensitivity, ...]],
    method: str = "clip",
    formats: Sequence[str] = GGUF_FORMATS,
) -> tuple[Recipe, float]:
    """Returns a recipe whose matrices take at most `budget` bytes together, and the divergence that is predicted for it.

    original: name -> tensor of the float model. sensitivities: of every matrix, by name. method: what rounds; a table that is looked up
    only is clipped, since it multiplies nothing. Raises RecipeError when the smallest formats are more than the budget.
    """
    options = {}
    for name, uses in sensitivities.items():
        tensor = original(name)
        w = np.array(get_format(tensor.format).dequantize(tensor), np.float32).reshape(tensor.shape)
        options[name] = candidates(w, uses, formats)
    mix = choose(options, budget)
    rounds, clips = Step(get_method(method), _defaults(method)), Step(get_method("clip"))
    common = Counter(c.format for name, c in mix.items() if not is_edge(name)).most_common(1)[0][0]
    untied = any("lm_head" in name for name in mix)
    rules = [
        Rule(name.removesuffix(".weight"), Choice(clips if untied and "embed_tokens" in name else rounds, (c.format,)))
        for name, c in mix.items()
        if is_edge(name) or c.format != common
    ]
    return Recipe(Choice(rounds, (common,)), tuple(rules)), sum(c.loss for c in mix.values())


def _defaults(method: str) -> object:
    """Returns the method's options as they are by themselves, as recipes have them that name none."""
    options = get_method(method).options
    return options() if options is not None else None
