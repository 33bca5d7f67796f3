"""GPTQModel's GPTQ with its defaults (group-aware order, damping 0.05), batches of 8, float32: see quantizing.py."""

from __future__ import annotations

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it takes one by default, and then refuses to start

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.version import __version__

from benchmarks.peers.quantizing import Run, arguments, quiet_exit

a = arguments()
run = Run(a)
config = QuantizeConfig(bits=a.bits, group_size=a.group, sym=a.sym, device="cpu")
model = GPTQModel.load(str(a.source), config, dtype=torch.float32)
model.quantize([{"input_ids": t, "attention_mask": [1] * len(t)} for t in run.windows.tolist()], batch_size=8)
model.save(str(a.out / "stored"))
run.stop()

decoded = {}
stored = GPTQModel.load(str(a.out / "stored"), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)  # else scales become bfloat16
for name, module in stored.model.named_modules():
    if isinstance(module, TorchLinear):
        module.scales = module.scales.float()  # float16 as stored; the weights are meant, not a kernel's rounding of them
        decoded[f"{name}.weight"] = module.dequantize_weight().T.float()
run.finish(f"gptqmodel {__version__}", decoded, a.out / "stored")
quiet_exit()
