"""This machine's limits, to be asked between the runtimes: python -m benchmarks.peers.limits_worker - THREADS

bandwidth: GB/s of a loop that only reads a buffer far larger than the caches. peak: 10^9 int8 operations per second (1 multiply-add = 2)
of a loop that only multiplies, in registers. product: the same unit, of our product alone (`ops.linear`: rounding the input to 8 bits and
writing float32 included) of 512 rows with the matrices of one block of the 1.17B model, in one format.
"""

from __future__ import annotations

import time

import numpy as np

from benchmarks.memory import FFN, WIDTH
from benchmarks.peers import arguments, serve
from tersor import _native, ops
from tersor.formats import get_format

BUFFER_BYTES = 1 << 30
SHAPES = ((2 * FFN, WIDTH), (WIDTH, FFN), (WIDTH, WIDTH))  # (rows, columns): gate and up joined, down, output
ROWS = 512
PEAK_ROUNDS = 1 << 22  # some tens of milliseconds

a = arguments()
_native.set_threads(a.threads)
words = np.ones(BUFFER_BYTES // 8, np.uint64)
weights: dict[str, list[ops.Weight]] = {}


def best(work, repeats: int) -> float:
    """Returns the seconds of the fastest of some calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def bandwidth() -> float:
    return words.nbytes / best(lambda: _native.read_words(words), 3) / 1e9


def peak() -> float | None:
    multiply = getattr(_native, "multiply_bytes", None)  # a tersor without it has no such measure
    if multiply is None:
        return None
    operations = multiply(PEAK_ROUNDS)
    return operations / best(lambda: multiply(PEAK_ROUNDS), 3) / 1e9


def product(format: str) -> float:
    if format not in weights:
        rng = np.random.default_rng(0)
        made = (get_format(format).quantize(rng.standard_normal(shape, dtype=np.float32) * 0.02, None) for shape in SHAPES)
        weights[format] = [ops.pack([w]) for w in made]
    inputs = {n: np.random.default_rng(1).standard_normal((ROWS, n), dtype=np.float32) for _, n in SHAPES}
    seconds = best(lambda: [ops.linear(inputs[w.columns], w) for w in weights[format]], 5)
    return 2 * ROWS * sum(rows * columns for rows, columns in SHAPES) / seconds / 1e9


serve({"version": "limits"}, bandwidth=bandwidth, peak=peak, product=product)
