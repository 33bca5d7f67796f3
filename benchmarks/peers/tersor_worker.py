"""tersor: python -m benchmarks.peers.tersor_worker PATH THREADS [int8|float]"""

from __future__ import annotations

import sys

import numpy as np

from benchmarks.peers import peak_mib, serve
from tersor.engine import load

path, threads, activations = sys.argv[1], int(sys.argv[2]), (sys.argv[3:] or ["int8"])[0]
model = load(path, threads=threads, activations=activations)
cache = model.new_cache(1024)


def prefill(tokens: list[int]) -> None:
    cache.truncate(0)
    model.head(model.forward(np.array(tokens, np.int32), cache)[-1:])


def decode(tokens: list[int]) -> None:
    for token in tokens:
        model.head(model.forward(np.array([token], np.int32), cache))


serve(prefill, decode, peak_mib)
