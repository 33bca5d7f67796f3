"""Prompt lookup decoding (Saxena, 2023): the text itself drafts its continuation, the model checks all of it in one step.

Where the last few tokens occurred before, what followed then is likely to follow again: names, quotations, code that is
changed a little. A step on the last token and the draft gives the logits after each of them. The tokens are chosen from
these in order, as without a draft, and the first that differs from the draft ends the step. So the tokens are the same, drawn
ones too, as long as a step's rows have the bits that they have alone (models.decoder.STEP_ROWS).
"""

from __future__ import annotations

from collections.abc import Iterable

NGRAMS = (4, 3, 2)  # tokens that must agree, the longest match first; single ones mislead more often than they help
FIRST = 4  # tokens of the first draft


class Lookup:
    """The tokens of a text, and where each of their n-grams was followed by what."""

    def __init__(self, limit: int) -> None:
        """limit: tokens to draft at most; with 0 nothing is noted. A draft's length follows the success of the last one, since a
        step on many rows costs more than one on few."""
        self._limit = limit
        self._length = min(limit, FIRST)
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> place of the token after its last occurrence

    def read(self, tokens: Iterable[int]) -> None:
        """Takes note of the next tokens of the text."""
        if self._limit == 0:
            self._tokens.extend(tokens)
            return
        for token in tokens:
            for n in NGRAMS:
                if len(self._tokens) >= n:
                    self._next[tuple(self._tokens[-n:])] = len(self._tokens)
            self._tokens.append(token)

    @property
    def length(self) -> int:
        """Tokens read."""
        return len(self._tokens)

    def draft(self, room: int) -> list[int]:
        """Returns the tokens that may come next, at most room, none when the last few have not occurred before.

        A match that reaches the end of the text goes on with the draft itself, as repetitions do.
        """
        count = min(self._length, room)
        if count <= 0:
            return []
        place = next((self._next[gram] for gram in (tuple(self._tokens[-n:]) for n in NGRAMS) if gram in self._next), None)
        if place is None:
            return []
        found = self._tokens[place : place + count]
        while len(found) < count:
            found.append(found[len(found) - (len(self._tokens) - place)])
        return found

    def judge(self, drafted: int, accepted: int) -> None:
        """Sets the next draft's length: twice this one when all of it was right, else what was right, at least one."""
        if drafted:
            self._length = min(self._limit, 2 * drafted) if accepted == drafted else max(1, accepted)
