"""llama.cpp through llama-cpp-python: python -m benchmarks.peers.llama_cpp_worker PATH THREADS [--no-repack] [--context N]

Its C functions are called directly, so that no Python of the binding stands between the tokens. Everything is left as llama.cpp
chooses it (flash attention, repacking, 16-bit cache) but for --no-repack, which keeps the file's layout.
"""

from __future__ import annotations

import ctypes

import llama_cpp
from llama_cpp import llama_cpp as c

from benchmarks.peers import arguments, serve

a = arguments(flags=("--no-repack",))
c.llama_backend_init()
model_options = c.llama_model_default_params()
model_options.use_extra_bufts = not a.no_repack
model = c.llama_model_load_from_file(a.path.encode(), model_options)
if not model:
    raise SystemExit(f"llama.cpp cannot load {a.path}")
options = c.llama_context_default_params()
options.n_ctx, options.n_batch, options.n_ubatch = a.context, 512, 512
options.n_threads = options.n_threads_batch = a.threads
context = c.llama_init_from_model(model, options)
state = c.llama_get_memory(context)


def run(tokens: list[int]) -> None:
    ids = (c.llama_token * len(tokens))(*tokens)
    if c.llama_decode(context, c.llama_batch_get_one(ids, len(tokens))):
        raise RuntimeError("llama_decode failed")
    ctypes.cast(c.llama_get_logits_ith(context, -1), ctypes.c_void_p)  # waits until they are there


def prefill(tokens: list[int]) -> None:
    c.llama_memory_clear(state, False)
    for i in range(0, len(tokens), 512):
        run(tokens[i : i + 512])


def decode(tokens: list[int]) -> None:
    for token in tokens:
        run([token])


features = c.llama_print_system_info().decode().strip()
serve({"version": f"llama.cpp in llama-cpp-python {llama_cpp.__version__}", "build": features}, prefill=prefill, decode=decode)
