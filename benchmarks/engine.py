"""The engine beside llama.cpp, OpenVINO, onnxruntime-genai and transformers, and beside this machine's limits.

    python -m benchmarks engine FOLDER [--pieces matrix,peers,...] [--models synth,...] [--types q4_0,...] [--threads 1,2] [--rounds 5]
    python -m benchmarks engine --report

FOLDER holds the models (benchmarks/models.py); what is missing is made there, or named. Every piece writes
benchmarks/results/ISA/NAME.json and prints its table and the demands that it decides; the exit code is 1 when one of them is not
held. Pieces:

matrix   each of --models in each of --types, ours and llama.cpp on the same file, each of --threads: MODEL-TYPE.json
peers    SmolLM2 in 4 bits in every runtime
ladder   the 1.17B in 16, 8, 4 and 2 bits, ours
avx2     our AVX2 kernels beside llama.cpp compiled for AVX2 only
load     the 1.17B in Q4_0 from the start of the process to the first token, and its memory
product  our matrix product alone, beside the int8 peak

Runtimes are processes of their own that work in turns, round by round (benchmarks/speed.py); the limits are measured in every round too.
--report reads all result files, of this and of the other benchmarks that demands rest on (context, activations), checks every demand
(one without its measurement is not held) and puts the tables into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import models, report
from benchmarks.machine import describe
from benchmarks.runtimes import RUNTIMES, NotHere, Worker
from benchmarks.speed import measure

PIECES = ("matrix", "peers", "ladder", "avx2", "load", "product")
FIRST_PROMPT = 16  # tokens of the prompt whose answer's first token `load` waits for


@dataclass(frozen=True)
class Lane:
    """One runtime on one model file with so many threads."""

    runtime: str
    model: str
    type: str
    threads: int


@dataclass(frozen=True)
class Plan:
    """How every piece measures."""

    folder: Path
    threads: tuple[int, ...]
    rounds: int
    prefill: int
    decode: int


def matrix(plan: Plan, name: str, kind: str) -> dict[str, Any]:
    """Returns ours and llama.cpp on one file."""
    runtimes = ("tersor",) if kind in models.RECIPES else ("tersor", "llama.cpp")
    return _lanes(plan, [Lane(runtime, name, kind, t) for t in plan.threads for runtime in runtimes])


def peers(plan: Plan) -> dict[str, Any]:
    """Returns SmolLM2 in 4 bits (transformers: 16 and 32 bits, it has no such kernels) in every runtime.

    The head takes a sixth of what a token reads. llama.cpp's mixtures and OpenVINO's conversion give it 8 bits, onnxruntime-genai's 4, as
    q4_0_pure does.
    """
    kinds = {"tersor": ("q4_0", "q4_0_pure"), "llama.cpp": ("q4_0", "q4_0_pure", "q4_1", "q4_k_m", "iq4_nl", "iq4_xs")}
    names = ("tersor", "llama.cpp", "OpenVINO", "onnxruntime-genai", "transformers bf16", "transformers fp32")
    return _lanes(plan, [Lane(n, "smollm2", kind, max(plan.threads)) for n in names for kind in kinds.get(n, ("q4_0",))])


def ladder(plan: Plan) -> dict[str, Any]:
    """Returns the 1.17B in fewer and fewer bits."""
    kinds = ("f16", "int8_all", "int4_all", "int2_all", "q8_0", "q4_0", "q2_k")
    return _lanes(plan, [Lane("tersor", "synth", kind, max(plan.threads)) for kind in kinds])


def avx2(plan: Plan) -> dict[str, Any]:
    """Returns both engines without AVX-512."""
    names, kinds = ("tersor on AVX2", "llama.cpp for AVX2 only"), ("q8_0", "q4_0", "q4_k_m")
    return _lanes(plan, [Lane(n, "synth", kind, max(plan.threads)) for kind in kinds for n in names])


def load(plan: Plan) -> dict[str, Any]:
    """Returns seconds from the start of a process to the first token, and its memory after a whole run; the page cache is warm."""
    file, threads, rows = models.get(plan.folder, "synth", "q4_0"), max(plan.threads), []
    for runtime in ("tersor", "llama.cpp"):
        seconds, row = [], {}
        for round_ in range(plan.rounds + 1):  # the first fills the page cache
            worker = Worker(runtime, file.path, threads, plan.prefill + plan.decode)
            first = worker.ask("prefill", tokens=list(range(1000, 1000 + FIRST_PROMPT)))
            if round_:
                seconds.append(worker.seconds + first["seconds"])
            worker.ask("prefill", tokens=[1000] * plan.prefill)
            answer = worker.ask("decode", tokens=[1000] * plan.decode)
            row = {name: answer[name] for name in ("resident_mib", "peak_mib")} | {"about": worker.about}
            worker.close()
        rows.append({"runtime": runtime, "threads": threads, "first_token_seconds": seconds, **row})
    return {"files": [file.to_dict()], "first_prompt": FIRST_PROMPT, "rows": rows}


def product(plan: Plan) -> dict[str, Any]:
    """Returns our product alone, without attention, norms and the rest."""
    rows = []
    for threads in plan.threads:
        worker = Worker("limits", "-", threads)
        figures: dict[str, list[float]] = {"peak": [], "q4_0": [], "q8_0": []}
        for _ in range(plan.rounds):
            figures["peak"].append(worker.ask("peak").get("value"))
            for kind in ("q4_0", "q8_0"):
                figures[kind].append(worker.ask("product", format=kind)["value"])
        worker.close()
        rows.append({"threads": threads, **figures})
    return {"rows": rows}


def _lanes(plan: Plan, lanes: Sequence[Lane]) -> dict[str, Any]:
    """Returns the lanes' figures and the limits at their numbers of threads, all taken in turns. A runtime that is not here is named."""
    workers: dict[Lane, Worker] = {}
    files, missing = {}, {}
    limits = {t: Worker("limits", "-", t) for t in sorted({lane.threads for lane in lanes})}
    figures: dict[int, dict[str, list[float | None]]] = {t: {"bandwidth": [], "peak": []} for t in limits}

    def between() -> None:
        for threads, worker in limits.items():
            for what, values in figures[threads].items():
                values.append(worker.ask(what).get("value"))

    try:
        for lane in lanes:
            try:
                environment = RUNTIMES[lane.runtime].environment
                if environment in models.EXPORTS:
                    path = models.exported(plan.folder, lane.model, environment)
                else:
                    file = models.get(plan.folder, lane.model, lane.type)
                    files[lane.model, lane.type], path = file.to_dict(), Path(file.path)
                workers[lane] = Worker(lane.runtime, path, lane.threads, plan.prefill + plan.decode + 8)
            except NotHere as error:
                missing[lane.runtime] = str(error)
                print(f"{lane.runtime}: not measured: {error}", file=sys.stderr)
        measured = measure(workers, plan.rounds, plan.prefill, plan.decode, between)
        rows = [vars(lane) | {"about": workers[lane].about} | row for lane, row in measured.items()]
    finally:
        for worker in (*workers.values(), *limits.values()):
            worker.close()
    return {"files": list(files.values()), "limits": {str(t): f for t, f in figures.items()}, "rows": rows, "missing": missing}


def _save(plan: Plan, name: str, run: Callable[[], dict[str, Any]]) -> str | None:
    """Runs a piece and writes its result. Returns its name, None when a file it needs is not here."""
    print(f"\n== {name} ==", flush=True)
    try:
        result = run()
    except NotHere as error:
        print(f"not measured: {error}")
        return None
    report.save(name, describe() | {"rounds": plan.rounds, "prefill": plan.prefill, "decode": plan.decode} | result)
    print(report.table(name), flush=True)
    return name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--report", action="store_true", help="check all demands and write the tables into benchmarks/README.md")
    for option, default in (("--pieces", PIECES), ("--models", models.MODELS), ("--types", models.TYPES), ("--threads", ("1", "2"))):
        parser.add_argument(option, default=",".join(default), help="default: %(default)s")
    for option, number in (("--rounds", 5), ("--prefill", 512), ("--decode", 128)):
        parser.add_argument(option, type=int, default=number, help="default: %(default)s")
    a = parser.parse_args()
    if a.report:
        return report.write()
    if a.folder is None:
        parser.error("name the FOLDER of the models, or --report")
    pieces = a.pieces.split(",")
    if unknown := set(pieces) - set(PIECES):
        parser.error(f"unknown pieces {', '.join(sorted(unknown))}; pieces are {', '.join(PIECES)}")
    plan = Plan(a.folder, tuple(int(t) for t in a.threads.split(",")), a.rounds, a.prefill, a.decode)
    done = []
    if "matrix" in pieces:
        for name in a.models.split(","):
            for kind in ("q4_k_m",) if name == "qwen" else a.types.split(","):
                done.append(_save(plan, f"{name}-{kind}", lambda name=name, kind=kind: matrix(plan, name, kind)))
    for piece in (peers, ladder, avx2, load, product):
        if piece.__name__ in pieces:
            done.append(_save(plan, piece.__name__, lambda piece=piece: piece(plan)))
    return report.judge([name for name in done if name])


if __name__ == "__main__":
    sys.exit(main())
