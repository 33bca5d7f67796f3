"""GGUF files as llama-quantize makes them with an importance matrix, and judged by llama.cpp itself.

The judge takes its logits on the file against its logits on the original (F16 or BF16).

Windows of 2,048 tokens, no overlap, no BOS, the second half of each counts, as in llama-perplexity. What is known of every token of every
file is kept in OUT/columns: a run that was cut off goes on, and more windows later cost only those.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_judge import WINDOW, save, summary
from tersor import ops
from tersor.calibration.imatrix import write_imatrix
from tersor.containers import open_checkpoint
from tersor.containers.gguf_file import GGUFFile
from tersor.engine.tokenizer import Tokenizer
from tersor.evaluation.kl import from_comparison
from tersor.evaluation.text import Windows, cut, read_text
from tersor.importance import measured
from tersor.tensor import Array

FIRST = WINDOW // 2  # of the tokens that count
BATCH = 512  # tokens that llama.cpp takes at once
AT_ONCE = 4  # windows: 2.5 GB of logits for Qwen2.5
ROWS = 32  # logits compared at once
LLAMA_TYPES = {"q2_k": 10, "q3_k_m": 12, "q4_0": 2, "q4_k_m": 15, "iq4_xs": 30}  # llama_ftype


class LlamaJudge:
    """llama.cpp on the original and on files of it, a few windows of all of them at a time: the original's logits are kept no longer."""

    def __init__(self, original: Path, text: Path, windows: int, folder: Path, threads: int) -> None:
        self.threads, self._original, self._folder = threads, original, folder / "columns" / text.stem / original.stem
        with open_checkpoint(original) as checkpoint:
            tokenizer = Tokenizer(checkpoint.description)
        self._windows: Windows = cut(tokenizer, *read_text(text), WINDOW, windows=windows, bos=False)

    def judge(self, files: list[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yields the figures of every file on the first AT_ONCE windows, then on those and the next, and so on."""
        count = len(self._windows.tokens)
        for begin in range(0, count, AT_ONCE):
            some = range(begin, min(begin + AT_ONCE, count))
            if left := [file for file in files if not all(self._known(file, i) for i in some)]:
                base = list(run(self._original, [self._windows.tokens[i] for i in some], self.threads))
                for file in left:
                    self._compare(file, some, base)
            for file in files:
                yield file, self._figures(file, some.stop)

    def _compare(self, file: Path, some: range, base: list[Array]) -> None:
        """Writes ops.compare_logits' columns of these windows, whose logits by the original are base."""
        for i, logits, original in zip(some, run(file, [self._windows.tokens[i] for i in some], self.threads), base):
            targets = self._windows.tokens[i][FIRST:]
            parts = (slice(at, at + ROWS) for at in range(0, len(targets), ROWS))
            columns = np.concatenate([ops.compare_logits(original[rows], logits[rows], targets[rows]) for rows in parts])
            self._columns(file, i).parent.mkdir(parents=True, exist_ok=True)
            save(self._columns(file, i), columns)

    def _figures(self, file: Path, windows: int) -> dict[str, Any]:
        """Returns the figures of a file on the first windows."""
        columns = np.concatenate([np.load(self._columns(file, i)) for i in range(windows)])
        told = summary(from_comparison(columns, replace(self._windows.protocol, windows=windows, scored=len(columns)), 0.0))
        return told | {"protocol": f"{told['protocol']}, then the first half of every window not counted; logits by llama.cpp"}

    def _columns(self, file: Path, i: int) -> Path:
        return self._folder / file.stem / f"{i}.npy"

    def _known(self, file: Path, i: int) -> bool:
        columns = self._columns(file, i)
        return columns.exists() and columns.stat().st_mtime > max(file.stat().st_mtime, self._original.stat().st_mtime)


def run(file: Path, windows: list[Array], threads: int) -> Iterator[Array]:
    """Yields llama.cpp's logits before each token that counts, (WINDOW - FIRST, vocabulary) float32; it computes no others."""
    import llama_cpp as c

    model = c.Llama(str(file), n_ctx=WINDOW, n_batch=BATCH, n_ubatch=BATCH, n_threads=threads, n_threads_batch=threads, verbose=False)
    batch = c.llama_batch_init(BATCH, 0, 1)
    for tokens in windows:
        c.llama_memory_clear(c.llama_get_memory(model.ctx), True)
        logits = []
        for begin in range(0, WINDOW, BATCH):
            batch.n_tokens = BATCH
            for i in range(BATCH):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = tokens[begin + i], begin + i, 1, 0
                batch.logits[i] = FIRST - 1 <= begin + i < WINDOW - 1
            if code := c.llama_decode(model.ctx, batch):
                raise RuntimeError(f"llama_decode: {file} gave {code}")
            if count := sum(batch.logits[:BATCH]):
                logits.append(np.ctypeslib.as_array(c.llama_get_logits(model.ctx), (count, model.n_vocab())).copy())
        yield np.concatenate(logits)
    c.llama_batch_free(batch)
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
