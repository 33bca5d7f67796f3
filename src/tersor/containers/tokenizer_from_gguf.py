"""GGUF's tokenizer keys -> tokenizer.json, tokenizer_config.json and generation_config.json.

Two kinds: `gpt2`, byte-level BPE with its merges listed, and `llama`, SentencePiece BPE, where a pair merges by the score of the token
that it makes. Source: ggml-org/ggml docs/gguf.md ("Tokenizer"), llama.cpp src/llama-vocab.cpp; tokenizer.json as huggingface/tokenizers
serializes it (tokenizers/src/tokenizer/serialization.rs) and as transformers' convert_slow_tokenizer.py builds it for these kinds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tersor.containers.gguf_file import KeyValue
from tersor.containers.pretokenizers import PRE_TOKENIZERS, PreTokenizer, pre_tokenizer_json
from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError, unknown

# tokenizer.ggml.token_type (llama.h, llama_token_type)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# No vocabulary has longer tokens; finding the merges of one takes time quadratic in its length.
MAX_TOKEN = 1024

SPACE = "\u2581"  # how SentencePiece writes a space
_MODELS = ("gpt2", "llama", "none", "no_vocab")
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class Vocabulary:
    """The tokenizer keys of one file, checked: tokens (unique by id), types (n,), scores (n,), ids of special tokens."""

    def __init__(self, where: str, metadata: Mapping[str, KeyValue]) -> None:
        self.where, self._metadata = where, metadata
        self.tokens: list[str] = self._list("tokenizer.ggml.tokens", "[str]")
        n = len(self.tokens)
        longest = max(self.tokens, key=len, default="")
        if len(longest) > MAX_TOKEN:
            raise ContainerError(f"{where}: a token of {len(longest)} characters, above the limit of {MAX_TOKEN}; the file is damaged")
        self.types = self._numbers("tokenizer.ggml.token_type", n, np.ones(n, np.int64)).astype(np.int64)
        self.scores = self._numbers("tokenizer.ggml.scores", n, np.zeros(n)).astype(np.float64)
        if not np.isfinite(self.scores).all():
            raise ContainerError(f"{where}: tokenizer.ggml.scores holds values that are not finite; the file is damaged")

    def get(self, key: str, kind: str, default: Any = None) -> Any:
        """Returns a value of this type, the default when absent."""
        found, value = self._metadata.get(f"tokenizer.{key}", (kind, default))
        if found != kind:
            raise ContainerError(f"{self.where}: tokenizer.{key} is {found}, needs {kind}; the file is damaged")
        return value

    def _list(self, key: str, kind: str) -> Any:
        found, value = self._metadata.get(key, (None, None))
        if found != kind:
            raise ContainerError(f"{self.where}: {key} is {found or 'missing'}, needs {kind}; the file has no usable tokenizer")
        return value

    def _numbers(self, key: str, n: int, default: Any) -> Any:
        found, value = self._metadata.get(key, ("[]", default))
        if not found.startswith("[") or found == "[str]" or len(value) != n:
            raise ContainerError(f"{self.where}: {key} is {found} with {len(value)} items, needs {n} numbers; the file is damaged")
        return value

    def special_id(self, name: str) -> int | None:
        """Returns tokenizer.ggml.{name}_token_id, None when absent or, as some writers say so, out of range."""
        _, value = self._metadata.get(f"tokenizer.ggml.{name}_token_id", ("u32", None))
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def is_padding(self, number: int) -> bool:
        """Returns whether the token only fills the embedding's rows."""
        return bool(self.types[number] == UNUSED) and self.tokens[number] == f"[PAD{number}]"


def read_tokenizer(where: str, metadata: Mapping[str, KeyValue]) -> dict[str, bytes]:
    """Returns the tokenizer's files by name; none when the file says that it has no tokenizer.

    Raises ContainerError for an unknown model or pre-tokenizer, listing the known, and for keys that contradict each other.
    """
    _, model = metadata.get("tokenizer.ggml.model", ("str", "none"))
    if model not in _MODELS:
        raise ContainerError(f"{where}: {unknown('tokenizer model', shorten(model), _MODELS)}")
    if model in ("none", "no_vocab"):
        return {}
    vocabulary = Vocabulary(where, metadata)
    if model == "gpt2":
        pre = _pre_tokenizer(vocabulary)
        tokenizer, add_bos = _byte_level(vocabulary, pre), pre.add_bos
    else:
        tokenizer, add_bos = _sentence_piece(vocabulary), True
    add_bos = bool(vocabulary.get("ggml.add_bos_token", "bool", add_bos))
    add_eos = bool(vocabulary.get("ggml.add_eos_token", "bool", False))
    tokenizer["post_processor"] = _template(vocabulary, add_bos, add_eos) or tokenizer["post_processor"]
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _tokenizer_config(vocabulary, add_bos, add_eos),
        "generation_config.json": _generation_config(vocabulary),
    }
    return {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}


def _pre_tokenizer(vocabulary: Vocabulary) -> PreTokenizer:
    name = vocabulary.get("ggml.pre", "str", "default")
    if name not in PRE_TOKENIZERS:
        raise ContainerError(f"{vocabulary.where}: {unknown('tokenizer.ggml.pre', shorten(name), PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[name]


def _ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Returns {token: id} without padding; of equal tokens the first."""
    out: dict[str, int] = {}
    for number, token in enumerate(vocabulary.tokens):
        if not vocabulary.is_padding(number):
            out.setdefault(token, number)
    return out


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Returns the tokens that are recognized in the text before anything else."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": vocabulary.tokens[number], **flags, "special": kind != USER_DEFINED}
        for number, kind in enumerate(vocabulary.types.tolist())
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and vocabulary.tokens[number]
    ]


def _document(added: list[dict[str, Any]], normalizer: Any, pre_tokenizer: Any, post: Any, decoder: Any, model: Any) -> dict[str, Any]:
    head: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer}
    return head | {"pre_tokenizer": pre_tokenizer, "post_processor": post, "decoder": decoder, "model": model}


def _byte_level(vocabulary: Vocabulary, pre: PreTokenizer) -> dict[str, Any]:
    """Returns tokenizer.json of byte-level BPE."""
    ids = _ids(vocabulary)
    merges = vocabulary.get("ggml.merges", "[str]")
    if merges is None:
        raise ContainerError(f"{vocabulary.where}: tokenizer.ggml.merges is missing, which a gpt2 tokenizer needs; convert the model again")
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise ContainerError(
                f"{vocabulary.where}: merge {shorten(merge)!r} is no pair of tokens that make a token; the file is damaged"
            )
        pairs.append([left, right])
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pre.ignore_merges,
        "vocab": ids,
        "merges": pairs,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    normalizer = {"type": "NFC"} if pre.nfc else None
    return _document(_added_tokens(vocabulary), normalizer, pre_tokenizer_json(pre), byte_level | {"use_regex": False}, byte_level, model)


def _sentence_piece(vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns tokenizer.json of SentencePiece BPE: spaces become U+2581, unknown characters their UTF-8 bytes."""
    prefix = bool(vocabulary.get("ggml.add_space_prefix", "bool", True))
    unk = vocabulary.special_id("unknown")
    if unk is None:
        unk = next(iter(np.flatnonzero(vocabulary.types == UNKNOWN).tolist()), None)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]} if prefix else replace
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    ids = _ids(vocabulary)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if unk is None else vocabulary.tokens[unk],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool((vocabulary.types == BYTE).any()),
        "ignore_merges": False,
        "vocab": ids,
        "merges": _merges_of_scores(vocabulary, ids),
    }
    return _document(_added_tokens(vocabulary), normalizer, None, None, {"type": "Sequence", "decoders": back + strip}, model)


def _merges_of_scores(vocabulary: Vocabulary, ids: Mapping[str, int]) -> list[list[str]]:
    """Returns the merges, best first: every way to make a token of two, by the token's score.

    SentencePiece merges the pair whose token scores best, the leftmost of equals; llama.cpp the same (`llm_tokenizer_spm`).
    """
    mergeable = {token: number for token, number in ids.items() if vocabulary.types[number] in (NORMAL, USER_DEFINED)}
    found: list[tuple[float, int, list[str]]] = []
    for token, number in mergeable.items():
        score = -float(vocabulary.scores[number])
        for cut in range(1, len(token)):
            if token[:cut] in mergeable and token[cut:] in mergeable:
                found.append((score, number, [token[:cut], token[cut:]]))
    found.sort(key=lambda merge: merge[:2])
    return [pair for _, _, pair in found]


def _template(vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> dict[str, Any] | None:
    """Returns the post-processor that adds BOS and EOS, None when there is nothing to add."""
    ends = [vocabulary.special_id("bos") if add_bos else None, vocabulary.special_id("eos") if add_eos else None]
    if ends == [None, None]:
        return None

    def around(sequence: str, type_id: int) -> list[dict[str, Any]]:
        tokens = [None if end is None else {"SpecialToken": {"id": vocabulary.tokens[end], "type_id": type_id}} for end in ends]
        whole = [tokens[0], {"Sequence": {"id": sequence, "type_id": type_id}}, tokens[1]]
        return [part for part in whole if part is not None]

    special = {
        token: {"id": token, "ids": [end], "tokens": [token]} for end in ends if end is not None for token in [vocabulary.tokens[end]]
    }
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": around("A", 0) + around("B", 1), "special_tokens": special}


def _tokenizer_config(vocabulary: Vocabulary, add_bos: bool, add_eos: bool) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"add_bos_token": add_bos, "add_eos_token": add_eos}
    for name, key in _SPECIAL.items():
        number = vocabulary.special_id(key)
        if number is not None:
            config[name] = vocabulary.tokens[number]
    template = vocabulary.get("chat_template", "str")
    named = {name: vocabulary.get(f"chat_template.{name}", "str") for name in vocabulary.get("chat_templates", "[str]", [])}
    named = {name: text for name, text in named.items() if text is not None}
    if named:
        everything = {"default": template, **named} if template is not None else named
        config["chat_template"] = [{"name": name, "template": text} for name, text in everything.items()]
    elif template is not None:
        config["chat_template"] = template
    return config


def _generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns generation_config.json: the ends of a turn and of a message end a generation too."""
    ends: Sequence[int | None] = [vocabulary.special_id(name) for name in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(end for end in ends if end is not None))
    config = {"bos_token_id": vocabulary.special_id("bos"), "pad_token_id": vocabulary.special_id("padding")}
    config = {key: value for key, value in config.items() if value is not None}
    return {**config, "eos_token_id": eos[0] if len(eos) == 1 else eos} if eos else dict(config)
