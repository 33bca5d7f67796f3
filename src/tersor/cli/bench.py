"""tersor bench: tokens per second beside the machine's limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tersor.cli import options

if TYPE_CHECKING:
    from tersor.evaluation import Speed
    from tersor.evaluation.speed import Contestant

LLAMA_CPP = "llama.cpp"


def command(
    path: Annotated[
        str | None,
        typer.Argument(metavar="PATH", help="Hugging Face directory, .gguf file or hub id.", show_default=False),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            "-a",
            metavar="OTHER",
            help="Measure this beside it, in turns: another PATH, or llama.cpp on the same file (pip install 'tersor[bench]'); "
            "may be repeated.",
        ),
    ] = None,
    prefill: Annotated[int, typer.Option("--prefill", metavar="N", help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option("--decode", metavar="N", help="Tokens decoded after it.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="Runs of which the median counts, all in turns.")] = 5,
    kv: options.Kv = "f16",
    threads: options.Threads = None,
    isa: Annotated[bool, typer.Option("--isa", help="List the instruction sets of this CPU, name the one in use, and stop.")] = False,
    json: options.Json = False,
) -> None:
    """Measure tokens per second.

    Prefill and decode speed, load time, memory and energy of PATH, beside what this machine can do at all: the bytes that it
    reads from memory, which limit decoding, and the products of bytes that it computes, which limit prefill.
    TERSOR_ISA=name forces an instruction set.
    """
    from tersor.cli.printing import print_json, progress
    from tersor.errors import RecipeError

    if isa:
        _isa(json)
        return
    if path is None:
        raise RecipeError("bench needs a PATH, or --isa")
    others = list(against or ())
    if len({path, *others}) <= len(others):
        raise RecipeError("bench: the same is given twice; drop one")
    from tersor.engine import load
    from tersor.evaluation.speed import measure
    from tersor.threads import set_threads

    set_threads(threads)
    with progress() as report:
        results = measure(
            {p: partial(load, p, kv=kv) for p in (path, *others) if p != LLAMA_CPP},
            peers={LLAMA_CPP: partial(_llama_cpp, path, kv, prefill + decode)} if LLAMA_CPP in others else {},
            prefill=prefill,
            decode=decode,
            repeats=repeats,
            progress=lambda done, total: report("time", done, total),
        )
    speeds = {name: results[name] for name in (path, *others)}
    if json:
        print_json({"speeds": {name: s.to_dict() for name, s in speeds.items()}, "ratios": _ratios(speeds)})
    else:
        _print(speeds)


def _llama_cpp(path: str, kv: str, capacity: int) -> Contestant:
    from tersor import _native
    from tersor.evaluation.llama_cpp import LlamaCpp

    return LlamaCpp(path, _native.threads(), kv, capacity)


def _isa(json: bool) -> None:
    from tersor import _native
    from tersor.cli.printing import print_json

    if json:
        print_json({"isas": _native.isas(), "isa": _native.isa(), "threads": _native.threads()})
        return
    for name in _native.isas():
        print(f"{name}{'  (in use)' if name == _native.isa() else ''}")


def _ratios(speeds: dict[str, Speed]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns how many times as fast the first is as each other one: median and range over the rounds."""
    from statistics import median

    from tersor.evaluation.speed import ratios

    first, *others = speeds
    found = {}
    for name in others:
        pairs = zip(("prefill", "decode"), ratios(speeds[first], speeds[name]))
        found[name] = {what: {"median": median(r), "lowest": r[0], "highest": r[-1]} for what, r in pairs}
    return found


def _print(speeds: dict[str, Speed]) -> None:
    from tersor.report import format_bytes, text_table
    from tersor.report.table import format_number

    s = next(iter(speeds.values()))

    def row(
        label: str, value: Callable[[Speed], float | None], show: Callable[[float], str] = format_number, none: str = "-"
    ) -> Sequence[str]:
        found = [value(speed) for speed in speeds.values()]
        return [label, *(none if x is None else show(x) for x in found)]

    def percent(part: float | None, whole: float) -> float | None:
        return None if part is None or whole == 0 else 100 * part / whole

    rows = [
        row(f"prefill {s.prefill_tokens}, tokens/s", lambda x: x.prefill),
        row("  products, GOP/s", lambda x: x.prefill_gops),
        row(f"  of {s.int8_gops:.0f}, the peak of int8", lambda x: percent(x.prefill_gops, x.int8_gops), lambda x: f"{x:.0f} %"),
        row(f"decode {s.decode_tokens}, tokens/s", lambda x: x.decode),
        row("  read per token", lambda x: x.token_bytes, format_bytes),
        row("  read, GB/s", lambda x: x.decode_gbps),
        row(f"  of {s.bandwidth_gbps:.1f}, what memory gives", lambda x: percent(x.decode_gbps, x.bandwidth_gbps), lambda x: f"{x:.0f} %"),
        row("energy per token, J", lambda x: x.joules, none="not measurable here"),
        row("load, s", lambda x: x.load_seconds),
        row("load to first token, s", lambda x: x.first_token_seconds),
        row("weights in memory", lambda x: x.weight_bytes, format_bytes),
        row("resident memory", lambda x: x.resident_bytes, format_bytes),
    ]
    ratios: dict[str, Any] = _ratios(speeds)
    for what in ("prefill", "decode") if ratios else ():
        shown = [f"{r[what]['median']:.2f} ({r[what]['lowest']:.2f}-{r[what]['highest']:.2f})" for r in ratios.values()]
        rows.append([f"{what}: first / this", "", *shown])
    print(text_table(["", *(Path(name).name for name in speeds)], rows) + "\n")
    print(f"{s.threads} threads, {s.isa}; medians of {s.repeats} runs in turns; a product's multiplication and addition are two operations")
