"""The only configuration object: which method and format each tensor gets.

    "rtn:int4_g64"                                   every matrix of the blocks, round to nearest, 4 bits in groups of 64
    "clip:q4_k|q5_0, lm_head=q6_k|q8_0"              q5_0 where the columns do not divide by 256; the head in 6 bits
    "q4_0, attn=q5_0, layers.0-3=rtn:q8_0, *.mlp.down_proj.weight=keep"
    "rotate+awq+gptq(act_order):int3_g64|int3_g32"   three steps: rotate, scale the channels, round with error feedback

Grammar: `[method:]formats {, pattern=[method:]formats}`; formats are tried from left to right at every `|`, the first whose
groups divide the tensor's columns is taken. `keep` leaves a tensor as the source stores it, `f32 f16 bf16` cast it.
The method of the default may be several steps joined by `+`, in the order of methods/method.py: one that rounds, before it what
changes the weights and not the function, after it what tunes the rest. A step may have options: `name(option; option=value)`.
A rule names a rounding method only; without one it takes the default's. Of several rules that match, the last one counts.

Patterns, on Hugging Face's tensor names:
- with `*`, `?` or `[`: a shell pattern (fnmatch) for the whole name, with or without its `.weight`;
- otherwise dotted words that must occur in the name in this order: `q_proj`, `mlp`, `layers.0-3`, `layers.20-.down_proj`, a whole
  name. `attn` stands for self_attn, `embed` for embed_tokens; a number, `a-b` or `a-` stands for block numbers.
  `lm_head` of a model with tied embeddings is the embedding.

What no rule names:
- matrices of the blocks get the default;
- norms, biases and other vectors are kept, or cast when the default is a cast; in GGUF they are always f32, as llama.cpp demands;
- embedding and head: q8_0 in GGUF (f16 where the columns do not divide by 32); elsewhere as they are, but f32 as f16, because
  every engine that loads these directories expects them in 16 bits. A cast in the default is applied to them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

from tersor.errors import FormatError, RecipeError, unknown
from tersor.formats import get_format
from tersor.methods import METHODS, Step, parse_step
from tersor.methods.method import STAGES
from tersor.tensor import TensorInfo

KEEP = "keep"
CASTS = ("f32", "f16", "bf16")
_ALIASES = {"attn": "self_attn", "embed": "embed_tokens"}
_RTN = Step(METHODS["rtn"])
_WORDS = ("attn", "mlp", "embed", "lm_head", "layers.0-3")  # offered in messages beside the words of the model's own names


@dataclass(frozen=True)
class Choice:
    """A rounding method and the formats to try from left to right. `keep` is a format here."""

    step: Step
    formats: tuple[str, ...]

    def __str__(self) -> str:
        formats = "|".join(self.formats)
        return formats if self.is_cast else f"{self.step}:{formats}"

    @property
    def method(self) -> str:
        """Name of the rounding method."""
        return self.step.method.name

    @property
    def is_cast(self) -> bool:
        """Whether this only keeps or casts, so that no grid is fitted."""
        return all(f in (KEEP, *CASTS) for f in self.formats)

    def format_for(self, info: TensorInfo) -> str:
        """Returns the first format that fits the tensor. Raises FormatError when none does."""
        for name in self.formats:
            if name == KEEP or get_format(name).fits(info.shape):
                return name
        if len(self.formats) == 1:
            get_format(self.formats[0]).check(info.shape, info.name)
        advice = get_format(self.formats[-1]).alternative(info.shape[-1])
        raise FormatError(f"{'|'.join(self.formats)}: {info.name} has {info.shape[-1]} columns, which none of these divides; {advice}")


@dataclass(frozen=True)
class Rule:
    """Tensors whose name matches the pattern get the choice."""

    pattern: str
    choice: Choice

    def __str__(self) -> str:
        return f"{self.pattern}={self.choice}"


@dataclass(frozen=True)
class Recipe:
    """The default for the matrices of the blocks, and rules for other tensors, of which the last that matches counts.

    before, after: steps around the rounding, for the whole model, in the order of their stages.
    """

    default: Choice
    rules: tuple[Rule, ...] = ()
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()

    def __str__(self) -> str:
        """Returns the text that `parse` turns into this recipe again."""
        return ", ".join([self._first, *map(str, self.rules)])

    @property
    def _first(self) -> str:
        """The text of the default, its steps joined by `+`."""
        if not (self.before or self.after):
            return str(self.default)
        formats = "|".join(self.default.formats)
        rounding = [] if self.default.is_cast else [self.default.step]
        return "+".join(map(str, [*self.before, *rounding, *self.after])) + f":{formats}"

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every step that is named anywhere, rounding ones of rules among them; casts have none."""
        choices = [self.default, *(rule.choice for rule in self.rules)]
        return (*self.before, *(choice.step for choice in choices if not choice.is_cast), *self.after)

    @classmethod
    def parse(cls, text: str | Recipe) -> Recipe:
        """Returns the recipe of a text (grammar above) or of a TOML file whose name ends in .toml. Raises RecipeError, FormatError."""
        if isinstance(text, Recipe):
            return text
        if text.strip().endswith(".toml"):
            return cls.load(Path(text.strip()))
        parts = [part.strip() for part in text.split(",")]
        if not parts[0]:
            raise RecipeError(f"recipe {text!r} is empty at its start; it begins with the blocks' format, like rtn:int4_g64 or q4_k|q5_0")
        if "=" in re.sub(r"\([^)]*\)?", "", parts[0]):
            raise RecipeError(f"recipe {text!r} begins with a rule; it begins with the blocks' format, like rtn:int4_g64, {parts[0]}")
        rules = []
        for part in parts[1:]:
            pattern, equals, value = (piece.strip() for piece in part.partition("="))
            if not (pattern and equals and value):
                raise RecipeError(f"recipe {text!r}: {part!r} is not a rule; write pattern=format, like lm_head=q6_k")
            rules.append((pattern, value))
        return cls._build(parts[0], rules)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Returns the recipe of a TOML file: `default = "rtn:int4_g64"` and a table `[rules]` of "pattern" = "format", in order."""
        try:
            data = _parse_toml(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"recipe {path}: {error.strerror or error}; name a TOML file or write the recipe itself") from None
        except ValueError as error:
            raise RecipeError(f"recipe {path} is not TOML: {error}") from None
        rules = data.get("rules", {})
        entries = [data.get("default"), *rules.values()] if isinstance(rules, dict) else [None]
        if not all(isinstance(entry, str) for entry in entries):
            raise RecipeError(f'recipe {path} needs default = "method:format" and, if any, [rules] with "pattern" = "format"')
        if strange := sorted(data.keys() - {"default", "rules"}):
            raise RecipeError(f"recipe {path}: " + unknown("key", strange[0], ("default", "rules")))
        return cls._build(data["default"], list(rules.items()))

    @classmethod
    def _build(cls, default: str, rules: Sequence[tuple[str, str]]) -> Recipe:
        before, rounding, after = _steps(default)
        choice = _choice(default, rounding or _RTN, named=rounding is not None)
        if choice.is_cast and (refused := [step for step in (*before, *after) if step.method.stage != "view"]):
            raise RecipeError(
                f"recipe {default!r}: {choice} is a cast, which rounds to no grid; {refused[0].method.name} has nothing to work for"
            )
        return cls(choice, tuple(Rule(pattern, _rule_choice(value, rounding or _RTN)) for pattern, value in rules), before, after)

    @classmethod
    def frame(cls, steps: str, formats: Sequence[str]) -> Recipe:
        """Returns the recipe of steps alone, like `gptq` or `rotate+gptq(act_order)`, with any of the formats, which a budget chooses from.

        Raises RecipeError for formats or rules in the text.
        """
        if re.search("[:,=]", re.sub(r"\([^)]*\)?", "", steps)):
            raise RecipeError(
                f"recipe {steps!r} names formats, which a budget chooses; name the steps alone, like clip, gptq or rotate+gptq"
            )
        before, rounding, after = _steps(f"{steps}:")
        return cls(Choice(rounding or _RTN, tuple(formats)), (), before, after)

    def to_toml(self) -> str:
        """Returns the recipe as TOML, as `load` reads it."""
        lines = [f'default = "{self._first}"', "", "[rules]"] if self.rules else [f'default = "{self._first}"']
        return "\n".join([*lines, *(f'"{rule.pattern}" = "{rule.choice}"' for rule in self.rules), ""])

    def assign(self, tensors: Mapping[str, TensorInfo], *, gguf: bool, tied: bool = False) -> dict[str, Choice]:
        """Returns the choice of every tensor, defaults filled in.

        gguf: whether the output is GGUF, whose defaults differ; tied: whether the model ties its embeddings, so that
        `lm_head` names the embedding. Raises RecipeError for a rule that matches nothing, or that would quantize vectors only.
        """
        choices = {name: self._default(info, gguf) for name, info in tensors.items()}
        for rule in self.rules:
            found = [name for name in tensors if matches(rule.pattern, name) or (tied and _is_tied_head(rule.pattern, name))]
            if not found:
                raise RecipeError(_no_match(rule.pattern, tensors))
            usable = [name for name in found if len(tensors[name].shape) > 1 or (rule.choice.is_cast and not gguf)]
            if not usable:
                need = "is f32 in GGUF; drop the rule" if gguf else "is kept or cast; use keep, f32, f16 or bf16"
                raise RecipeError(f"recipe rule {rule}: {found[0]} is a vector, which {need}")
            choices.update(dict.fromkeys(usable, rule.choice))
        return choices

    def _default(self, info: TensorInfo, gguf: bool) -> Choice:
        if gguf and len(info.shape) < 2:
            return Choice(_RTN, ("f32",))
        if self.default.is_cast or (len(info.shape) > 1 and not is_edge(info.name)):
            return self.default
        if len(info.shape) < 2:
            return Choice(_RTN, (KEEP,))
        if gguf:
            return Choice(_RTN, ("q8_0", "f16"))
        return Choice(_RTN, (KEEP,) if info.format in ("f16", "bf16") else ("f16",))


def is_edge(name: str) -> bool:
    """Returns whether the tensor is the embedding or the head, which stand outside the blocks."""
    return bool({"embed_tokens", "lm_head"} & set(name.split(".")))


def matches(pattern: str, name: str) -> bool:
    """Returns whether a pattern (grammar above) matches a Hugging Face tensor name."""
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)
    parts = iter(name.split("."))
    return all(any(_same(word, part) for part in parts) for word in pattern.split("."))


def _same(word: str, part: str) -> bool:
    if part == _ALIASES.get(word, word):
        return True
    span = re.fullmatch(r"(\d+)-(\d*)", word)
    return bool(span and part.isdigit() and int(span[1]) <= int(part) <= int(span[2] or part))


def _is_tied_head(pattern: str, name: str) -> bool:
    return name == "model.embed_tokens.weight" and matches(pattern, "lm_head.weight")


def _no_match(pattern: str, tensors: Mapping[str, TensorInfo]) -> str:
    words = sorted({part for name in tensors for part in name.split(".") if not part.isdigit()} | set(_WORDS))
    last = pattern.strip("*.").split(".")[-1]
    near = get_close_matches(pattern, list(tensors), 2) + get_close_matches(last, words, 3, 0.5)
    return f"recipe pattern {pattern!r} matches none of {len(tensors)} tensors; nearest: {', '.join(near or words)}"


def _steps(text: str) -> tuple[tuple[Step, ...], Step | None, tuple[Step, ...]]:
    """Returns the steps before, at and after rounding that `[step{+step}:]formats` names. Raises RecipeError for nonsense."""
    head, colon, _ = text.rpartition(":")
    if not colon:
        return (), None, ()
    steps = [parse_step(part, METHODS) for part in head.split("+")]
    for first, second in pairwise([step.method for step in steps]):
        if first is second:
            raise RecipeError(f"recipe {text!r}: {first.name} is named twice")
        if STAGES.index(first.stage) > STAGES.index(second.stage):
            raise RecipeError(
                f"recipe {text!r}: {second.name} works {_WHEN[second.stage]}, so it comes before {first.name}; write it first"
            )
        if first.stage == second.stage:
            raise RecipeError(f"recipe {text!r}: {first.name} and {second.name} both {_WHAT[first.stage]}; choose one")
    by_stage = {stage: tuple(step for step in steps if step.method.stage == stage) for stage in STAGES}
    return by_stage["view"] + by_stage["scale"], (by_stage["round"] or (None,))[0], by_stage["tune"] + by_stage["distill"]


_WHEN = {
    "view": "on the unquantized model",
    "scale": "on unquantized blocks",
    "round": "on unquantized weights",
    "tune": "on rounded blocks",
}
_WHAT = {"view": "turn the whole model", "scale": "scale the channels", "round": "choose the codes"}


def _rule_choice(text: str, default: Step) -> Choice:
    """Returns the choice of a rule. Raises RecipeError for a step that works on the whole model."""
    before, rounding, after = _steps(text)
    if before or after:
        name = (before + after)[0].method.name
        raise RecipeError(f"recipe rule {text!r}: {name} works on the whole model, not on some tensors; name it in the recipe's first part")
    return _choice(text, rounding or default, named=rounding is not None)


def _choice(text: str, step: Step, named: bool) -> Choice:
    """Returns the choice of `[method:]format[|format...]`. named: whether the text names the method. Casts need none: theirs is rtn."""
    names = tuple(name.strip().lower() for name in text.rpartition(":")[2].split("|"))
    for name in names:
        if not name:
            raise RecipeError(f"recipe part {text!r} lacks a format; write method:format, like rtn:int4_g64")
        if name.partition("(")[0].strip() in METHODS and ":" not in text:
            raise RecipeError(f"recipe part {text!r} names a method and no format; write method:format, like {text.strip()}:int4_g64")
        if name != KEEP and not get_format(name).can_encode:
            raise FormatError(f"{name} can be read but not written; use another, like q2_k, iq4_xs or int2_g32 (docs/formats.md)")
    choice = Choice(step, names)
    if not choice.is_cast:
        return choice
    if named and step.method.needs != "nothing":
        raise RecipeError(
            f"recipe part {text!r}: {'|'.join(names)} is a cast, which rounds to no grid; {step.method.name} cannot choose codes for it"
        )
    return Choice(_RTN, names)


def _parse_toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    data: dict[str, Any] = tomllib.loads(text)
    return data
