"""OpenVINO: python -m benchmarks.peers.openvino_worker DIRECTORY THREADS [--context N]

DIRECTORY: what `optimum-cli export openvino --weight-format int4` wrote. The head is made to read the last token's state only, as
OpenVINO's own text pipelines do. Everything else is left as OpenVINO chooses it (8-bit activations, 8-bit cache, which grows as it must).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
from openvino import opset13 as ops

from benchmarks.peers import arguments, serve


def last_token_only(model: openvino.Model) -> None:
    """Puts a slice of the last position before the product that gives the logits."""
    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    states = node.input_value(0)
    start, stop, step, axis = (np.array([i], np.int64) for i in (-1, np.iinfo(np.int64).max, 1, 1))
    node.input(0).replace_source_output(ops.slice(states, start, stop, step, axis).output(0))
    model.validate_nodes_and_infer_types()


a = arguments()
core = openvino.Core()
model = core.read_model(Path(a.path) / "openvino_model.xml")
last_token_only(model)
compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": a.threads, "PERFORMANCE_HINT": "LATENCY"})
request = compiled.create_infer_request()
inputs = {name for port in compiled.inputs for name in port.names}
length = 0


def run(tokens: list[int]) -> None:
    global length
    start, length = length, length + len(tokens)
    values = {
        "input_ids": np.array([tokens], np.int64),
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(start, length, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    request.infer({name: value for name, value in values.items() if name in inputs})


def prefill(tokens: list[int]) -> None:
    global length
    request.reset_state()
    length = 0
    run(tokens)


def decode(tokens: list[int]) -> None:
    for token in tokens:
        run([token])


serve({"version": f"OpenVINO {openvino.__version__}"}, prefill=prefill, decode=decode)
