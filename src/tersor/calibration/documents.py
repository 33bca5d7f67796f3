"""Documents as tokens: lines of a JSONL file, or rows of a hub data set, each a text or a conversation.

    {"text": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}        (ShareGPT's names)

A text is [BOS] tokens [EOS], where the model has them and its tokenizer adds BOS. A conversation is what the chat template
makes of it, which writes BOS and ends of turns itself; nothing asks for another answer behind the last one.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tersor.engine.chat import render_chat
from tersor.engine.tokenizer import Tokenizer
from tersor.errors import ModelError, RecipeError
from tersor.tensor import Array

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's; system, user and assistant are called so there too
Row = tuple[str, Any]  # (where it stands, what it is)


def pack(rows: Iterable[Row], tokenizer: Tokenizer, enough: int | None = None) -> tuple[Array, bool]:
    """Returns (tokens of all documents one after the other, (n,) int32; whether the chat template was used).

    enough: stop reading after so many tokens. Raises RecipeError for a row that is no document, ModelError for a conversation
    without chat template or that the template refuses; both name the row.
    """
    tokens = array("i")
    chat = False
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise RecipeError(f"{where} is a {type(row).__name__}; need an object with text, messages or conversations")
        if "text" in row:
            tokens.extend(_text(row["text"], where, tokenizer))
        else:
            tokens.extend(_conversation(_messages(row, where), where, tokenizer))
            chat = True
        if enough is not None and len(tokens) >= enough:
            break
    return np.array(tokens, np.int32), chat


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Yields the lines of a JSONL file that are not blank. Raises RecipeError for one that is no JSON, OSError, UnicodeDecodeError."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"calibration file {path}: line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RecipeError(f"{where}: {error}; need one JSON object a line") from None


def hub_rows(name: str, config: str | None, split: str) -> Iterator[Row]:
    """Yields the rows of a data set through the package `datasets`, in order, as they are downloaded.

    Raises RecipeError when the package is missing, or the data set cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise RecipeError(f"calibration data set {name}: the package datasets is missing; pip install 'tersor[datasets]'") from None
    try:
        for number, row in enumerate(datasets.load_dataset(name, config, split=split, streaming=True)):
            yield f"calibration data set {name}: row {number}", row
    except Exception as error:  # of the hub, of the data set's own reader, of its file formats: no common class
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise RecipeError(
            f"calibration data set {name}, config {config}, split {split}: {reason}; name it as hub:NAME[:config][:split]"
        ) from None


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """Returns the token that ends a text: the tokenizer's eos_token, else the first that ends a generation, if there is one."""
    named = tokenizer.encode(tokenizer.special_tokens.get("eos_token", ""), bos=False)
    return named[0] if len(named) == 1 else next(iter(tokenizer.eos_ids), None)


def _text(text: Any, where: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens of a text with BOS and EOS; none of an empty one."""
    if not isinstance(text, str):
        raise RecipeError(f"{where}: text is a {type(text).__name__}; need a string")
    end = end_of_text(tokenizer)
    return tokenizer.encode(text) + ([] if end is None else [end]) if text else []


def _messages(row: Mapping[str, Any], where: str) -> list[Any]:
    """Returns the messages of a conversation with Hugging Face's names."""
    key = next((key for key in ("messages", "conversations") if key in row), None)
    if key is None:
        raise RecipeError(f"{where} has {', '.join(sorted(map(str, row))) or 'nothing'}; need text, messages or conversations")
    if not isinstance(row[key], list) or not row[key]:
        raise RecipeError(f"{where}: {key} is {type(row[key]).__name__} without messages; need a list of at least one")
    return [
        {"role": _ROLES.get(m["from"], m["from"]), "content": m["value"]} if isinstance(m, Mapping) and {"from", "value"} <= m.keys() else m
        for m in row[key]
    ]


def _conversation(messages: list[Any], where: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the tokens of a conversation as the chat template writes it."""
    if tokenizer.chat_template is None:
        raise ModelError(f'{where} is a conversation, but the model has no chat template; give {{"text": ...}} lines')
    try:
        text = render_chat(tokenizer.chat_template, messages, tokenizer.special_tokens, add_generation_prompt=False)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    return tokenizer.encode(text, bos=False)
