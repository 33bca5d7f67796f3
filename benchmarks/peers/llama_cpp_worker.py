"""llama.cpp through llama-cpp-python: python -m benchmarks.peers.llama_cpp_worker PATH THREADS"""

from __future__ import annotations

import sys

from llama_cpp import Llama

from benchmarks.peers import peak_mib, serve

path, threads = sys.argv[1], int(sys.argv[2])
model = Llama(path, n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False)


def prefill(tokens: list[int]) -> None:
    model.reset()
    model.eval(tokens)


def decode(tokens: list[int]) -> None:
    for token in tokens:
        model.eval([token])


serve(prefill, decode, peak_mib)
