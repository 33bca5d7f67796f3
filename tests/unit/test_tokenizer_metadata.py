"""Tokenizers between tokenizer.json and GGUF's keys: the same ids as the tokenizers and sentencepiece libraries on varied text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tersor.containers.pretokenizers import PRE_TOKENIZERS
from tersor.containers.tokenizer_from_gguf import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_tokenizer
from tersor.containers.tokenizer_to_gguf import write_tokenizer
from tersor.errors import ContainerError
from tersor.tensor import ModelDescription
from tiny import tiny_model

TEXT = "\n".join(list(topics.values())[:12])
SAMPLES = [
    "Hello world", "  two  spaces\tand\ttabs \n\n\nnewlines\r\n end ", "It's I'LL we'Ve 123456 3.14 1,000,000",
    "def f(x):\n    return x**2  # näïve Ünïcödé", "日本語テキスト と English 🙂👍🏽 mixed", "<|im_start|>user\nhi<|im_end|>\n",
    "ABCdefGHI camelCaseWord SNAKE_CASE", "a\u0301 combining \u00a0nbsp\u2003em", "!!!???...---===", "Dž ſs '½ ² ٣٤٥", " ", "",
]  # fmt: skip
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def split(expression: str) -> Any:
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(expression), "isolated")


def byte_level(use_regex: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


# As the models that these names come from spell their pre-tokenizers: SmolLM2, Llama 3, Qwen 2.5, Mistral Nemo, GPT-2.
LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: byte_level(True),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)]),
    "llama-bpe": lambda: pre_tokenizers.Sequence([split(CONTRACTIONS + LETTERS + r"\p{N}{1,3}" + REST), byte_level()]),
    "qwen2": lambda: pre_tokenizers.Sequence([split(CONTRACTIONS + LETTERS + r"\p{N}" + REST), byte_level()]),
}


@lru_cache
def trained(name: str) -> Tokenizer:
    """Returns a byte-level BPE of 700 tokens with this pre-tokenizer, with special tokens at the end and one that is not special."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = PUBLISHED[name](), decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT, *SAMPLES], trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


def description(tokenizer: Tokenizer | dict[str, Any], rows: int = 0, **files: Any) -> ModelDescription:
    document = tokenizer if isinstance(tokenizer, dict) else json.loads(tokenizer.to_str())
    size = max([*document["model"]["vocab"].values(), *(t["id"] for t in document["added_tokens"])]) + 1
    contents = {name.replace("__", "."): json.dumps(content).encode() for name, content in files.items()}
    return ModelDescription({"vocab_size": rows or size}, {"tokenizer.json": json.dumps(document).encode(), **contents})


@pytest.mark.parametrize("name", PUBLISHED)
def test_byte_level_round_trip_gives_the_same_ids(name: str) -> None:
    tokenizer = trained(name)
    metadata = write_tokenizer("out", description(tokenizer))
    assert metadata["tokenizer.ggml.model"] == ("str", "gpt2") and metadata["tokenizer.ggml.pre"] == ("str", name)
    again = Tokenizer.from_buffer(read_tokenizer("in", metadata)["tokenizer.json"])
    for text in [*SAMPLES, TEXT[:3000], "<think>1 + 1</think>"]:
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert again.encode(text, add_special_tokens=False).ids == expected, text
        assert again.decode(expected, skip_special_tokens=False) == tokenizer.decode(expected, skip_special_tokens=False)
        assert again.decode(expected) == tokenizer.decode(expected)


def test_every_pre_tokenizer_name_can_be_read() -> None:
    metadata = write_tokenizer("out", description(trained("gpt-2")))
    for name in PRE_TOKENIZERS:
        files = read_tokenizer("in", metadata | {"tokenizer.ggml.pre": ("str", name)})
        tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        assert tokenizer.decode(tokenizer.encode(SAMPLES[3], add_special_tokens=False).ids) == SAMPLES[3]


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "it's 2024!", ["it", "'s", " 2024", "!"]),
        ("smollm", "it's 2024!", ["it", "'s", " ", "2", "0", "2", "4", "!"]),
        ("llama-bpe", "IT'S 2024\n!", ["IT", "'S", " ", "202", "4", "\n", "!"]),
        ("qwen2", "IT'S 2024\n!", ["IT", "'S", " ", "2", "0", "2", "4", "\n", "!"]),
        ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
        ("default", "a+b 1234", ["a", "+", "b", " ", "123", "4"]),
    ],
)
def test_pieces_by_hand(name: str, text: str, pieces: list[str]) -> None:
    metadata = write_tokenizer("out", description(trained("gpt-2"))) | {"tokenizer.ggml.pre": ("str", name)}
    pre = Tokenizer.from_buffer(read_tokenizer("in", metadata)["tokenizer.json"]).pre_tokenizer
    decode = decoders.ByteLevel()
    assert [decode.decode([piece]) for piece, _ in pre.pre_tokenize_str(text)] == pieces


def test_types_and_padding() -> None:
    tokenizer = trained("smollm")
    size = tokenizer.get_vocab_size()
    metadata = write_tokenizer("out", description(tokenizer, rows=size + 3))
    tokens, types = metadata["tokenizer.ggml.tokens"][1], metadata["tokenizer.ggml.token_type"][1].tolist()
    assert types[: size - 3] == [NORMAL] * (size - 3) and types[size - 3 :] == [CONTROL, CONTROL, USER_DEFINED, UNUSED, UNUSED, UNUSED]
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, size + 3)]
    assert tokens[:size] == [tokenizer.id_to_token(i) for i in range(size)]
    assert Tokenizer.from_buffer(read_tokenizer("in", metadata)["tokenizer.json"]).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("add_eos", [True, False])
def test_bos_and_eos(add_bos: bool, add_eos: bool) -> None:
    settings = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": add_bos, "add_eos_token": add_eos}
    metadata = write_tokenizer("out", description(trained("smollm"), tokenizer_config__json=settings))
    bos, eos = (trained("smollm").token_to_id(t) for t in ("<|im_start|>", "<|im_end|>"))
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (("u32", bos), ("u32", eos))
    files = read_tokenizer("in", metadata)
    ids = Tokenizer.from_buffer(files["tokenizer.json"]).encode("a").ids
    assert ids == [bos] * add_bos + trained("smollm").encode("a").ids + [eos] * add_eos
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["add_bos_token"]) == ("<|im_start|>", "<|im_end|>", add_bos)


def test_bos_is_found_in_the_post_processor() -> None:
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    tokenizer = Tokenizer.from_str(trained("llama-bpe").to_str())
    start = tokenizer.token_to_id("<|im_start|>")
    template = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
    tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), template])  # as Llama 3 has it
    metadata = write_tokenizer("out", description(tokenizer, tokenizer_config__json={"bos_token": "<|im_start|>"}))
    assert metadata["tokenizer.ggml.add_bos_token"] == ("bool", True) and metadata["tokenizer.ggml.add_eos_token"] == ("bool", False)


def test_all_ends_of_a_generation_survive() -> None:
    files = {"tokenizer_config__json": {"eos_token": "<|im_end|>"}, "generation_config__json": {"eos_token_id": [5, 701, 7]}}
    metadata = write_tokenizer("out", description(trained("smollm"), **files))
    assert [metadata[f"tokenizer.ggml.{k}_token_id"][1] for k in ("eos", "eot", "eom")] == [701, 5, 7]
    assert json.loads(read_tokenizer("in", metadata)["generation_config.json"])["eos_token_id"] == [701, 5, 7]


@pytest.mark.parametrize(
    "given",
    [
        "{{ plain }}",
        [{"name": "default", "template": "{{ a }}"}, {"name": "tool", "template": "{{ b }}"}],
        [{"name": "rag", "template": "{{ c }}"}],
    ],
)
def test_chat_templates(given: Any) -> None:
    metadata = write_tokenizer("out", description(trained("smollm"), tokenizer_config__json={"chat_template": given}))
    assert json.loads(read_tokenizer("in", metadata)["tokenizer_config.json"])["chat_template"] == given


def test_chat_template_file_wins() -> None:
    source = description(trained("smollm"), tokenizer_config__json={"chat_template": "old"})
    metadata = write_tokenizer("out", ModelDescription(source.config, {**source.files, "chat_template.jinja": "neü".encode()}))
    assert metadata["tokenizer.chat_template"] == ("str", "neü")


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    import transformers

    from tersor.conversion import convert

    hf = tiny_model(tmp_path / "hf")
    convert(hf, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "again")
    expected = transformers.AutoTokenizer.from_pretrained(hf)
    readers = [
        transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "again"),
    ]
    messages = [{"role": "user", "content": "hi"}]
    for tokenizer in readers:
        for text in SAMPLES:
            assert tokenizer(text).input_ids == expected(text).input_ids
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
        assert tokenizer.apply_chat_template(messages, tokenize=False) == expected.apply_chat_template(messages, tokenize=False)


# --- SentencePiece --------------------------------------------------------------------------------------------------------


@lru_cache
def sentence_piece(prefix: bool, symbols: tuple[str, ...] = ()) -> tuple[Any, dict[str, Any]]:
    """Returns (a trained SentencePiece BPE of 600 pieces, the GGUF keys that llama.cpp's converter writes for it)."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=600, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=prefix,
        user_defined_symbols=list(symbols), minloglevel=2,
    )  # fmt: skip
    piece = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    n = piece.vocab_size()
    tokens = [piece.id_to_piece(i) for i in range(n)]
    kinds = [
        (piece.is_unknown, UNKNOWN),
        (piece.is_control, CONTROL),
        (piece.is_byte, BYTE),
        (lambda i: tokens[i] in symbols, USER_DEFINED),
    ]
    types = [next((kind for test, kind in kinds if test(i)), NORMAL) for i in range(n)]
    metadata = {
        "tokenizer.ggml.model": ("str", "llama"),
        "tokenizer.ggml.tokens": ("[str]", tokens),
        "tokenizer.ggml.scores": ("[f32]", np.array([piece.get_score(i) for i in range(n)], np.float32)),
        "tokenizer.ggml.token_type": ("[i32]", np.array(types, np.int32)),
        "tokenizer.ggml.add_space_prefix": ("bool", prefix),
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
        "tokenizer.ggml.unknown_token_id": ("u32", 0),
    }
    return piece, metadata


@pytest.mark.parametrize(("prefix", "symbols"), [(True, ()), (False, ()), (True, ("<start>", "<end>"))])
def test_sentence_piece_ids(prefix: bool, symbols: tuple[str, ...]) -> None:
    """Ids and text are the sentencepiece library's own, from GGUF's scores, and again after a way to tokenizer.json and back."""
    piece, metadata = sentence_piece(prefix, symbols)
    files = read_tokenizer("in", metadata)
    again = write_tokenizer("out", ModelDescription({"vocab_size": piece.vocab_size() + 2}, files))
    n = piece.vocab_size()
    assert again["tokenizer.ggml.tokens"][1][:n] == metadata["tokenizer.ggml.tokens"][1]
    assert again["tokenizer.ggml.token_type"][1].tolist() == [*metadata["tokenizer.ggml.token_type"][1].tolist(), UNUSED, UNUSED]
    assert again["tokenizer.ggml.add_space_prefix"] == ("bool", prefix)
    for keys in (metadata, again):
        tokenizer = Tokenizer.from_buffer(read_tokenizer("in", keys)["tokenizer.json"])
        for text in [*SAMPLES, TEXT[:3000], "aaaaaaa     bbbb", "trailing ", *(["x y<end>"] if symbols else [])]:
            if text:
                expected = piece.encode(text)
                assert tokenizer.encode(text).ids == [1, *expected], text  # llama.cpp adds BOS when the file is silent
                if not text.endswith(">"):  # as text, symbols are told from special tokens by each library in its own way
                    assert tokenizer.decode(expected) == piece.decode(expected)


def test_scores_rank_the_tokens_as_sentence_piece_does() -> None:
    piece, metadata = sentence_piece(True)
    again = write_tokenizer("out", ModelDescription({"vocab_size": piece.vocab_size()}, read_tokenizer("in", metadata)))
    old, new = metadata["tokenizer.ggml.scores"][1], again["tokenizer.ggml.scores"][1]
    merged = [
        i
        for i, t in enumerate(metadata["tokenizer.ggml.token_type"][1])
        if t == NORMAL and len(metadata["tokenizer.ggml.tokens"][1][i]) > 1
    ]
    assert np.argsort(-old[merged], kind="stable").tolist() == np.argsort(-new[merged], kind="stable").tolist()


def test_metaspace_is_sentence_piece_too() -> None:
    """Newer tokenizer.json files write the space prefix as a pre-tokenizer."""
    _, metadata = sentence_piece(True)
    document = json.loads(read_tokenizer("in", metadata)["tokenizer.json"])
    document |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}}
    found = write_tokenizer("out", description(document))
    assert found["tokenizer.ggml.model"] == ("str", "llama") and found["tokenizer.ggml.add_space_prefix"] == ("bool", True)


# --- refusals -------------------------------------------------------------------------------------------------------------


def small() -> dict[str, Any]:
    """Returns the keys of a byte-level tokenizer of four tokens."""
    return {
        "tokenizer.ggml.model": ("str", "gpt2"),
        "tokenizer.ggml.pre": ("str", "gpt-2"),
        "tokenizer.ggml.tokens": ("[str]", ["a", "b", "ab", "<s>"]),
        "tokenizer.ggml.token_type": ("[i32]", np.array([1, 1, 1, 3], np.int32)),
        "tokenizer.ggml.merges": ("[str]", ["a b"]),
    }


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tokenizer.ggml.model": ("str", "bert")}, "unknown tokenizer model 'bert'; known: gpt2, llama, no_vocab, none"),
        ({"tokenizer.ggml.pre": ("str", "gpt-9")}, "unknown tokenizer.ggml.pre 'gpt-9'; known: "),
        ({"tokenizer.ggml.pre": ("u32", 1)}, "tokenizer.ggml.pre is u32, needs str"),
        ({"tokenizer.ggml.tokens": ("[u32]", np.arange(4))}, "tokenizer.ggml.tokens is [u32], needs [str]"),
        ({"tokenizer.ggml.tokens": (None, None)}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.tokens": ("[str]", ["a", "b", "ab", "x" * 5000])}, "a token of 5000 characters"),
        ({"tokenizer.ggml.token_type": ("[i32]", np.ones(3, np.int32))}, "token_type is [i32] with 3 items, needs 4 numbers"),
        ({"tokenizer.ggml.scores": ("[f32]", np.array([0, np.nan, 0, 0], np.float32))}, "scores holds values that are not finite"),
        ({"tokenizer.ggml.merges": ("[str]", ["a c"])}, "merge 'a c' is no pair of tokens"),
        ({"tokenizer.ggml.merges": ("[str]", ["ab"])}, "merge 'ab' is no pair of tokens"),
        ({"tokenizer.ggml.merges": ("str", "a b")}, "tokenizer.ggml.merges is str, needs [str]"),
        ({"tokenizer.ggml.merges": ("[str]", None)}, "merges is missing"),
        ({"tokenizer.chat_template": ("u32", 3)}, "tokenizer.chat_template is u32, needs str"),
    ],
)  # fmt: skip
def test_unusable_keys_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ContainerError) as caught:
        read_tokenizer("m.gguf", {k: v for k, v in (small() | change).items() if v[0] is not None})
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_no_tokenizer_is_no_files() -> None:
    assert read_tokenizer("m.gguf", {}) == {} and read_tokenizer("m.gguf", {"tokenizer.ggml.model": ("str", "no_vocab")}) == {}
    assert write_tokenizer("out", ModelDescription({"vocab_size": 3})) == {"tokenizer.ggml.model": ("str", "none")}


def model_edit(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: document["model"].update(changes)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unigram": (model_edit(type="Unigram", vocab=[]), "model type 'Unigram'; GGUF can hold BPE"),
    "vocab is a list": (model_edit(vocab=[]), "GGUF can hold BPE"),
    "id beyond the rows": (lambda d: d["model"]["vocab"].update({"new": 5000}), "token 'new' has id 5000, the embedding has"),
    "id is text": (lambda d: d["model"]["vocab"].update({"new": "5"}), "token 'new' has id 5"),
    "added token is text": (lambda d: d["added_tokens"].append("x"), "added token x is no object"),
    "added token without id": (lambda d: d["added_tokens"].append({"content": "x"}), "token 'x' has id None"),
    "merge of three": (model_edit(merges=[["a", "b", "c"]]), "is no pair of tokens"),
    "merge with a space": (model_edit(merges=[["a ", "b"]]), "holds a space"),
    "lower case": (lambda d: d.update(normalizer={"type": "Lowercase"}), "normalizer {'type': 'Lowercase'} has no place in GGUF"),
    "unknown expression": (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "is none that GGUF has a name for"),
    "prefix space": (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "is none that GGUF has a name for"),
    "merges ignored": (model_edit(ignore_merges=True), "(ignore_merges True, normalizer None) is none that GGUF"),
    "fallback without spaces": (model_edit(byte_fallback=True), "is not SentencePiece's (spaces as U+2581)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tokenizers_that_gguf_cannot_hold_are_refused(case: str) -> None:
    change, text = REFUSED[case]
    document = json.loads(trained("gpt-2").to_str())
    source = description(document)
    change(document)
    with pytest.raises(ContainerError) as caught:
        write_tokenizer("out", ModelDescription(source.config, {"tokenizer.json": json.dumps(document).encode()}))
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_merges_that_are_no_scores_are_refused() -> None:
    """With scores alone, any two neighbours that make a token may merge; here ('a', 'bc') must not."""
    model = {"type": "BPE", "byte_fallback": True, "vocab": {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5}}
    model["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    document = {"model": model, "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": None}
    with pytest.raises(ContainerError, match=r"\('a', 'bc'\) make a token but are no merge, so this is no SentencePiece model"):
        write_tokenizer("out", description(document))


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", b"[]"), ("tokenizer.json", b"{"), ("tokenizer_config.json", b"3")])
def test_files_that_are_no_objects_are_refused(name: str, content: bytes) -> None:
    source = description(trained("gpt-2"))
    with pytest.raises(ContainerError, match=name.replace(".", r"\.")):
        write_tokenizer("out", ModelDescription(source.config, {**source.files, name: content}))


def test_sentence_piece_model_alone_asks_for_tokenizer_json() -> None:
    with pytest.raises(ContainerError, match=r"no tokenizer\.json; make one with transformers"):
        write_tokenizer("out", ModelDescription({"vocab_size": 3}, {"tokenizer.model": b""}))
