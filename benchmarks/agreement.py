"""A GGUF file in our engine and in llama.cpp: perplexity on the same tokens.

    python -m benchmarks.agreement MODEL.gguf [--recipes rtn:q8_0,rtn:q4_0,...] [--tokens 2000] [--window 500] [--text FILE]

MODEL.gguf (or a Hugging Face directory) is quantized by us to each recipe; llama.cpp (llama-cpp-python) opens what we wrote. Windows do not
overlap, no BOS is added, the first token of each window is not counted; both engines get the same token ids. The third figure is
llama.cpp on the same weights written out in float32: it differs from our float activations only by the file, not by how
each engine rounds activations. Exit code 1 when our engine and llama.cpp differ by more than 1 % on the file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from math import exp
from pathlib import Path

import numpy as np
from llama_cpp import Llama

import tersor
from tersor.conversion import convert
from tersor.engine import load


def nll_rows(logits: np.ndarray, targets: np.ndarray) -> float:
    """Returns the sum of the negative log likelihoods. logits: (n, vocab); targets: (n,)."""
    x = logits.astype(np.float64)
    top = x.max(axis=1, keepdims=True)
    return float((np.log(np.exp(x - top).sum(axis=1)) + top[:, 0] - x[np.arange(len(targets)), targets]).sum())


def ours(path: Path, windows: list[list[int]], activations: str) -> float:
    model, total, count = load(path, threads=2, activations=activations), 0.0, 0
    for w in windows:
        logits = model.head(model.forward(np.array(w, np.int32), model.new_cache(len(w))))
        total, count = total + nll_rows(logits[:-1], np.array(w[1:])), count + len(w) - 1
    return exp(total / count)


def theirs(path: Path, windows: list[list[int]]) -> float:
    model, total, count = Llama(str(path), n_ctx=1024, n_threads=2, logits_all=True, verbose=False), 0.0, 0
    for w in windows:
        model.reset()
        model.eval(w)
        total, count = total + nll_rows(model.scores[: len(w) - 1], np.array(w[1:])), count + len(w) - 1
    return exp(total / count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipes", default="rtn:q8_0,rtn:q5_1,rtn:q4_1,rtn:q4_0,rtn:iq4_nl,rtn:q6_k|q8_0,rtn:q4_k|q5_0,rtn:q2_k|q4_0")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--window", type=int, default=500)
    parser.add_argument("--text", help="a text file (default: the technical English of Python's pydoc_data.topics)")
    a = parser.parse_args()
    if a.text:
        text = Path(a.text).read_text()
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[k] for k in sorted(topics))
    tokens = load(a.model).tokenizer.encode(text[: 8 * a.tokens], bos=False)[: a.tokens]
    windows = [tokens[i : i + a.window] for i in range(0, len(tokens) - a.window + 1, a.window)]
    worst = 0.0
    print(f"{Path(a.model).name}, {len(windows)} windows of {a.window} tokens")
    print("| recipe | tersor, float activations | llama.cpp, float32 weights | difference | tersor | llama.cpp | difference |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for recipe in a.recipes.split(","):
            out = Path(folder) / "model.gguf"
            tersor.quantize(a.model, out, recipe, force=True)
            exact, fast, foreign = ours(out, windows, "float"), ours(out, windows, "int8"), theirs(out, windows)
            wide = Path(folder) / "float32.gguf"
            convert(out, wide, dequantize="f32", force=True)
            same = theirs(wide, windows)
            gap = abs(fast / foreign - 1)
            worst = max(worst, gap)
            pairs = f"{exact:.4f} | {same:.4f} | {100 * abs(exact / same - 1):.3f} % | {fast:.4f} | {foreign:.4f} | {100 * gap:.2f} %"
            print(f"| {recipe} | {pairs} |", flush=True)
    print(f"largest difference {100 * worst:.2f} %, limit 1 %")
    return int(worst > 0.01)


if __name__ == "__main__":
    sys.exit(main())
