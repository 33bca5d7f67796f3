"""`python -m benchmarks` runs the first form of every benchmark; `python -m benchmarks NAME ...` one of them.

speed           prefill and decode tokens/s of SmolLM2-135M beside transformers and llama.cpp
memory          peak memory of quantizing a 1.1-billion-parameter sharded checkpoint to Q4_K
agreement       a GGUF of ours in llama.cpp: the same tokens, the same perplexity
logits          our float logits beside transformers'
ggml_encoders   error of our block encoders beside ggml's own
"""

from __future__ import annotations

import subprocess
import sys

from tersor.demo import cache_directory, fetch


def main() -> int:
    """Runs the named benchmark, or those that need nothing but the demo's model. Returns the worst exit code."""
    if len(sys.argv) > 1 and sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 0
    if len(sys.argv) > 1:
        return subprocess.call([sys.executable, "-m", f"benchmarks.{sys.argv[1]}", *sys.argv[2:]])
    model = str(fetch(cache_directory()))
    worst = 0
    for name, arguments in {"speed": [model], "memory": [], "agreement": [model], "ggml_encoders": [model]}.items():
        print(f"\n== {name} ==", flush=True)
        worst = max(worst, subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *arguments]))
    return worst


if __name__ == "__main__":
    sys.exit(main())
