"""llama.cpp's logits of a GGUF file: FILE.gguf TOKENS.npy (n,) OUT.npy (n, vocab) [THREADS]. Needs llama-cpp-python and numpy alone.

Weights stay as they lie in the file: llama.cpp multiplies those that it packs anew (Q4_0, Q4_K, ...) with inputs in 8 bits, BLAS or not.
"""

from __future__ import annotations

import sys

import llama_cpp
import llama_cpp.llama_cpp as c
import numpy as np

_defaults = c.llama_model_default_params


def _as_they_lie() -> c.llama_model_params:
    params = _defaults()
    params.use_extra_bufts = False
    return params


c.llama_model_default_params = _as_they_lie  # Llama has no argument for it

file, tokens, out = sys.argv[1:4]
ids = np.load(tokens).tolist()
threads = int(sys.argv[4]) if len(sys.argv) > 4 else 2
model = llama_cpp.Llama(
    file, n_ctx=len(ids), n_batch=len(ids), n_ubatch=len(ids), logits_all=True, verbose=False, n_threads=threads, n_threads_batch=threads
)
model.eval(ids)
np.save(out, np.array(model.scores[: len(ids)], np.float32))
