"""Prefill and decode speed of one model file beside other runtimes, interleaved, same threads.

    python -m benchmarks.speed MODEL.gguf [--threads 2] [--rounds 5] [--prefill 512] [--decode 64] [--peers "tersor;llama.cpp"]

Every runtime is a process of its own (benchmarks/peers); only one works at a time. Each round asks every runtime once, every other
round in reverse order; the table shows medians over the rounds and the ratio to the first row, pair by pair. transformers dequantizes
the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.machine import describe
from benchmarks.runtimes import NotHere, Worker

PEERS = ("tersor", "tersor, float activations", "llama.cpp", "transformers bf16", "transformers fp32")
REST_SECONDS = 0.1  # between two requests, for threads that still spin

Key = TypeVar("Key", bound=Hashable)


def measure(
    workers: Mapping[Key, Worker], rounds: int, prefill: int, decode: int, between: Callable[[], None] | None = None
) -> dict[Key, dict[str, Any]]:
    """Returns {key: {"prefill": tokens/s of each round, "decode": ..., "resident_mib": after the last, "peak_mib": ...}}.

    decode 0: none. between: called before every round that counts. One prefill and four steps of each come first and do not count.
    """
    prompt = [1000 + 7 * i % 20000 for i in range(prefill)]
    steps = [2000 + 11 * i % 20000 for i in range(decode)]
    for worker in workers.values():
        worker.ask("prefill", tokens=prompt)
        worker.ask("decode", tokens=steps[:4])
    figures: dict[Key, dict[str, Any]] = {key: {"prefill": [], "decode": []} for key in workers}
    for round_ in range(rounds):
        if between is not None:
            between()
        for key in list(workers)[:: 1 if round_ % 2 == 0 else -1]:
            time.sleep(REST_SECONDS)
            answer = workers[key].ask("prefill", tokens=prompt)
            figures[key]["prefill"].append(prefill / answer["seconds"])
            if decode:
                answer = workers[key].ask("decode", tokens=steps)
                figures[key]["decode"].append(decode / answer["seconds"])
            figures[key] |= {name: answer[name] for name in ("resident_mib", "peak_mib")}
    return figures


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Returns the median of the pairwise ratios ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--peers", default=";".join(PEERS), help="names of benchmarks/runtimes.py, separated by semicolons")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    workers = {}
    for name in (n.strip() for n in a.peers.split(";")):
        try:
            workers[name] = Worker(name, a.model, a.threads, a.prefill + a.decode + 8)
        except NotHere as error:
            print(f"{name}: not measured: {error}", file=sys.stderr)
    figures = measure(workers, a.rounds, a.prefill, a.decode)
    if a.json:
        print(json.dumps(figures))
        return
    machine, names = describe(), list(figures)
    print(f"{Path(a.model).name}, {a.threads} threads, {machine['cpu']} ({machine['isa']}), commit {machine['commit']}")
    print(f"medians of {a.rounds} interleaved rounds; ratios pair by pair")
    print(f"| runtime | prefill {a.prefill} t/s | decode {a.decode} t/s | {names[0]} is faster: prefill | decode | peak MiB |")
    print("|---|---|---|---|---|---|")
    first = figures[names[0]]
    for name, f in figures.items():
        prefill, decode = statistics.median(f["prefill"]), statistics.median(f["decode"])
        times = f"{ratio(first['prefill'], f['prefill']):.2f}x | {ratio(first['decode'], f['decode']):.2f}x"
        print(f"| {name} | {prefill:.0f} | {decode:.1f} | {times} | {f['peak_mib']:.0f} |")


if __name__ == "__main__":
    main()
