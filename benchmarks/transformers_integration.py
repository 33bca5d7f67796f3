"""Decoding through transformers on our kernels: python -m benchmarks transformers_integration MODEL [--recipe rtn:int4_g64s] [--threads 2]
[--head int8_g64s] [--rounds 5] [--decode 64]

MODEL is a directory of float weights. In every round each of these decodes greedily behind the same prompt of 32 tokens, in turns:

    transformers, bfloat16       the model as transformers loads it
    our kernels, head as stored  MODEL quantized by the recipe, opened with tersor.integrations.transformers.load
    our kernels, head FORMAT     MODEL quantized by the recipe while it is loaded (TersorConfig), embedding and head too
    tersor                       the files of the first in our engine

A row's tokens/s is the median over the rounds of (tokens / (seconds of all - seconds of the first)); its ratio is the median of the
rounds' own ratios to the faster bfloat16 row of that round, with their range. With "torch threads 1" torch's own operations stay on one
thread: its pool waits by spinning, as ours does, so that two pools on the same cores are in each other's way. Generation ends after
so many tokens only: the id that would end it, which transformers looks for after every token, is none of the vocabulary.
Exit code 1 when the ratio of our kernels in transformers is below 3.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tersor
from benchmarks.machine import describe
from tersor import engine

PROMPT = 32
DEMAND = 3.0


def transformers_decoder(model: Any, torch_threads: int) -> Callable[[int], float]:
    """Returns a function from a number of tokens to the seconds that one takes."""
    import torch

    ids = torch.arange(5, 5 + PROMPT)[None]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=-1)
        return time.perf_counter() - start

    def decode(count: int) -> float:
        torch.set_num_threads(torch_threads)
        return (seconds(count + 1) - seconds(1)) / count

    return decode


def engine_decoder(model: engine.Model) -> Callable[[int], float]:
    """Returns the same for our engine."""

    def decode(count: int) -> float:
        cache, steps = model.new_cache(PROMPT + count + 1), model.steps()
        model.forward(np.arange(5, 5 + PROMPT, dtype=np.int32), cache)
        tops = [1]
        start = time.perf_counter()
        for _ in range(count):
            _, tops = steps.run(np.array(tops, np.int32), [cache])
        return (time.perf_counter() - start) / count

    return decode


def main() -> int:
    """Prints the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="rtn:int4_g64s")
    parser.add_argument("--head", default="int8_g64s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", type=int, default=64)
    a = parser.parse_args()

    import torch
    import transformers

    from tersor.integrations.transformers import TersorConfig, load

    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        quantized = Path(folder) / "quantized"
        tersor.quantize(a.model, quantized, a.recipe, verify=False)
        models = {
            "transformers, bfloat16": transformers.AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16),
            "our kernels, head as stored": load(quantized, threads=a.threads),
            f"our kernels, head {a.head}": transformers.AutoModelForCausalLM.from_pretrained(
                a.model, quantization_config=TersorConfig(f"{a.recipe}, embed={a.head}, lm_head={a.head}")
            ),
        }
        contestants = {}
        for name, model in models.items():
            for label, threads in (("", a.threads), (", torch threads 1", 1)):
                contestants[name + label] = transformers_decoder(model, threads)
        contestants["tersor"] = engine_decoder(engine.load(quantized, threads=a.threads))
        for decode in contestants.values():
            decode(4)
        rounds = [{name: decode(a.decode) for name, decode in contestants.items()} for _ in range(a.rounds)]
    print(f"{Path(a.model).name}, {a.recipe}, {a.threads} threads, transformers {transformers.__version__}, torch {torch.__version__}")
    print(", ".join(f"{key} {value}" for key, value in describe().items()))
    return report(rounds)


def report(rounds: list[dict[str, float]]) -> int:
    """Prints a row per contestant from its seconds a token in every round. Returns 1 when the demand is missed."""
    bases = [min(seconds[name] for name in seconds if "bfloat16" in name) for seconds in rounds]
    print("| | tokens/s | beside bfloat16, range |\n|---|---|---|")
    reached = 0.0
    for name in rounds[0]:
        ratios = [base / seconds[name] for base, seconds in zip(bases, rounds)]
        rate, ratio = statistics.median(1 / seconds[name] for seconds in rounds), statistics.median(ratios)
        print(f"| {name} | {rate:.1f} | {ratio:.2f}, {min(ratios):.2f}-{max(ratios):.2f} |")
        if "our kernels" in name:
            reached = max(reached, ratio)
    return 0 if reached >= DEMAND else 1


if __name__ == "__main__":
    sys.exit(main())
