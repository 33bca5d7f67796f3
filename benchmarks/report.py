"""Result files as tables, and the demands that they decide."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.demands import Demand, counterpart, demands, share
from benchmarks.speed import ratio

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
MARKS = ("<!-- engine: written by `python -m benchmarks engine --report` -->", "<!-- /engine -->")
MODELS = {"smollm2": "SmolLM2-135M", "synth": "1.17 billion random weights", "qwen": "Qwen2.5-Coder-1.5B"}
LEAST = {"rounds": 5, "prefill": 512, "decode": 64, "length": 4096, "windows": 20}  # of a result that decides something
PIECES = ("peers", "ladder", "avx2", "load", "product", "context")


def save(name: str, result: dict[str, Any]) -> None:
    """Writes one result file, floats with five digits, into the folder of the kernels that ran: what they reach is not comparable."""
    folder = RESULTS / result["isa"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(_rounded(result), indent=1) + "\n")


def read(isa: str, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Returns the named results of these kernels, by default all, by name."""
    folder = RESULTS / isa
    paths = sorted(folder.glob("*.json")) if names is None else [folder / f"{name}.json" for name in names]
    return {path.stem: json.loads(path.read_text()) for path in paths}


def judge(names: Sequence[str]) -> int:
    """Prints the demands that these results of this machine decide. Returns 1 when one is not held."""
    results = read(isa(), names)
    decided = [d for d in demands(_proven(results)) if d.value is not None]
    if decided:
        print("\n" + "\n".join(_demands(decided)))
    return int(not all(d.held for d in decided))


def write() -> int:
    """Puts all tables into the README, machine by machine, and prints them. Returns 1 unless every demand is measured and held on each."""
    pages, decided = [], []
    for folder in sorted((f for f in RESULTS.iterdir() if f.is_dir()), reverse=True):
        results = read(folder.name)
        here = list(demands(_proven(results)))
        pages.append("\n".join((f"### Measured on {folder.name}", "", *_page(results, here))))
        decided += here
    text = "\n\n".join(pages)
    old = README.read_text()
    before, _, rest = old.partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        print(f"{README}: has no place for the tables, {MARKS[0]} ... {MARKS[1]}", file=sys.stderr)
        return 2
    README.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")
    print(text)
    return int(not all(d.held for d in decided))


def isa() -> str:
    """Returns the name of the kernels that run here, which names the folder of their results."""
    from tersor import _native

    return _native.isa()


def _proven(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the results that may decide a demand: those taken in its own sizes. Names the others."""
    proper = {}
    for name, result in results.items():
        if lacking := [f"{least} {key}" for key, least in LEAST.items() if result.get(key, least) < least]:
            print(f"{name}: decides nothing, a demand needs {', '.join(lacking)}")
        else:
            proper[name] = result
    return proper


def table(name: str) -> str:
    """Returns the table of one result of this machine, with a line that says where it was measured."""
    result = read(isa(), [name])[name]
    return "\n".join((_where(result), *_table(name, result)))


def _page(results: dict[str, dict[str, Any]], decided: Sequence[Demand]) -> Iterator[str]:
    for model, title in MODELS.items():
        found = {name: r for name, r in results.items() if name.startswith(f"{model}-")}
        if found:
            yield from (f"#### {title}, llama.cpp on the same file", "", *_wheres(found), *_matrix(found), "")
    for piece in (*PIECES, *(name for name in results if name.startswith("activations-"))):
        if piece in results:
            yield from (f"#### {piece}", "", _where(results[piece]), *_table(piece, results[piece]), "")
    yield from ("#### What must hold", "", *_demands(decided))


def _demands(decided: Sequence[Demand]) -> list[str]:
    held = sum(d.held for d in decided)
    return [*_head("line", "what", "bound", "measured", ""), *map(str, decided), "", f"{held} of {len(decided)} held"]


def _where(result: dict[str, Any]) -> str:
    machine = f"{result['cpu']}, {result['cpus']} CPUs, {result['memory_gib']} GiB, {result['isa']}"
    versions = {r["about"]["version"]: None for r in result["rows"] if "about" in r and not r["about"]["version"].startswith("tersor")}
    rounds = [f"medians of {result['rounds']} rounds"] if "rounds" in result else []
    return "; ".join((machine, f"commit {result['commit']}, {result['date']}", *rounds, *versions, *_limits(result))) + "\n"


def _wheres(results: dict[str, dict[str, Any]]) -> list[str]:
    """Returns one line for all results that were measured under the same conditions, limits apart."""
    lines: dict[str, list[str]] = {}
    for name, result in results.items():
        lines.setdefault(_where(result | {"limits": {}}).strip(), []).append(name.split("-", 1)[1])
    shown = [line if len(lines) == 1 else f"{', '.join(names)}: {line}" for line, names in lines.items()]
    everything: dict[str, dict[str, list[float]]] = {}
    for result in results.values():
        for threads, limits in result["limits"].items():
            for what, values in limits.items():
                everything.setdefault(threads, {}).setdefault(what, []).extend(values)
    return [*shown, "; ".join(_limits({"limits": everything})) + "\n"]


def _limits(result: dict[str, Any]) -> Iterator[str]:
    units = {"bandwidth": ("memory", "GB/s"), "peak": ("int8", "GOP/s")}
    for threads, limits in result.get("limits", {}).items():
        known = [(*units[what], values) for what, values in limits.items() if values and all(values)]
        shown = (f"{name} {median(v):.0f} {unit} ({min(v):.0f}-{max(v):.0f})" for name, unit, v in known)
        yield f"{threads} thread{'s' if int(threads) > 1 else ''}: {', '.join(shown)}"


def _matrix(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields one row for every type and number of threads: ours, llama.cpp's, and each one's share of the limit."""
    yield from _head(
        "type",
        "file MB",
        "read a token MB",
        "threads",
        "prefill t/s",
        "llama.cpp",
        "ratio",
        "of int8 peak",
        "decode t/s",
        "llama.cpp",
        "ratio",
        "of bandwidth",
        "peak MiB",
    )
    for result in results.values():
        file = result["files"][0]
        for ours in (r for r in result["rows"] if r["runtime"] == "tersor"):
            theirs = next((r for r in result["rows"] if r["runtime"] == "llama.cpp" and r["threads"] == ours["threads"]), None)
            cells = [file["type"], f"{file['bytes'] / 1e6:.0f}", f"{file['token_bytes'] / 1e6:.0f}", str(ours["threads"])]
            for what, limit, per in (("prefill", "peak", "operations"), ("decode", "bandwidth", "token_bytes")):
                shares = [_percent(share(result, r, what, limit, per)) for r in (ours, theirs) if r]
                cells += [
                    _speed(ours[what]),
                    _speed(theirs[what]) if theirs else "",
                    f"{ratio(ours[what], theirs[what]):.2f}x" if theirs else "",
                ]
                cells.append(" / ".join(shares) if any(shares) else "")
            cells.append(" / ".join(f"{r['peak_mib']:.0f}" for r in (ours, theirs) if r))
            yield f"| {' | '.join(cells)} |"


def _table(name: str, result: dict[str, Any]) -> Iterator[str]:
    tables = {"load": _load, "product": _product, "context": _context, "ladder": _ladder, "activations": _activations}
    return tables.get(name.split("-")[0], _rows)(result)


def _load(result: dict[str, Any]) -> Iterator[str]:
    yield from _head("runtime", "threads", "to the first token s", "resident MiB", "peak MiB", "KV cache MiB", "file MiB")
    for r in result["rows"]:
        kv, file = r["about"].get("kv_mib"), result["files"][0]["bytes"] / 2**20
        memory = f"{r['resident_mib']:.0f} | {r['peak_mib']:.0f} | {'' if kv is None else f'{kv:.0f}'} | {file:.0f}"
        yield f"| {r['runtime']} | {r['threads']} | {median(r['first_token_seconds']):.2f} | {memory} |"


def _product(result: dict[str, Any]) -> Iterator[str]:
    yield from _head("threads", "int8 peak GOP/s", "q4_0 GOP/s", "q8_0 GOP/s")
    for r in result["rows"]:
        peak = _speed(r["peak"]) if all(r["peak"]) else ""
        yield f"| {r['threads']} | {peak} | {_speed(r['q4_0'])} | {_speed(r['q8_0'])} |"


def _context(result: dict[str, Any]) -> Iterator[str]:
    yield from _head("runtime", "cache", "ms a token at context 0", f"at {result['length']:,}", "grows by")
    for r in result["rows"]:
        times = " | ".join(f"{1e3 * median(r[what]):.2f}" for what in ("short_seconds", "long_seconds"))
        yield f"| {r['runtime']} | {r['kv']} | {times} | {ratio(r['long_seconds'], r['short_seconds']):.2f}x |"


def _activations(result: dict[str, Any]) -> Iterator[str]:
    yield from (f"{result['file']}, {result['protocol']}", "")
    yield from _head("runtime", "how", "KL divergence, nats", "same top-1")
    for r in result["rows"]:
        yield f"| {r['runtime']} | {r['how']} | {r['kl_mean']:.6f} ± {r['kl_error']:.6f} | {100 * r['top1']:.2f} % |"


def _ladder(result: dict[str, Any]) -> Iterator[str]:
    """Yields every type beside the first, the widest."""
    files = {f["type"]: f for f in result["files"]}
    first = result["rows"][0]
    yield from _head(
        "type", "read a token MB", "decode t/s", f"over {first['type']}", f"reads less than {first['type']} by", "of bandwidth"
    )
    for r in result["rows"]:
        read, widest = files[r["type"]]["token_bytes"], files[first["type"]]["token_bytes"]
        times = f"{ratio(r['decode'], first['decode']):.2f}x | {widest / read:.2f}x"
        limit = _percent(share(result, r, "decode", "bandwidth", "token_bytes"))
        yield f"| {r['type']} | {read / 1e6:.0f} | {_speed(r['decode'])} | {times} | {limit} |"


def _rows(result: dict[str, Any]) -> Iterator[str]:
    """Yields every lane of a result, and how much faster our counterpart is."""
    columns = ("runtime", "type", "threads", "prefill t/s", "decode t/s", "ours is faster: prefill", "decode")
    yield from _head(*columns, "of int8 peak", "of bandwidth", "resident / peak MiB")
    ours = [r for r in result["rows"] if r["runtime"].startswith("tersor")]
    for r in result["rows"]:
        kind = "int4" if r["runtime"] in ("OpenVINO", "onnxruntime-genai") else "" if r["runtime"].startswith("transformers") else r["type"]
        beside = counterpart(r, ours) if r not in ours else None
        times = " | ".join(f"{ratio(beside[what], r[what]):.2f}x" if beside else "" for what in ("prefill", "decode"))
        shares = (("prefill", "peak", "operations"), ("decode", "bandwidth", "token_bytes"))
        limits = " | ".join(_percent(share(result, r, *s)) if kind not in ("", "int4") else "" for s in shares)
        memory = f"{r['resident_mib']:.0f} / {r['peak_mib']:.0f}"
        speeds = f"{_speed(r['prefill'])} | {_speed(r['decode'])}"
        yield f"| {r['runtime']} | {kind} | {r['threads']} | {speeds} | {times} | {limits} | {memory} |"
    for name, why in result.get("missing", {}).items():
        yield f"| {name} | not measured: {why} |" + " |" * 8


def _head(*columns: str) -> tuple[str, str]:
    return f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"


def _speed(values: list[float]) -> str:
    value = median(values)
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
