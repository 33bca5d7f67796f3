"""Every command on a tiny model, through the same function that the program calls: output, JSON, progress, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

import tersor
from tersor import _native
from tersor.calibrated import BlockReport
from tersor.cli import execute
from tersor.cli.page import main as page_main
from tersor.cli.page import page
from tersor.cli.printing import _Lines, say
from tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("cli") / "model", tie=False, dtype="bf16")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog 0123456789 times; " * 40)
    return path


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    assert execute(["quantize", str(model), "-o", str(path), "-r", "q8_0"]) == 0
    return path


def run(*arguments: object) -> int:
    return execute([str(a) for a in arguments])


def python(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False, **options)


def test_quantize_prints_size_bits_and_error(model, tmp_path, capsys):
    assert run("quantize", model, "-o", tmp_path / "a.gguf", "--recipe", "q4_0, lm_head=q5_0") == 0
    out, err = capsys.readouterr()
    assert "a.gguf: " in out
    assert "4.500 in the blocks" in out
    assert "14 q4_0" in out
    assert "1 q5_0" in out
    assert "quantize: done in" in err  # plain lines: this is no terminal


def test_quantize_json_is_one_document(model, tmp_path, capsys):
    assert run("quantize", model, "-o", tmp_path / "a", "--recipe", "clip:int4_g32", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["container"] == "compressed-tensors"
    assert result["recipe"] == "clip:int4_g32"
    tensor = next(t for t in result["tensors"] if t["name"] == "model.layers.1.mlp.up_proj.weight")
    assert (tensor["format"], tensor["method"], tensor["shape"]) == ("int4_g32", "clip", [128, 64])
    assert tensor["bits_per_weight"] == 4 + (16 + 4) / 32


def test_quantize_says_what_the_source_was(small, tmp_path, capsys):
    assert run("quantize", small, "-o", tmp_path / "b.gguf", "-r", "q4_0") == 0
    assert "note: the source is itself stored in q8_0 (16 tensors)" in capsys.readouterr().out


def test_quantize_takes_a_toml_recipe(model, tmp_path, capsys):
    (tmp_path / "r.toml").write_text('default = "q4_0"\n[rules]\nmlp = "q5_0"\n')
    assert run("quantize", model, "-o", tmp_path / "a.gguf", "-r", tmp_path / "r.toml", "--json") == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "rtn:q4_0, mlp=rtn:q5_0"


def test_inspect(small, model, capsys):
    assert run("inspect", small) == 0
    out = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj.weight" in out
    assert "8.5000" in out
    assert "general.architecture = llama" in out
    assert run("inspect", small, "--all") == 0
    assert "model.layers.1.self_attn.q_proj.weight" in capsys.readouterr().out
    assert run("inspect", model, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["container"], found["formats"]["bf16"][0]) == ("huggingface", len(found["tensors"]))
    assert found["bits_per_weight"] == 16
    assert found["files"]["tokenizer.json"] > 0


def test_eval(small, model, text, capsys):
    assert run("eval", small, "--text", text, "--window", 32, "-n", 4) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out
    assert "4 windows of 32 tokens, no overlap, no BOS" in out
    assert run("eval", small, "--against", model, "--text", text, "--window", 32, "-n", 4, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["kl_mean"] < 0.1
    assert result["protocol"]["scored"] == 4 * 31
    assert run("eval", small, "--against", model, "--text", text, "--window", 32, "-n", 4) == 0
    out = capsys.readouterr().out
    assert "KL divergence, mean" in out
    assert "same top-1" in out


def test_inputs_may_be_rounded_as_others_do(small, text, capsys):
    found = []
    for how in ("int8", "int8_token", "llm_int8", "float"):
        assert run("eval", small, "--text", text, "--window", 32, "-n", 2, "--activations", how, "--json") == 0
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert len(set(found)) == 4 and max(found) / min(found) < 1.02
    assert run("run", small, "-p", "the", "-n", 2, "--raw", "--activations", "int8_static") == 2
    assert "has no calibrated input scales" in capsys.readouterr().err


def test_the_cache_may_be_int8(small, text, capsys):
    ratios = {}
    for kv in ("f16", "f32", "int8", "int4"):
        assert run("eval", small, "--text", text, "--window", 32, "-n", 4, "--kv", kv, "--json") == 0
        ratios[kv] = json.loads(capsys.readouterr().out)["perplexity"]
    assert len(set(ratios.values())) == 4
    assert abs(ratios["int8"] / ratios["f32"] - 1) < 0.01 and abs(ratios["int4"] / ratios["f32"] - 1) < 0.05
    assert run("run", small, "-p", "the", "-n", 2, "--raw", "--kv", "int8") == 0
    assert run("bench", small, "--prefill", 4, "--decode", 2, "--repeats", 1, "--kv", "int8", "--json") == 0


def test_compare_writes_models_results_and_page(model, small, text, tmp_path, capsys):
    arguments = ["--text", text, "--window", 64, "-n", 2, "--prefill", 16, "--decode", 4, "--repeats", 1, "--also", small]
    assert run("compare", model, "-o", tmp_path / "out", "-r", "q8_0; q4_0, lm_head=q5_0", "--recipe", "clip:int4_g32", *arguments) == 0
    out = capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["clip-int4_g32", "index.html", "plot.svg", "q4_0-lm_head-q5_0.gguf", "q8_0.gguf", "results.json"]
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "recipe"
    assert [line.split("  ")[0] for line in lines[2:7]] == ["original", "q8_0", "q4_0, lm_head=q5_0", "clip:int4_g32", "small"]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows[1]["divergence"]["kl_mean"] < rows[2]["divergence"]["kl_mean"]
    assert rows[4]["divergence"]["kl_mean"] == pytest.approx(rows[1]["divergence"]["kl_mean"])
    assert rows[1]["file_bytes"] == (tmp_path / "out" / "q8_0.gguf").stat().st_size
    html = (tmp_path / "out" / "index.html").read_text()
    assert html.count("<circle") == 4 + 2  # a dot each, and the legend's two kinds
    assert run("compare", model, "-o", tmp_path / "out", "-r", "q8_0", *arguments) == 2
    assert "q8_0.gguf exists" in capsys.readouterr().err


def test_convert(small, tmp_path, capsys):
    assert run("convert", small, tmp_path / "floats", "--dequantize", "f16") == 0
    assert "huggingface; tensors: 16 f16, 5 f32" in capsys.readouterr().out
    assert run("convert", tmp_path / "floats", tmp_path / "again.gguf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["container"] == "gguf"


def test_plan_needs_no_weights(model, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    assert run("plan", tmp_path / "config.json", "--ram", "1GiB", "-r", "q4_0; int4_g64", "-r", "f16") == 0
    out = capsys.readouterr().out
    assert "32 bits" in out
    assert "KV cache in float16" in out
    assert run("plan", tmp_path / "config.json", "-r", "q4_0; int4_g64", "-r", "f16", "--json") == 0
    assert [s["recipe"] for s in json.loads(capsys.readouterr().out)["sizes"]] == ["q4_0", "int4_g64", "f16"]


def test_bench(small, capsys):
    assert run("bench", small, "--prefill", 16, "--decode", 4, "--repeats", 1) == 0
    out = capsys.readouterr().out
    assert "prefill 16, tokens/s" in out
    assert "what memory gives" in out
    assert run("bench", small, "--prefill", 16, "--decode", 4, "--repeats", 1, "--json") == 0
    speed = json.loads(capsys.readouterr().out)["speeds"][str(small)]
    assert speed["decode"] > 0
    assert speed["isa"] == _native.isa()


def test_bench_lists_instruction_sets(capsys):
    assert run("bench", "--isa") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == _native.isas()
    assert [line.split()[0] for line in lines if "in use" in line] == [_native.isa()]
    assert run("bench", "--isa", "--json") == 0
    assert json.loads(capsys.readouterr().out)["isa"] == _native.isa()


def test_run_answers_a_prompt(small, capsys):
    assert run("run", small, "-p", "the quick brown", "--raw", "-n", 5) == 0
    first = capsys.readouterr()
    assert "decode 5 at" in first.err or "ended by eos" in first.err
    assert run("run", small, "-p", "the quick brown", "--raw", "-n", 5, "--threads", 1) == 0
    assert capsys.readouterr().out == first.out
    assert run("run", small, "-p", "fox?", "--system", "be brief", "-n", 3, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["tokens"]) <= 3
    assert result["finish"] in ("length", "eos")


def test_run_samples_by_its_seed(small, capsys):
    outs = []
    for seed in (1, 1, 2):
        assert run("run", small, "-p", "the", "--raw", "-n", 12, "--temperature", 1.5, "--seed", seed) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]


def test_run_chats_line_by_line(small):
    done = python("-m", "tersor", "run", small, "-n", 4, input="hello fox\nand again\n\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("t/s") == 2 * 2
    prefilled = [int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("prefill")]
    assert prefilled[1] < 2 * prefilled[0] + 8  # the conversation so far was in the cache


def test_help_is_quick_and_lists_every_command():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = python("-m", "tersor", "--help")
        times.append(time.perf_counter() - start)
    for name in ("quantize", "inspect", "eval", "compare", "plan", "bench", "convert", "run"):
        assert f"  {name} " in done.stdout
    slow = python("-X", "importtime", "-m", "tersor", "--help").stderr
    assert not [name for name in ("numpy", "torch", "rich", "tokenizers", "gguf") if f" {name}\n" in slow], times


def test_importing_tersor_imports_nothing_heavy():
    done = python("-c", "import sys, tersor; print([m for m in ('numpy', 'typer', 'gguf') if m in sys.modules], len(tersor.__all__))")
    assert done.stdout.split()[0] == "[]"
    assert int(done.stdout.split()[1]) <= 20
    assert python("-c", "import tersor; print(all(hasattr(tersor, n) for n in tersor.__all__))").stdout.strip() == "True"


def test_version(capsys):
    import tersor

    assert run("--version") == 0
    assert capsys.readouterr().out == f"tersor {tersor.__version__}\n"


def test_ctrl_c_leaves_nothing_and_exits_with_130(tmp_path):
    model = tiny_model(tmp_path / "m", hidden=1024, intermediate=4096, layers=6)
    child = subprocess.Popen(
        [sys.executable, "-m", "tersor", "quantize", str(model), "-o", str(tmp_path / "out.gguf"), "-r", "clip:q4_0", "-t", "1"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit that it is ignored
    )
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130, err
    assert err.splitlines()[-1] == "tersor: stopped"
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_reader_that_goes_away_is_no_fault(small):
    child = subprocess.Popen(
        [sys.executable, "-m", "tersor", "inspect", str(small), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child.stdout.close()
    _, err = child.communicate(timeout=30)
    assert err == ""
    assert child.returncode in (0, 141)


def test_the_page_of_the_command_line_is_fresh(tmp_path, capsys):
    (tmp_path / "cli.md").write_text(page())
    assert page_main(["--check", str(tmp_path / "cli.md")]) == 0
    (tmp_path / "cli.md").write_text(page() + "x")
    assert page_main(["--check", str(tmp_path / "cli.md")]) == 1
    assert "is stale" in capsys.readouterr().err
    assert page_main(["--verify"]) == 2
    assert page_main([]) == 0
    assert "None" not in page()


def test_the_clock_of_a_thing_begins_with_its_first_report(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tersor.cli.printing.time.monotonic", lambda: now[0])
    monkeypatch.setattr(_Lines, "last", 0.0)
    lines = _Lines()
    for what, seconds, done in (
        ("a", 0, 90),
        ("a", 10, 91),
        ("a", 2, 92),
        ("a", 8, 100),
        ("b", 0, 0),
        ("b", 7, 50),
        ("a", 1, 0),
        ("a", 9, 10),
    ):
        now[0] += seconds
        lines.report(what, done, 100)
    assert capsys.readouterr().err.splitlines() == ["a: 91 %, 90 s left", "a: done in 20.0 s", "b: 50 %, 7 s left", "a: 10 %, 81 s left"]


def test_the_time_left_is_told_when_the_first_steps_took_a_while(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tersor.cli.printing.time.monotonic", lambda: now[0])
    monkeypatch.setattr(_Lines, "last", 0.0)
    lines = _Lines()
    for seconds, done in ((0, 0), (1.5, 1), (5, 2)):
        now[0] += seconds
        lines.report("a", done, 1000)
    assert capsys.readouterr().err.splitlines() == ["a: 0 %", "a: 0 %, 3244 s left"]


def test_what_is_said_takes_the_place_of_progress(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tersor.cli.printing.time.monotonic", lambda: now[0])
    lines = _Lines()
    lines.report("a", 0, 100)
    now[0] += 10
    say("block 1 of 2")
    now[0] += 1
    lines.report("a", 50, 100)
    assert capsys.readouterr().err == "block 1 of 2\n"


def test_every_part_of_a_budgeted_run_is_told(model, tmp_path):
    calls = []
    options = {"calib": "pydoc", "samples": 4, "seqlen": 64, "budget": "9bpw"}
    tersor.quantize(model, tmp_path / "a.gguf", **options, progress=lambda *call: calls.append(call))
    things = list(dict.fromkeys(what for what, _, _ in calls))
    assert things == ["measure sensitivities", "judge formats", "quantize", "write", "verify"]
    for thing in things:
        done = [(done, total) for what, done, total in calls if what == thing]
        assert done[0][0] == 0 and done[-1][0] == done[-1][1] and done == sorted(done), thing


def test_a_resumed_run_begins_with_what_is_done(model, tmp_path):
    def stop(report):
        if isinstance(report, BlockReport):
            raise KeyboardInterrupt

    options = {"recipe": "clip:int4_g32", "calib": "pydoc", "samples": 4, "seqlen": 64}
    with pytest.raises(KeyboardInterrupt):
        tersor.quantize(model, tmp_path / "a", **options, report=stop)
    calls = []
    tersor.quantize(model, tmp_path / "a", **options, resume=True, progress=lambda *call: calls.append(call))
    first = next(call for call in calls if call[0] == "quantize")
    assert 0 < first[1] < first[2]


def test_a_verification_says_what_it_cannot_know(model, tmp_path, capsys):
    assert run("quantize", model, "-o", tmp_path / "a", "-r", "int4_g32", "--no-verify") == 0
    capsys.readouterr()
    assert run("verify", tmp_path / "a", "--no-logits", "--against", model) == 0
    told = capsys.readouterr().out
    assert "verified, as far as it can be: what was to be in it is not known" in told and "give --against" not in told
    assert run("verify", tmp_path / "a", "--no-logits") == 0
    assert "as far as" not in capsys.readouterr().out  # verification.json is there now


def test_the_protocol_says_how_the_model_ran(small, text, capsys):
    assert run("eval", small, "--text", text, "--window", 64, "-n", 2, "--kv", "int8", "--activations", "float", "--json") == 0
    protocol = json.loads(capsys.readouterr().out)["protocol"]
    assert (protocol["activations"], protocol["kv"]) == ("float", "int8")
