"""What one request makes, token by token: chosen from logits, turned into text, until a token, a string or a limit ends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tersor.engine.sampling import Sampler, Sampling
from tersor.engine.text import Detokenizer, StopStrings
from tersor.engine.tokenizer import Tokenizer
from tersor.errors import RecipeError
from tersor.models.decoder import STEP_ROWS
from tersor.tensor import Array


@dataclass(frozen=True)
class Request(Sampling):
    """What to generate. max_tokens: at most so many; stop: strings that end it and are not part of the text.

    lookup: how many tokens to draft at most from an earlier place in the text, 0 to 15; 0 = none. It changes the speed, never
    the tokens (tersor.engine.lookup).
    """

    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    lookup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise RecipeError(f"max_tokens is {self.max_tokens}; need an integer >= 1")
        if not 0 <= self.lookup < STEP_ROWS:
            raise RecipeError(f"lookup is {self.lookup}; need an integer from 0 to {STEP_ROWS - 1}")
        StopStrings(self.stop)


@dataclass(frozen=True)
class Generation:
    """What came out. text: without special tokens and stop string; tokens: those generated, without the EOS that ended them.

    finish: eos (the model ended), stop (a stop string), length (max_tokens), context (the cache is full).
    cached_tokens: those at the front of the prompt whose keys and values were there already.
    prefill_seconds: until the logits of the prompt's last token; decode_seconds: the rest, sampling and text included. In a
    batch both include what was computed for other sequences meanwhile.
    drafted, accepted: tokens that lookup proposed, and those of them that were right.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    prompt_tokens: int
    cached_tokens: int
    prefill_seconds: float
    decode_seconds: float
    drafted: int = 0
    accepted: int = 0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed per second."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float:
        """Tokens generated per second; the first of them is the prefill's."""
        return max(len(self.tokens) - 1, 0) / max(self.decode_seconds, 1e-9)


class Continuation:
    """The answer to a request so far. tokens: those made; finish: why it ended, empty while it has not."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], request: Request) -> None:
        self.tokens: list[int] = []
        self.finish = ""
        self._request = request
        self._eos = frozenset(tokenizer.eos_ids)
        self._sampler, self._stops, self._detokenizer = Sampler(request), StopStrings(request.stop), Detokenizer(tokenizer)
        self._sampler.read(prompt)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All pieces so far."""
        return "".join(self._pieces)

    def take(self, logits: Array, top: int | None = None) -> str:
        """Chooses the next token from its logits, (vocab,), and returns the piece of text that it completes, maybe empty.

        top: the likeliest token, if it is known.
        """
        token = self._sampler.choose(logits, top)
        if token in self._eos:
            return self.end("eos")
        self.tokens.append(token)
        self._sampler.read((token,))
        piece = self._stops.push(self._detokenizer.push(token))
        self._pieces.append(piece)
        if self._stops.found:
            self.finish = "stop"
        elif len(self.tokens) == self._request.max_tokens:
            piece += self.end("length")
        return piece

    def end(self, reason: str) -> str:
        """Ends it and returns the text that was held back, which may turn out to hold a stop string."""
        piece = self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        self._pieces.append(piece)
        self.finish = "stop" if self._stops.found else reason
        return piece
