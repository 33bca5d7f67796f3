"""The results of `benchmarks quality` as tables, and what must hold of them, written into benchmarks/README.md."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
MARKS = ("<!-- quality: written by `python -m benchmarks quality report` -->", "<!-- /quality -->")
SIZES = ("int8", "nf4", "int4_g64s", "int4_g64", "int3_g64", "int2_g64")
MARGIN = 0.75  # of the best peer's KL divergence, which ours must not exceed
FASTER, PEAK = 3, 1.2 * 1024  # GPTQ: times the fastest peer's speed; MiB

Row = dict[str, Any]


def write() -> int:
    """Puts the tables into the README and prints them. Returns 1 unless everything that is measured holds, 2 without a place for them."""
    rows = {name: read(name) for name in ("peers", "tersor", "gguf", "speed")}
    decided = list(demands(rows))
    held = [*_head("what", "bound", "measured", ""), *map(_demand, decided)]
    models = _models([*rows["peers"].values(), *rows["tersor"].values()])
    text = "\n".join((*models, *_gguf(rows["gguf"]), *_speed(rows["speed"]), "### What must hold", "", *held))
    before, found, rest = README.read_text().partition(MARKS[0])
    _, closed, after = rest.partition(MARKS[1])
    if not (found and closed):
        print(f"{README}: has no place for the tables, {MARKS[0]} ... {MARKS[1]}", file=sys.stderr)
        return 2
    README.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")
    print(text)
    return int(not all(value <= bound for _, bound, value, _ in decided))


def read(name: str) -> dict[str, Row]:
    """Returns the rows of results/quality-NAME.json by key; none without the file."""
    path = RESULTS / f"quality-{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def size_of(recipe: str) -> str:
    """Returns the size class of a recipe or a tool's format, by its default format; only in 4 bits is symmetric apart."""
    format = recipe.split(",")[0].rsplit(":", 1)[-1].split("|")[0]
    return "int8" if format in ("int8", "int8_cs", "int8_row") else re.sub(r"(?<!int4_g64)s$", "", format)


def judged(row: Row, windows: int | None = None) -> Row | None:
    """Returns the figures on so many windows, by default on the most."""
    found = row.get("judged", {})
    key = str(windows) if windows else max(found, key=int, default="")
    return found.get(key)


def demands(rows: dict[str, dict[str, Row]]) -> Iterator[tuple[str, float, float, str]]:
    """Yields (what, upper bound, measured, note) of everything that both sides were measured for, on the windows that both share."""
    ours, theirs = list(rows["tersor"].values()), list(rows["peers"].values())
    for model in sorted({r["model"] for r in ours}):
        for size in SIZES:
            mine, others = (
                [r for r in side if r["model"] == model and size_of(r["recipe"]) == size and judged(r)] for side in (ours, theirs)
            )
            if not mine or not others:
                continue
            windows = min(max(map(int, r["judged"])) for r in (_best(mine, 2), _best(others, 2)))
            best, peer = _best(mine, windows), _best(others, windows)
            bound = judged(peer, windows)["kl_mean"] * (1 if size == "int8" else MARGIN)
            note = f"{best['recipe']}; the best peer is {peer['tool']}, {judged(peer, windows)['kl_mean']:.4f}; {windows} windows"
            yield f"{model}, {size}: KL divergence", bound, judged(best, windows)["kl_mean"], note
    files = rows["gguf"]
    for key, row in files.items():
        if "of" not in row:  # the peer's
            mine = [
                other
                for other, r in files.items()
                if "of" in r and r["original"] == row["original"] and r["file_bytes"] <= row["file_bytes"]
            ]
            if mine:
                best = min(mine, key=lambda other: files[other]["kl_mean"])
                yield f"{key}: KL divergence at no more bytes", row["kl_mean"] * MARGIN, files[best]["kl_mean"], best
    times = {key: [r["process_seconds"] for r in rounds_of(row)] for key, row in rows["speed"].items()}
    for key, ours in times.items():
        model, tool = key.split(" ", 1)
        others = [
            median(o / t for o, t in zip(ours, theirs)) for other, theirs in times.items() if other != key and other.startswith(model)
        ]
        if tool == "tersor" and others:
            yield f"{model}, GPTQ int4_g64s: our time over the fastest peer's", 1 / FASTER, max(others), f"{len(ours)} rounds"
            yield (
                f"{model}, GPTQ int4_g64s: peak MiB",
                PEAK,
                max(r["process_peak_mib"] for r in rounds_of(rows["speed"][key])),
                "the process",
            )


def rounds_of(row: Row) -> list[Row]:
    """Returns the rounds of a row of `quality speed`, in the order they were run."""
    return [row[key] for key in sorted(row) if key.startswith("round ")]


def _speed(rows: dict[str, Row]) -> Iterator[str]:
    if not rows:
        return
    yield from ("### GPTQ at int4_g64s, 32 samples of 512 tokens, in turns with nothing else running", "")
    yield from _head("model/kernels, tool", "rounds", "seconds, the whole process", "of them the work", "CPU seconds", "peak MiB")
    for key, row in sorted(rows.items()):
        rounds = rounds_of(row)
        names = ("process_seconds", "seconds", "process_cpu_seconds", "process_peak_mib")
        yield f"| {key} | {len(rounds)} | {' | '.join(f'{median(r[name] for r in rounds):.0f}' for name in names)} |"
    yield ""


def _best(rows: list[Row], windows: int) -> Row:
    return min(rows, key=lambda r: (judged(r, windows) or judged(r))["kl_mean"])


def _demand(decided: tuple[str, float, float, str]) -> str:
    what, bound, value, note = decided
    return f"| {what} | <= {bound:.4f} | {value:.4f} ({note}) | {'held' if value <= bound else '**not held**'} |"


def _models(rows: list[Row]) -> Iterator[str]:
    for model in sorted({r["model"] for r in rows}):
        for size in SIZES:
            part = [r for r in rows if r["model"] == model and size_of(r["recipe"]) == size and judged(r)]
            if not part:
                continue
            yield from (f"### {model}, {size}", "")
            columns = ("tool", "recipe", "samples", "bits/weight", "windows", "KLD", "perplexity", "over float", "top-1")
            yield from _head(*columns, "KLD, 2 windows", "perplexity, 8", "CPU seconds", "peak MiB")
            yield from map(_row, sorted(part, key=lambda r: judged(r, 2)["kl_mean"]))
            yield ""


def _row(r: Row) -> str:
    d, two, eight = judged(r), judged(r, 2), judged(r, 8)
    cpu, peak = r.get("cpu_seconds", r.get("process_cpu_seconds")), r.get("peak_mib", r.get("process_peak_mib"))
    tool, *settings = r["tool"].partition(",")  # "auto-round, 50 iterations"
    cells = (
        r.get("version", tool) + "".join(settings),
        f"`{r['recipe']}`" + (f", inputs {r['activations']}" if r.get("activations", "float") != "float" else ""),
        r["samples"] or "",
        f"{r['bits_per_weight']:.3f}",
        max(map(int, r["judged"])),
        f"{d['kl_mean']:.4f} ± {d['kl_error']:.4f}",
        f"{d['perplexity']:.2f}",
        f"{d['ratio']:.4f} ± {d['ratio_error']:.4f}",
        f"{100 * d['top1']:.2f} %",
        f"{two['kl_mean']:.4f}" if two else "",
        f"{eight['perplexity']:.2f}" if eight else "",
        f"{cpu:.0f}" if cpu else "",
        f"{peak:.0f}" if peak else "",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _gguf(rows: dict[str, Row]) -> Iterator[str]:
    for original in sorted({r["original"] for r in rows.values()}):
        part = {key: r for key, r in rows.items() if r["original"] == original}
        yield from (f"### GGUF files of {original}, judged by llama.cpp", "", next(iter(part.values()))["protocol"], "")
        yield from _head("file", "bytes", "bits/weight of the blocks", "KLD", "perplexity", "over the original", "top-1")
        for key, d in sorted(part.items(), key=lambda item: item[1]["file_bytes"]):
            kld, ratio = f"{d['kl_mean']:.4f} ± {d['kl_error']:.4f}", f"{d['ratio']:.4f} ± {d['ratio_error']:.4f} | {100 * d['top1']:.2f} %"
            yield f"| {key} | {d['file_bytes']:,} | {d['bits_per_weight']:.3f} | {kld} | {d['perplexity']:.2f} | {ratio} |"
        yield ""


def _head(*columns: str) -> tuple[str, str]:
    return f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"
