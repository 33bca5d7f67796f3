"""What the engine must reach, line by line, checked against the result files. Bounds are never weakened here: change the engine.

Ratios are medians of the rounds' pairwise ratios; a limit is the one measured in the same round. Where a demand names no number of
threads, all that were measured count and the worst is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import ge, le, lt
from statistics import median
from typing import Any

from benchmarks.models import TYPES
from benchmarks.speed import ratio

Results = Mapping[str, dict[str, Any]]
Row = dict[str, Any]

SIGNS: dict[str, Callable[[float, float], bool]] = {">=": ge, "<=": le, "<": lt}
CACHE_GROWTH = ("f16", "int8")


@dataclass(frozen=True)
class Demand:
    """One bound. value: None when it was not measured. note: what stands beside the value."""

    line: int
    text: str
    sign: str
    bound: float
    unit: str
    value: float | None
    note: str = ""

    @property
    def held(self) -> bool:
        """Whether it was measured and lies within the bound."""
        return self.value is not None and SIGNS[self.sign](self.value, self.bound)

    def __str__(self) -> str:
        """Returns a row of a table."""
        shown = "not measured" if self.value is None else f"{self.value:.3g}{self.unit}{self.note and f' ({self.note})'}"
        verdict = "held" if self.held else "-" if self.value is None else "**not held**"
        return f"| {self.line} | {self.text} | {self.sign} {self.bound:g}{self.unit} | {shown} | {verdict} |"


def demands(results: Results) -> Iterator[Demand]:
    """Yields every demand of the list with what was measured, in the list's order."""
    yield _against_peers(results, 1, "prefill", 1.5)
    for kind, bound in {"q8_0": 2, "q4_0": 2, "q4_1": 2, "q4_k_m": 2, "q2_k": 2, "q6_k": 1.4, "iq4_xs": 1.4}.items():
        pairs = _pairs(results.get(f"synth-{kind}"), "tersor", "llama.cpp")
        yield _worst(
            1, f"1.17B {kind}: prefill over llama.cpp", ">=", bound, "x", [(ratio(a["prefill"], b["prefill"]), n) for a, b, n in pairs]
        )
    for kind in ("q4_0", "q8_0"):
        shares = _shares(results.get(f"synth-{kind}"), "prefill", "peak", "operations")
        yield _worst(1, f"1.17B {kind}: prefill, share of the int8 peak", ">=", 60, " %", shares)
    for kind in ("q4_0", "q8_0"):
        rows = results.get("product", {}).get("rows", [])
        shares = [(100 * ratio(r[kind], r["peak"]), _threads(r)) for r in rows if all(r["peak"])]
        yield _worst(1, f"{kind}: the product alone, share of the int8 peak", ">=", 75, " %", shares)
    yield _against_peers(results, 2, "decode", 1.6)
    for kind in TYPES:
        shares = [s for s in _shares(results.get(f"synth-{kind}"), "decode", "bandwidth", "token_bytes") if s[1] == "2 threads"]
        yield _worst(2, f"1.17B {kind}: decode at 2 threads, share of the memory's bandwidth", ">=", 85, " %", shares)
    for kind in TYPES:
        yield _worst(2, f"1.17B {kind}: peak memory is not double the file", "<", 2, "x", _memory(results.get(f"synth-{kind}"), kv=False))
    for kind, bound in {"int8_all": 1.9, "int4_all": 3.3, "int2_all": 5}.items():
        yield _ladder(results, kind, bound)
    yield _transformers(results)
    for kind in ("q4_1", "q8_0"):
        for how, sign, bound in (("prefill", "<=", 0.0020), ("token by token", "<=", 0.0005), ("float", "<", 0.0001)):
            yield _divergence(results, kind, how, sign, bound)
    yield from _load(results)
    yield from _context(results)
    pairs = _pairs(results.get("avx2"), "tersor on AVX2", "llama.cpp for AVX2 only")
    values = [(ratio(a["prefill"], b["prefill"]), a["type"]) for a, b, _ in pairs]
    yield _worst(7, "1.17B: prefill on AVX2 over llama.cpp compiled for AVX2 only", ">=", 1.2, "x", values)


def _against_peers(results: Results, line: int, what: str, bound: float) -> Demand:
    """SmolLM2 in Q4_0 against the best 4-bit peer: the one that leaves us the smallest ratio."""
    rows = results.get("peers", {}).get("rows", [])
    ours = [r for r in rows if r["runtime"] == "tersor"]
    others = [r for r in rows if r["runtime"] in ("llama.cpp", "OpenVINO", "onnxruntime-genai")]
    text = f"SmolLM2 in 4 bits: {what} over the best peer"
    if not ours or {r["runtime"] for r in others} != {"llama.cpp", "OpenVINO", "onnxruntime-genai"}:
        return Demand(line, text, ">=", bound, "x", None)

    def name(row: Row) -> str:
        return f"{row['runtime']}{' ' + row['type'] if row['runtime'] == 'llama.cpp' else ''}, {median(row[what]):.0f} tokens/s"

    return _worst(line, text, ">=", bound, "x", [(ratio(o[what], r[what]), name(r)) for r in others if (o := counterpart(r, ours))])


def counterpart(row: Row, ours: Sequence[Row]) -> Row | None:
    """Returns the one of our rows that a peer's stands beside: the same threads and type, or else the first of these threads.

    onnxruntime-genai's int4 puts the head into 4 bits too: it stands beside q4_0_pure.
    """
    beside = [o for o in ours if o["threads"] == row["threads"]]
    kind = "q4_0_pure" if row["runtime"] == "onnxruntime-genai" else row["type"]
    return next((o for o in beside if o["type"] == kind), beside[0] if beside else None)


def _ladder(results: Results, kind: str, bound: float) -> Demand:
    result = results.get("ladder", {})
    rows = {r["type"]: r for r in result.get("rows", [])}
    text = f"1.17B {kind.replace('_all', '')}: decode over our 16 bits"
    if kind not in rows or "f16" not in rows:
        return Demand(3, text, ">=", bound, "x", None)
    read = {f["type"]: f["token_bytes"] for f in result["files"]}
    note = f"reads {read['f16'] / read[kind]:.2f}x less"
    return Demand(3, text, ">=", bound, "x", ratio(rows[kind]["decode"], rows["f16"]["decode"]), note)


def _transformers(results: Results) -> Demand:
    pairs = _pairs(results.get("peers"), "tersor", "transformers bf16")
    values = [(ratio(a["decode"], b["decode"]), f"{median(b['decode']):.1f} tokens/s") for a, b, _ in pairs]
    return _worst(3, "SmolLM2 int4: decode over transformers' bfloat16", ">=", 8, "x", values)


def _divergence(results: Results, kind: str, how: str, sign: str, bound: float) -> Demand:
    rows = results.get(f"activations-{kind}", {}).get("rows", [])
    values = [(r["kl_mean"], f"± {r['kl_error']:.1g}") for r in rows if r["runtime"] == "tersor" and r["how"].startswith(how)]
    return _worst(4, f"SmolLM2 {kind}: KL divergence, {how}", sign, bound, "", values)


def _load(results: Results) -> Iterator[Demand]:
    result = results.get("load", {})
    rows = [r for r in result.get("rows", []) if r["runtime"] == "tersor"]
    seconds = [(median(r["first_token_seconds"]), "interpreter and imports included") for r in rows]
    yield _worst(5, "1.17B q4_0: from the start of the process to the first token", "<", 2, " s", seconds)
    for what in ("resident", "peak"):
        memory = _memory(result or None, kv=True, what=f"{what}_mib")
        yield _worst(5, f"1.17B q4_0: {what} memory of the process, less the KV cache, over the file", "<=", 1.1, "x", memory)


def _context(results: Results) -> Iterator[Demand]:
    rows = {r["kv"]: r for r in results.get("context", {}).get("rows", []) if r["runtime"].startswith("tersor")}
    growth = {kv: ratio(r["long_seconds"], r["short_seconds"]) if (r := rows.get(kv)) else None for kv in CACHE_GROWTH}
    yield Demand(6, "SmolLM2: time per token at context 4,096 over 0, f16 cache", "<=", 1.5, "x", growth["f16"])
    text = "SmolLM2: the same with the int8 cache, less than with f16"
    yield Demand(6, text, "<", growth["f16"] or 1.5, "x", growth["int8"] if growth["f16"] else None)


def _worst(line: int, text: str, sign: str, bound: float, unit: str, values: list[tuple[float, str]]) -> Demand:
    """Returns the demand with the value of (value, note) that is worst for it."""
    if not values:
        return Demand(line, text, sign, bound, unit, None)
    value, note = (min if sign == ">=" else max)(values)
    return Demand(line, text, sign, bound, unit, value, note)


def _pairs(result: dict[str, Any] | None, ours: str, theirs: str) -> list[tuple[Row, Row, str]]:
    """Returns (our row, theirs, threads) for every file and number of threads that both ran."""
    rows = (result or {}).get("rows", [])
    other = {(r["model"], r["type"], r["threads"]): r for r in rows if r["runtime"] == theirs}
    mine = [r for r in rows if r["runtime"] == ours and (r["model"], r["type"], r["threads"]) in other]
    return [(r, other[r["model"], r["type"], r["threads"]], _threads(r)) for r in mine]


def _shares(result: dict[str, Any] | None, speed: str, limit: str, per_token: str) -> list[tuple[float, str]]:
    """Returns our percentages of a limit, by number of threads."""
    if result is None:
        return []
    rows = [r for r in result["rows"] if r["runtime"] == "tersor"]
    return [(s, _threads(r)) for r in rows if (s := share(result, r, speed, limit, per_token)) is not None]


def share(result: dict[str, Any], row: Row, speed: str, limit: str, per_token: str) -> float | None:
    """Returns the median over the rounds of 100 * speed * per_token / limit. None when the file or the limit is not known."""
    file = next((f for f in result["files"] if (f["name"], f["type"]) == (row["model"], row["type"])), None)
    limits = result["limits"][str(row["threads"])][limit]
    if file is None or not limits or not all(limits) or not row[speed]:
        return None
    return 100 * ratio([s * file[per_token] / 1e9 for s in row[speed]], limits)


def _memory(result: dict[str, Any] | None, kv: bool, what: str = "peak_mib") -> list[tuple[float, str]]:
    """Returns our process's memory, with kv less its cache, over the file's bytes."""
    if result is None:
        return []
    rows, file = [r for r in result["rows"] if r["runtime"] == "tersor"], result["files"][0]["bytes"] / 2**20
    return [((r[what] - (r["about"]["kv_mib"] if kv else 0)) / file, f"{r[what]:.0f} MiB, file {file:.0f}") for r in rows]


def _threads(row: Row) -> str:
    return f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
