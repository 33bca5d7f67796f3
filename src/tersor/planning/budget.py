"""The recipe that fits a budget at the least predicted divergence: sensitivity.py judges the formats, mix.py chooses.

    budget of the file - what is in it besides the matrices that are chosen   -> mix of formats -> recipe -> the file's size, exactly
             ^------------------------- what it is too much ------------------------------------------------------'

The rest of a file depends on the recipe too (its text is written into it), so the last step is repeated until the file fits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tersor.errors import FormatError, RecipeError
from tersor.formats import Format, get_format
from tersor.methods import get_method
from tersor.methods.method import Step
from tersor.planning.mix import Candidate, choose
from tersor.planning.sensitivity import Sensitivity
from tersor.planning.sizes import parse_bytes
from tersor.recipe import Choice, Recipe, Rule, is_edge
from tersor.tensor import Array, QuantizedTensor

GGUF_FORMATS = ("q2_k", "q3_k", "iq4_xs", "iq4_nl", "q4_0", "q4_k", "q4_1", "q5_k", "q5_0", "q5_1", "q6_k", "q8_0")  # the smallest first
MIXES = {  # the containers whose tensors may differ in width, and the formats to choose from
    "gguf": GGUF_FORMATS,
    "compressed-tensors": ("int2_g64s", "int3_g64s", "int4_g128s", "int4_g64s", "int4_g32s", "int5_g64s", "int6_g64s", "int8_cs"),
    "mlx": ("int2_g64m", "int3_g64m", "int4_g64m", "int4_g32m", "int5_g64m", "int6_g64m", "int8_g64m"),
}
SAMPLES = 16  # calibration sequences that sensitivities are measured on
ROUNDS = 8  # of fitting the recipe's own text

Options = Mapping[tuple[str, ...], Sequence[Candidate]]  # of tensors that get one format together


@dataclass(frozen=True)
class Fitted:
    """A recipe within a budget. nbytes: of the whole output; divergence: predicted, in nats per token."""

    recipe: Recipe
    nbytes: int
    divergence: float


def parse_budget(text: str | int, parameters: int) -> int:
    """Returns the bytes of `3.5GiB`, `90MB`, a number of bytes, or `4.25bpw`: bits per weight of the whole output. Raises RecipeError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*bpw\s*", str(text).lower())
    if match:
        return int(float(match[1]) * parameters / 8)
    try:
        nbytes = parse_bytes(str(text))
    except RecipeError:
        raise RecipeError(f"budget {text!r} is none; write it like 3.5GiB, 90MB or, in bits per weight, 4.25bpw") from None
    if nbytes <= 32:
        raise RecipeError(f"budget {text} is {nbytes} bytes; for bits per weight write {text}bpw")
    return nbytes


def candidates(w: Array, uses: Sequence[Sensitivity], formats: Sequence[str]) -> list[Candidate]:
    """Returns the formats that fit w, (out, in) float32, with the divergence that each is predicted to cause, in nats per token.

    Weights are rounded by the search for clipped ranges, with the inputs' share of the last use as importance. uses: as of
    sensitivity.measure. Raises FormatError when none of the formats fits.
    """
    importance = (uses[-1].h / max(float(uses[-1].h.max()), 1e-300)).astype(np.float32)
    found = []
    for format in fitting(w.shape, formats):
        error = format.dequantize(format.quantize_clipped(w, importance)).reshape(w.shape) - w
        found.append(Candidate(format.name, format.nbytes(w.shape), sum(use.divergence(error) for use in uses)))
    return found


def fitting(shape: tuple[int, ...], formats: Sequence[str]) -> list[Format]:
    """Returns those of the formats that fit a matrix of this shape. Raises FormatError when there is none."""
    found = [format for format in map(get_format, formats) if format.fits(shape)]
    if not found:
        raise FormatError(f"none of {', '.join(formats)} fits {shape[-1]} columns; allow a format of smaller groups, like q8_0 or q4_0")
    return found


def options_of(
    original: Callable[[str], QuantizedTensor],
    sensitivities: Mapping[str, tuple[Sensitivity, ...]],
    formats: Sequence[str],
    joined: Sequence[Collection[str]] = (),
    progress: Callable[[int, str], None] | None = None,
) -> dict[tuple[str, ...], list[Candidate]]:
    """Returns the candidates of every matrix, those of `joined` names together, since an engine wants one format for them.

    original: name -> tensor of the float model. sensitivities: of every matrix that is to be chosen for, by name.
    progress: called with (weights, name) after each matrix. Raises FormatError when no format fits.
    """
    home = {name: tuple(name for name in sensitivities if name in group) for group in joined for name in group}
    found: dict[tuple[str, ...], list[Candidate]] = {}
    for name, uses in sensitivities.items():
        tensor = original(name)
        w = np.array(get_format(tensor.format).dequantize(tensor), np.float32).reshape(tensor.shape)
        own, key = candidates(w, uses, formats), home.get(name, (name,))
        before = {c.format: c for c in found.get(key, own)}
        if key in found:
            own = [
                Candidate(c.format, c.nbytes + before[c.format].nbytes, c.loss + before[c.format].loss) for c in own if c.format in before
            ]
        found[key] = own
        if progress is not None:
            progress(w.size, name)
    return found


def mixed(options: Options, budget: int, frame: Recipe) -> tuple[Recipe, float]:
    """Returns a recipe whose chosen matrices take at most `budget` bytes together, and the divergence that is predicted for it.

    frame: the steps around and at rounding; its formats are not used. A table that is looked up only is clipped, since it multiplies
    nothing. Raises RecipeError when the smallest formats are more than the budget.
    """
    chosen = choose(options, budget)
    mix = {name: c.format for names, c in chosen.items() for name in names}
    rounds, clips = frame.default.step, Step(get_method("clip"))
    common = Counter(format for name, format in mix.items() if not is_edge(name)).most_common(1)[0][0]
    untied = any("lm_head" in name for name in mix)
    rules = [
        Rule(name.removesuffix(".weight"), Choice(clips if untied and "embed_tokens" in name else rounds, (format,)))
        for name, format in mix.items()
        if is_edge(name) or format != common
    ]
    return Recipe(Choice(rounds, (common,)), tuple(rules), frame.before, frame.after), sum(c.loss for c in chosen.values())


def recipe_within(budget: int, options: Options, frame: Recipe, size: Callable[[Recipe], int]) -> Fitted:
    """Returns the recipe of least predicted divergence whose output takes at most `budget` bytes.

    size: recipe -> bytes of the output, all that is in it counted. frame: as of `mixed`. Raises RecipeError when the smallest formats
    are more than the budget.
    """
    smallest = sum(min(c.nbytes for c in of) for of in options.values())
    rest = size(mixed(options, smallest, frame)[0]) - smallest
    for _ in range(ROUNDS):
        if budget - rest < smallest:
            raise RecipeError(
                f"budget of {budget} bytes; need at least {smallest + rest}: {smallest} for the smallest format of every matrix and "
                f"{rest} for the rest of the output"
            )
        recipe, divergence = mixed(options, budget - rest, frame)
        nbytes = size(recipe)
        if nbytes <= budget:
            return Fitted(recipe, nbytes, divergence)
        rest += nbytes - budget
    raise RecipeError(f"budget of {budget} bytes: the recipe's own text kept the output above it; allow {nbytes} bytes")
