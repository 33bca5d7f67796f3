"""Tokens to text as they come: no half characters, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

from tersor.engine.tokenizer import Tokenizer
from tersor.errors import RecipeError

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns tokens into text one by one; the pieces joined are the text of all tokens.

    A character may span tokens, and a token's text may depend on the one before (SentencePiece's leading space). So the
    tokens of the last piece stay in a window that is decoded with the new ones, unless tokens are just joined, and nothing
    is given out while the window ends in an incomplete character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0  # tokens at the front of the window whose text was given out

    def push(self, token: int) -> str:
        """Returns the text that this token completes; empty while a character is incomplete."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        return "" if text.endswith(_BROKEN) else self._give(text)

    def finish(self) -> str:
        """Returns what is left at the end, without an incomplete last character."""
        return self._give(self._tokenizer.decode(self._window).rstrip(_BROKEN))

    def _give(self, text: str) -> str:
        """Returns what is new in the window's text; the tokens that it came from alone stay in the window."""
        before = self._tokenizer.decode(self._window[: self._given]) if self._given else ""
        if len(text) <= len(before):
            return ""  # tokens without text, special ones for instance
        self._window = [] if self._tokenizer.joins else self._window[self._given :]
        self._given = len(self._window)
        return text[len(before) :]


class StopStrings:
    """Holds back text that may be the beginning of a stop string, and cuts at the first that is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: not empty strings. Raises RecipeError for an empty one."""
        if any(not stop for stop in stops):
            raise RecipeError("stop is an empty string; leave it out to stop at the end of the text")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Returns the text that is safe to give out. Once `found` is set, all before the stop string was given out."""
        if not self._stops:
            return text
        self._held += text
        found = [(at + len(stop), at) for stop, at in ((stop, self._held.find(stop)) for stop in self._stops) if at >= 0]
        if found:
            self.found = True
            return self._take(min(found)[1])  # the one that ends first, however the text was cut into pieces
        return self._take(len(self._held) - self._longest_beginning())

    def finish(self) -> str:
        """Returns what was held back, when no stop string came of it."""
        return "" if self.found else self._take(len(self._held))

    def _take(self, count: int) -> str:
        """Returns the first count characters held and holds the rest."""
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _longest_beginning(self) -> int:
        """Returns the length of the longest end of the held text that is a proper beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0
