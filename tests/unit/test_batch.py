"""Batches: every request gets the tokens that it gets alone, whoever comes and goes; common prefixes are read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tersor.engine import Batch, Generation, Model, Request, load
from tersor.engine import batch as batch_module
from tersor.engine.prefill import chunks
from tersor.engine.session import common
from tersor.errors import ModelError, RecipeError
from tiny import ARCHITECTURES, tiny_model

SYSTEM = "the quick brown fox jumps over the lazy dog, 0123456789 times; " * 4  # some 90 tokens
PROMPTS = [SYSTEM + "def f(x): return x", SYSTEM + "return 1", "fox", SYSTEM + "the dog", "A tiny tokenizer reads this line", SYSTEM]


def quantized(path: Path, kind: str) -> Path:
    """Writes a tiny model in int4_g32, whose products round activations, as those of real models do."""
    from tersor.pipeline import quantize

    tiny_model(path / "floats", kind, tie=False, seed=5)
    quantize(path / "floats", path / "model", "int4_g32")
    return path / "model"


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(quantized(tmp_path_factory.mktemp("tiny"), request.param))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(quantized(tmp_path_factory.mktemp("tiny"), "llama"))


def plain(g: Generation | None) -> Generation:
    """Returns what does not depend on time and company."""
    assert g is not None
    return replace(g, prefill_seconds=0.0, decode_seconds=0.0, cached_tokens=0)


def run(batch: Batch, ids: list[int]) -> list[Generation]:
    """Runs until nothing is left; returns the generations in order."""
    done = {part.id: part.generation for part in batch.stream() if part.generation is not None}
    return [done[id] for id in ids]  # type: ignore[misc]


def test_every_architecture_answers_as_alone(any_model: Model) -> None:
    alone = [any_model.generate(p, max_tokens=20) for p in PROMPTS]
    together = any_model.generate_many(PROMPTS, max_tokens=20)
    assert list(map(plain, together)) == list(map(plain, alone))


@pytest.mark.parametrize("options", [{"temperature": 1.0, "seed": 4}, {"repeat_penalty": 1.4}, {"stop": ["a", "0"]}], ids=str)
def test_options_mean_what_they_mean_alone(model: Model, options: Mapping[str, Any]) -> None:
    alone = [model.generate(p, max_tokens=30, **options) for p in PROMPTS]
    assert list(map(plain, model.generate_many(PROMPTS, max_tokens=30, **options))) == list(map(plain, alone))


@pytest.mark.parametrize("max_sequences", [1, 2, 5, 20])
def test_any_number_at_the_same_time(model: Model, max_sequences: int) -> None:
    prompts = [f"{i} times the fox" for i in range(20)]
    alone = [model.generate(p, max_tokens=6) for p in prompts]
    assert list(map(plain, model.generate_many(prompts, max_sequences=max_sequences, max_tokens=6))) == list(map(plain, alone))
    assert model.generate_many([]) == []


def test_requests_join_and_leave_between_steps(model: Model) -> None:
    batch = model.batch(max_sequences=3, capacity=300)
    lengths = [30, 5, 12, 1, 20, 9]
    ids: list[int] = []
    done: dict[int, Generation] = {}
    texts: dict[int, str] = {}
    steps = 0
    while len(ids) < len(PROMPTS) or len(batch):
        if steps % 3 == 0 and len(ids) < len(PROMPTS):
            ids.append(batch.add(PROMPTS[len(ids)], Request(max_tokens=lengths[len(ids)])))
        for part in batch.step():
            texts[part.id] = texts.get(part.id, "") + part.text
            if part.generation is not None:
                done[part.id] = part.generation
        steps += 1
    for id, prompt, length in zip(ids, PROMPTS, lengths):
        assert plain(done[id]) == plain(model.generate(prompt, max_tokens=length))
        assert texts[id] == done[id].text
    assert len(set(ids)) == len(ids) and steps < sum(lengths)


def test_a_common_prefix_is_read_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    forward = Model.forward
    monkeypatch.setattr(
        Model, "forward", lambda self, tokens, *rest, **how: read.append(len(tokens)) or forward(self, tokens, *rest, **how)
    )
    shared = len(model.tokenizer.encode(SYSTEM)) // 64 * 64
    got = model.generate_many(PROMPTS, max_tokens=2)
    prompts = [len(model.tokenizer.encode(p)) for p in PROMPTS]
    assert shared == 64 and sum(p.startswith(SYSTEM) for p in PROMPTS) == 4
    assert sum(read) == sum(prompts) - shared * (4 - 1)
    assert [g.cached_tokens for g in got] == [0, 64, 0, 64, 0, 64]
    assert all(n > 16 or n in prompts for n in read)


def test_prefixes_stay_for_later_requests_and_grow(model: Model) -> None:
    batch = model.batch(capacity=600)
    longer = SYSTEM * 2
    cached = []
    for prompt in (SYSTEM + " first", SYSTEM + " second", SYSTEM + " third", longer + "a", longer + "b", longer + "c", SYSTEM + "last"):
        got = run(batch, [batch.add(prompt, Request(max_tokens=4))])[0]
        assert plain(got) == plain(model.generate(prompt, max_tokens=4))
        cached.append(got.cached_tokens)
    # the second sees that it is shared and reads it, the third has it; the same for the longer one, which begins with it
    first, second = (n // 64 * 64 for n in (len(model.tokenizer.encode(SYSTEM)), len(model.tokenizer.encode(longer))))
    assert cached == [0, 0, first, first, first, second, first]


def test_few_prefixes_are_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "PREFIXES", 2)
    batch = model.batch(capacity=600)

    def ask(which: int) -> int:
        prompt = f"{which} " + SYSTEM
        got = run(batch, [batch.add(prompt, Request(max_tokens=2)), batch.add(prompt + "x", Request(max_tokens=2))])
        assert [plain(g) for g in got] == [plain(model.generate(p, max_tokens=2)) for p in (prompt, prompt + "x")]
        return got[0].cached_tokens

    assert [ask(i) for i in (1, 2, 1, 3, 1, 2)] == [0, 0, 64, 0, 64, 0]  # 3 drops 2, which was used before 1


def test_cancelled_requests_are_gone_wherever_they_are(model: Model) -> None:
    batch = model.batch(max_sequences=2, capacity=400)
    ids = [batch.add(p, Request(max_tokens=10)) for p in PROMPTS]
    batch.step()
    for id in (ids[0], ids[-1], 999):
        batch.cancel(id)
    for _ in range(4):
        batch.step()
    batch.cancel(ids[1])
    done = {part.id for part in batch.stream() if part.generation is not None}
    assert done <= set(ids[2:-1]) and len(batch) == 0


def test_a_long_prompt_does_not_hold_the_others_up(model: Model) -> None:
    batch = model.batch(capacity=2000)
    first = batch.add("fox", Request(max_tokens=60))
    batch.step()
    second = batch.add(SYSTEM * 10, Request(max_tokens=3))
    seen = [part.id for _ in range(6) for part in batch.step()]
    assert seen.count(first) >= 3 and second not in seen
    assert {part.id for part in batch.stream()} == {first, second}


def test_the_cache_ends_it(model: Model) -> None:
    prompt = "0 " * 20
    count = len(model.tokenizer.encode(prompt))
    batch = model.batch(capacity=count + 3)
    got = run(batch, [batch.add(prompt, Request(max_tokens=100)), batch.add("fox", Request(max_tokens=2))])
    assert (got[0].finish, len(got[0].tokens)) == ("context", 4)
    assert plain(got[0]) == plain(model.session(count + 3).generate(prompt, Request(max_tokens=100)))
    assert got[1].finish == "length"


def test_requests_that_cannot_be_answered_are_refused(model: Model) -> None:
    batch = model.batch(capacity=16)
    with pytest.raises(ModelError, match=r"the prompt has \d+ tokens; a sequence of the batch holds 16"):
        batch.add("0 " * 40, Request())
    with pytest.raises(ModelError, match="the prompt is empty"):
        batch.add("", Request())
    with pytest.raises(RecipeError, match="lookup drafts for one sequence at a time"):
        batch.add("fox", Request(lookup=3))
    with pytest.raises(RecipeError, match="max_sequences is 0; need an integer >= 1"):
        model.batch(max_sequences=0)
    with pytest.raises(ModelError, match="a cache of 9999 positions"):
        model.batch(capacity=9999)
    with pytest.raises(ModelError, match=r"a prompt has \d+ tokens; the model's context is 2048; shorten it"):
        model.generate_many(["fox", "0 " * 3000])
    assert len(batch) == 0


@pytest.mark.parametrize("size", [64, 128, 512])
def test_no_part_of_a_prompt_is_short(size: int) -> None:
    for n in [*range(1, 300), 511, 512, 513, 528, 529, 1024, 1025]:
        parts = chunks(n, size)
        assert np.concatenate([np.arange(n)[p] for p in parts]).tolist() == list(range(n))
        lengths = [p.stop - p.start for p in parts]
        assert max(lengths) <= size and (n <= 16 or min(lengths) > 16)


def test_common_fronts() -> None:
    assert [common([1, 2, 3], b) for b in ([1, 2, 4, 5], [1, 2, 3, 4], [1, 2], [2], [])] == [2, 3, 2, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 16])
def test_a_real_model_answers_as_alone(count: int) -> None:
    from tersor.demo import cache_directory, fetch

    model = load(fetch(cache_directory()))
    system = {"role": "system", "content": "You answer in one short sentence. " * 12}
    topics = ["rain", "bread", "Rome", "cats", "iron", "jazz", "chess", "tides"]
    prompts = [[system, {"role": "user", "content": f"{verb} {topic}?"}] for verb in ("What is", "Who likes") for topic in topics][:count]
    alone = [model.generate(p, max_tokens=40) for p in prompts]
    together = model.generate_many(prompts, max_tokens=40)
    assert list(map(plain, together)) == list(map(plain, alone))
    assert all(g.cached_tokens >= 64 for g in together[1:])
