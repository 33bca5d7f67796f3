"""tersor: python -m benchmarks.peers.tersor_worker PATH THREADS [--activations int8|float] [--kv TYPE] [--context N]"""

from __future__ import annotations

import time

import numpy as np

from benchmarks.peers import arguments, memory, serve
from tersor import __version__, _native
from tersor.engine import load

a = arguments("--activations", "--kv")
before = memory()["resident_mib"]
start = time.perf_counter()
chosen = {name: value for name, value in (("activations", a.activations), ("kv", a.kv)) if value}
model = load(a.path, threads=a.threads, **chosen)
cache = model.new_cache(a.context)
seconds = time.perf_counter() - start


def prefill(tokens: list[int]) -> None:
    cache.truncate(0)
    model.head(model.forward(np.array(tokens, np.int32), cache, last=True))


def decode(tokens: list[int]) -> None:
    for token in tokens:
        model.head(model.forward(np.array([token], np.int32), cache))


about = {"version": f"tersor {__version__}", "isa": _native.isa(), "kernels": list(model.kernels)}
serve(about | {"before_mib": before, "kv_mib": cache.nbytes / 2**20, "load_seconds": seconds}, prefill=prefill, decode=decode)
