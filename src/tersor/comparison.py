"""Several recipes of one model side by side: quantized, judged against the original, timed; as a table, results.json and a page.

Every recipe's output stays in the directory. The original is run on its dequantized weights with float activations, once: its
hidden states are kept, so that every recipe costs one pass of its own.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tersor.containers import CONTAINERS, open_checkpoint
from tersor.errors import OutputError, RecipeError
from tersor.evaluation.kl import Base, Divergence, divergence
from tersor.evaluation.perplexity import Perplexity
from tersor.evaluation.speed import Speed, TimedModel, measure
from tersor.evaluation.text import Protocol, cut, read_text
from tersor.pipeline import QuantizeResult, file_bytes, quantize, source_note
from tersor.planning import machine_ram
from tersor.recipe import KEEP, Recipe
from tersor.report.page import comparison_page, comparison_plot
from tersor.report.plot import Point
from tersor.report.table import format_error, format_number, text_table
from tersor.threads import set_threads
from tersor.weighing import check_served, names_imatrix, uses_calibration

HEADER = ("recipe", "bits/weight", "file MB", "perplexity", "KLD", "top-1", "prefill t/s", "decode t/s")

DEFAULT_RECIPES = ("q8_0", "q5_1", "q4_k|q5_0", "q4_0", "clip:int4_g128|int4_g64", "q3_k|iq4_nl")

Progress = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)


@dataclass(frozen=True)
class Row:
    """One model of the comparison. quantized, divergence: None for the original, whose perplexity then stands alone."""

    label: str
    path: str
    container: str
    file_bytes: int
    quantized: QuantizeResult | None
    perplexity: Perplexity
    divergence: Divergence | None
    speed: Speed

    def cells(self) -> list[str]:
        """Returns the row as HEADER's columns."""
        d = self.divergence
        return [
            self.label,
            f"{self.quantized.block_bits_per_weight:.2f}" if self.quantized else "-",
            f"{self.file_bytes / 1e6:.1f}",
            format_error(self.perplexity.perplexity, self.perplexity.error),
            format_error(d.kl_mean, d.kl_error) if d else "-",
            f"{100 * d.top1:.1f} %" if d else "-",
            format_number(self.speed.prefill),
            format_number(self.speed.decode),
        ]


@dataclass(frozen=True)
class Comparison:
    """The original, first, and every recipe, in the order given."""

    model: str
    note: str
    protocol: Protocol
    rows: tuple[Row, ...]

    def table(self) -> str:
        """Returns the rows as a plain text table."""
        return text_table(HEADER, [row.cells() for row in self.rows])

    def notes(self) -> list[str]:
        """Returns what must be said beside the table: protocol, speed settings, caveats."""
        s = self.rows[0].speed
        notes = [
            "bits/weight: of the matrices of the blocks, scales included; file MB: the whole file or directory, 1 MB = 1e6 bytes",
            f"quality: {self.protocol}; ± is the standard error, tokens taken as independent",
            "KLD: mean KL divergence from the original in nats per token; top-1: how often the likeliest token is the original's",
            f"speed: medians of {s.repeats} runs in turns, prefill of {s.prefill_tokens} tokens, then {s.decode_tokens} decoded, "
            f"{s.threads} threads, {s.isa}; memory reads {s.bandwidth_gbps:.1f} GB/s here",
        ]
        return [self.note, *notes] if self.note else notes

    def points(self) -> list[Point]:
        """Returns what the plot shows: every model but the original."""
        return [
            Point(row.label, row.file_bytes / 1e6, row.divergence.kl_mean, row.divergence.kl_error, row.container)
            for row in self.rows
            if row.divergence is not None
        ]

    def page(self) -> str:
        """Returns the HTML page."""
        title = f"{Path(self.model).name}: what each recipe costs"
        lead = (
            f"{len(self.rows) - 1} recipes, judged against the original on the same text and timed on this machine ({platform.machine()})."
        )
        return comparison_page(title, lead, HEADER, [row.cells() for row in self.rows], self.points(), self.notes())

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON; of the tensors only counts, which `quantize --json` lists."""
        rows = []
        for row in self.rows:
            values = asdict(row)
            if row.quantized is not None:
                values["quantized"] = row.quantized.to_dict() | {"tensors": len(row.quantized.tensors)}
            rows.append(values)
        return {"model": self.model, "note": self.note, "protocol": asdict(self.protocol), "rows": rows}


def compare(
    model: str | Path,
    out: str | Path,
    recipes: Sequence[str | Recipe],
    *,
    also: Sequence[str | Path] = (),
    calib: str | Path | None = None,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    text: str | Path | None = None,
    window: int = 512,
    windows: int | None = 8,
    prefill: int = 512,
    decode: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    force: bool = False,
    note: str = "",
    progress: Progress | None = None,
) -> Comparison:
    """Returns the comparison of the recipes and writes into the directory `out` every quantized model and the report.

    The report: results.json, index.html and plot.svg.

    A recipe of ggml types becomes a GGUF file, any other a directory. also: models that exist already, judged beside the recipes'.
    calib, samples, seqlen, seed: see quantize, for the recipes that have a use for it.
    text, window, windows: see evaluate. note: said first beside the table, before what is known of the source itself.
    progress: called with (what, steps done, steps in all). Raises what quantize and evaluate raise; OutputError when an output
    exists and not force.
    """
    directory = Path(out)
    parsed = [Recipe.parse(recipe) for recipe in recipes]
    targets = [directory / output_name(recipe) for recipe in parsed]
    _check_outputs(parsed, targets, force)
    if calib is not None and names_imatrix(calib):
        for recipe in filter(uses_calibration, parsed):
            check_served(recipe, calib)
    set_threads(threads)
    tell: Progress = progress or (lambda what, done, total: None)
    with open_checkpoint(model) as checkpoint:
        source, container, own_note = checkpoint.path, checkpoint.container, source_note(checkpoint.tensors)
    directory.mkdir(parents=True, exist_ok=True)
    candidates: list[_Candidate] = []
    for recipe, target in zip(parsed, targets):
        made = quantize(
            source,
            target,
            recipe,
            calib=calib if uses_calibration(recipe) else None,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            force=force,
            verify=False,
            progress=_steps(tell, short_name(recipe)),
        )
        candidates.append(_Candidate(short_name(recipe), target, made.container, made))
    for path in also:
        with open_checkpoint(path) as checkpoint:
            candidates.append(_Candidate(Path(path).stem, checkpoint.path, checkpoint.container, None))

    base = _load(source, threads, "float")
    name, content = read_text(text)
    cuts = cut(base.tokenizer, name, content, window, None, windows)
    judge = Base(base, cuts, keep=True)
    judged = [divergence(_load(c.path, threads), judge, _windows(tell, f"judge {c.label}")) for c in candidates]
    loaders = {"original": lambda: base} | {c.label: partial(_load, c.path, threads) for c in candidates}
    speeds = _measure(loaders, sum(file_bytes(c.path) for c in candidates), prefill, decode, repeats, tell)

    rows = [Row("original", str(source), container, file_bytes(source), None, judged[0].base, None, speeds["original"])]
    for c, d in zip(candidates, judged):
        rows.append(Row(c.label, str(c.path), c.container, file_bytes(c.path), c.made, d.perplexity, d, speeds[c.label]))
    result = Comparison(str(model), "; ".join(filter(None, (note, own_note))), cuts.protocol, tuple(rows))
    (directory / "results.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    (directory / "index.html").write_text(result.page(), encoding="utf-8")
    (directory / "plot.svg").write_text(comparison_plot(result.points()), encoding="utf-8")
    return result


@dataclass(frozen=True)
class _Candidate:
    label: str
    path: Path
    container: str
    made: QuantizeResult | None


def output_name(recipe: Recipe) -> str:
    """Returns the file or directory name of a recipe's output: *.gguf when GGUF holds all its formats."""
    formats = {f for choice in (recipe.default, *(rule.choice for rule in recipe.rules)) for f in choice.formats if f != KEEP}
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", short_name(recipe)).strip("-")
    return stem + (".gguf" if all(CONTAINERS["gguf"].holds(f) for f in formats) else "")


def short_name(recipe: Recipe) -> str:
    """Returns the recipe's text without the method that is the default anyway."""
    return str(recipe).replace("rtn:", "")


def _check_outputs(recipes: Sequence[Recipe], targets: Sequence[Path], force: bool) -> None:
    """Raises before anything is computed: no recipe, the same twice, an output that exists."""
    if not recipes:
        raise RecipeError("no recipe to compare; give at least one, like q4_0")
    for i, target in enumerate(targets):
        if target in targets[:i]:
            raise RecipeError(f"recipe {recipes[i]} is given twice; drop one")
        if target.exists() and not force:
            raise OutputError(f"{target} exists; choose another directory or pass --force")


def _measure(
    loaders: dict[str, Callable[[], TimedModel]], nbytes: int, prefill: int, decode: int, repeats: int, tell: Progress
) -> dict[str, Speed]:
    """Returns every model's speed, measured in turns when all of them fit in half of the memory, else one after the other."""
    report = _windows(tell, "time")
    if nbytes < machine_ram() // 2:
        return measure(loaders, prefill=prefill, decode=decode, repeats=repeats, progress=report)
    return {
        name: measure({name: load}, prefill=prefill, decode=decode, repeats=repeats, progress=report)[name]
        for name, load in loaders.items()
    }


def _load(path: Path, threads: int | None, activations: str = "int8") -> TimedModel:
    from tersor.engine import load

    return load(path, threads=threads, activations=activations)


def _steps(tell: Progress, recipe: str) -> Progress:
    return lambda what, done, total: tell(f"{what} {recipe}", done, total)


def _windows(tell: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: tell(what, done, total)
