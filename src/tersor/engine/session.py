"""Generation for one reader: prompt -> prefill in chunks -> one token after the other, in a cache that outlives it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from tersor.engine.chat import Message
from tersor.engine.continuation import Continuation, Generation, Request
from tersor.engine.lookup import Lookup
from tersor.errors import ModelError
from tersor.tensor import Array

if TYPE_CHECKING:
    from tersor.engine.model import Model

Prompt = str | Sequence[Message]


class Session:
    """A model with a cache of what it has read. A prompt that begins like the last one is computed from where it differs."""

    def __init__(self, model: Model, capacity: int) -> None:
        """capacity: positions of the cache, at most the model's context."""
        self._model = model
        self._cache = model.new_cache(capacity)
        self._steps = model.steps()
        self._tokens: list[int] = []  # those in the cache
        self.capacity = capacity

    def generate(self, prompt: Prompt, request: Request) -> Generation:
        """Returns the whole generation at once."""
        return last(self.stream(prompt, request))

    def stream(self, prompt: Prompt, request: Request) -> Generator[str, None, Generation]:
        """Yields pieces of text, whole characters; returns the Generation."""
        return self.complete(self._model.prompt_tokens(prompt), request)

    def complete(self, tokens: list[int], request: Request) -> Generator[str, None, Generation]:
        """Does what stream does, from tokens. Raises ModelError when there are none or too many, at the first piece."""
        started = perf_counter()
        answer = Continuation(self._model.tokenizer, tokens, request)
        cached, logits = self._prefill(tokens)
        prefilled = perf_counter()
        lookup, drafted, accepted = Lookup(request.lookup), 0, 0
        lookup.read(tokens)
        piece = answer.take(logits)
        while not answer.finish:
            if piece:
                yield piece
            room = self.capacity - len(self._tokens)
            if room == 0:
                piece = answer.end("context")
                break
            lookup.read(answer.tokens[lookup.length - len(tokens) :])
            draft = lookup.draft(min(room, request.max_tokens - len(answer.tokens)) - 1)
            piece, right = self._step([answer.tokens[-1], *draft], answer)
            lookup.judge(len(draft), right)
            drafted, accepted = drafted + len(draft), accepted + right
        if piece:
            yield piece
        seconds = (prefilled - started, perf_counter() - prefilled)
        return Generation(answer.text, tuple(answer.tokens), answer.finish, len(tokens), cached, *seconds, drafted, accepted)

    def _step(self, tokens: list[int], answer: Continuation) -> tuple[str, int]:
        """Reads the last token made and a draft of those after it, and takes tokens as long as they are the draft's and once
        more; returns the text that they complete and how many of the draft were right."""
        piece, right = "", 0
        for token, logits, top in zip(tokens, *self._steps.run(np.array(tokens, np.int32), [self._cache])):
            self._tokens.append(token)
            piece += answer.take(logits, top)
            if answer.finish or answer.tokens[-1:] != tokens[right + 1 : right + 2]:
                break
            right += 1
        self._cache.truncate(len(self._tokens))
        return piece, right

    def _prefill(self, tokens: list[int]) -> tuple[int, Array]:
        """Reads the prompt; returns how many of its tokens were in the cache, and the logits after its last, (vocab,)."""
        if not tokens:
            raise ModelError("the prompt is empty and the model has no BOS token; give some text")
        if len(tokens) > self.capacity:
            raise ModelError(f"the prompt has {len(tokens)} tokens; the context holds {self.capacity}; shorten it or enlarge the context")
        shared = min(common(self._tokens, tokens), len(tokens) - 1)  # the last token is computed in any case, for its logits
        self._cache.truncate(shared)
        self._tokens = self._tokens[:shared]
        hidden = self._model.forward(np.asarray(tokens[shared:], np.int32), self._cache, last=True)
        self._tokens = list(tokens)
        return shared, self._model.head(hidden)[0]


def common(a: Sequence[int] | Array, b: Sequence[int] | Array) -> int:
    """Returns how many tokens at the front of a and b are the same."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(different[0]) if len(different) else n


def last(pieces: Generator[str, None, Generation]) -> Generation:
    """Returns what a generator of pieces returns at its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: Generation = end.value
            return result
