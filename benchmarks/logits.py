"""Our logits beside transformers' in float32: python -m benchmarks.logits PATH [--tokens 512] [--kv f32]

PATH: a Hugging Face directory with float weights. The text is Python's own documentation. Prints the largest absolute
difference over all tokens, prefilled at once and decoded one by one with the cache; exits 1 above the tolerance.
"""

from __future__ import annotations

import argparse
import sys
from pydoc_data import topics

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tersor.engine import load

TOLERANCE = 2e-3  # absolute, of logits that span about 40


def main() -> int:
    """Runs both models on the same tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--kv", choices=("f32", "f16"), default="f32")
    options = parser.parse_args()
    model = load(options.path, activations="float", kv=options.kv)
    text = "\n".join(str(topics.topics[name]) for name in sorted(topics.topics)[:20])
    tokens = np.array(model.tokenizer.encode(text)[: options.tokens], np.int32)
    reference = AutoModelForCausalLM.from_pretrained(options.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        want = reference(torch.from_numpy(tokens).long()[None]).logits[0].numpy()
    cache = model.new_cache(len(tokens))
    prefilled = model.head(model.forward(tokens, cache))
    cache.truncate(0)
    decoded = np.concatenate([model.head(model.forward(tokens[i : i + 1], cache)) for i in range(len(tokens))])
    worst = 0.0
    for name, got in (("prefilled", prefilled), ("decoded", decoded)):
        difference = float(np.abs(got - want).max())
        same = float((got.argmax(1) == want.argmax(1)).mean())
        print(f"{len(tokens)} tokens {name}: max |difference| {difference:.2e} (tolerance {TOLERANCE:.0e}), same argmax {same:.4f}")
        worst = max(worst, difference)
    print(f"logits from {want.min():.1f} to {want.max():.1f}; kernels {', '.join(model.kernels)}; kv {options.kv}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
