"""Calibration samples: what --calib names, as windows of tokens, with a record of where they came from.

    pydoc                        pydoc_data.topics, the text that every Python carries
    self                         text that the model writes itself (calibration.generation)
    notes.txt                    UTF-8 text: tokenized as a whole, then cut
    chats.jsonl                  a document a line, text or conversation (calibration.documents), packed one after the other
    tokens.npy                   integers, (n,) to be cut, or (n, seqlen) as they are to be read
    hub:NAME[:config][:split]    a hub data set with the columns of the JSONL; org/name is short for hub:org/name

Windows do not overlap and are never padded. Of more than are asked for, as many are drawn at random without replacement
and read in the order of the text. Where the tokenizer adds BOS, every window of a text begins with it, as in judging.
Raw .bin files are not read, because they do not say how wide their integers are; numpy.save writes the .npy.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tersor
from tersor.calibration.documents import hub_rows, jsonl_rows, pack
from tersor.errors import ModelError, RecipeError
from tersor.evaluation.text import pydoc_text
from tersor.tensor import Array

if TYPE_CHECKING:
    from tersor.calibration.generation import Generate
    from tersor.engine.tokenizer import Tokenizer

HUB_TOKENS = 4  # a data set, which may not end, is read until it has so many times the tokens that are asked for
KINDS = "pydoc, self, a UTF-8 text file, a .jsonl or .npy file, hub:NAME[:config][:split] or org/name"
_HUB_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
_OTHER_FILES = (".json", ".parquet", ".arrow", ".csv", ".tsv", ".npz", ".bin")  # some are text, but not the text that is meant
_FILES = (".txt", ".jsonl", ".npy", *_OTHER_FILES)  # names that end so are files, even when they are not there


@dataclass(frozen=True)
class Samples:
    """Calibration data.

    tokens: (n, seqlen) int32. provenance, for the output's metadata, plain values: source (its name, without directories), kind
    (pydoc, self, text, jsonl, tokens, hub), samples, seqlen, seed, tokens (how many), sha256 (of the tokens as little-endian int32),
    chat_template (used; unused: the model has one; none; unknown: tokens came from outside), bos (whether every window begins with
    it), tersor (version).
    """

    tokens: Array
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class _Source:
    """Tokens before they are cut: a stream (n,), or windows (n, seqlen) already."""

    name: str
    kind: str
    tokens: Array
    chat_template: str
    bos: int | None = None  # that every window is to begin with


def read_samples(
    calib: str | Path,
    tokenizer: Tokenizer | None,
    *,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    generate: Generate | None = None,
    vocab_size: int | None = None,
    context: int | None = None,
) -> Samples:
    """Returns `samples` windows of `seqlen` tokens of what calib names.

    tokenizer: None only for token files. generate: for `self`, calibration.generation.generator(model). vocab_size: ids that the
    model knows, by default the tokenizer's. context: positions that the model was made for, None = not known.
    Raises RecipeError for settings out of range and a source that is unknown, unreadable, malformed, empty or too short; ModelError
    for what the model cannot do: no tokenizer, no chat template, ids beyond its vocabulary, windows beyond its context.
    """
    for name, value, least in (("samples", samples, 1), ("seqlen", seqlen, 2), ("seed", seed, 0)):
        if value < least:
            raise RecipeError(f"{name} is {value}; need an integer >= {least}")
    if context is not None and seqlen > context:
        raise ModelError(f"seqlen is {seqlen}; the model's context is {context}; use --seqlen {context} or less")
    source = _read(calib, tokenizer, samples, seqlen, seed, generate)
    known = tokenizer.vocab_size if vocab_size is None and tokenizer is not None else vocab_size or 1 << 31
    tokens = _checked_ids(source.name, _draw(source, samples, seqlen, seed), known)
    provenance = {
        "source": source.name,
        "kind": source.kind,
        "samples": samples,
        "seqlen": seqlen,
        "seed": seed,
        "tokens": int(tokens.size),
        "sha256": hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(),
        "chat_template": source.chat_template,
        "bos": source.bos is not None,
        "tersor": tersor.__version__,
    }
    return Samples(tokens, provenance)


def _read(calib: str | Path, tokenizer: Tokenizer | None, samples: int, seqlen: int, seed: int, generate: Generate | None) -> _Source:
    """Returns what calib names, by the rules at the top; a file wins over a hub data set of the same name."""
    path = Path(calib)
    if calib not in ("pydoc", "self") and path.suffix == ".npy":
        return _Source(path.name, "tokens", _token_file(path, seqlen), "unknown")
    if tokenizer is None:
        raise ModelError(f"calibration {calib}: the model has no tokenizer; give token ids in a .npy file")
    if calib == "self":
        return _generated(tokenizer, samples, seqlen, seed, generate)
    unused = "none" if tokenizer.chat_template is None else "unused"
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    if calib == "pydoc":
        return _Source("pydoc_data.topics", "pydoc", _encode(tokenizer, pydoc_text()), unused, bos)
    name = str(calib)
    if name.startswith("hub:") or (
        isinstance(calib, str) and not path.exists() and re.fullmatch(_HUB_NAME, name) and path.suffix.lower() not in _FILES
    ):
        title, config, split = _hub_name(name)
        tokens, chat = pack(hub_rows(title, config, split), tokenizer, enough=HUB_TOKENS * samples * seqlen)
        shown = title if re.fullmatch(_HUB_NAME, title) else Path(title).name
        return _Source(f"{shown}:{config or ''}:{split}", "hub", tokens, "used" if chat else unused, bos)
    if path.suffix.lower() in _OTHER_FILES or (path.exists() and not path.is_file()):
        raise RecipeError(f"calibration {calib}: not a kind that is read; known: {KINDS}")
    try:
        if path.suffix == ".jsonl":
            tokens, chat = pack(jsonl_rows(path), tokenizer)
            return _Source(path.name, "jsonl", tokens, "used" if chat else unused, bos)
        return _Source(path.name, "text", _encode(tokenizer, path.read_text(encoding="utf-8-sig")), unused, bos)
    except UnicodeDecodeError as error:
        raise RecipeError(f"calibration file {path}: not UTF-8 at byte {error.start}; convert it, or name: {KINDS}") from None
    except OSError as error:
        raise RecipeError(f"calibration {path}: {error.strerror or error}; name one of: {KINDS}") from None


def _hub_name(name: str) -> tuple[str, str | None, str]:
    """Returns (data set, config, split) of hub:NAME[:config][:split] or org/name; the split is train by default."""
    title, *rest = name.removeprefix("hub:").split(":")
    if not title or len(rest) > 2:
        raise RecipeError(f"calibration {name}: need hub:NAME[:config][:split]; leave the config empty to name a split alone")
    config, split = [*rest, "", ""][:2]
    return title, config or None, split or "train"


def _encode(tokenizer: Tokenizer, text: str) -> Array:
    """Returns the tokens of a text without BOS, (n,) int32."""
    return np.array(tokenizer.encode(text, bos=False) if text.strip() else [], np.int32)


def _generated(tokenizer: Tokenizer, samples: int, seqlen: int, seed: int, generate: Generate | None) -> _Source:
    """Returns what the model wrote."""
    if generate is None:
        raise RecipeError("calibration self: there is no model here that could write; name a text")
    tokens = np.asarray(generate(samples, seqlen, seed))
    assert tokens.shape == (samples, seqlen), "generate keeps its promise"
    return _Source("self", "self", tokens, "none" if tokenizer.chat_template is None else "unused")


def _token_file(path: Path, seqlen: int) -> Array:
    """Returns the integers of a .npy file, mapped: (n,) or (n, seqlen)."""
    try:
        tokens: Array = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise RecipeError(f"calibration file {path}: {error.strerror or error}; name a readable .npy file") from None
    except Exception as error:  # numpy reads the header with Python's tokenizer, whose errors have no common class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"calibration file {path}: {reason}; write token ids with numpy.save") from None
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
        raise RecipeError(f"calibration file {path} holds {tokens.dtype} of shape {tokens.shape}; need integers, (n,) or (n, {seqlen})")
    if tokens.ndim == 2 and tokens.shape[1] != seqlen:
        raise RecipeError(
            f"calibration file {path} holds windows of {tokens.shape[1]} tokens, not of {seqlen}; use --seqlen {tokens.shape[1]}"
        )
    return tokens


def _draw(source: _Source, samples: int, seqlen: int, seed: int) -> Array:
    """Returns the windows that are used, (samples, seqlen), ids still as the source has them. Raises RecipeError when there are too few."""
    tokens = source.tokens
    if not tokens.size:
        raise RecipeError(f"calibration {source.name} is empty; give some text")
    starts = np.arange(len(tokens)) if tokens.ndim == 2 else _starts(tokens, seqlen, source.bos)
    if len(starts) < samples:
        fixes = [f"--samples {len(starts)}"] if len(starts) else []
        fixes += [f"--seqlen {tokens.size // samples}"] if tokens.ndim == 1 and tokens.size >= 2 * samples else []
        raise RecipeError(
            f"calibration {source.name} has {tokens.size} tokens, which make {len(starts)} windows of {seqlen}; {samples} of them need"
            f" {samples * seqlen} tokens; {' or '.join(['give more text', *fixes])}"
        )
    keys = np.random.Generator(np.random.PCG64(seed)).random(len(starts))
    chosen = np.sort(starts[np.argsort(keys, kind="stable")[:samples]]) if len(starts) > samples else starts
    if tokens.ndim == 2:
        return np.array(tokens[chosen])
    return np.stack([_window(tokens, int(start), seqlen, source.bos) for start in chosen])


def _starts(tokens: Array, seqlen: int, bos: int | None) -> Array:
    """Returns where windows begin in a stream, one after the other; with BOS in front a window holds one token of the stream less."""
    starts, at = [], 0
    while at + (size := seqlen - (bos is not None and tokens[at] != bos)) <= len(tokens):
        starts.append(at)
        at += size
        if at == len(tokens):
            break
    return np.array(starts, np.int64)


def _window(tokens: Array, start: int, seqlen: int, bos: int | None) -> Array:
    """Returns the window at start, (seqlen,), beginning with BOS if there is one to begin with."""
    if bos is None or tokens[start] == bos:
        return tokens[start : start + seqlen]
    return np.concatenate([np.array([bos], tokens.dtype), tokens[start : start + seqlen - 1]])


def _checked_ids(name: str, tokens: Array, vocab_size: int) -> Array:
    """Returns the ids as int32. Raises ModelError for ids that the model does not know."""
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ModelError(
            f"calibration {name}: token {low if low < 0 else high} is out of range, the model knows 0 to {vocab_size - 1};"
            " make the tokens with the model's own tokenizer"
        )
    return np.ascontiguousarray(tokens, np.int32)
