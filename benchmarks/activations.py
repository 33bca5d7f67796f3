"""What 8-bit activations cost: divergence from the file's own weights in float32, judged by transformers.

    python -m benchmarks activations FILE [--text FILE] [--windows 20]

The judge dequantizes FILE's weights by its own code and runs them in float32, so that nothing but the runtime's arithmetic differs. Windows
of 512 tokens do not overlap, no BOS is added; the second half of each window counts, as in llama-perplexity. Ours: the default kernels on
whole windows and token by token, and `activations="float"` likewise; llama.cpp on whole windows, when it is installed and FILE is a GGUF.
Writes benchmarks/results/ISA/activations-TYPE.json; the exit code is 1 when a demand that it decides is not held.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks import report
from benchmarks.machine import describe
from tersor.conversion import convert
from tersor.engine import Model, load
from tersor.evaluation.text import read_text
from tersor.tensor import Array

WINDOW = 512
FIRST = WINDOW // 2  # of the positions that count
SLOW_WINDOWS = 4  # of float activations token by token, which take minutes and differ by rounding only

Logits = Callable[[Array], Array]  # (WINDOW,) int32 tokens -> (WINDOW - FIRST, vocabulary) float32


def judge(path: Path) -> Logits:
    """Returns transformers on the dequantized weights."""
    if path.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    else:
        with tempfile.TemporaryDirectory() as folder:
            convert(path, Path(folder) / "float32", dequantize="f32")
            model = AutoModelForCausalLM.from_pretrained(str(Path(folder) / "float32"), dtype=torch.float32)
    model.eval()

    @torch.inference_mode()
    def run(tokens: Array) -> Array:
        return model(torch.from_numpy(tokens).long()[None]).logits[0, FIRST:].numpy()

    return run


def at_once(model: Model) -> Logits:
    """Returns our model, the window as one prompt."""
    cache = model.new_cache(WINDOW)

    def run(tokens: Array) -> Array:
        cache.truncate(0)
        return model.head(model.forward(tokens, cache)[FIRST:])

    return run


def step_by_step(model: Model) -> Logits:
    """Returns our model, token by token as in decoding."""
    cache = model.new_cache(WINDOW)

    def run(tokens: Array) -> Array:
        cache.truncate(0)
        hidden = [model.forward(tokens[i : i + 1], cache) for i in range(WINDOW)]
        return np.concatenate([model.head(h) for h in hidden[FIRST:]])

    return run


def llama_cpp(path: Path) -> Logits:
    """Returns llama.cpp, the window as one prompt."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=WINDOW, n_batch=WINDOW, n_ubatch=WINDOW, logits_all=True, verbose=False)

    def run(tokens: Array) -> Array:
        model.reset()
        model.eval(tokens.tolist())
        return np.array(model.scores[FIRST:WINDOW])

    return run


def lanes(path: Path) -> Iterator[tuple[str, str, Logits]]:
    """Yields (runtime, how, logits) of everything that is judged."""
    default, exact = load(path), load(path, activations="float")
    yield "tersor", "prefill", at_once(default)
    yield "tersor", "token by token", step_by_step(default)
    yield "tersor", "float activations, prefill", at_once(exact)
    yield "tersor", f"float activations, token by token ({SLOW_WINDOWS} windows)", step_by_step(exact)
    if path.suffix == ".gguf":
        try:
            yield "llama.cpp", "prefill", llama_cpp(path)
        except ImportError as error:
            print(f"llama.cpp: not measured: {error}", file=sys.stderr)


def divergence(p: Array, q: Array) -> tuple[Array, Array]:
    """Returns KL(p || q) in nats and whether the likeliest token is the same, of every row of logits; in float64."""
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), dim=1) for x in (p, q))
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).numpy(), p.argmax(1) == q.argmax(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", help="a UTF-8 file (default: the technical English of Python's pydoc_data.topics)")
    parser.add_argument("--windows", type=int, default=20)
    a = parser.parse_args()
    name, text = read_text(a.text)
    measured = list(lanes(a.file))
    tokens = np.array(load(a.file).tokenizer.encode(text, bos=False)[: WINDOW * a.windows], np.int32)
    windows = tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)
    truth, parts = judge(a.file), [[] for _ in measured]
    for i, window in enumerate(windows):
        p = truth(window)
        for part, (_, how, logits) in zip(parts, measured):
            if i < SLOW_WINDOWS or not how.startswith("float activations, token"):
                part.append(divergence(p, logits(window)))
    rows = []
    for part, (runtime, how, _) in zip(parts, measured):
        kl, same = (np.concatenate(column) for column in zip(*part))
        error = kl.std(ddof=1) / sqrt(len(kl))  # tokens taken as independent
        rows.append({"runtime": runtime, "how": how, "kl_mean": float(kl.mean()), "kl_error": float(error), "top1": float(same.mean())})
    protocol = f"{name}, {len(windows)} windows of {WINDOW} tokens, the second half of each counts, no BOS; against float32 by transformers"
    result = f"activations-{a.file.stem.removeprefix('smollm2-')}"
    report.save(result, describe() | {"file": a.file.name, "protocol": protocol, "windows": len(windows), "rows": rows})
    print(report.table(result))
    return report.judge([result])


if __name__ == "__main__":
    sys.exit(main())
