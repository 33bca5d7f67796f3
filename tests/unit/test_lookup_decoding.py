"""Prompt lookup: drafts come from the text, and the tokens are those of decoding without it, whatever was drafted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tersor.engine import Generation, Model, Request, load
from tersor.engine.lookup import Lookup
from tersor.errors import RecipeError
from tiny import ARCHITECTURES, tiny_model

PROMPT = "the quick brown fox jumps over the lazy dog; the quick brown fox jumps"


def reading(tokens: list[int], limit: int = 15) -> Lookup:
    lookup = Lookup(limit)
    lookup.read(tokens)
    lookup.judge(limit, limit)  # the next draft may be as long as it likes
    return lookup


def test_what_followed_is_drafted() -> None:
    assert reading([1, 2, 3, 4, 5, 6, 7, 1, 2], 3).draft(9) == [3, 4, 5]
    assert reading([1, 2, 3, 4, 5, 6, 7, 1, 2]).draft(2) == [3, 4]
    assert reading([1, 2, 3, 4, 5, 6, 7, 1, 2]).draft(0) == []
    assert reading([1, 2, 3, 4, 5, 6, 7, 1, 2]).draft(-1) == []


def test_one_token_is_no_match() -> None:
    assert reading([1, 2, 3, 9, 1]).draft(9) == []
    assert reading([1]).draft(9) == []
    assert reading([]).draft(9) == []


def test_the_longest_and_then_the_latest_match_counts() -> None:
    assert reading([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], 1).draft(1) == [7]
    assert reading([2, 3, 7, 2, 3, 8, 2, 3], 1).draft(1) == [8]


def test_a_repetition_goes_on() -> None:
    assert reading([9, 1, 2, 3, 1, 2, 3, 1, 2]).draft(8) == [3, 1, 2, 3, 1, 2, 3, 1]
    assert reading([4, 4, 4, 4, 4]).draft(6) == [4] * 6


def test_drafts_follow_their_success() -> None:
    lookup = Lookup(12)
    lookup.read([5] * 40)
    lengths = []
    for right in (4, 8, 12, 0, 1, 2, 3, 6, 12):
        lengths.append(len(lookup.draft(99)))
        lookup.judge(lengths[-1], right)
    lookup.judge(0, 0)  # no draft says nothing
    assert lengths == [4, 8, 12, 12, 1, 2, 4, 3, 6]
    assert len(lookup.draft(99)) == 12


def test_drafts_are_what_a_search_finds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens = rng.integers(0, 4, rng.integers(1, 60)).tolist()
        want: list[int] = []
        for n in (4, 3, 2):
            places = [i for i in range(n, len(tokens)) if tokens[i - n : i] == tokens[-n:]]
            if places and len(tokens) >= n:
                want = (tokens + tokens[places[-1] :] * 9)[places[-1] :][:7]
                break
        assert reading(tokens).draft(7) == want


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(tiny_model(tmp_path_factory.mktemp("tiny") / "m", request.param, tie=False, seed=3))


def same(a: Generation, b: Generation) -> bool:
    return (a.text, a.tokens, a.finish) == (b.text, b.tokens, b.finish)


@pytest.mark.parametrize("lookup", [1, 4, 15])
def test_greedy_tokens_are_the_same(model: Model, lookup: int) -> None:
    plain = model.generate(PROMPT, max_tokens=100)
    fast = model.generate(PROMPT, max_tokens=100, lookup=lookup)
    assert same(fast, plain)
    assert 0 <= fast.accepted <= fast.drafted and (plain.drafted, plain.accepted) == (0, 0)


def test_drawn_and_penalized_tokens_are_the_same(model: Model) -> None:
    for options in ({"temperature": 0.3, "seed": 5}, {"temperature": 2.0, "top_k": 3, "seed": 1}, {"repeat_penalty": 1.3}):
        assert same(model.generate(PROMPT, max_tokens=60, lookup=15, **options), model.generate(PROMPT, max_tokens=60, **options))


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model that repeats itself: tied embeddings and small layers make the likeliest next token the last one."""
    return load(tiny_model(tmp_path_factory.mktemp("tiny") / "m", tie=True))


def test_repetitions_are_accepted_many_at_a_time(parrot: Model) -> None:
    plain = parrot.generate("aaaa fox", max_tokens=64)
    fast = parrot.generate("aaaa fox", max_tokens=64, lookup=15)
    assert same(fast, plain) and fast.accepted > 20


def test_limits_and_stop_strings_hold_inside_a_draft(parrot: Model) -> None:
    whole = parrot.generate("aaaa fox", max_tokens=40)
    for count in range(1, 20):
        assert same(parrot.generate("aaaa fox", max_tokens=count, lookup=15), parrot.generate("aaaa fox", max_tokens=count))
    stop = whole.text[20:24]
    assert stop
    assert same(parrot.generate("aaaa fox", max_tokens=40, lookup=15, stop=stop), parrot.generate("aaaa fox", max_tokens=40, stop=stop))
    small = parrot.session(20)
    got = small.generate("aaaa fox", Request(max_tokens=100, lookup=15))
    assert same(got, parrot.session(20).generate("aaaa fox", Request(max_tokens=100))) and got.finish == "context"
    again = small.generate("aaaa fox", Request(max_tokens=5, lookup=15))  # the cache holds no rejected drafts
    assert again.tokens == got.tokens[:5] and again.cached_tokens == again.prompt_tokens - 1


def test_pieces_join_to_the_text(parrot: Model) -> None:
    pieces = list(parrot.stream("aaaa fox", max_tokens=40, lookup=15))
    assert "".join(pieces) == parrot.generate("aaaa fox", max_tokens=40).text


@pytest.mark.parametrize("lookup", [-1, 16])
def test_drafts_that_do_not_fit_a_step_are_refused(lookup: int) -> None:
    with pytest.raises(RecipeError, match=f"lookup is {lookup}; need an integer from 0 to 15"):
        Request(lookup=lookup)


@pytest.mark.slow
def test_a_real_model_copies_faster_and_equally() -> None:
    from tersor.demo import cache_directory, fetch

    model = load(Path(fetch(cache_directory())))
    prompt = [{"role": "user", "content": f"Repeat this text word for word: {PROMPT}. The end of the text is near, said the fox."}]
    plain, fast = (model.generate(prompt, max_tokens=80, lookup=n) for n in (0, 15))
    assert same(fast, plain) and fast.accepted > 5
