"""auto-round's signed-gradient tuning: its defaults (200 iterations, batches of 8) or --iters; float32: see quantizing.py."""

from __future__ import annotations

import torch
from auto_round import AutoRound, __version__
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.quantizing import Run, arguments, quiet_exit

a = arguments("iters", "lr")
run = Run(a)
model = AutoModelForCausalLM.from_pretrained(str(a.source), dtype=torch.float32)
tokens = [{"input_ids": torch.tensor([t]), "attention_mask": torch.ones(1, len(t), dtype=torch.long)} for t in run.windows.tolist()]
more = {"iters": int(a.iters)} if a.iters else {}
more |= {"lr": float(a.lr)} if a.lr else {}
tool = AutoRound(
    model,
    AutoTokenizer.from_pretrained(str(a.source)),
    scheme={"bits": a.bits, "group_size": a.group, "sym": a.sym, "data_type": "int", "act_bits": 16},
    dataset=tokens,
    nsamples=len(tokens),
    seqlen=run.windows.shape[1],
    device_map="cpu",
    enable_torch_compile=False,
    **more,
)
quantized, layers = tool.quantize()
decoded = {f"{name}.weight": quantized.get_submodule(name).weight.detach().clone() for name in layers if layers[name].get("bits", 16) < 16}
tool.save_quantized(str(a.out / "stored"), format="auto_round", inplace=True)
run.stop()
run.finish(f"auto-round {__version__}", decoded, a.out / "stored")
quiet_exit()
