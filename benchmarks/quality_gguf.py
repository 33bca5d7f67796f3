"""GGUF files as llama-quantize makes them with an importance matrix, and judged by llama.cpp itself.

The judge takes its logits on the file against its logits on the original (F16 or BF16).

Windows of 512 tokens, no overlap, no BOS, the second half of each counts, as in llama-perplexity. The original's logits are kept in
OUT/logits while they are needed: 50 MB a window for SmolLM2, 155 MB for Qwen2.5.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_judge import save, summary
from tersor import ops
from tersor.calibration.imatrix import write_imatrix
from tersor.containers import open_checkpoint
from tersor.containers.gguf_file import GGUFFile
from tersor.engine.tokenizer import Tokenizer
from tersor.evaluation.kl import from_comparison
from tersor.evaluation.text import Windows, cut, read_text
from tersor.importance import measured
from tersor.tensor import Array

WINDOW = 512
FIRST = WINDOW // 2  # of the tokens that count
ROWS = 32  # logits compared at once
LLAMA_TYPES = {"q2_k": 10, "q3_k_m": 12, "q4_0": 2, "q4_k_m": 15, "iq4_xs": 30}  # llama_ftype


class LlamaJudge:
    """llama.cpp on the original, its logits kept in a folder that `close` removes."""

    def __init__(self, original: Path, text: Path, windows: int, folder: Path, threads: int) -> None:
        self.threads, self._original, self._folder = threads, original, folder / "logits" / original.stem
        with open_checkpoint(original) as checkpoint:
            tokenizer = Tokenizer(checkpoint.description)
        self.windows: Windows = cut(tokenizer, *read_text(text), WINDOW, windows=windows, bos=False)
        missing = [i for i in range(len(self.windows.tokens)) if not self._file(i).exists()]
        if missing:
            self._folder.mkdir(parents=True, exist_ok=True)
            for i, logits in zip(missing, run(original, [self.windows.tokens[i] for i in missing], threads)):
                save(self._file(i), logits)

    def judge(self, file: Path) -> dict[str, Any]:
        """Returns the figures of a GGUF file, and of the tensors' true bits per weight in the blocks."""
        parts = []
        for i, logits in enumerate(run(file, self.windows.tokens, self.threads)):
            base, targets = np.load(self._file(i), mmap_mode="r"), self.windows.tokens[i][FIRST:]
            for begin in range(0, len(targets), ROWS):
                rows = slice(begin, begin + ROWS)
                parts.append(ops.compare_logits(np.ascontiguousarray(base[rows]), logits[rows], targets[rows]))
        columns = np.concatenate(parts)
        protocol = replace(self.windows.protocol, scored=len(columns))
        told = summary(from_comparison(columns, protocol, 0.0))
        return told | {"protocol": f"{protocol}, then the first half of every window not counted; logits by llama.cpp"}

    def close(self) -> None:
        """Removes the original's logits."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, i: int) -> Path:
        return self._folder / f"{i}.npy"


def run(file: Path, windows: Any, threads: int) -> Iterator[Array]:
    """Yields llama.cpp's logits before each token that counts, (WINDOW - FIRST, vocabulary) float32."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(file), n_ctx=WINDOW, n_batch=WINDOW, n_ubatch=WINDOW, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False
    )
    for tokens in windows:
        model.reset()
        model.eval(tokens.tolist())
        yield np.array(model.scores[FIRST - 1 : WINDOW - 1], np.float32)
    model.close()


def importance(model: Path, tokens: Array, out: Path) -> Path:
    """Writes OUT, the importance matrix that llama-imatrix makes of these tokens, (sequences, length): means of squares of every matrix's
    inputs, float32. model: a Hugging Face directory. The head is left out, as llama-imatrix does by itself."""
    if out.exists():
        return out
    with open_checkpoint(model) as checkpoint:
        statistics = measured(checkpoint, tokens, out.with_name(out.name + ".states"))
        provenance = {"source": "calib.npy", "samples": tokens.shape[0], "seqlen": tokens.shape[1]}
        write_imatrix(out, statistics, checkpoint.description.config["model_type"], provenance)
    return out


def llama_quantize(source: Path, out: Path, kind: str, matrix: Path, threads: int) -> Path:
    """Writes OUT: the GGUF source in a type of LLAMA_TYPES by llama.cpp's own quantizer, with an importance matrix."""
    from llama_cpp import llama_cpp as c

    with closing(GGUFFile(matrix)) as file:
        names = [name.removesuffix(".counts") for name in file.tensors if name.endswith(".counts")]
        rows = {name: [file.rows(f"{name}.{part}").view("<f4")[0] for part in ("in_sum2", "counts")] for name in names}
        means = {name: np.ascontiguousarray(sums / count, np.float32) for name, (sums, count) in rows.items()}
    entries = (c.llama_model_imatrix_data * (len(means) + 1))()  # a nameless one ends it
    for entry, (name, mean) in zip(entries, means.items()):
        entry.name, entry.data, entry.size = name.encode(), mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), len(mean)
    options = c.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.imatrix = LLAMA_TYPES[kind], threads, ctypes.cast(entries, type(options.imatrix))
    part = out.with_name(f"part-{out.name}")
    if code := c.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama_model_quantize: {source} to {kind} gave {code}")
    part.rename(out)
    return out


def block_bits(file: Path) -> float:
    """Returns the bits per weight of the matrices of the blocks, by the types that the file stores them in."""
    with open_checkpoint(file) as checkpoint:
        blocks = [t for t in checkpoint.tensors.values() if len(t.shape) == 2 and ".layers." in t.name]
        return 8 * sum(t.nbytes for t in blocks) / sum(prod(t.shape) for t in blocks)
