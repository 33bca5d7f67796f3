"""The calibration doctor: is this data enough, and does the model see anything on it? It is asked before hours are spent.

Stability. With a_j and b_j the mean of x_j^2 over the first and over the second half of the samples, a column's two estimates
differ by 2 |a_j - b_j| / (a_j + b_j) of their mean; an input's `spread` is the median of that over its columns. Half of it is the error
to expect of the mean of both halves, which is what methods use. Columns that are zero in both halves do not count.

Spread of SmolLM2-135M on wikitext-2 (samples of 512 tokens, median of all inputs): 2 samples 23 %, 4 18 %, 8 14 %, 16 10 %, 32 7.6 %: it
falls with the samples to the power of 0.4, because texts are not independent tokens. 100 % means that a typical column is three
times as large in one half as in the other. The first 256 tokens of a sample tell as much: from four, this rule expects 6.8 % of the 32
samples whose halves differ by 8.0 % in SmolLM2's first six layers (8 draws); from four whole ones it expects 5.6 %.

Tokens a column. H = X^T X / n of n tokens has rank n at most; with fewer tokens than columns, damping decides what the data does not
say. With more, error feedback still learns the sample: GPTQ of int4_g64 on a 576-column input of SmolLM2 (rotated) leaves on held-out
text, against what it leaves with 57 tokens a column, 2.0 times the error with 0.9 a column, 1.6 with 1.8, 1.34 with 3.6, 1.18 with 7,
1.08 with 14, 1.02 with 28.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, prod
from typing import Any

import numpy as np

from tersor.calibration.samples import Samples
from tersor.errors import ModelError
from tersor.tensor import InputStatistics

THIN_SPREAD = 0.15
BAD_SPREAD = 1.0
FALL = 0.4  # of the spread: samples to the power of minus this
TOKENS_PER_COLUMN = 8  # below it, data is thin
WORST = 5  # inputs that are named
Halves = tuple[str, InputStatistics, InputStatistics]


@dataclass(frozen=True)
class InputHealth:
    """One input of linear layers. spread: see above, in [0, 2]; dead: columns that are zero on every token; finite: no NaN, no infinity."""

    name: str
    width: int
    tokens: int
    spread: float
    dead: int
    finite: bool


@dataclass(frozen=True)
class Examination:
    """What the doctor found. verdict: good, thin (it works, more or other data would be better) or bad (see refuse); reasons: why
    it is not good; advice: what would mend it.

    source: provenance of the samples. examined: samples that the layers were run on; length: the tokens of each that they were run on,
    its first. distinct: different tokens among all of them;
    vocabulary: tokens that the model knows. repeated: windows that are equal to an earlier one. experts: tokens that each expert
    saw, by name. hessian: whether the recipe asks for one, so that tokens a column matter.
    """

    verdict: str
    reasons: tuple[str, ...]
    advice: tuple[str, ...]
    source: Mapping[str, Any]
    examined: int
    length: int
    tokens: int
    distinct: int
    vocabulary: int
    repeated: int
    inputs: tuple[InputHealth, ...]
    experts: Mapping[str, int]
    hessian: bool

    @property
    def worst(self) -> tuple[InputHealth, ...]:
        """The least stable inputs, the worst first; those that are not finite or all zero are not among them."""
        alive = [i for i in self.inputs if i.finite and i.dead < i.width]
        return tuple(sorted(alive, key=lambda i: -i.spread)[:WORST])

    @property
    def spread(self) -> float:
        """The median of the inputs' spreads, 0 without any."""
        return float(np.median([i.spread for i in self.inputs])) if self.inputs else 0.0

    @property
    def expected_spread(self) -> float:
        """The spread that all samples would have, from how it falls with their number."""
        return float(self.spread * (self.examined / max(self.examined, self.source["samples"])) ** FALL) if self.examined else 0.0

    @property
    def rank_limited(self) -> tuple[int, ...]:
        """Widths of inputs that have more columns than there are tokens, ascending."""
        return tuple(sorted({i.width for i in self.inputs if i.tokens < i.width}))

    @property
    def never_hit(self) -> tuple[str, ...]:
        """Experts without tokens."""
        return tuple(name for name, tokens in self.experts.items() if tokens == 0)

    def refuse(self, force: bool = False) -> None:
        """Raises ModelError for what calibration cannot go on with; names block and layer.

        Activations that are NaN or infinite: always. Inputs that are all zero and experts without tokens: unless force.
        """
        broken = [place(i.name) for i in self.inputs if not i.finite]
        if broken:
            raise ModelError(
                f"calibration: activations are NaN or infinite at the input of {_few(broken)}; the model overflows on this text,"
                " or its weights are damaged: judge it first with tersor eval"
            )
        if force:
            return
        zero = [place(i.name) for i in self.inputs if i.dead == i.width]
        if zero:
            raise ModelError(f"calibration: only zeros reach {_few(zero)}; give other text, or --force to round them without calibration")
        if self.never_hit:
            raise ModelError(
                f"calibration: {len(self.never_hit)} of {len(self.experts)} experts saw no token: {_few(list(map(place, self.never_hit)))};"
                " give more or other text, or --force to round them without calibration"
            )

    @property
    def _examined(self) -> str:
        which = f"{self.examined} of the samples" if self.examined < self.source["samples"] else "the samples"
        return f"the first {self.length} tokens of {which}" if self.length < self.source["seqlen"] else which

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        return asdict(self) | {"source": dict(self.source), "experts": dict(self.experts), "spread": self.spread}

    def __str__(self) -> str:
        s = self.source
        share = 100 * self.distinct / max(1, self.vocabulary)
        dead = [i for i in self.inputs if i.dead]
        rows = [
            ("calibration", f"{s['source']}: {s['samples']} samples of {s['seqlen']} tokens, seed {s['seed']}"),
            ("verdict", ": ".join(filter(None, (self.verdict, "; ".join(self.reasons))))),
            *(("advice", line) for line in self.advice),
            ("tokens", f"{self.tokens:,}, {self.distinct:,} different ones: {share:.1f} % of the vocabulary"),
            ("repeated samples", str(self.repeated)),
            ("chat template", _TEMPLATE[s["chat_template"]]),
            ("stability", f"importance differs by {100 * self.spread:.1f} % between the halves of {self._examined} (median input, column)"),
            *((f"  {rank}. least stable", f"{place(i.name)}, {100 * i.spread:.1f} %") for rank, i in enumerate(self.worst, 1)),
            ("dead columns", f"{sum(i.dead for i in dead)}, in {_few([place(i.name) for i in dead])}" if dead else "none"),
        ]
        if self.experts:
            least = min(self.experts, key=lambda name: self.experts[name])
            few = f"the fewest tokens of {len(self.experts)}: {self.experts[least]:,}, {place(least)}"
            rows.append(("experts", f"{len(self.never_hit)} never hit; {few}"))
        return "\n".join(f"{title:<20}  {value}" for title, value in rows)


_TEMPLATE = {
    "used": "used",
    "unused": "not used, though the model has one",
    "none": "the model has none",
    "unknown": "not known, tokens came from outside",
}


def examine(
    samples: Samples,
    vocab_size: int,
    halves: Sequence[Halves],
    experts: Mapping[str, int] | None = None,
    examined: tuple[int, int] | None = None,
    hessian: bool = False,
) -> Examination:
    """Returns what the samples are worth. halves: (name of the input, its statistics on the first and on the second half of the
    samples that were examined); the name is that of a layer that reads it, model.layers.0.self_attn.q_proj. examined: how many samples
    these were, and of how many tokens, None = all. experts: tokens of each, by name. hessian: whether the recipe asks for one."""
    tokens = samples.tokens
    examined = examined or tokens.shape
    inputs = tuple(_health(*half, tokens.size / prod(examined)) for half in halves)
    found = Examination(
        verdict="",
        reasons=(),
        advice=(),
        source=samples.provenance,
        examined=examined[0],
        length=examined[1],
        tokens=int(tokens.size),
        distinct=len(np.unique(tokens)),
        vocabulary=vocab_size,
        repeated=len(tokens) - len(np.unique(tokens, axis=0)),
        inputs=inputs,
        experts=dict(experts or {}),
        hessian=hessian,
    )
    return _judged(found)


def _health(name: str, first: InputStatistics, second: InputStatistics, share: float) -> InputHealth:
    """Returns what two halves say about one input; a half without tokens says zero. share: all tokens over those examined."""
    a, b = (half.mean_square.astype(np.float64) if half.tokens else np.zeros(half.mean_square.shape) for half in (first, second))
    finite = bool(np.isfinite(a).all() and np.isfinite(b).all())
    total = a + b
    alive = total > 0
    spread = float(np.median(2 * np.abs(a - b)[alive] / total[alive])) if finite and alive.any() else 0.0
    return InputHealth(name, len(a), round((first.tokens + second.tokens) * share), spread, int((total == 0).sum()), finite)


def _judged(e: Examination) -> Examination:
    """Returns the examination with its verdict."""
    bad, thin, advice = _bad(e), [], []
    if THIN_SPREAD < e.expected_spread <= BAD_SPREAD:
        thin.append(f"the halves of the samples differ by {100 * e.expected_spread:.0f} %")
    if e.expected_spread > THIN_SPREAD:
        need = ceil(e.examined * (e.spread / THIN_SPREAD) ** (1 / FALL))
        advice.append(f"--samples {need} would bring the difference to about {100 * THIN_SPREAD:.0f} %, if the text is of one kind")
    if e.hessian:
        few, wish = _few_tokens(e)
        thin += few
        advice += wish
    if e.repeated:
        thin.append(f"{e.repeated} samples repeat an earlier one")
    if e.source["chat_template"] == "unused" and e.source["kind"] != "self":
        advice.append("the model has a chat template: if it is for chat, give conversations in a .jsonl file")
    verdict = "bad" if bad else "thin" if thin else "good"
    return replace(e, verdict=verdict, reasons=tuple(bad + thin), advice=tuple(advice))


def _few_tokens(e: Examination) -> tuple[list[str], list[str]]:
    """Returns why there are too few tokens a column for error feedback, and what it wants; nothing when there are enough."""
    wide = sorted({i.width for i in e.inputs if i.tokens < TOKENS_PER_COLUMN * i.width})
    if not wide:
        return [], []
    least = min(i.tokens / i.width for i in e.inputs)
    reasons = [f"inputs of {', '.join(map(str, wide))} columns saw few tokens, {least:.1f} a column"]
    if e.rank_limited:
        reasons.append(f"a Hessian of {', '.join(map(str, e.rank_limited))} columns cannot have full rank")
    need = TOKENS_PER_COLUMN * max(wide)
    return reasons, [f"methods with error feedback (gptq) want {TOKENS_PER_COLUMN} tokens a column: {need} tokens"]


def _bad(e: Examination) -> list[str]:
    """Returns the reasons for which the data will not do."""
    broken = [place(i.name) for i in e.inputs if not i.finite]
    zero = [place(i.name) for i in e.inputs if i.dead == i.width]
    reasons = []
    if broken:
        reasons.append(f"activations are NaN or infinite at the input of {_few(broken)}")
    if zero:
        reasons.append(f"only zeros reach {_few(zero)}")
    if e.never_hit:
        reasons.append(f"{len(e.never_hit)} of {len(e.experts)} experts saw no token")
    if e.expected_spread > BAD_SPREAD:
        reasons.append(f"the halves of the samples differ by {100 * e.expected_spread:.0f} %")
    return reasons


def place(name: str) -> str:
    """Returns a tensor or layer as block and layer: `block 3 mlp.down_proj` for model.layers.3.mlp.down_proj.weight."""
    found = re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(.+?)(?:\.weight)?", name)
    return f"block {found[1]} {found[2]}" if found else name


def _few(names: Sequence[str], most: int = 3) -> str:
    """Returns the names in one line: the first few and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
