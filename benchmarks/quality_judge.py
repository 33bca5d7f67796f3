"""The judge of `benchmarks quality`: divergence of a directory's float weights, or of kept hidden states, from the original in float32.

One code judges everybody: tersor's engine with float activations on the decoded weights, or, for a tool whose arithmetic is part of
the method (LLM.int8()), the hidden states that the tool's own forward pass gave. Windows of 2,048 tokens of the test text, no overlap, no
BOS. The original's hidden states are kept in files, the columns of every token of every candidate too: more windows later cost only those.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tersor import ops
from tersor.engine import Model, load
from tersor.evaluation.kl import Divergence, from_comparison
from tersor.evaluation.model import chunks
from tersor.evaluation.text import Windows, cut, read_text
from tersor.tensor import Array

WINDOW = 2048
COUNTS = {"kld": 2, "ppl": 8, "table": 40}  # windows of the quick KL divergence, of the quick perplexity, of the table


class Judge:
    """The original, its windows, and its hidden states, which are computed once and kept in `folder`."""

    def __init__(self, original: Path, text: Path, windows: int, folder: Path, threads: int) -> None:
        self.threads = threads
        self._model = load(original, activations="float", kv="f32", threads=threads)
        name, content = read_text(text)
        self.windows: Windows = cut(self._model.tokenizer, name, content, WINDOW, windows=windows, bos=False)
        self._folder, self._name = folder, original.name

    def hidden(self, i: int) -> Array:
        """Returns the original's hidden states of window i, (WINDOW, d) float32."""
        return hidden(self._model, self.windows, i, self._folder / "hidden" / self._name)

    def write_windows(self) -> Path:
        """Writes the windows for a tool that computes hidden states itself: (windows, WINDOW) int32."""
        save(self._folder / "windows.npy", np.stack(self.windows.tokens))
        return self._folder / "windows.npy"

    def compare(self, candidate: Model | Path, columns: Path) -> Array:
        """Returns ops.compare_logits' columns of every token that counts, (windows, WINDOW - 1, 5) float64.

        candidate: a model, or a directory of hidden states 0.npy, 1.npy, ... of another runtime, which the original's head completes.
        columns: the folder where they are kept, a file a window.
        """
        for i, tokens in enumerate(self.windows.tokens):
            file = columns / f"{i}.npy"
            if file.exists():
                continue
            if isinstance(candidate, Path):
                head, states = self._model.head, np.load(candidate / f"{i}.npy")
            else:
                head, states = candidate.head, forward(candidate, tokens)
            base, parts = self.hidden(i), []
            for rows in chunks(0, WINDOW - 1, self._model.vocab_size):
                targets = tokens[rows.start + 1 : rows.stop + 1]
                parts.append(ops.compare_logits(self._model.head(base[rows]), head(states[rows]), targets))
            file.parent.mkdir(parents=True, exist_ok=True)
            save(file, np.concatenate(parts))
        return np.stack([np.load(columns / f"{i}.npy") for i in range(len(self.windows.tokens))])

    def judge(self, candidate: Path, columns: Path, activations: str = "float") -> dict[str, Any]:
        """Returns the figures on the first windows, see `figures`. candidate: a model directory, or one of hidden states. activations: how
        our engine rounds the inputs of a model's products, as of `tersor.load`."""
        missing = not all((columns / f"{i}.npy").exists() for i in range(len(self.windows.tokens)))
        states = (candidate / "0.npy").exists()
        model = candidate if states or not missing else load(candidate, activations=activations, kv="f32", threads=self.threads)
        return figures(self.compare(model, columns), self.windows)


def figures(columns: Array, windows: Windows) -> dict[str, Any]:
    """Returns, for each count of COUNTS that was run and for all windows, what a table needs. columns: (windows, WINDOW - 1, 5)."""
    counts = sorted({n for n in COUNTS.values() if n <= len(columns)} | {len(columns)})
    protocol = windows.protocol
    told = {}
    for n in counts:
        part = columns[:n].reshape(-1, columns.shape[-1])
        told[str(n)] = summary(from_comparison(part, replace(protocol, windows=n, scored=len(part)), 0.0))
    return told


def summary(d: Divergence) -> dict[str, Any]:
    """Returns the figures of a divergence that are kept."""
    names = ("kl_mean", "kl_error", "kl_median", "kl_p99", "top1", "top1_error", "ratio", "ratio_error")
    told = {name: getattr(d, name) for name in names}
    return told | {"perplexity": d.perplexity.perplexity, "base": d.base.perplexity, "protocol": str(d.protocol)}


def forward(model: Model, tokens: Array) -> Array:
    """Returns hidden states of one window, (WINDOW, d) float32, from an empty cache of float32."""
    return model.forward(tokens, model.new_cache(len(tokens))).copy()


def hidden(model: Model, windows: Windows, i: int, folder: Path) -> Array:
    """Returns the hidden states of window i, read from the folder when they are there."""
    file = folder / f"{i}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save(file, forward(model, windows.tokens[i]))
    return np.load(file)


def save(file: Path, values: Array) -> None:
    """Writes an array under its name only when it is whole."""
    part = file.with_name(f"part-{time.time_ns()}-{file.name}")
    np.save(part, values)
    part.rename(file)
