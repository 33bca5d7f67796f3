"""Prefill and decode speed of one model file beside other runtimes, interleaved, same threads.

    python -m benchmarks.speed MODEL.gguf [--threads 2] [--rounds 5] [--prefill 512] [--decode 64] [--peers "tersor;llama.cpp"]

Every runtime is a process of its own (benchmarks/peers); only one works at a time. Each round asks every runtime once;
the table shows medians over the rounds and the ratio to the first row, pair by pair. transformers dequantizes the file.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path

WORKERS = {
    "tersor": ("tersor_worker", []),
    "tersor, float activations": ("tersor_worker", ["float"]),
    "llama.cpp": ("llama_cpp_worker", []),
    "transformers bf16": ("transformers_worker", ["bfloat16"]),
    "transformers fp32": ("transformers_worker", ["float32"]),
}


class Worker:
    """A runtime in a process of its own, loaded and waiting."""

    def __init__(self, name: str, model: str, threads: int) -> None:
        module, extra = WORKERS[name]
        command = [sys.executable, "-m", f"benchmarks.peers.{module}", model, str(threads), *extra]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.answer()

    def answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.process.stderr.read().strip().splitlines()[-1:])
        return json.loads(line)

    def ask(self, do: str, tokens: list[int]) -> dict[str, float]:
        self.process.stdin.write(json.dumps({"do": do, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return self.answer()


def measure(model: str, names: list[str], threads: int, rounds: int, prefill: int, decode: int) -> dict[str, dict[str, list[float]]]:
    """Returns {runtime: {"prefill": tokens/s of each round, "decode": ..., "peak_mib": [...]}}.

    A runtime that fails to load is left out, with a line that says why.
    """
    workers = {}
    for name in names:
        try:
            workers[name] = Worker(name, model, threads)
        except RuntimeError as error:
            print(f"{name}: not measured: {error}", file=sys.stderr)
    prompt = [1000 + 7 * i % 20000 for i in range(prefill)]
    steps = [2000 + 11 * i % 20000 for i in range(decode)]
    figures: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": [], "peak_mib": []} for name in workers}
    for round_ in range(rounds + 1):  # the first round warms up and is not counted
        for name, worker in workers.items():
            first = worker.ask("prefill", prompt)
            second = worker.ask("decode", steps)
            if round_:
                figures[name]["prefill"].append(prefill / first["seconds"])
                figures[name]["decode"].append(decode / second["seconds"])
                figures[name]["peak_mib"] = [second["peak_mib"]]
    return figures


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Returns the median of the pairwise ratios ours / theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs))


def commit() -> str:
    """Returns the commit that is measured, with + when the tree is changed."""
    head = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return head.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--peers", default=";".join(WORKERS), help="separated by semicolons; default: all")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    names = [n.strip() for n in a.peers.split(";")]
    figures = measure(a.model, names, a.threads, a.rounds, a.prefill, a.decode)
    if a.json:
        print(json.dumps(figures))
        return
    from tersor import _native

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    print(f"{Path(a.model).name}, {a.threads} threads, {cpu} ({_native.isa()}), commit {commit()}")
    print(f"medians of {a.rounds} interleaved rounds; ratios pair by pair")
    print(f"| runtime | prefill {a.prefill} t/s | decode {a.decode} t/s | {names[0]} is faster: prefill | decode | peak MiB |")
    print("|---|---|---|---|---|---|")
    first = figures[names[0]]
    for name, f in figures.items():
        prefill, decode = statistics.median(f["prefill"]), statistics.median(f["decode"])
        times = f"{ratio(first['prefill'], f['prefill']):.2f}x | {ratio(first['decode'], f['decode']):.2f}x"
        print(f"| {name} | {prefill:.0f} | {decode:.1f} | {times} | {f['peak_mib'][0]:.0f} |")


if __name__ == "__main__":
    main()
