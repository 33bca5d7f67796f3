"""Perplexity, divergence and windows on a model whose logits are known, against sums written out from the definitions."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tersor.errors import ModelError, RecipeError
from tersor.evaluation import Divergence, Perplexity, evaluate
from tersor.evaluation.kl import Base, divergence
from tersor.evaluation.model import chunks
from tersor.evaluation.speed import measure
from tersor.evaluation.text import cut, pydoc_text, read_text

VOCABULARY = 11


class Bytes:
    """A tokenizer of the letters a..j; token 10 is BOS."""

    def __init__(self, adds_bos: bool = False, bos_id: int | None = 10) -> None:
        self.adds_bos, self.bos_id = adds_bos, bos_id

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        ids = [ord(c) % 10 for c in text]
        return [self.bos_id, *ids] if (self.adds_bos if bos is None else bos) else ids


class Cache:
    length = 0

    def truncate(self, n: int) -> None:
        self.length = n


class Table:
    """A model of one table: the logits after a token, and after a token at an even position of the window, are fixed random rows."""

    weight_bytes = 1000

    def __init__(self, seed: int, tokenizer: Bytes | None = None, vocabulary: int = VOCABULARY) -> None:
        self.tokenizer = tokenizer or Bytes()
        self.vocab_size = vocabulary
        self.table = np.random.default_rng(seed).standard_normal((2, vocabulary, vocabulary)).astype(np.float32)
        self.seen: list[list[int]] = []

    def new_cache(self, capacity: int) -> Cache:
        return Cache()

    def forward(self, tokens: np.ndarray, cache: Cache, last: bool = False) -> np.ndarray:
        self.seen.append(tokens.tolist())
        positions = (cache.length + np.arange(len(tokens))) % 2
        cache.length += len(tokens)
        return self.table[positions, tokens][-1 if last else 0 :]

    def head(self, hidden: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(hidden * 2)

    def token_bytes(self, position: int) -> int:
        return 1000 + position

    def product_operations(self, n: int) -> int:
        return 10 * n

    def steps(self) -> Table:
        return self

    def run(self, tokens: np.ndarray, caches: list[Cache]) -> tuple[np.ndarray, list[int]]:
        logits = self.head(self.forward(tokens, caches[0]))
        return logits, logits.argmax(axis=1).tolist()


def softmax(logits: np.ndarray) -> list[float]:
    exps = [math.exp(float(x)) for x in logits]
    return [e / sum(exps) for e in exps]


def predictions(model: Table, ids: list[int], window: int, step: int, windows: int) -> list[tuple[list[float], int]]:
    """Returns (probabilities, true token) of every token that counts, without BOS: each text token once, never a window's first."""
    found, predicted = [], 0
    for w in range(windows):
        start = w * step
        for i in range(1, window):
            if start + i > predicted:
                found.append((softmax(2 * model.table[(i - 1) % 2, ids[start + i - 1]]), ids[start + i]))
                predicted = start + i
    return found


TEXT = "the five boxing wizards jump quickly over a lazy dog and a fox " * 3


@pytest.mark.parametrize(("window", "stride", "windows"), [(8, None, 4), (16, 8, 5), (16, 5, 3), (3, None, None)])
def test_perplexity_is_exp_of_the_mean_nll(window, stride, windows):
    model, ids = Table(0), Bytes().encode(TEXT)
    record = evaluate(model, text=_file(TEXT), window=window, stride=stride, windows=windows)
    assert isinstance(record, Perplexity)
    step = stride or window
    count = record.protocol.windows
    assert count == (windows or (len(ids) - window) // step + 1)
    nll = [-math.log(p[t]) for p, t in predictions(model, ids, window, step, count)]
    assert record.protocol.scored == len(nll)
    mean = sum(nll) / len(nll)
    spread = math.sqrt(sum((x - mean) ** 2 for x in nll) / (len(nll) - 1) / len(nll))
    assert record.nll == pytest.approx(mean, rel=1e-6)
    assert record.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    assert record.error == pytest.approx(math.exp(mean) * spread, rel=1e-5)


def test_divergence_matches_its_definitions():
    model, base, ids = Table(1), Table(2), Bytes().encode(TEXT)
    base.table = model.table + 0.3 * base.table
    record = evaluate(model, against=base, text=_file(TEXT), window=12, windows=6)
    assert isinstance(record, Divergence)
    q, p = predictions(model, ids, 12, 12, 6), predictions(base, ids, 12, 12, 6)
    kl = [sum(a * math.log(a / b) for a, b in zip(pp, qq)) for (pp, _), (qq, _) in zip(p, q)]
    change = [qq[t] - pp[t] for (pp, t), (qq, _) in zip(p, q)]
    same = [pp.index(max(pp)) == qq.index(max(qq)) for (pp, _), (qq, _) in zip(p, q)]
    n = len(kl)
    assert record.kl_mean == pytest.approx(sum(kl) / n, rel=1e-5)
    assert record.kl_error == pytest.approx(np.std(kl, ddof=1) / math.sqrt(n), rel=1e-4)
    assert record.kl_median == pytest.approx(sorted(kl)[n // 2] if n % 2 else sum(sorted(kl)[n // 2 - 1 : n // 2 + 1]) / 2, rel=1e-4)
    assert record.kl_max == pytest.approx(max(kl), rel=1e-4)
    assert record.kl_median < record.kl_p99 <= record.kl_max
    assert record.top1 == pytest.approx(sum(same) / n)
    assert 0 < record.top1 < 1
    assert record.top1_error == pytest.approx(math.sqrt(record.top1 * (1 - record.top1) / (n - 1)), rel=1e-6)
    assert record.rms_change == pytest.approx(math.sqrt(sum(c * c for c in change) / n), rel=1e-5)
    assert record.mean_change == pytest.approx(sum(change) / n, abs=1e-7)
    log_ratio = sum(math.log(pp[t] / qq[t]) for (pp, t), (qq, _) in zip(p, q)) / n
    assert record.ratio == pytest.approx(math.exp(log_ratio), rel=1e-5)
    assert record.ratio == pytest.approx(record.perplexity.perplexity / record.base.perplexity, rel=1e-6)


def test_a_model_against_itself_is_the_same():
    record = evaluate(Table(3), against=Table(3), text=_file(TEXT), window=16, windows=4)
    assert (record.kl_max, record.top1, record.rms_change, record.ratio) == (0.0, 1.0, 0.0, 1.0)


def test_a_kept_base_runs_once_for_several_models():
    base = Table(4)
    windows = cut(base.tokenizer, "t", TEXT, 16, None, 4)
    kept = Base(base, windows, keep=True)
    first, second = divergence(Table(5), kept), divergence(Table(5), kept)
    assert len(base.seen) == 4
    assert first.kl_mean == second.kl_mean == divergence(Table(5), Base(base, windows)).kl_mean > 0


@pytest.mark.parametrize(("adds", "bos", "expected"), [(True, None, True), (True, False, False), (False, None, False), (False, True, True)])
def test_bos_begins_every_window_and_is_stated(adds, bos, expected):
    model = Table(6, Bytes(adds))
    record = evaluate(model, text=_file(TEXT), window=9, windows=3, bos=bos)
    assert record.protocol.bos is expected
    assert ("with BOS" in str(record.protocol)) is expected
    ids = Bytes().encode(TEXT)
    if expected:
        assert model.seen == [[10, *ids[8 * i : 8 * i + 8]] for i in range(3)]
        assert record.protocol.scored == 24  # every text token, the first of a window too
    else:
        assert model.seen == [ids[9 * i : 9 * i + 9] for i in range(3)]
        assert record.protocol.scored == 24


def test_the_protocol_says_how_the_text_was_cut(tmp_path):
    (tmp_path / "some.txt").write_text(TEXT)
    record = evaluate(Table(0), text=tmp_path / "some.txt", window=16, stride=4, windows=2)
    assert str(record.protocol) == (
        "some.txt: 2 windows of 16 tokens, stride 4, no BOS, 19 of 189 tokens scored, the first of a window not counted"
    )
    assert record.to_dict()["protocol"]["window"] == 16


def test_the_default_text_is_the_language_reference():
    name, text = read_text(None)
    assert name == "pydoc_data.topics"
    assert text == pydoc_text()
    assert len(text) > 300_000


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"window": 2}, RecipeError, "window 2"),
        ({"window": 8, "stride": 0}, RecipeError, "stride 0"),
        ({"window": 8, "stride": 9}, RecipeError, "stride 9"),
        ({"windows": 0}, RecipeError, "windows 0"),
        ({"window": 1000}, ModelError, "189 tokens, fewer than one window of 1000"),
    ],
)
def test_refused_windows(options, error, says):
    with pytest.raises(error, match=says):
        evaluate(Table(0), text=_file(TEXT), **options)


def test_refused_models_and_texts(tmp_path):
    with pytest.raises(ModelError, match="no BOS"):
        evaluate(Table(0, Bytes(bos_id=None)), text=_file(TEXT), window=8, bos=True)
    with pytest.raises(ModelError, match="the model has 11 tokens, the base 12"):
        evaluate(Table(0), against=Table(0, vocabulary=12), text=_file(TEXT), window=8)
    other = Bytes()
    other.encode = lambda text, bos=None: [(ord(c) + 1) % 10 for c in text]
    with pytest.raises(ModelError, match="different tokens"):
        evaluate(Table(0), against=Table(0, other), text=_file(TEXT), window=8)
    with pytest.raises(RecipeError, match="No such file"):
        evaluate(Table(0), text=tmp_path / "none.txt", window=8)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        evaluate(Table(0), text=tmp_path / "binary", window=8)


def test_chunks_cover_every_row_within_the_memory():
    for vocabulary in (11, 32_000, 300_000, 1 << 23):
        parts = list(chunks(3, 515, vocabulary))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(3, 515))
        assert all(part.stop - part.start == 1 or 4 * vocabulary * (part.stop - part.start) <= 16 << 20 for part in parts)


def test_speed_counts_tokens_and_takes_turns():
    order = []

    class Timed(Table):
        def new_cache(self, capacity: int) -> Cache:
            order.append(self.table[0, 0, 0])
            return super().new_cache(capacity)

    a, b = Timed(0), Timed(1)
    done = []
    speeds = measure(
        {"a": lambda: a, "b": lambda: b}, prefill=32, decode=5, repeats=3, limits=False, progress=lambda *call: done.append(call)
    )
    turns = [x == order[0] for x in order[4:]]  # after two warming runs each
    assert turns == [True, False] * 3
    assert done[-1] == (6, 6)
    s = speeds["a"]
    assert (s.prefill_tokens, s.decode_tokens, s.repeats, s.weight_bytes) == (32, 5, 3, 1000)
    assert s.prefill > 0
    assert s.decode_gbps == pytest.approx((1000 + 32 + 2) * s.decode / 1e9)
    assert s.prefill_gops == pytest.approx(10 * s.prefill / 1e9)
    assert [len(x) for x in a.seen].count(32) == 1 + 3
    assert [len(x) for x in a.seen].count(1) == 1 + 2 + 3 * 5


def test_speed_refuses_nothing_to_measure():
    with pytest.raises(RecipeError, match="decode 0"):
        measure({"a": lambda: Table(0)}, decode=0)


def _file(text: str) -> Path:
    path = Path(_file.folder) / "text.txt"
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def _folder(tmp_path):
    _file.folder = tmp_path
