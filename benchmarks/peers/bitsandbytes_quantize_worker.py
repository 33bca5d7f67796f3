"""bitsandbytes: --scheme nf4, nf4_dq (blocks of 64) or int8 (LLM.int8(), threshold 6.0), float32 elsewhere: see quantizing.py.

What int8 costs lies in its run-time products: it writes the hidden states of the judge's windows too (--windows FILE.npy, (n, window)).
"""

from __future__ import annotations

import bitsandbytes as bnb
import numpy as np
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.peers.quantizing import Run, arguments, quiet_exit

a = arguments("scheme", "windows")
run = Run(a)
if a.scheme == "int8":
    config = BitsAndBytesConfig(load_in_8bit=True)
else:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=a.scheme == "nf4_dq", bnb_4bit_compute_dtype=torch.float32
    )
model = AutoModelForCausalLM.from_pretrained(str(a.source), dtype=torch.float32, quantization_config=config, device_map="cpu").eval()
decoded = {}
for name, module in model.named_modules():
    if isinstance(module, bnb.nn.Linear4bit):
        decoded[f"{name}.weight"] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    elif isinstance(module, bnb.nn.Linear8bitLt):
        decoded[f"{name}.weight"] = module.weight.data.float() * (module.weight.SCB.float()[:, None] / 127)
model.save_pretrained(str(a.out / "stored"))
run.stop()
if a.windows:
    with torch.inference_mode():
        for i, tokens in enumerate(np.load(a.windows)):
            np.save(a.out / f"{i}.npy", model.model(torch.from_numpy(tokens).long()[None]).last_hidden_state[0].float().numpy())
run.finish(f"bitsandbytes {bnb.__version__}", decoded, a.out / "stored")
quiet_exit()
