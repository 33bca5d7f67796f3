"""The verdicts of the quality tables on hand-made results: like with like, on windows that both were judged on."""

import pytest
from benchmarks.quality_report import demands, size_of


def row(tool, recipe, model="smollm2-rot", **kld):
    judged = {windows.strip("w"): {"kl_mean": value} for windows, value in kld.items()}
    return {"model": model, "tool": tool, "recipe": recipe, "judged": judged}


def verdicts(ours, theirs, gguf=()):
    keyed = [{str(i): r for i, r in enumerate(side)} for side in (ours, theirs)]
    return list(demands({"tersor": keyed[0], "peers": keyed[1], "gguf": dict(gguf), "speed": {}}))


@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        ("gptq:int4_g64s", "int4_g64s"),
        ("rotate+awq+gptq(damp=0.02):int3_g64|int3_g32, lm_head=q8_0", "int3_g64"),
        ("int2_g64s", "int2_g64"),
        ("llm_int8:int8_cs", "int8"),
        ("int8", "int8"),
    ],
)
def test_size(recipe, size):
    assert size_of(recipe) == size


def test_our_best_stands_beside_the_best_peer_on_the_windows_of_both():
    ours = [row("tersor", "gptq:int3_g64", w2=0.5, w8=0.8), row("tersor", "rtn:int3_g64", w2=3.0, w8=3.0, w40=3.0)]
    theirs = [row("gptqmodel", "int3_g64", w2=1.0, w8=1.0, w40=1.1), row("auto-round", "int3_g64s", w2=2.0)]
    ((what, bound, value, note),) = verdicts(ours, theirs)
    assert what == "smollm2-rot, int3_g64: KL divergence" and note == "gptq:int3_g64; the best peer is gptqmodel, 1.0000; 8 windows"
    assert bound == pytest.approx(0.75) and value == 0.8


def test_other_models_other_sizes_and_what_nobody_judged_decide_nothing():
    ours = [row("tersor", "gptq:int3_g64", w2=0.5), row("tersor", "gptq:int4_g64s")]
    theirs = [
        row("gptqmodel", "int3_g64", model="smollm2-scaled", w2=1.0),
        row("gptqmodel", "int4_g64", w2=1.0),
        row("a", "int4_g64s", w2=1),
    ]
    assert verdicts(ours, theirs) == []


def test_int8_need_only_be_as_good():
    ((_, bound, value, _),) = verdicts([row("tersor", "llm_int8:int8_cs", w2=0.006)], [row("bitsandbytes", "int8", w2=0.0063)])
    assert bound == 0.0063 and value == 0.006


def test_a_gguf_file_stands_beside_our_best_of_no_more_bytes():
    theirs = {"kl_mean": 0.2, "file_bytes": 100, "original": "m"}
    ours = {"kl_mean": 0.12, "file_bytes": 100, "original": "m", "of": "theirs"}
    others = {
        "better": ours | {"kl_mean": 0.1, "file_bytes": 90, "of": "another"},
        "larger": ours | {"kl_mean": 0.01, "file_bytes": 101},
        "another model": ours | {"kl_mean": 0.01, "original": "n"},
    }
    found = verdicts([], [], {"theirs": theirs, "ours": ours, **others})
    assert [(value, note) for _, _, value, note in found] == [(0.1, "better")] and found[0][1] == pytest.approx(0.15)


def test_speed_is_judged_beside_the_fastest_peer_round_by_round():
    def rounds(*seconds):
        return {f"round {i}": {"process_seconds": s, "process_peak_mib": 100 * s} for i, s in enumerate(seconds)} | {"machine": {}}

    speed = {"m tersor": rounds(2, 4, 3), "m slow": rounds(20, 20, 20), "m fast": rounds(4, 16, 9), "n fast": rounds(1, 1, 1)}
    time, peak = demands({"tersor": {}, "peers": {}, "gguf": {}, "speed": speed})
    assert time[1:3] == pytest.approx((1 / 3, 1 / 3)) and peak[1:3] == pytest.approx((1228.8, 400))
