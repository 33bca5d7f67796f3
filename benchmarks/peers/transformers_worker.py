"""transformers on torch: python -m benchmarks.peers.transformers_worker PATH THREADS bfloat16|float32

PATH: a GGUF (dequantized at load) or a Hugging Face directory. Its cache grows as it must, whatever --context says.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.peers import arguments, serve

a = arguments("dtype")
path, dtype = Path(a.path), getattr(torch, a.dtype)
torch.set_num_threads(a.threads)
where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
model = AutoModelForCausalLM.from_pretrained(str(path.parent if where else path), dtype=dtype, **where).to(dtype).eval()
state = DynamicCache()


@torch.inference_mode()
def step(tokens: list[int]) -> None:
    model(torch.tensor([tokens]), past_key_values=state, logits_to_keep=1)


def prefill(tokens: list[int]) -> None:
    global state
    state = DynamicCache()
    step(tokens)


def decode(tokens: list[int]) -> None:
    for token in tokens:
        step([token])


serve({"version": f"transformers {transformers.__version__}, torch {torch.__version__}"}, prefill=prefill, decode=decode)
