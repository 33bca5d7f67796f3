"""onnxruntime-genai: python -m benchmarks.peers.onnxruntime_worker DIRECTORY THREADS [--context N]

DIRECTORY: what its model builder wrote with `-p int4 -e cpu`.
"""

from __future__ import annotations

import json

import numpy as np
import onnxruntime_genai as og

from benchmarks.peers import arguments, serve

a = arguments()
config = og.Config(a.path)
threads = {"intra_op_num_threads": a.threads, "inter_op_num_threads": 1}
config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
model = og.Model(config)
options = og.GeneratorParams(model)
options.set_search_options(max_length=a.context, batch_size=1)
generator = og.Generator(model, options)


def prefill(tokens: list[int]) -> None:
    generator.rewind_to(0)
    generator.append_tokens(np.array(tokens, np.int32))


def decode(tokens: list[int]) -> None:
    for token in tokens:
        generator.append_tokens(np.array([token], np.int32))


serve({"version": f"onnxruntime-genai {og.__version__}"}, prefill=prefill, decode=decode)
