"""The benchmarks' verdicts on hand-made results: ratios pair by pair, limits of the same round, and nothing held that was not measured."""

import pytest
from benchmarks.demands import demands
from benchmarks.report import judge

FILE = {"name": "synth", "type": "q4_0", "bytes": 100 * 2**20, "token_bytes": 10**8, "operations": 10**9}


def row(runtime, prefill, decode, threads=2, **more):
    base = {"runtime": runtime, "model": "synth", "type": "q4_0", "threads": threads, "prefill": prefill, "decode": decode}
    return {**base, "resident_mib": 100, "peak_mib": 110, "about": {"version": runtime, "kv_mib": 10}, **more}


def result(*rows, peak=(1000.0, 500.0, 1000.0)):
    limits = {"bandwidth": [10.0, 20.0, 10.0], "peak": list(peak)}
    return {"files": [FILE], "limits": {"1": limits, "2": limits}, "rows": list(rows)}


def find(results, text):
    found = [d for d in demands(results) if text in d.text]
    assert len(found) == 1, [d.text for d in found]
    return found[0]


def test_nothing_measured_is_nothing_held():
    everything = list(demands({}))
    assert len(everything) > 40
    assert not any(d.held or d.value is not None for d in everything)


def test_prefill_ratio_is_the_median_of_pairs_of_the_worst_number_of_threads():
    two = row("tersor", [100.0, 300.0, 200.0], [1.0] * 3), row("llama.cpp", [50.0, 100.0, 150.0], [1.0] * 3)  # 2, 3, 1.33
    one = row("tersor", [190.0] * 3, [1.0] * 3, threads=1), row("llama.cpp", [100.0] * 3, [1.0] * 3, threads=1)
    demand = find({"synth-q4_0": result(*two)}, "1.17B q4_0: prefill over llama.cpp")
    assert demand.value == 2 and demand.held
    demand = find({"synth-q4_0": result(*two, *one)}, "1.17B q4_0: prefill over llama.cpp")
    assert demand.value == pytest.approx(1.9) and not demand.held and demand.note == "1 thread"


def test_share_of_a_limit_is_taken_round_by_round():
    results = {"synth-q4_0": result(row("tersor", [600.0, 350.0, 500.0], [85.0, 100.0, 95.0]))}
    assert find(results, "1.17B q4_0: prefill, share of the int8 peak").value == pytest.approx(60)  # 60, 70, 50 %
    bandwidth = find(results, "1.17B q4_0: decode at 2 threads")
    assert bandwidth.value == pytest.approx(85) and bandwidth.held  # 85, 50, 95 %


def test_a_limit_that_is_not_measured_decides_nothing():
    results = {"synth-q4_0": result(row("tersor", [600.0] * 3, [85.0] * 3), peak=(None, None, None))}
    assert find(results, "1.17B q4_0: prefill, share of the int8 peak").value is None


def test_the_best_peer_counts_and_every_peer_must_be_there():
    ours = row("tersor", [1600.0] * 3, [100.0] * 3)
    rows = [ours, row("llama.cpp", [700.0] * 3, [60.0] * 3), row("OpenVINO", [1000.0] * 3, [50.0] * 3)]
    assert find({"peers": result(*rows)}, "SmolLM2 in 4 bits: prefill").value is None
    rows.append(row("onnxruntime-genai", [500.0] * 3, [80.0] * 3))
    prefill, decode = (find({"peers": result(*rows)}, f"SmolLM2 in 4 bits: {what}") for what in ("prefill", "decode"))
    assert prefill.value == pytest.approx(1.6) and prefill.held and "OpenVINO" in prefill.note
    assert decode.value == pytest.approx(1.25) and not decode.held and "onnxruntime-genai" in decode.note


def test_memory_counts_without_the_cache_and_its_peak_too():
    load = result(row("tersor", [1.0], [1.0], resident_mib=115, peak_mib=125, first_token_seconds=[1.0, 3.0, 1.5]))
    demand = find({"load": load}, "resident memory of the process")
    assert demand.value == pytest.approx(1.05) and demand.held
    assert not find({"load": load}, "peak memory of the process").held  # 1.15
    assert find({"load": load}, "first token").held


def test_the_int8_cache_must_grow_less_than_the_float16_cache():
    def context(f16, int8):
        rows = [{"runtime": "tersor", "kv": kv, "short_seconds": [1.0], "long_seconds": [g]} for kv, g in (("f16", f16), ("int8", int8))]
        return {"context": {"rows": rows}}

    assert find(context(1.4, 1.3), "int8 cache").held
    assert not find(context(1.2, 1.3), "int8 cache").held
    assert not find(context(1.6, 1.3), "f16 cache").held


def test_every_way_of_running_counts_for_the_divergence():
    rows = [
        {"runtime": "tersor", "how": how, "kl_mean": kl, "kl_error": 1e-5}
        for how, kl in (
            ("prefill", 0.0019),
            ("token by token", 0.0006),
            ("float activations, prefill", 1e-6),
            ("float activations, x", 2e-4),
        )
    ]
    found = [find({"activations-q4_1": {"rows": rows}}, f"q4_1: KL divergence, {what}") for what in ("prefill", "token", "float")]
    assert [(d.value, d.held) for d in found] == [(0.0019, True), (0.0006, False), (2e-4, False)]


def test_a_short_run_decides_nothing(monkeypatch, capsys):
    short = {"rounds": 2, "prefill": 512, "decode": 128} | result(
        row("tersor", [1.0] * 3, [1.0] * 3), row("llama.cpp", [1.0] * 3, [1.0] * 3)
    )
    monkeypatch.setattr("benchmarks.report.read", lambda isa, names: {"synth-q4_0": short})
    assert judge(["synth-q4_0"]) == 0
    assert "decides nothing" in capsys.readouterr().out
    monkeypatch.setattr("benchmarks.report.read", lambda isa, names: {"synth-q4_0": short | {"rounds": 5}})
    assert judge(["synth-q4_0"]) == 1
    assert "not held" in capsys.readouterr().out
