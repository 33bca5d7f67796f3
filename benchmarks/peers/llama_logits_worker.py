"""llama.cpp's logits of a GGUF file: FILE.gguf TOKENS.npy (n,) OUT.npy (n, vocab) [THREADS]. Needs llama-cpp-python and numpy alone."""

from __future__ import annotations

import sys

import llama_cpp
import numpy as np

file, tokens, out = sys.argv[1:4]
ids = np.load(tokens).tolist()
threads = int(sys.argv[4]) if len(sys.argv) > 4 else 2
model = llama_cpp.Llama(
    file, n_ctx=len(ids), n_batch=len(ids), n_ubatch=len(ids), logits_all=True, verbose=False, n_threads=threads, n_threads_batch=threads
)
model.eval(ids)
np.save(out, np.array(model.scores[: len(ids)], np.float32))
