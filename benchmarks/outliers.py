"""What rounding inputs to 8 bits costs where a few columns are far larger than the others, planted so that the function stays the same.

    python -m benchmarks outliers MODEL [--format int8_row] [--columns 6] [--factor 32] [--text FILE] [--window 2048] [--windows 2]

Norm weights of COLUMNS columns are multiplied by FACTOR (a power of two: exact), those columns of the linear layers that read the
norm divided by it. Judged against the planted model in float: KL divergence and perplexity ratio of every way to round inputs, on the
same weights in FORMAT. The row `float` is what the weights alone cost: LLM.int8()'s files hold outlier columns in 8 bits like all others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tersor.containers import open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.engine import load
from tersor.evaluation.kl import Base, divergence
from tersor.evaluation.text import cut, read_text
from tersor.formats import get_format
from tersor.tensor import QuantizedTensor

READERS = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}
WAYS = ("float", "int8", "llm_int8", "int8_token")


class Planted(Checkpoint):
    """A float checkpoint of a llama or qwen2 decoder with planted outliers, its projections in a format (None: float)."""

    def __init__(self, checkpoint: Checkpoint, columns: Sequence[int], factor: float, format: str | None = None) -> None:
        self._of, self._columns, self._factor = checkpoint, list(columns), np.float32(factor)
        self._format = None if format is None else get_format(format)
        self.path, self.container = checkpoint.path, checkpoint.container
        self.description, self.tensors = checkpoint.description, checkpoint.tensors

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the tensor as planted."""
        tensor = self._of.read(name, rows)
        module = name.removesuffix(".weight").rpartition(".")[2]
        reads = any(module in readers for readers in READERS.values())
        if not (module in READERS or name.endswith("_proj.weight")):
            return tensor
        w = np.array(get_format(tensor.format).dequantize(tensor), np.float32)
        if module in READERS:
            w[self._columns] *= self._factor
        elif reads:
            w[:, self._columns] /= self._factor
        is_matrix = w.ndim == 2 and self._format is not None
        return (self._format if is_matrix and self._format else get_format("f32")).quantize(w)

    def release(self) -> None:
        """Gives pages back."""
        self._of.release()

    def close(self) -> None:
        """Closes the original."""
        self._of.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--format", default="int8_row")
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--factor", type=float, default=32)
    parser.add_argument("--text", help="a UTF-8 file (default: the technical English of Python's pydoc_data.topics)")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    a = parser.parse_args()
    name, text = read_text(a.text)
    with open_checkpoint(a.model) as checkpoint:
        hidden = int(checkpoint.description.config["hidden_size"])
        columns = np.random.default_rng(0).choice(hidden, a.columns, replace=False).tolist()
        truth = load(Planted(checkpoint, columns, a.factor), activations="float")
        base = Base(truth, cut(truth.tokenizer, name, text, a.window, None, a.windows, False), keep=True)
        print(f"{a.model.name}, {a.columns} columns times {a.factor:g}, weights {a.format}; {name}, {a.windows} windows of {a.window}")
        print("| inputs | KL divergence | perplexity / float |\n|---|---|---|")
        for way in WAYS:
            d = divergence(load(Planted(checkpoint, columns, a.factor, a.format), activations=way), base)
            print(f"| {way} | {d.kl_mean:.5f} ± {d.kl_error:.5f} | {d.ratio:.5f} ± {d.ratio_error:.5f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
