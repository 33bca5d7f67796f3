"""tokenizer.json, tokenizer_config.json and the chat template -> GGUF's tokenizer keys.

Source: llama.cpp conversion/base.py (`_set_vocab_gpt2`, `_set_vocab_sentencepiece`), gguf-py/gguf/vocab.py (`SpecialVocab`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.containers.gguf_file import KeyValue
from tersor.containers.pretokenizers import name_of
from tersor.containers.safetensors_file import parse_json, shorten
from tersor.containers.tokenizer_from_gguf import BYTE, CONTROL, MAX_TOKEN, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from tersor.errors import ContainerError
from tersor.tensor import ModelDescription

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class _Source:
    """The tokenizer files of a model, parsed. size: rows of the embedding."""

    where: str
    tokenizer: Mapping[str, Any]
    settings: Mapping[str, Any]
    generation: Mapping[str, Any]
    config: Mapping[str, Any]
    size: int

    @property
    def model(self) -> Mapping[str, Any]:
        """The `model` of tokenizer.json."""
        model = self.tokenizer.get("model")
        return model if isinstance(model, Mapping) else {}

    def refuse(self, what: str) -> ContainerError:
        """Returns the error for something that GGUF cannot say."""
        return ContainerError(f"{self.where}: tokenizer.json: {what}")


def write_tokenizer(where: str, description: ModelDescription) -> dict[str, KeyValue]:
    """Returns the tokenizer's key-values; for a model without tokenizer files, those that say so.

    Raises ContainerError for a tokenizer that GGUF's readers would run differently.
    """
    files = description.files
    if "tokenizer.json" not in files:
        if any(name in files for name in ("tokenizer.model", "vocab.json")):
            raise ContainerError(f"{where}: no tokenizer.json; make one with transformers (AutoTokenizer, save_pretrained) and try again")
        return {"tokenizer.ggml.model": ("str", "none")}
    parsed = [_object(where, files, name) for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")]
    source = _Source(where, parsed[0], parsed[1], parsed[2], description.config, description.config["vocab_size"])
    if source.model.get("type", "BPE") != "BPE" or not isinstance(source.model.get("vocab"), Mapping):
        raise source.refuse(f"model type {shorten(source.model.get('type'))!r}; GGUF can hold BPE and SentencePiece BPE so far")
    tokens, types = _tokens(source)
    spm = bool(source.model.get("byte_fallback")) or _replaces_spaces(source.tokenizer.get("normalizer"))
    pairs = _sentence_piece(source, tokens, types) if spm else _byte_level(source, tokens, types)
    return pairs | _special(source, tokens) | _chat_template(description, source)


def _object(where: str, files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    value = parse_json(files.get(name, b"{}"), where, name)
    if not isinstance(value, dict):
        raise ContainerError(f"{where}: {name} holds a JSON {type(value).__name__}, needs an object")
    return value


def _tokens(source: _Source) -> tuple[list[str], list[int]]:
    """Returns (token by id, type by id) for every row of the embedding; rows without a token are named [PADi]."""
    tokens = [f"[PAD{i}]" for i in range(source.size)]
    types = [UNUSED] * source.size
    for token, number in source.model["vocab"].items():
        _place(source, tokens, types, token, number, BYTE if source.model.get("byte_fallback") and _BYTE_TOKEN.fullmatch(token) else NORMAL)
    for added in source.tokenizer.get("added_tokens") or ():
        if not isinstance(added, Mapping):
            raise source.refuse(f"added token {shorten(added)} is no object")
        _place(source, tokens, types, added.get("content"), added.get("id"), CONTROL if added.get("special") else USER_DEFINED)
    unk = source.model.get("unk_token")
    if unk is not None and unk in tokens:
        types[tokens.index(unk)] = UNKNOWN
    return tokens, types


def _place(source: _Source, tokens: list[str], types: list[int], token: Any, number: Any, kind: int) -> None:
    if not isinstance(token, str) or len(token) > MAX_TOKEN or not isinstance(number, int) or not 0 <= number < source.size:
        raise source.refuse(f"token {shorten(token)!r} has id {shorten(number)}, the embedding has {source.size} rows")
    tokens[number], types[number] = token, kind


def _merges(source: _Source) -> list[tuple[str, str]]:
    """Returns the merges as pairs; they are written as pairs or as one text with a space."""
    out = []
    for merge in source.model.get("merges") or ():
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and len(part) <= MAX_TOKEN for part in pair):
            raise source.refuse(f"merge {shorten(merge)} is no pair of tokens")
        out.append((pair[0], pair[1]))
    return out


def _common(model: str, pre: str, tokens: list[str], types: list[int]) -> dict[str, KeyValue]:
    return {
        "tokenizer.ggml.model": ("str", model),
        "tokenizer.ggml.pre": ("str", pre),
        "tokenizer.ggml.tokens": ("[str]", tokens),
        "tokenizer.ggml.token_type": ("[i32]", np.array(types, np.int32)),
    }


def _byte_level(source: _Source, tokens: list[str], types: list[int]) -> dict[str, KeyValue]:
    """Returns the keys of byte-level BPE."""
    normalizer = source.tokenizer.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise source.refuse(f"normalizer {shorten(normalizer)} has no place in GGUF")
    pre = name_of(source.tokenizer.get("pre_tokenizer"), bool(source.model.get("ignore_merges")), normalizer is not None)
    if pre is None:
        raise source.refuse(
            f"pre_tokenizer {shorten(source.tokenizer.get('pre_tokenizer'), 200)} (ignore_merges {bool(source.model.get('ignore_merges'))},"
            f" normalizer {shorten(normalizer)}) is none that GGUF has a name for"
        )
    merges = _merges(source)
    spaced = next((pair for pair in merges if " " in pair[0] + pair[1]), None)
    if spaced is not None:
        raise source.refuse(f"merge {shorten(spaced)} holds a space, which GGUF's merges cannot")
    return _common("gpt2", pre, tokens, types) | {"tokenizer.ggml.merges": ("[str]", [f"{left} {right}" for left, right in merges])}


def _sentence_piece(source: _Source, tokens: list[str], types: list[int]) -> dict[str, KeyValue]:
    """Returns the keys of SentencePiece BPE. A token's score is minus the rank of the first merge that makes it."""
    prefix = _prefix(source)
    merges = _merges(source)
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    _check_scores_suffice(source, merges, tokens, types)
    lowest = -float(len(merges))

    def score(token: str, kind: int) -> float:
        return -float(rank[token]) if token in rank else lowest if kind in (NORMAL, USER_DEFINED) else 0.0

    scores = [score(token, kind) for token, kind in zip(tokens, types)]
    return _common("llama", "default", tokens, types) | {
        "tokenizer.ggml.scores": ("[f32]", np.array(scores, np.float32)),
        "tokenizer.ggml.add_space_prefix": ("bool", prefix),
    }


def _check_scores_suffice(source: _Source, merges: Iterable[tuple[str, str]], tokens: list[str], types: list[int]) -> None:
    """Raises ContainerError when merging by the score of the result would allow a pair that is not among the merges.

    SentencePiece has scores, not merges: any two neighbours that make a token may merge. A tokenizer.json that was made from a
    SentencePiece model lists all of them.
    """
    known = set(merges)
    normal = {token for token, kind in zip(tokens, types) if kind == NORMAL}
    for token in {left + right for left, right in known} & normal:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in known and pair[0] in normal and pair[1] in normal:
                raise source.refuse(
                    f"{shorten(pair)} make a token but are no merge, so this is no SentencePiece model; GGUF has no tokenizer for it"
                )


def _replaces_spaces(normalizer: Any) -> bool:
    """Returns whether the normalizer writes spaces as U+2581."""
    parts = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, Mapping) else []
    return any(isinstance(part, Mapping) and part.get("type") == "Replace" and part.get("content") == SPACE for part in parts)


def _prefix(source: _Source) -> bool:
    """Returns whether a space is put before the text: by a normalizer, or by the Metaspace pre-tokenizer."""
    normalizer, pre = source.tokenizer.get("normalizer"), source.tokenizer.get("pre_tokenizer")
    if isinstance(pre, Mapping) and pre.get("type") == "Metaspace":
        return bool(pre.get("prepend_scheme", "always") != "never")
    if not _replaces_spaces(normalizer):
        raise source.refuse(f"normalizer {shorten(normalizer)} with byte fallback is not SentencePiece's (spaces as U+2581)")
    assert isinstance(normalizer, Mapping)
    return any(part.get("type") == "Prepend" for part in normalizer.get("normalizers", []))


def _special(source: _Source, tokens: list[str]) -> dict[str, KeyValue]:
    """Returns the ids of special tokens, and whether BOS and EOS are added."""
    ids = {token: number for number, token in reversed(list(enumerate(tokens)))}
    pairs: dict[str, KeyValue] = {}
    for name, key in _SPECIAL.items():
        token = source.settings.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        number = ids.get(text) if isinstance(text, str) else next(iter(_numbers(source.config.get(f"{name}_id"))), None)
        if number is not None and 0 <= number < source.size:
            pairs[f"tokenizer.ggml.{key}_token_id"] = ("u32", number)
    ends = [n for n in _numbers(source.generation.get("eos_token_id", source.config.get("eos_token_id"))) if 0 <= n < source.size]
    own = pairs.get("tokenizer.ggml.eos_token_id", ("u32", None))[1]
    if own is None and ends:
        own = ends[0]
        pairs["tokenizer.ggml.eos_token_id"] = ("u32", own)
    for key, number in zip(("eot", "eom"), (n for n in ends if n != own)):
        pairs[f"tokenizer.ggml.{key}_token_id"] = ("u32", number)
    starts, stops = _template_ends(source.tokenizer.get("post_processor"))
    pairs["tokenizer.ggml.add_bos_token"] = ("bool", bool(source.settings.get("add_bos_token", starts)))
    pairs["tokenizer.ggml.add_eos_token"] = ("bool", bool(source.settings.get("add_eos_token", stops)))
    return pairs


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _template_ends(post: Any) -> tuple[bool, bool]:
    """Returns whether the post-processor puts a token (before, after) the text."""
    if not isinstance(post, Mapping):
        return False, False
    if post.get("type") == "Sequence":
        ends = [_template_ends(part) for part in post.get("processors", [])]
        return any(first for first, _ in ends), any(last for _, last in ends)
    single = post.get("single") if post.get("type") == "TemplateProcessing" else None
    if not isinstance(single, list) or not single:
        return False, False
    return "SpecialToken" in single[0], "SpecialToken" in single[-1]


def _chat_template(description: ModelDescription, source: _Source) -> dict[str, KeyValue]:
    """Returns the chat template, and named ones."""
    given: Any = source.settings.get("chat_template")
    if "chat_template.jinja" in description.files:
        given = description.files["chat_template.jinja"].decode("utf-8", "replace")
    if isinstance(given, str):
        return {"tokenizer.chat_template": ("str", given)}
    if not isinstance(given, list):
        return {}
    named = {item["name"]: item["template"] for item in given if isinstance(item, Mapping) and {"name", "template"} <= set(item)}
    pairs: dict[str, KeyValue] = {}
    if "default" in named:
        pairs["tokenizer.chat_template"] = ("str", named.pop("default"))
    if named:
        pairs["tokenizer.chat_templates"] = ("[str]", list(named))
    return pairs | {f"tokenizer.chat_template.{name}": ("str", text) for name, text in named.items()}
