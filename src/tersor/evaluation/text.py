"""Text to judge on: token windows with a stated protocol."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

import numpy as np

from tersor.errors import ModelError, RecipeError
from tersor.tensor import Array


class Tokenizer(Interface):
    """What evaluation asks of a tokenizer."""

    @property
    def bos_id(self) -> int | None:
        """The id of the token that begins a text, if the model has one."""
        ...

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Returns token ids. bos: whether BOS comes first; None: as the model was trained."""
        ...


@dataclass(frozen=True)
class Protocol:
    """How a text was cut: every number of an evaluation depends on it, so every Record carries it.

    window: tokens that the model sees at once, BOS included. stride: tokens from one window's start to the next. bos: whether each
    window begins with BOS. windows: how many were judged; scored: tokens that count; text_tokens: tokens of the whole text.
    activations, kv: of the model that was judged (engine.load), empty when it came loaded.
    The first token of the first window never counts; of later windows those count that no window before has predicted, and
    never a window's first token.
    """

    text: str
    window: int
    stride: int
    bos: bool
    windows: int
    scored: int
    text_tokens: int
    activations: str = ""
    kv: str = ""

    def __str__(self) -> str:
        stride = "no overlap" if self.stride >= self.window - self.bos else f"stride {self.stride}"
        bos = "with" if self.bos else "no"
        return (
            f"{self.text}: {self.windows} windows of {self.window} tokens, {stride}, {bos} BOS, "
            f"{self.scored} of {self.text_tokens} tokens scored, the first of a window not counted"
        ) + (f"; activations {self.activations}, cache {self.kv}" if self.activations else "")


@dataclass(frozen=True)
class Windows:
    """The windows to run. tokens: int32 (window,) each; first: index in the window of the first token that counts (>= 1)."""

    tokens: tuple[Array, ...]
    first: tuple[int, ...]
    protocol: Protocol


def pydoc_text() -> str:
    """Returns the text that every Python carries: the topics of its language reference, about 465 kB of technical English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(text: str | Path | None) -> tuple[str, str]:
    """Returns (name, text) of a file, or of pydoc_data.topics for None. Raises RecipeError when it cannot be read."""
    if text is None:
        return "pydoc_data.topics", pydoc_text()
    path = Path(text)
    try:
        return path.name, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RecipeError(f"text {path}: {what}; name a readable UTF-8 text file") from None


def cut(
    tokenizer: Tokenizer,
    name: str,
    text: str,
    window: int = 512,
    stride: int | None = None,
    windows: int | None = 16,
    bos: bool | None = None,
) -> Windows:
    """Returns the windows of a text.

    stride None: windows do not overlap. windows None: all that fit; a rest shorter than a window is dropped. bos None: as the
    tokenizer does by itself. Raises RecipeError for settings that contradict each other, ModelError for a text shorter than one window.
    """
    if window < 3 or (stride is not None and not 1 <= stride <= window) or (windows is not None and windows < 1):
        given = f"window {window}, windows {windows}" + ("" if stride is None else f", stride {stride}")
        raise RecipeError(f"{given}: need window >= 3, 1 <= stride <= window, windows >= 1 (0: the whole text)")
    ids = tokenizer.encode(text, bos=False)
    with_bos = _adds_bos(tokenizer) if bos is None else bos
    if with_bos and tokenizer.bos_id is None:
        raise ModelError("the model has no BOS token; evaluate without BOS")
    body = window - with_bos
    step = min(stride or body, body)
    if len(ids) < body:
        raise ModelError(f"text {name} has {len(ids)} tokens, fewer than one window of {body}; use a longer text or a smaller window")
    starts = list(range(0, len(ids) - body + 1, step))[:windows]
    lead = [tokenizer.bos_id] if with_bos else []
    tokens = tuple(np.array(lead + ids[s : s + body], dtype=np.int32) for s in starts)
    first = tuple(1 if i == 0 else max(1, window - step) for i in range(len(starts)))
    scored = sum(window - f for f in first)
    return Windows(tokens, first, Protocol(name, window, step, with_bos, len(starts), scored, len(ids)))


def _adds_bos(tokenizer: Tokenizer) -> bool:
    return tokenizer.bos_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_id
