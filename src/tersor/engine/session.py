"""Generation: prompt -> prefill in chunks -> one token after the other, until a token, a string or a limit ends it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from tersor.engine.chat import Message
from tersor.engine.sampling import Sampler, Sampling
from tersor.engine.text import Detokenizer, StopStrings
from tersor.errors import ModelError, RecipeError
from tersor.tensor import Array

if TYPE_CHECKING:
    from tersor.engine.model import Model

Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Request(Sampling):
    """What to generate. max_tokens: at most so many; stop: strings that end it and are not part of the text."""

    max_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise RecipeError(f"max_tokens is {self.max_tokens}; need an integer >= 1")


@dataclass(frozen=True)
class Generation:
    """What came out. text: without special tokens and stop string; tokens: those generated, without the EOS that ended them.

    finish: eos (the model ended), stop (a stop string), length (max_tokens), context (the cache is full).
    cached_tokens: those at the front of the prompt that were in the session's cache already.
    prefill_seconds: until the logits of the prompt's last token; decode_seconds: the rest, sampling and text included.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    prompt_tokens: int
    cached_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed per second."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Tokens generated per second; the first of them is the prefill's."""
        return max(len(self.tokens) - 1, 0) / max(self.decode_seconds, 1e-9)


class Session:
    """A model with a cache of what it has read. A prompt that begins like the last one is computed from where it differs."""

    def __init__(self, model: Model, capacity: int) -> None:
        """capacity: positions of the cache, at most the model's context."""
        self._model = model
        self._cache = model.new_cache(capacity)
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
        sampler, stops = Sampler(request), StopStrings(request.stop)
        detokenizer = Detokenizer(self._model.tokenizer)
        cached, logits = self._prefill(tokens)
        prefilled = perf_counter()
        pieces: list[str] = []
        made: list[int] = []
        finish = "length"
        for count in range(request.max_tokens):
            if count:
                if len(self._tokens) == self.capacity:
                    finish = "context"
                    break
                logits = self._step(made[-1])
            token = sampler.choose(logits, self._tokens)
            if token in self._model.tokenizer.eos_ids:
                finish = "eos"
                break
            made.append(token)
            piece = stops.push(detokenizer.push(token))
            if piece:
                pieces.append(piece)
                yield piece
            if stops.found:
                finish = "stop"
                break
        if finish != "stop":
            last = stops.push(detokenizer.finish()) + stops.finish()
            finish = "stop" if stops.found else finish
            if last:
                pieces.append(last)
                yield last
        seconds = (prefilled - started, perf_counter() - prefilled)
        return Generation("".join(pieces), tuple(made), finish, len(tokens), cached, *seconds)

    def _prefill(self, tokens: list[int]) -> tuple[int, Array]:
        """Reads the prompt; returns how many of its tokens were in the cache, and the logits after its last, (vocab,)."""
        if not tokens:
            raise ModelError("the prompt is empty and the model has no BOS token; give some text")
        if len(tokens) > self.capacity:
            raise ModelError(f"the prompt has {len(tokens)} tokens; the context holds {self.capacity}; shorten it or enlarge the context")
        shared = 0
        for old, new in zip(self._tokens, tokens[:-1]):  # the last token is computed in any case, for its logits
            if old != new:
                break
            shared += 1
        self._cache.truncate(shared)
        self._tokens = self._tokens[:shared]
        hidden = self._model.forward(np.asarray(tokens[shared:], np.int32), self._cache)
        self._tokens = list(tokens)
        return shared, self._model.head(hidden[-1:])[0]

    def _step(self, token: int) -> Array:
        """Reads one token; returns the logits after it, (vocab,)."""
        hidden = self._model.forward(np.asarray([token], np.int32), self._cache)
        self._tokens.append(token)
        logits: Array = self._model.head(hidden)[0]
        return logits


def last(pieces: Generator[str, None, Generation]) -> Generation:
    """Returns what a generator of pieces returns at its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: Generation = end.value
            return result
