"""Text to tokens and back, with what a model's files say about its special tokens and chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tersor.engine.chat import Message, render_chat
from tersor.errors import ModelError
from tersor.tensor import ModelDescription

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """The model's tokenizer.

    bos_id: the token that starts a text, or None. adds_bos: whether `encode` puts it there by itself.
    eos_ids: the tokens that end a generation: those of generation_config (else of config), and the tokenizer's eos_token.
    special_tokens: bos_token, eos_token, ... as text, where the model names them. chat_template: Jinja source or None.
    joins: whether the bytes of a text are those of its tokens joined, as in byte-level BPE.
    """

    def __init__(self, description: ModelDescription) -> None:
        """Raises ModelError when tokenizer.json is missing or malformed."""
        import tokenizers

        if "tokenizer.json" not in description.files:
            raise ModelError("the model has no tokenizer.json; text cannot be encoded, give token ids")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(description.files["tokenizer.json"])
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.joins = isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel)
        settings = _json(description, "tokenizer_config.json")
        generation = _json(description, "generation_config.json")
        self.special_tokens = _special_tokens(settings)
        self.bos_id = self._bos(generation, description.config)
        self.adds_bos = self._adds_bos(settings)
        self.eos_ids = self._eos(generation, description.config)
        self.chat_template = _chat_template(description, settings)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Returns the tokens of a text. bos: whether the first is bos_id; None = as the model was trained (adds_bos).

        Special tokens written in the text are recognized. Raises ModelError for bos=True when the model has none.
        """
        if bos and self.bos_id is None:
            raise ModelError("the tokenizer has no BOS token; encode without it")
        tokens = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return [self.bos_id, *tokens] if (self.adds_bos if bos is None else bos) and self.bos_id is not None else tokens

    def decode(self, tokens: Iterable[int], special: bool = False) -> str:
        """Returns the text of the tokens; special: with the special ones written out. Bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=not special))

    def apply_chat(self, messages: Sequence[Message]) -> str:
        """Returns the conversation as text, up to where the assistant speaks; the template writes BOS itself, so encode
        it with bos=False. Raises ModelError when the model has no chat template."""
        if self.chat_template is None:
            raise ModelError("the model has no chat template; give a plain prompt")
        return render_chat(self.chat_template, messages, self.special_tokens)

    def _bos(self, generation: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
        """Returns the BOS token: the tokenizer's, else the one that the configs name."""
        if "bos_token" in self.special_tokens:
            found: int | None = self._tokenizer.token_to_id(self.special_tokens["bos_token"])
            if found is not None:
                return found
        return next((i for source in (generation, config) for i in _ids(source.get("bos_token_id"))), None)

    def _adds_bos(self, settings: Mapping[str, Any]) -> bool:
        """Returns add_bos_token of tokenizer_config.json, else whether tokenizer.json's post-processor starts with BOS."""
        if isinstance(settings.get("add_bos_token"), bool):
            return bool(settings["add_bos_token"]) and self.bos_id is not None
        empty = self._tokenizer.encode("", add_special_tokens=True).ids
        return bool(empty) and empty[0] == self.bos_id

    def _eos(self, generation: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[int, ...]:
        """Returns the tokens that end a generation, sorted."""
        found = set(_ids(generation.get("eos_token_id")) or _ids(config.get("eos_token_id")))
        if "eos_token" in self.special_tokens:
            own = self._tokenizer.token_to_id(self.special_tokens["eos_token"])
            found |= {own} if own is not None else set()
        return tuple(sorted(found))


def _json(description: ModelDescription, name: str) -> dict[str, Any]:
    """Returns a small JSON file of the model, empty when it is missing. Raises ModelError when it is no JSON object."""
    try:
        value = json.loads(description.files.get(name, b"{}"))
    except ValueError as error:
        raise ModelError(f"{name}: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{name}: holds a {type(value).__name__}; need an object")
    return value


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the special tokens as text; tokenizer_config.json writes them as text or as {"content": text}."""
    found = {}
    for name in _SPECIAL:
        token = settings.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _chat_template(description: ModelDescription, settings: Mapping[str, Any]) -> str | None:
    """Returns the chat template: chat_template.jinja, else tokenizer_config.json's, of several the one named default."""
    if "chat_template.jinja" in description.files:
        return description.files["chat_template.jinja"].decode("utf-8", "replace")
    given = settings.get("chat_template")
    if isinstance(given, list):
        given = next((t.get("template") for t in given if isinstance(t, Mapping) and t.get("name") == "default"), None)
    return given if isinstance(given, str) else None


def _ids(value: Any) -> list[int]:
    """Returns token ids written as one integer, a list of them, or null."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
