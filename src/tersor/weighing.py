"""What calibration is to a rounding, and runs by an importance matrix: means of squares from a file weigh the errors of every tensor by
itself, so that nothing is run, and memory holds one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tersor.errors import RecipeError
from tersor.formats import Format, get_format
from tersor.methods import Step
from tersor.recipe import CASTS, KEEP, Choice, Recipe
from tersor.tensor import Array, InputStatistics, QuantizedTensor, TensorInfo

if TYPE_CHECKING:
    from tersor.calibration.imatrix import Imatrix

_LACKS = {"gram": "X^T X of the inputs", "samples": "the calibration tokens themselves", "importance": "the largest |x| of every column"}


def uses_calibration(recipe: Recipe) -> bool:
    """Returns whether any step of the recipe needs calibration data, or can weigh errors by it."""
    return any(step.method.needs != "nothing" for step in recipe.steps) or any(weighs(step, format) for step, format in pairs(recipe))


def weighs(step: Step, format: str) -> bool:
    """Returns whether a rounding step makes use of importance in this format."""
    if step.method.name == "clip" or step.method.needs_for(format):
        return True
    return step.method.name == "rtn" and get_format(format).uses_importance


def pairs(recipe: Recipe) -> Iterator[tuple[Step, str]]:
    """Yields every rounding step with every format that it is to serve."""
    for choice in (recipe.default, *(rule.choice for rule in recipe.rules)):
        if not choice.is_cast:
            yield from ((choice.step, format) for format in choice.formats if format != KEEP)


def names_imatrix(calib: str | Path | None) -> bool:
    """Returns whether calib is the path of an importance matrix."""
    if calib is None or calib in ("pydoc", "self"):
        return False
    from tersor.calibration.imatrix import is_imatrix  # only here: the package brings the engine, half a second for a run without

    return is_imatrix(calib)


def check_served(recipe: Recipe, matrix: str | Path) -> None:
    """Raises RecipeError for a step that needs more than the mean squares of the model's own inputs."""
    lacks = [(step, _LACKS.get(step.method.needs, "")) for step in recipe.steps]
    lacks += [(step, f"the largest |x| of every column for {format}") for step, format in pairs(recipe) if step.method.needs_for(format)]
    for step, what in lacks:
        if step.method.stage == "view":
            why = "turns the inputs, and an importance matrix is of inputs that are not turned"
        elif what:
            why = f"needs {what}, and an importance matrix has their mean squares only"
        else:
            continue
        raise RecipeError(f"{matrix}: {step} {why}; give --calib a text, pydoc or self, or use clip")


def matched(
    matrix: Imatrix, recipe: Recipe, choices: Mapping[str, Choice], plan: Sequence[TensorInfo], force: bool
) -> tuple[dict[str, InputStatistics], str]:
    """Returns the statistics of the tensors whose errors can be weighed, by name, and a sentence on those of which the matrix says nothing,
    which are rounded without, as llama-quantize does; empty when there are none.

    force: inputs that were always zero count as nothing said. Raises ModelError for them without force, RecipeError when nothing is left.
    """
    from tersor.calibration.statistics import check_statistics

    found, missing, where = {}, [], matrix.provenance["file"]
    for info in plan:
        choice = choices[info.name]
        if choice.is_cast or info.format in CASTS or not weighs(choice.step, info.format):
            continue
        statistics = matrix.statistics.get(info.name)
        if statistics is not None:
            check_statistics(statistics, info.name, rounded=not force)
        if statistics is None or not statistics.mean_square.any():
            missing.append(info.name)
        else:
            found[info.name] = statistics
    if not found:
        raise RecipeError(
            f"{where}: of its {len(matrix.statistics)} matrices, {recipe} weighs the errors of none; leave --calib out, or give an"
            " importance matrix of those that it rounds"
        )
    if not missing:
        return found, ""
    return found, f"{where} says nothing of {len(missing)} of {len(missing) + len(found)} matrices, first {missing[0]}: rounded without it"


class Weighed:
    """A rounding step that weighs errors by statistics of its own, and sums up what it does to the products x W^T.

    step: the same method, for whoever passes no statistics.
    """

    def __init__(self, step: Step, statistics: InputStatistics) -> None:
        self._method, self._statistics = step.method, statistics
        self._errors = self._squares = 0.0
        self.step = Step(replace(step.method, run=self._run), step.options)

    @property
    def output_error(self) -> float:
        """Relative RMS error of the products over all rows so far, H = X^T X taken as diagonal."""
        return sqrt(self._errors / self._squares) if self._squares else 0.0

    def _run(self, w: Array, format: Format, statistics: None = None, options: Any = None) -> QuantizedTensor:
        made: QuantizedTensor = self._method.run(w, format, self._statistics, options)
        importance = self._statistics.importance
        error = format.dequantize(made).reshape(w.shape) - w
        self._errors += float((np.square(error) @ importance).sum(dtype=np.float64))
        self._squares += float((np.square(w) @ importance).sum(dtype=np.float64))
        return made
