"""Continuous batching (Yu et al., 2022, Orca): sequences that decode together, and join and leave between steps.

A step reads one part of one prompt, then one token of every sequence that is being answered: one product for all of them, so
that the weights are read once. The tokens are those that each request would get alone: a row of a step has the bits that it
has alone (models.decoder.STEP_ROWS), and prompts are cut into parts that do not show (engine.prefill).

What prompts have in common at the front, a system prompt for instance, is computed once and kept once: it is read into a
cache of its own, whose forks share its memory (KVCache.fork, in steps of 64 tokens).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from tersor import ops
from tersor.engine.continuation import Continuation, Generation, Request
from tersor.engine.prefill import chunks
from tersor.engine.session import Prompt, common
from tersor.errors import ModelError, RecipeError
from tersor.models.decoder import MOST_ROWS, STEP_ROWS
from tersor.tensor import Array

if TYPE_CHECKING:
    from tersor.engine.model import Model

PART = 128  # tokens of a prompt that are read between two steps of the others
FORK = 64  # a fork shares a multiple of so many positions
COMPARED = 32  # prompts before and after one that it may share a prefix with
PREFIXES = 8  # prefixes that are kept for later prompts, the last ones used


@dataclass(frozen=True)
class Part:
    """A piece of the text of a request, maybe empty; with the last one its Generation."""

    id: int
    text: str
    generation: Generation | None


@dataclass
class _Sequence:
    """A request on its way. shared: tokens of the prompt whose keys and values were there already."""

    id: int
    tokens: Array
    request: Request
    cache: ops.KVCache | None = None
    prefix: ops.KVCache | None = None  # being read, to be forked when it is full
    prefix_tokens: int = 0
    shared: int = 0
    started: float = 0.0
    prefilled: float = 0.0
    answer: Continuation | None = None


class Batch:
    """Generations that decode together. add requests at any time; step, or stream, until len is 0. One caller at a time."""

    def __init__(self, model: Model, max_sequences: int = STEP_ROWS, capacity: int | None = None) -> None:
        """max_sequences: that are answered at the same time, others wait; up to 16 go through the layers together.
        capacity: positions of each, None = the context, at most 4096. Raises RecipeError below 1, ModelError beyond the context."""
        if max_sequences < 1:
            raise RecipeError(f"max_sequences is {max_sequences}; need an integer >= 1")
        self.max_sequences = max_sequences
        self.capacity = min(model.context, 4096) if capacity is None else capacity
        model.new_cache(self.capacity)  # refuses what is beyond the context
        self._model = model
        self._steps = model.steps()
        self._ids = count()
        self._waiting: deque[_Sequence] = deque()
        self._reading: _Sequence | None = None
        self._answering: list[_Sequence] = []
        self._before: deque[Array] = deque(maxlen=COMPARED)  # prompts that were read
        self._prefixes: list[tuple[Array, ops.KVCache]] = []  # the last used one last

    def __len__(self) -> int:
        """Requests that have not ended."""
        return len(self._waiting) + (self._reading is not None) + len(self._answering)

    def add(self, prompt: Prompt, request: Request) -> int:
        """Returns the id of a new request. Raises ModelError for a prompt that is empty or too long, RecipeError for lookup."""
        return self.add_tokens(self._model.prompt_tokens(prompt), request)

    def add_tokens(self, tokens: Sequence[int], request: Request) -> int:
        """Does what add does, from tokens."""
        if not tokens:
            raise ModelError("the prompt is empty and the model has no BOS token; give some text")
        if len(tokens) > self.capacity:
            raise ModelError(f"the prompt has {len(tokens)} tokens; a sequence of the batch holds {self.capacity}; shorten it")
        if request.lookup:
            raise RecipeError("lookup drafts for one sequence at a time; leave it out in a batch, whose steps are full already")
        sequence = _Sequence(next(self._ids), np.array(tokens, np.int32), request)
        self._waiting.append(sequence)
        return sequence.id

    def cancel(self, id: int) -> None:
        """Drops a request and frees its cache; one that has ended, or never was, is none."""
        self._waiting = deque(s for s in self._waiting if s.id != id)
        self._answering = [s for s in self._answering if s.id != id]
        if self._reading is not None and self._reading.id == id:
            self._reading = None

    def stream(self) -> Iterator[Part]:
        """Yields parts of all requests as they are made, until none is left; more may be added meanwhile."""
        while len(self):
            yield from self.step()

    def step(self) -> list[Part]:
        """Reads one part of a prompt, then one token of every sequence that is being answered; returns what came out."""
        parts = []
        decoding = list(self._answering)
        if self._reading is None and self._waiting and len(self._answering) < self.max_sequences:
            self._reading = self._begin(self._waiting.popleft())
        if self._reading is not None:
            parts += self._read(self._reading, PART if decoding else MOST_ROWS)
        for start in range(0, len(decoding), STEP_ROWS):
            parts += self._decode(decoding[start : start + STEP_ROWS])
        self._answering = [s for s in self._answering if s.answer is not None and not s.answer.finish]
        return parts

    def _begin(self, s: _Sequence) -> _Sequence:
        """Gives a sequence its cache: a fork of the longest prefix that is known, and a longer one to read first if others share it."""
        s.started = perf_counter()
        others = [*self._before, *(w.tokens for w in islice(self._waiting, COMPARED))]
        self._before.append(s.tokens)
        # The rest of the prompt is read as all of it would be: by more than STEP_ROWS tokens at a time.
        limit = max(0, len(s.tokens) - STEP_ROWS - 1)
        s.prefix_tokens = min(limit, max((common(s.tokens, other) for other in others), default=0)) // FORK * FORK
        origin = None
        for i, (tokens, cache) in enumerate(self._prefixes):
            if s.shared < len(tokens) <= limit and common(tokens, s.tokens) == len(tokens):
                s.shared, origin, used = len(tokens), cache, i
        if origin is not None:
            self._prefixes.append(self._prefixes.pop(used))
        cache = self._model.new_cache(self.capacity) if origin is None else origin.fork(s.shared)
        if s.prefix_tokens > s.shared:
            s.prefix = cache
        else:
            s.cache = cache
        return s

    def _read(self, s: _Sequence, size: int) -> list[Part]:
        """Reads the next part of a prompt; after its last one the sequence is being answered."""
        if s.cache is None and s.prefix is not None:
            self._forward(s.tokens[: s.prefix_tokens], s.prefix, size)
            if s.prefix.length == s.prefix_tokens:
                self._prefixes = [*self._prefixes, (s.tokens[: s.prefix_tokens], s.prefix)][-PREFIXES:]
                s.cache, s.prefix = s.prefix.fork(s.prefix_tokens), None
            return []
        assert s.cache is not None
        hidden = self._forward(s.tokens, s.cache, size)
        if s.cache.length < len(s.tokens):
            return []
        logits = self._model.head(hidden)
        s.prefilled = perf_counter()
        s.answer = Continuation(self._model.tokenizer, s.tokens.tolist(), s.request)
        self._reading = None
        self._answering.append(s)
        return self._take(s, logits[0])

    def _forward(self, tokens: Array, cache: ops.KVCache, size: int) -> Array:
        """Reads at most size of the tokens that are not in the cache; returns the hidden state of the last, (1, hidden)."""
        part = chunks(len(tokens) - cache.length, size)[0]
        return self._model.forward(tokens[cache.length :][part], cache, last=True)

    def _decode(self, sequences: list[_Sequence]) -> list[Part]:
        """Reads the last token of every sequence together and takes the next."""
        parts, ready = [], []
        for s in sequences:
            assert s.answer is not None and s.cache is not None
            if s.cache.length == self.capacity:
                parts.append(self._part(s, s.answer.end("context")))
            else:
                ready.append((s, s.answer.tokens[-1], s.cache))
        if ready:
            tokens = np.array([token for _, token, _ in ready], np.int32)
            for (s, _, _), row, top in zip(ready, *self._steps.run(tokens, [cache for _, _, cache in ready])):
                parts += self._take(s, row, top)
        return parts

    def _take(self, s: _Sequence, logits: Array, top: int | None = None) -> list[Part]:
        """Takes the next token of a sequence; returns the part that it completes, if any."""
        assert s.answer is not None
        piece = s.answer.take(logits, top)
        return [self._part(s, piece)] if piece or s.answer.finish else []

    def _part(self, s: _Sequence, piece: str) -> Part:
        """Returns a piece of text, with the Generation when it was the last."""
        assert s.answer is not None
        if not s.answer.finish:
            return Part(s.id, piece, None)
        seconds = (s.prefilled - s.started, perf_counter() - s.prefilled)
        a = s.answer
        return Part(s.id, piece, Generation(a.text, tuple(a.tokens), a.finish, len(s.tokens), s.shared, *seconds))
