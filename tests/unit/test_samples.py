"""Calibration samples: what --calib names, cut by hand and compared; every refusal."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tersor
from tersor.calibration import read_samples
from tersor.calibration.generation import generator
from tersor.engine.tokenizer import Tokenizer
from tersor.errors import ModelError, RecipeError
from tersor.tensor import ModelDescription
from tiny import CHAT_TEMPLATE, tiny_model, tokenizer_json

BOS, EOS = 1, 2
TEXT = "the quick brown fox jumps over the lazy dog, 0123456789 times\n"
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the fox"}]


def make_tokenizer(template: str | None = CHAT_TEMPLATE, adds_bos: bool = False) -> Tokenizer:
    settings: dict[str, Any] = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_bos_token": adds_bos}
    if template is not None:
        settings["chat_template"] = template
    return Tokenizer(
        ModelDescription({}, {"tokenizer.json": tokenizer_json().encode(), "tokenizer_config.json": json.dumps(settings).encode()})
    )


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def lines(path: Path, *rows: Any) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


# What is cut


def test_text_is_cut_without_overlap_in_order(tmp_path: Path) -> None:
    t = make_tokenizer()
    ids = t.encode(TEXT * 20, bos=False)
    got = read_samples(write(tmp_path / "a.txt", TEXT * 20), t, samples=len(ids) // 16, seqlen=16)
    assert got.tokens.dtype == np.int32 and got.tokens.tolist() == [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]


def test_more_windows_than_asked_are_drawn_by_seed_without_replacement(tmp_path: Path) -> None:
    t = make_tokenizer()
    text = " ".join(map(str, range(3000)))
    ids = t.encode(text, bos=False)
    starts = {tuple(ids[i : i + 8]): i for i in range(0, len(ids) - 7, 8)}  # every window is another
    path = write(tmp_path / "a.txt", text)
    drawn = [[starts[tuple(row)] for row in read_samples(path, t, samples=40, seqlen=8, seed=s).tokens.tolist()] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for chosen in drawn:
        assert chosen == sorted(set(chosen)) and len(chosen) == 40
    assert min(drawn[0]) < len(ids) // 4 and max(drawn[0]) > len(ids) * 3 // 4  # of the whole text, not of its beginning


def test_windows_begin_with_bos_where_the_tokenizer_adds_it(tmp_path: Path) -> None:
    t = make_tokenizer(adds_bos=True)
    ids = make_tokenizer().encode(TEXT * 4)
    got = read_samples(write(tmp_path / "a.txt", TEXT * 4), t, samples=3, seqlen=9)
    assert got.provenance["bos"] is True
    every = [[BOS, *ids[i : i + 8]] for i in range(0, len(ids) - 7, 8)]
    assert all(row in every for row in got.tokens.tolist())


def test_documents_are_packed_with_eos_and_never_padded(tmp_path: Path) -> None:
    t = make_tokenizer()
    path = lines(tmp_path / "a.jsonl", {"text": "the quick"}, {"text": ""}, {"text": "brown fox"}, {"text": "lazy"})
    stream = [*t.encode("the quick"), EOS, *t.encode("brown fox"), EOS, *t.encode("lazy"), EOS]
    got = read_samples(path, t, samples=1, seqlen=len(stream))
    assert got.tokens.tolist() == [stream] and got.provenance["kind"] == "jsonl" and got.provenance["chat_template"] == "unused"


def test_packed_documents_of_a_tokenizer_that_adds_bos(tmp_path: Path) -> None:
    t, plain = make_tokenizer(adds_bos=True), make_tokenizer()
    path = lines(tmp_path / "a.jsonl", {"text": "abcdef"}, {"text": "ghi"})
    a, b = plain.encode("abcdef"), plain.encode("ghi")
    n = len(a) + 2
    stream = [BOS, *a, EOS, BOS, *b, EOS]
    assert read_samples(path, t, samples=1, seqlen=n).tokens.tolist() == [stream[:n]]  # its own BOS, not a second one
    cut = read_samples(path, t, samples=3, seqlen=4).tokens.tolist()
    assert stream[7] == BOS and cut == [stream[:4], [BOS, *stream[4:7]], stream[7:11]]


def test_conversations_go_through_the_template_and_mix_with_text(tmp_path: Path) -> None:
    t = make_tokenizer()
    share = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "the fox"}]
    path = lines(tmp_path / "a.jsonl", {"messages": CHAT}, {"text": "over"}, {"conversations": share}, {"conversations": CHAT})
    chat = t.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe fox<|im_end|>\n", bos=False)
    stream = [*chat, *t.encode("over"), EOS, *chat, *chat]
    got = read_samples(path, t, samples=1, seqlen=len(stream))
    assert got.tokens.tolist() == [stream] and got.provenance["chat_template"] == "used"


def test_token_files(tmp_path: Path) -> None:
    stream = np.arange(40, dtype=np.uint16)
    np.save(tmp_path / "a.npy", stream)
    got = read_samples(tmp_path / "a.npy", None, samples=4, seqlen=10, vocab_size=40)
    assert got.tokens.dtype == np.int32 and got.tokens.tolist() == stream.reshape(4, 10).tolist()
    np.save(tmp_path / "b.npy", stream.reshape(4, 10).astype(np.int64))
    rows = read_samples(tmp_path / "b.npy", make_tokenizer(), samples=3, seqlen=10, seed=5).tokens.tolist()
    assert rows == sorted(rows) and len(rows) == 3 and all(row in stream.reshape(4, 10).tolist() for row in rows)
    assert got.provenance["kind"] == "tokens" and got.provenance["chat_template"] == "unknown" and got.provenance["source"] == "a.npy"


def test_pydoc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydoc_data.topics.topics", {"b": "the lazy dog", "a": "the quick fox"})  # all of it takes seconds
    t = make_tokenizer(template=None)
    ids = t.encode("the quick fox\n\nthe lazy dog", bos=False)
    got = read_samples("pydoc", t, samples=1, seqlen=len(ids))
    assert got.tokens.tolist() == [ids]
    assert got.provenance["source"] == "pydoc_data.topics" and got.provenance["chat_template"] == "none"


def test_provenance_names_everything_but_the_machine(tmp_path: Path) -> None:
    got = read_samples(write(tmp_path / "a.txt", TEXT * 20), make_tokenizer(), samples=3, seqlen=16, seed=7)
    raw = b"".join(int(token).to_bytes(4, "little") for row in got.tokens for token in row)
    assert got.provenance == {
        "source": "a.txt", "kind": "text", "samples": 3, "seqlen": 16, "seed": 7, "tokens": 48, "sha256": hashlib.sha256(raw).hexdigest(),
        "chat_template": "unused", "bos": False, "tersor": tersor.__version__,
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(got.provenance)


# What the model writes


def test_self_is_deterministic_and_each_text_is_the_models_own(tmp_path: Path) -> None:
    model = tersor.load(tiny_model(tmp_path / "m"), activations="float")
    seen: list[tuple[int, int]] = []
    got = read_samples("self", model.tokenizer, samples=3, seqlen=24, seed=4, generate=generator(model, lambda *at: seen.append(at)))
    again = read_samples("self", model.tokenizer, samples=3, seqlen=24, seed=4, generate=generator(model))
    other = read_samples("self", model.tokenizer, samples=3, seqlen=24, seed=5, generate=generator(model))
    assert np.array_equal(got.tokens, again.tokens) and not np.array_equal(got.tokens, other.tokens)
    assert (got.tokens[:, 0] == BOS).all() and len({tuple(row) for row in got.tokens.tolist()}) == 3
    assert got.provenance["kind"] == "self" and seen[-1] == (72, 72)
    two = generator(model)(2, 24, 4)
    assert np.array_equal(two, got.tokens[:2])  # however many are computed together


def test_self_goes_on_with_another_text_after_eos(tmp_path: Path) -> None:
    """A model whose head gives EOS nearly always: every text is short, every sample full."""
    head = np.zeros((320, 64), np.float32)
    head[EOS] = 1.0
    path = tiny_model(tmp_path / "m", tie=False, change={"lm_head.weight": head, "model.norm.weight": np.full(64, 9.0, np.float32)})
    tokens = generator(tersor.load(path, activations="float"))(2, 40, 0)
    assert tokens.shape == (2, 40) and (tokens == EOS).sum() > 4
    assert (tokens[:, 1:][tokens[:, :-1] == EOS] == BOS).all()
    texts = " ".join(map(str, tokens[0].tolist())).split(f" {EOS} ")
    assert len(set(texts)) > 1  # not the same one again


def test_self_begins_with_a_random_token_where_there_is_no_bos(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m", config={"bos_token_id": None})
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (path / "generation_config.json").write_text("{}")
    tokens = generator(tersor.load(path, activations="float"))(8, 4, 0)
    assert len(set(tokens[:, 0].tolist())) > 4


# Hub data sets: the package is not there, and neither is the hub; what we ask it for is


class FakeDatasets(SimpleNamespace):
    def __init__(self, rows: list[Any]) -> None:
        self.asked: list[Any] = []
        self.read = 0
        super().__init__(rows=rows)

    def load_dataset(self, *names: Any, **options: Any) -> Any:
        self.asked.append((names, options))
        for row in self.rows:
            self.read += 1
            yield row


@pytest.mark.parametrize(
    ("calib", "names", "split", "source"),
    [
        ("hub:wikitext", ("wikitext", None), "train", "wikitext::train"),
        ("hub:org/set:small", ("org/set", "small"), "train", "org/set:small:train"),
        ("hub:org/set:small:test", ("org/set", "small"), "test", "org/set:small:test"),
        ("hub:set::test", ("set", None), "test", "set::test"),
        ("org/some.set", ("org/some.set", None), "train", "org/some.set::train"),
        ("hub:/a/b/c", ("/a/b/c", None), "train", "c::train"),
    ],
)
def test_hub_names(calib: str, names: tuple[Any, ...], split: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDatasets([{"text": TEXT}] * 1000)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    t = make_tokenizer()
    got = read_samples(calib, t, samples=2, seqlen=10)
    assert fake.asked == [(names, {"split": split, "streaming": True})]
    assert got.provenance["source"] == source and got.provenance["kind"] == "hub"
    assert fake.read == -(-4 * 2 * 10 // (len(t.encode(TEXT)) + 1))  # no more than four times what is needed


def test_hub_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"pip install 'tersor\[datasets\]'"):
        read_samples("hub:wikitext", make_tokenizer())


def test_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*names: Any, **options: Any) -> Any:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    with pytest.raises(RecipeError, match="org/name, config None, split train: no route; name it as hub:NAME"):
        read_samples("org/name", make_tokenizer())


# What is refused


def refused(calib: Any, kind: type[Exception], tokenizer: Tokenizer | None = None, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        read_samples(calib, tokenizer or make_tokenizer(), **{"samples": 2, "seqlen": 8} | options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("samples", 0), ("seqlen", 1), ("seed", -1)])
def test_settings_out_of_range(name: str, value: int) -> None:
    assert f"{name} is {value}; need an integer >= " in refused("pydoc", RecipeError, **{name: value})


def test_windows_beyond_the_context() -> None:
    assert "seqlen is 65; the model's context is 64; use --seqlen 64" in refused("pydoc", ModelError, seqlen=65, context=64)


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_empty_text(content: str, tmp_path: Path) -> None:
    assert "a.txt is empty; give some text" in refused(write(tmp_path / "a.txt", content), RecipeError)
    assert "a.jsonl is empty; give some text" in refused(write(tmp_path / "a.jsonl", content), RecipeError)


def test_too_short(tmp_path: Path) -> None:
    t = make_tokenizer()
    n = len(t.encode(TEXT))
    path = write(tmp_path / "a.txt", TEXT)
    text = refused(path, RecipeError, samples=n, seqlen=10)
    assert f"a.txt has {n} tokens, which make {n // 10} windows of 10; {n} of them need {10 * n} tokens; " in text
    assert text.endswith(f"give more text or --samples {n // 10}")
    text = refused(path, RecipeError, samples=4, seqlen=512)
    assert text.endswith(f"which make 0 windows of 512; 4 of them need 2048 tokens; give more text or --seqlen {n // 4}")
    read_samples(path, t, samples=4, seqlen=n // 4)  # the fixes mend it
    np.save(tmp_path / "a.npy", np.zeros((3, 8), np.int32))
    assert refused(tmp_path / "a.npy", RecipeError, samples=4).endswith("give more text or --samples 3")


@pytest.mark.parametrize("name", ["nowhere.txt", "some/nowhere.txt", "nowhere", "a/b/c", "wikitext2.npy", "nowhere.jsonl"])
def test_no_such_file(name: str) -> None:
    assert "No such file or directory; name" in refused(name, RecipeError)


@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.csv", "a.bin", "folder"])
def test_unknown_kind(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir() if name == "folder" else path.write_text("{}")
    assert "not a kind that is read; known: pydoc, self, a UTF-8 text file, a .jsonl" in refused(path, RecipeError)


@pytest.mark.parametrize("name", ["hub:", "hub::a", "hub:a:b:c:d"])
def test_bad_hub_name(name: str) -> None:
    assert "need hub:NAME[:config][:split]" in refused(name, RecipeError)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_not_utf8(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 at byte 0; convert it" in refused(tmp_path / name, RecipeError)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("{", "need one JSON object a line"),
        ("[" * 100_000, "need one JSON object a line"),
        ("[1]", "is a list; need an object with text, messages or conversations"),
        ('{"txt": "a"}', "has txt; need text, messages or conversations"),
        ("{}", "has nothing; need text"),
        ('{"text": 3}', "text is a int; need a string"),
        ('{"messages": []}', "messages is list without messages"),
        ('{"conversations": "a"}', "conversations is str without messages"),
        ('{"messages": [{"content": "a"}]}', "need a mapping with role and content"),
        ('{"messages": [{"role": "user", "content": {}}]}', "chat template: "),
    ],
)
def test_bad_line_names_its_number(row: str, text: str, tmp_path: Path) -> None:
    kind = ModelError if "mapping" in text or "template" in text else RecipeError
    found = refused(write(tmp_path / "a.jsonl", '{"text": "good"}\n\n' + row + "\n"), kind)
    assert "a.jsonl: line 3" in found and text in found


def test_conversation_without_template(tmp_path: Path) -> None:
    found = refused(lines(tmp_path / "a.jsonl", {"messages": CHAT}), ModelError, make_tokenizer(template=None))
    assert 'line 1 is a conversation, but the model has no chat template; give {"text": ...} lines' in found


@pytest.mark.parametrize("bad", [-1, 320, 2**40])
def test_ids_beyond_the_vocabulary(bad: int, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([0] * 15 + [bad]))
    assert f"token {bad} is out of range, the model knows 0 to 319" in refused(tmp_path / "a.npy", ModelError)
    assert "the model knows 0 to 9" in refused(write(tmp_path / "a.txt", TEXT), ModelError, vocab_size=10)


def test_malformed_token_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    good = tmp_path / "good.npy"
    np.save(good, np.arange(64, dtype=np.int32))
    cases = [
        b"",
        b"no numpy file",
        good.read_bytes()[:-4],
        good.read_bytes().replace(b"(64,)", b"(1<<60,)"[:5]),
        b"\x93NUMPY\x01\x00\xff\xff{",
    ]
    huge = good.read_bytes().replace(b"(64,), }   ", b"(9999999999999999999,), }"[:11])
    for content in [*cases, huge, good.read_bytes().replace(b"(64,), }              ", b"(99999999999999999,), }"[:22])]:
        path.write_bytes(content)
        assert "a.npy: " in refused(path, RecipeError)
    np.save(path, np.array([None, 1]), allow_pickle=True)
    assert "write token ids with numpy.save" in refused(path, RecipeError)
    for array in (np.zeros(64, np.float32), np.zeros((2, 2, 8), np.int32), np.zeros((), np.int32)):
        np.save(path, array)
        assert "need integers, (n,) or (n, 8)" in refused(path, RecipeError)
    np.save(path, np.zeros((4, 9), np.int32))
    assert "windows of 9 tokens, not of 8; use --seqlen 9" in refused(path, RecipeError)


def test_without_model_or_tokenizer(tmp_path: Path) -> None:
    assert "there is no model here that could write" in refused("self", RecipeError)
    with pytest.raises(ModelError, match=r"the model has no tokenizer; give token ids in a \.npy file"):
        read_samples("pydoc", None)
