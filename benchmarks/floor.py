"""Decoding beside reading the very same memory: python -m benchmarks floor FILE... [--threads 2] [--rounds 5] [--decode 64]

A machine's bandwidth may differ from buffer to buffer by a factor of two (with how the host of a virtual machine backs the pages), so that
a buffer of another process is no limit of ours. For each FILE every round decodes tokens behind a prompt of 32, and reads all
packed matrices with a loop that only adds words. Columns: medians over the rounds; share = time of reading / time of a token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from tersor.engine import Model, load


def token_seconds(model: Model, count: int) -> float:
    """Returns the seconds of one of `count` greedy tokens."""
    cache, steps = model.new_cache(count + 34), model.steps()
    model.forward(np.arange(32, dtype=np.int32), cache)
    _, tops = steps.run(np.array([1], np.int32), [cache])
    start = time.perf_counter()
    for _ in range(count):
        _, tops = steps.run(np.array(tops, np.int32), [cache])
    return (time.perf_counter() - start) / count


def main() -> None:
    """Prints a row per file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", type=int, default=64)
    a = parser.parse_args()
    print("| file | tokens/s | GB/s | the same memory only read, GB/s | share, range |")
    print("|---|---|---|---|---|")
    for path in a.files:
        model = load(path, threads=a.threads)
        size, pairs = model.read_weights(), []
        for _ in range(a.rounds):
            token, start = token_seconds(model, a.decode), time.perf_counter()
            for _ in range(4):
                model.read_weights()
            pairs.append((token, (time.perf_counter() - start) / 4))
        shares = [read / token for token, read in pairs]
        token, read = (statistics.median(column) for column in zip(*pairs))
        share = f"{100 * statistics.median(shares):.0f} %, {100 * min(shares):.0f}-{100 * max(shares):.0f}"
        print(f"| {Path(path).name} | {1 / token:.1f} | {size / token / 1e9:.1f} | {size / read / 1e9:.1f} | {share} |", flush=True)


if __name__ == "__main__":
    main()
