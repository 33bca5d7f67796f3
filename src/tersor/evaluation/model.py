"""What evaluation asks of a model: the part of tersor.engine.Model that predicts tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from tersor.evaluation.text import Tokenizer
from tersor.tensor import Array

LOGITS_BYTES = 16 << 20  # float32 logits of one model that exist at once


class LanguageModel(Protocol):
    """A decoder-only model: hidden states in windows, logits in chunks of rows."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids."""
        ...

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        ...

    def new_cache(self, capacity: int) -> Any:
        """Returns an empty KV cache for this many tokens; it has truncate(n)."""
        ...

    def forward(self, tokens: Array, cache: Any, last: bool = False) -> Array:
        """Returns the hidden states after the final norm, (n, d) float32; last: the last token's, (1, d). tokens: (n,) int32."""
        ...

    def head(self, hidden: Array) -> Array:
        """Returns logits (n, vocab) float32."""
        ...


def chunks(begin: int, end: int, vocabulary: int) -> Iterator[slice]:
    """Yields ranges of rows whose logits take at most LOGITS_BYTES."""
    step = max(1, LOGITS_BYTES // (4 * vocabulary))
    for start in range(begin, end, step):
        yield slice(start, min(end, start + step))
