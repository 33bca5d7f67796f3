"""The tokenizer's special tokens, streaming detokenization, and stop strings."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, processors
from transformers import AutoTokenizer

from tersor.engine.text import Detokenizer, StopStrings
from tersor.engine.tokenizer import Tokenizer
from tersor.errors import ModelError, RecipeError
from tersor.tensor import ModelDescription
from tiny import tokenizer_json


def tokenizer(
    source: str | None = None, settings: dict[str, Any] | None = None, generation: dict[str, Any] | None = None, **config: Any
) -> Tokenizer:
    """Returns a Tokenizer of these files; the tiny byte-level one by default."""
    files = {
        "tokenizer.json": (source or tokenizer_json()).encode(),
        "tokenizer_config.json": json.dumps(settings or {}).encode(),
        "generation_config.json": json.dumps(generation or {}).encode(),
    }
    return Tokenizer(ModelDescription(config, files))


def with_bos(source: str, also_eos: bool = False) -> str:
    """Returns tokenizer.json with a post-processor that puts <|im_start|> in front, and perhaps <|im_end|> behind."""
    library = Library.from_str(source)
    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    library.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A" + (" <|im_end|>" if also_eos else ""), special_tokens=special
    )
    return str(library.to_str())


def sentencepiece_like() -> str:
    """Returns a tokenizer.json with byte fallback and a space that belongs to the next word, as Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c", "▁a", "▁ab", "bc", "é"]
    merges = [("▁", "a"), ("▁a", "b"), ("b", "c")]
    library = Library(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)
    return str(library.to_str())


SOURCES = {"bytes": tokenizer_json(), "sentencepiece": sentencepiece_like()}
NAMES = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("settings", "processed", "adds"),
    [
        (NAMES, False, False),
        (NAMES, True, True),
        (NAMES | {"add_bos_token": True}, False, True),
        (NAMES | {"add_bos_token": False}, True, False),
        ({"bos_token": {"content": "<|im_start|>", "special": True}}, True, True),
        ({}, False, False),
    ],
)
def test_bos_is_where_the_model_wants_it(settings: dict[str, Any], processed: bool, adds: bool) -> None:
    source = with_bos(tokenizer_json(), also_eos=True) if processed else tokenizer_json()
    t = tokenizer(source, settings, bos_token_id=1)
    plain = Library.from_str(tokenizer_json()).encode("the fox").ids
    assert t.bos_id == 1 and t.adds_bos == adds
    assert t.encode("the fox") == ([1] if adds else []) + plain
    assert t.encode("the fox", bos=True) == [1, *plain]
    assert t.encode("the fox", bos=False) == plain


def test_tokens_are_those_of_transformers(tmp_path: Any) -> None:
    (tmp_path / "tokenizer.json").write_text(with_bos(tokenizer_json()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    t = tokenizer(with_bos(tokenizer_json()), NAMES)
    for text in ("", "the quick brown fox", " é\u4f60 \U0001f600\n\n", "a<|im_end|>b"):
        assert t.encode(text) == oracle(text).input_ids
        assert t.decode(t.encode(text)) == oracle.decode(oracle(text).input_ids, skip_special_tokens=True)


def test_bos_of_a_model_without_one_is_refused() -> None:
    with pytest.raises(ModelError, match="no BOS token"):
        tokenizer().encode("x", bos=True)


@pytest.mark.parametrize(
    ("settings", "generation", "config", "want"),
    [
        ({}, {}, {"eos_token_id": 5}, (5,)),
        ({}, {"eos_token_id": [7, 6]}, {"eos_token_id": 5}, (6, 7)),
        (NAMES, {"eos_token_id": 0}, {}, (0, 2)),
        ({"eos_token": "not in it"}, {}, {"eos_token_id": None}, ()),
    ],
)
def test_eos_tokens(settings: dict[str, Any], generation: dict[str, Any], config: dict[str, Any], want: tuple[int, ...]) -> None:
    assert tokenizer(None, settings, generation, **config).eos_ids == want


def test_chat_template_of_several_is_the_default_one() -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].content }}!"}]
    assert tokenizer(None, {"chat_template": several}).apply_chat([{"role": "user", "content": "hi"}]) == "hi!"
    with pytest.raises(ModelError, match="no chat template"):
        tokenizer().apply_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json"),
        ({"tokenizer.json": b"{"}, "^tokenizer.json: "),
        ({"tokenizer.json": tokenizer_json().encode(), "generation_config.json": b"{"}, "^generation_config.json: "),
        ({"tokenizer.json": tokenizer_json().encode(), "tokenizer_config.json": b"[]"}, "holds a list; need an object"),
    ],
)
def test_broken_files_are_refused(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Tokenizer(ModelDescription({}, files))


@pytest.mark.parametrize("kind", SOURCES)
@given(text=st.text(max_size=30))
def test_pieces_are_whole_characters_and_join_to_the_text(kind: str, text: str) -> None:
    t = tokenizer(SOURCES[kind])
    tokens = t.encode(text)
    detokenizer = Detokenizer(t)
    pieces = [detokenizer.push(token) for token in tokens]
    whole = t.decode(tokens)
    assert "".join(pieces) + detokenizer.finish() == whole.rstrip("\ufffd")
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", SOURCES)
def test_an_unfinished_character_is_never_given_out(kind: str) -> None:
    t = tokenizer(SOURCES[kind])
    tokens = t.encode("ab \U0001f600", bos=False)
    for cut in range(1, len(tokens)):
        detokenizer = Detokenizer(t)
        text = "".join(detokenizer.push(token) for token in tokens[:cut]) + detokenizer.finish()
        assert "ab ".startswith(text)


def test_bytes_that_are_no_text_do_not_stall() -> None:
    t = tokenizer(SOURCES["sentencepiece"])
    byte = t.encode("\U0001f600", bos=False)[1]  # the first of four bytes, alone
    detokenizer = Detokenizer(t)
    letter = t.encode("c", bos=False)[-1]
    assert [detokenizer.push(token) for token in (letter, byte, letter)] == ["c", "", "\ufffdc"]


@example(text="ab b", stops=["ab b", "b "], cuts=set())  # one inside the other: the inner one ends first
@given(
    text=st.text("ab ", max_size=20),
    stops=st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3),
    cuts=st.sets(st.integers(0, 20)),
)
def test_stop_strings_cut_at_the_first_that_ends(text: str, stops: list[str], cuts: set[int]) -> None:
    edges = [0, *sorted(c for c in cuts if 0 < c < len(text)), len(text)]
    guard = StopStrings(stops)
    got = ""
    for begin, end in pairwise(edges):
        got += guard.push(text[begin:end])
        if guard.found:
            break
    got += guard.finish()
    ends = [(end, end - len(s)) for end in range(len(text) + 1) for s in stops if text[:end].endswith(s)]
    assert guard.found == bool(ends)
    assert got == (text[: min(ends)[1]] if ends else text)


def test_text_that_cannot_become_a_stop_is_given_out_at_once() -> None:
    guard = StopStrings(["</s>", "User:"])
    assert [guard.push(p) for p in ("Hi </", "b> Us", "er", " x", " User", ":", "more")] == ["Hi ", "</b> ", "", "User x", " ", "", ""]
    assert guard.found and guard.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RecipeError, match="stop is an empty string"):
        StopStrings(["a", ""])
