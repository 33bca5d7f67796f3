"""What a method is: a member of METHODS. A method decides the numbers; it never sees bytes or files.

Three stages follow each other, and a recipe joins steps with `+` in this order:

    fold    changes weights without changing the function:
              view   checkpoint -> checkpoint, the whole model                      rotate
              scale  (weights, formats, statistics, options, sources) -> s, (in,)   awq, smoothquant
                     columns of the readers times s, what produces their input divided by s (models/folding.py)
    round   (w, format, statistics, options) -> QuantizedTensor                     rtn, clip, hqq, gptq, llm_int8
              or, of needs "samples", a whole block: autoround_block                autoround
    tune    moves what stays float, block by block, after rounding: tune_block      tune
    distill moves it in the whole model, when every block is rounded: tune_model    distill
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

from tersor.errors import RecipeError, unknown
from tersor.formats import Format
from tersor.tensor import Array, InputStatistics, QuantizedTensor

STAGES = ("view", "scale", "round", "tune", "distill")

# What a method asks of calibration: nothing; the mean square of every input column; the Gram matrix; the samples themselves.
NEEDS = ("nothing", "importance", "gram", "samples")


class Rounding(Protocol):
    """A method of the stage `round`: a function from weights to a stored tensor."""

    def __call__(self, w: Array, format: Format, statistics: InputStatistics | None = None, options: Any = None) -> QuantizedTensor:
        """Returns w, (..., in) float32 and finite, in this format.

        statistics: of the inputs that w multiplies, or None when the method needs none. options: the method's, None = its defaults.
        Raises FormatError when the format cannot store the shape, can only be decoded, or does not suit the method.
        """


def rounding_workspace(rows: int, columns: int) -> int:
    """Returns the bytes that rounding a matrix by itself takes at most, besides the matrix: a few copies of it."""
    return 20 * rows * columns


def _never(what: object) -> bool:
    return False


@dataclass(frozen=True)
class Method:
    """One method. stage: of STAGES; run: its function, as the stage says; needs: of NEEDS; options: a frozen dataclass, or None.

    workspace: (rows, columns) of a matrix -> bytes that the method needs at most besides the matrix and its statistics.
    guided: options -> whether statistics weigh tokens and have `outputs`, by the Fisher information of the float model (torch).
    needs_for: format name -> whether it needs `importance` to serve this format, though `needs` is nothing.
    compares: options -> whether the unquantized model walks along, so that statistics have `cross` or blocks have targets.
    """

    name: str
    stage: str
    run: Callable[..., Any]
    needs: str = "nothing"
    options: type | None = None
    workspace: Callable[[int, int], int] = rounding_workspace
    compares: Callable[[Any], bool] = _never
    guided: Callable[[Any], bool] = _never
    needs_for: Callable[[str], bool] = _never

    def calibrates(self, format: str) -> bool:
        """Returns whether it cannot serve this format without calibration."""
        return self.needs != "nothing" or self.needs_for(format)


@dataclass(frozen=True)
class Step:
    """A method with its options, as a recipe names it: `gptq(act_order; damp=0.02)`."""

    method: Method
    options: Any = None

    def __str__(self) -> str:
        if self.options is None:
            return self.method.name
        changed = [
            field.name if value is True else f"{field.name}={str(value).lower() if isinstance(value, bool) else value}"
            for field in fields(self.options)
            if (value := getattr(self.options, field.name)) != field.default
        ]
        return f"{self.method.name}({'; '.join(changed)})" if changed else self.method.name


def parse_step(text: str, methods: dict[str, Method]) -> Step:
    """Returns the step of `name` or `name(option; option=value)`. Raises RecipeError for what is unknown or no value of its option."""
    name, parenthesis, rest = text.strip().partition("(")
    name = name.strip().lower()
    if name not in methods:
        raise RecipeError(unknown("method", name, methods))
    method = methods[name]
    if parenthesis and not rest.endswith(")"):
        raise RecipeError(f"{text!r} lacks its closing parenthesis; write {name}(option; option=value)")
    given = [part.strip() for part in rest[:-1].split(";") if part.strip()] if parenthesis else []
    if method.options is None:
        if given:
            raise RecipeError(f"{name} has no options, got {given[0]!r}")
        return Step(method)
    known = {field.name: field for field in fields(method.options)}
    values = {}
    for part in given:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in known:
            raise RecipeError(unknown(f"option of {name}", key, known))
        values[key] = _value(f"{name}({part})", type(known[key].default), value if equals else "true")
    return Step(method, method.options(**values))


def _value(where: str, kind: type, text: str) -> Any:
    """Returns the text as a value of this type. Raises RecipeError when it is none."""
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise RecipeError(f"{where}: {text!r} is not true or false")
    try:
        return kind(text)
    except ValueError:
        raise RecipeError(f"{where}: {text!r} is not a value of type {kind.__name__}") from None


__all__ = ["NEEDS", "STAGES", "Method", "Rounding", "Step", "parse_step"]
