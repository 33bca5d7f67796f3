"""`python -m benchmarks NAME ...` runs one benchmark.

all             every one of the first seven in its first form: all FOLDER, which holds or gets the models
engine          prefill and decode beside llama.cpp, OpenVINO, onnxruntime-genai, transformers and this machine's limits
context         time per token behind 4,096 tokens
floor           decoding beside only reading the same weights
activations     what 8-bit activations cost, judged by transformers
models          makes the model files of the three above
speed           prefill and decode tokens/s of one file beside transformers and llama.cpp
memory          peak memory of quantizing a 1.1-billion-parameter sharded checkpoint to Q4_K
agreement       a GGUF of ours in llama.cpp: the same tokens, the same perplexity
logits          our float logits beside transformers'
ggml_encoders   error of our block encoders beside ggml's own
outliers        what rounding inputs to 8 bits costs where outlier columns were planted
containers      a model in every container, run by others; what others wrote, run here
transformers_integration  decoding through transformers: bfloat16, our kernels, our engine
quality         quality per bit beside llmcompressor, gptqmodel, auto-round, bitsandbytes and llama-quantize
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.models import get
from tersor.demo import cache_directory, fetch

NAMES = (
    "engine",
    "context",
    "activations",
    "models",
    "speed",
    "memory",
    "agreement",
    "logits",
    "ggml_encoders",
    "floor",
    "outliers",
    "containers",
    "transformers_integration",
    "quality",
)


def main() -> int:
    """Runs the named benchmark. Returns the worst exit code."""
    name, arguments = (sys.argv[1:] or ["--help"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name in NAMES:
        return subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *arguments])
    if name != "all" or len(arguments) != 1:
        print(f"need `all FOLDER` or one of {', '.join(NAMES)}; got {' '.join(sys.argv[1:])}", file=sys.stderr)
        return 2
    return run_all(Path(arguments[0]), str(fetch(cache_directory())))


def run_all(folder: Path, model: str) -> int:
    """Runs the benchmarks of `all`. model: the demo's. Returns the worst exit code."""
    files = {kind: get(folder, "smollm2", kind).path for kind in ("q4_0", "q4_1", "q8_0")}
    worst = 0
    for name, *arguments in (
        ("engine", str(folder)),
        ("context", files["q4_0"]),
        ("activations", files["q4_1"]),
        ("activations", files["q8_0"]),
        ("engine", "--report"),
        ("speed", model),
        ("memory",),
        ("agreement", model),
        ("ggml_encoders", model),
    ):
        print(f"\n== {name} {' '.join(arguments)} ==", flush=True)
        worst = max(worst, subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *arguments]))
    return worst


if __name__ == "__main__":
    sys.exit(main())
