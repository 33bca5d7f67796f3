"""The calibration doctor on statistics worked out by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from tersor.calibration.doctor import BAD_SPREAD, THIN_SPREAD, Examination, Halves, examine, place
from tersor.calibration.samples import Samples
from tersor.errors import ModelError
from tersor.tensor import InputStatistics

Q, DOWN = "model.layers.3.self_attn.q_proj", "model.layers.12.mlp.down_proj.weight"


def statistics(mean_square: list[float], tokens: int = 100) -> InputStatistics:
    values = np.array(mean_square, np.float32)
    return InputStatistics(tokens, values, np.sqrt(values), values)


def half(name: str, first: list[float], second: list[float], tokens: int = 100) -> Halves:
    return name, statistics(first, tokens), statistics(second, tokens)


def samples(tokens: list[list[int]] | None = None, **provenance: Any) -> Samples:
    array = np.array(tokens or [[1, 2, 3, 4], [5, 6, 7, 1]], np.int32)
    known = {"source": "a.txt", "kind": "text", "samples": len(array), "seqlen": 4, "seed": 0, "chat_template": "none"}
    return Samples(array, known | provenance)


def check(*halves: Halves, experts: dict[str, int] | None = None, hessian: bool = True, **provenance: Any) -> Examination:
    return examine(samples(**provenance), 70, halves, experts, hessian=hessian)


GOOD = half(Q, [1.0, 2.0, 4.0], [1.02, 2.0, 4.0])


def test_good() -> None:
    found = check(GOOD)
    assert (found.verdict, found.reasons, found.advice) == ("good", (), ())
    assert (found.tokens, found.distinct, found.vocabulary, found.repeated) == (8, 7, 70, 0)
    assert "8, 7 different ones: 10.0 % of the vocabulary" in str(found) and "verdict               good\n" in str(found)
    found.refuse()


def test_spread_is_the_median_of_the_columns_differences() -> None:
    # 2 |a - b| / (a + b): 2/4 * 2 = 1 for (1, 3), 0 for (2, 2), 2 for (0, 5); the dead column does not count
    found = check(half(Q, [1.0, 2.0, 0.0, 0.0], [3.0, 2.0, 5.0, 0.0]))
    health = found.inputs[0]
    assert (health.spread, health.dead, health.width, health.tokens) == (1.0, 1, 4, 200)
    assert found.spread == 1.0 and "dead columns          1, in block 3 self_attn.q_proj" in str(found)
    assert check(half(Q, [1e30], [3e30])).spread == pytest.approx(1.0)  # whatever the scale


def test_spread_of_noise_falls_with_the_square_root_of_the_samples() -> None:
    """Inputs of independent normal values: 2 |a - b| / (a + b) of n tokens each has the median 0.6745 * 2 / sqrt(n)."""
    rng = np.random.default_rng(0)
    for n in (64, 400):
        a, b = (np.square(rng.standard_normal((n, 2001))).mean(axis=0).tolist() for _ in range(2))
        assert check(half(Q, a, b, n)).spread == pytest.approx(0.6745 * 2 / math.sqrt(n), rel=0.06)


def test_the_worst_five_are_named_and_the_spread_is_the_middle_one() -> None:
    halves = [half(f"model.layers.{i}.mlp.down_proj", [1.0], [1.0 + 0.01 * i]) for i in range(9)]
    found = check(*halves)
    assert [place(i.name) for i in found.worst] == [f"block {i} mlp.down_proj" for i in (8, 7, 6, 5, 4)]
    assert found.spread == pytest.approx(2 * 0.04 / 2.04)
    assert "  1. least stable     block 8 mlp.down_proj, 7.7 %" in str(found) and "5. least" in str(found) and "6. least" not in str(found)


@pytest.mark.parametrize(("spread", "verdict"), [(0.9 * THIN_SPREAD, "good"), (1.1 * THIN_SPREAD, "thin"), (1.1 * BAD_SPREAD, "bad")])
def test_verdict_on_the_spread(spread: float, verdict: str) -> None:
    found = check(half(Q, [1 - spread / 2], [1 + spread / 2]))
    assert found.verdict == verdict
    assert found.reasons == (() if verdict == "good" else (f"the halves of the samples differ by {100 * spread:.0f} %",))
    if verdict == "thin":
        assert found.advice[0].startswith(f"--samples {math.ceil(2 * 1.1**2.5)} would bring")
    found.refuse()  # it is the user's choice


def test_few_tokens_for_the_width() -> None:
    found = check(half(Q, [1.0] * 5, [1.0] * 5, 19), half(DOWN, [1.0] * 4, [1.0] * 4, 16), half(DOWN, [1.0] * 6, [1.0] * 6, 19))
    assert found.rank_limited == () and found.verdict == "thin"
    assert found.reasons == ("inputs of 5, 6 columns saw few tokens, 6.3 a column",)  # 38 / 6; 4 columns saw 8 each
    assert found.advice == ("methods with error feedback (gptq) want 8 tokens a column: 48 tokens",)


def test_rank() -> None:
    found = check(half(Q, [1.0] * 5, [1.0] * 5, 2), half(DOWN, [1.0] * 4, [1.0] * 4, 2), half(DOWN, [1.0] * 9, [1.0] * 9, 2))
    assert found.rank_limited == (5, 9) and found.verdict == "thin"
    assert found.reasons[1] == "a Hessian of 5, 9 columns cannot have full rank"


def test_tokens_a_column_matter_to_recipes_with_a_hessian_alone() -> None:
    found = check(half(Q, [1.0] * 5, [1.0] * 5, 2), hessian=False)
    assert found.rank_limited == (5,) and (found.verdict, found.reasons, found.advice) == ("good", (), ())


def test_repeated_samples() -> None:
    found = examine(samples([[1, 2], [3, 4], [1, 2], [1, 2]]), 10, [GOOD])
    assert found.repeated == 2 and found.verdict == "thin" and "2 samples repeat an earlier one" in found.reasons


@pytest.mark.parametrize(
    ("status", "kind", "shown", "advised"),
    [
        ("used", "jsonl", "used", False),
        ("unused", "text", "not used, though the model has one", True),
        ("unused", "self", "not used, though the model has one", False),
        ("none", "text", "the model has none", False),
        ("unknown", "tokens", "not known, tokens came from outside", False),
    ],
)
def test_chat_template(status: str, kind: str, shown: str, advised: bool) -> None:
    found = check(GOOD, chat_template=status, kind=kind)
    assert f"chat template         {shown}\n" in str(found)
    assert any("chat template" in line for line in found.advice) == advised == ("advice" in str(found))
    assert found.verdict == "good"


def test_a_half_without_tokens_says_nothing() -> None:
    found = check((Q, statistics([1.0, 1.0], 5), statistics([math.nan, math.nan], 0)))
    assert found.inputs[0].finite and found.inputs[0].spread == 2.0 and found.verdict == "bad"


@pytest.mark.parametrize(
    ("examined", "tokens", "told"),
    [
        (None, 200, "the samples"),
        ((2, 4), 200, "the samples"),
        ((1, 4), 400, "1 of the samples"),
        ((1, 2), 800, "the first 2 tokens of 1 of"),
    ],
)
def test_a_part_of_the_samples_stands_for_all(examined: tuple[int, int] | None, tokens: int, told: str) -> None:
    found = examine(samples(), 70, [GOOD], examined=examined)
    assert found.inputs[0].tokens == tokens
    assert f"between the halves of {told}" in str(found)


# What is refused


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("second", [False, True])
def test_activations_that_are_no_numbers(value: float, second: bool) -> None:
    pair = ([1.0, 1.0], [1.0, value]) if second else ([1.0, value], [1.0, 1.0])
    found = check(GOOD, half(DOWN, *pair))
    assert found.verdict == "bad" and [i.name for i in found.worst] == [Q]
    assert "activations are NaN or infinite at the input of block 12 mlp.down_proj" in found.reasons[0]
    for force in (False, True):
        with pytest.raises(ModelError, match=r"NaN or infinite at the input of block 12 mlp\.down_proj; the model overflows"):
            found.refuse(force)


def test_inputs_that_are_all_zero() -> None:
    found = check(GOOD, half(DOWN, [0.0, 0.0], [0.0, 0.0]))
    assert found.verdict == "bad" and found.reasons == ("only zeros reach block 12 mlp.down_proj",)
    with pytest.raises(ModelError, match=r"only zeros reach block 12 mlp\.down_proj; give other text, or --force"):
        found.refuse()
    found.refuse(force=True)


def test_experts_never_hit() -> None:
    experts = {f"model.layers.1.mlp.experts.{i}.up_proj": tokens for i, tokens in enumerate([5, 0, 7, 0])}
    found = check(GOOD, experts=experts)
    assert found.verdict == "bad" and found.reasons == ("2 of 4 experts saw no token",)
    assert "experts               2 never hit; the fewest tokens of 4: 0, block 1 mlp.experts.1.up_proj" in str(found)
    named = r"2 of 4 experts saw no token: block 1 mlp\.experts\.1\.up_proj, block 1 mlp\.experts\.3\.up_proj; give more"
    with pytest.raises(ModelError, match=named):
        found.refuse()
    found.refuse(force=True)
    assert check(GOOD, experts={"e": 1}).verdict == "good"


def test_many_places_are_a_few_and_a_number() -> None:
    found = check(*[half(f"model.layers.{i}.mlp.up_proj", [0.0], [0.0]) for i in range(9)])
    assert found.reasons[0].endswith("block 0 mlp.up_proj, block 1 mlp.up_proj, block 2 mlp.up_proj and 6 more")


def test_to_dict_is_json() -> None:
    found = check(GOOD, half(DOWN, [0.0], [0.0]), experts={"e": 3})
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["verdict"] == "bad" and plain["experts"] == {"e": 3} and plain["source"]["source"] == "a.txt"
    assert plain["inputs"][1] == {"name": DOWN, "width": 1, "tokens": 200, "spread": 0.0, "dead": 1, "finite": True}


def test_without_inputs() -> None:
    assert check().spread == 0.0 and check().verdict == "good"


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj"])
def test_place(name: str) -> None:
    assert place(name) == "block 3 mlp.up_proj" and place("lm_head") == "lm_head"
