"""Text that a model writes itself, as calibration data: what it says is what it saw in training, whatever that was.

Source: Williams et al., "Self-calibration for Language Model Quantization and Pruning", 2024 (arXiv 2410.17170), without their
temperature schedule: every token is drawn from the model's own distribution, temperature 1, all tokens allowed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tersor.calibration.documents import end_of_text
from tersor.engine.continuation import Request
from tersor.engine.model import Model
from tersor.tensor import Array

Generate = Callable[[int, int, int], Array]  # (samples, seqlen, seed) -> (samples, seqlen) integers


def generator(model: Model, progress: Callable[[int, int], None] | None = None) -> Generate:
    """Returns a function (samples, seqlen, seed) -> (samples, seqlen) int32 that lets the model write.

    A text begins with BOS, or with a token drawn at random where the model has none; a text that ends before its sample is full is
    followed by EOS and another one, which does not see it. Equal seeds give equal tokens, however many are computed together.
    progress: called with tokens done and tokens in all, first with 0.
    """

    def generate(samples: int, seqlen: int, seed: int) -> Array:
        rows: list[list[int]] = [[] for _ in range(samples)]
        end = end_of_text(model.tokenizer)
        text = 0
        if progress is not None:
            progress(0, samples * seqlen)
        while any(len(row) < seqlen for row in rows):
            batch = model.batch(capacity=seqlen)
            waiting = {}
            for i, row in enumerate(rows):
                if len(row) < seqlen:
                    random = np.random.Generator(np.random.PCG64([seed, i, text]))
                    bos = model.tokenizer.bos_id
                    row.append(int(random.random() * model.tokenizer.vocab_size) if bos is None else bos)
                    if len(row) < seqlen:
                        request = Request(temperature=1.0, seed=int(random.integers(2**63)), max_tokens=seqlen - len(row))
                        waiting[batch.add_tokens(row[-1:], request)] = row
            for part in batch.stream():
                if part.generation is not None:
                    row = waiting[part.id]
                    row.extend(part.generation.tokens)
                    if end is not None and len(row) < seqlen:
                        row.append(end)
                    if progress is not None:
                        progress(sum(map(len, rows)), samples * seqlen)
            text += 1
        return np.array(rows, np.int32)

    return generate
