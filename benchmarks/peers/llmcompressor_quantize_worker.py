"""llmcompressor's GPTQ with its defaults (block 128, damping 0.01, static activation order), float32: see quantizing.py.

--scheme w8a8: int8 per channel, symmetric, inputs rounded to int8 token by token; else weights alone, in groups. --method rtn: rounded to
nearest instead, without calibration.
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from datasets import Dataset
from llmcompressor import __version__, oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoModelForCausalLM

from benchmarks.peers.quantizing import Run, arguments, quiet_exit

a = arguments("scheme", "method")
run = Run(a)
model = AutoModelForCausalLM.from_pretrained(str(a.source), dtype=torch.float32)
tokens = run.windows.tolist()
data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(t) for t in tokens]})
weights = QuantizationArgs(num_bits=a.bits, type="int", symmetric=a.sym, strategy="group", group_size=a.group)
inputs = None
if a.scheme == "w8a8":
    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    inputs = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
plain = a.method == "rtn"
recipe = (QuantizationModifier if plain else GPTQModifier)(config_groups={"group_0": scheme}, ignore=["lm_head"])
oneshot(
    model=model,
    dataset=None if plain else data,
    recipe=recipe,
    max_seq_length=len(tokens[0]),
    num_calibration_samples=len(tokens),
    shuffle_calibration_samples=False,
)

decoded = {}
for name, module in model.named_modules():
    if (scheme := getattr(module, "quantization_scheme", None)) is not None and scheme.weights is not None:
        zero, index = getattr(module, "weight_zero_point", None), getattr(module, "weight_g_idx", None)
        decoded[f"{name}.weight"] = fake_quantize(module.weight.detach(), module.weight_scale, zero, scheme.weights, index).clone()
model.save_pretrained(str(a.out / "stored"), save_compressed=True)
run.stop()
run.finish(f"llmcompressor {__version__}", decoded, a.out / "stored")
quiet_exit()
