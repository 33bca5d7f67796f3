"""tersor bench: tokens per second beside the machine's limits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersor.cli import options

if TYPE_CHECKING:
    from tersor.evaluation import Speed


def command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH...", help="Models, each a Hugging Face directory, .gguf file or hub id.", show_default=False),
    ] = None,
    prefill: Annotated[int, typer.Option("--prefill", metavar="N", help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option("--decode", metavar="N", help="Tokens decoded after it.")] = 128,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="Runs of which the median counts, all models in turns.")] = 3,
    threads: options.Threads = None,
    kv: options.Kv = "f16",
    isa: Annotated[bool, typer.Option("--isa", help="List the instruction sets of this CPU, name the one in use, and stop.")] = False,
    json: options.Json = False,
) -> None:
    """Measure tokens per second.

    Prefill and decode speed, load time and memory of each PATH, beside the memory bandwidth of this machine.
    TERSOR_ISA=name forces an instruction set.
    """
    from tersor.cli.printing import print_json, progress
    from tersor.errors import RecipeError

    if isa:
        _isa(json)
        return
    if not paths:
        raise RecipeError("bench needs a PATH, or --isa")
    if len(set(paths)) < len(paths):
        raise RecipeError("bench: a PATH is given twice; drop one")
    from tersor.engine import load
    from tersor.evaluation.speed import measure

    with progress() as report:
        loaders = {path: partial(load, path, threads=threads, kv=kv) for path in paths}
        results = measure(
            loaders, prefill=prefill, decode=decode, repeats=repeats, progress=lambda done, total: report("time", done, total)
        )
    if json:
        print_json({path: speed.to_dict() for path, speed in results.items()})
    else:
        _print(results)


def _isa(json: bool) -> None:
    from tersor import _native
    from tersor.cli.printing import print_json

    if json:
        print_json({"isas": _native.isas(), "isa": _native.isa(), "threads": _native.threads()})
        return
    for name in _native.isas():
        print(f"{name}{'  (in use)' if name == _native.isa() else ''}")


def _print(results: dict[str, Speed]) -> None:
    from tersor.report import format_bytes, text_table
    from tersor.report.table import format_number

    rows = []
    for path, s in results.items():
        shown = [s.prefill, s.decode, s.decode_gbps, s.load_seconds]
        rows.append([Path(path).name, *map(format_number, shown), format_bytes(s.weight_bytes), format_bytes(s.resident_bytes)])
    print(text_table(["model", "prefill t/s", "decode t/s", "decode GB/s", "load s", "weights", "resident"], rows) + "\n")
    s = next(iter(results.values()))
    print(f"medians of {s.repeats} runs in turns: prefill of {s.prefill_tokens} tokens, then {s.decode_tokens} decoded")
    print(f"{s.threads} threads, {s.isa}; memory reads {s.bandwidth_gbps:.1f} GB/s here, the ceiling of decode GB/s")
