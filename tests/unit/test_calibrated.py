"""Calibrated runs from end to end: what they write, how they refuse, and how they go on after they were stopped."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tersor
from tersor.calibrated import BlockReport
from tersor.calibration.doctor import Examination
from tersor.errors import ContainerError, ModelError, OutputError, RecipeError
from tiny import tiny_model

RECIPE = "clip:int4_g32"
OPTIONS = {"calib": "pydoc", "samples": 4, "seqlen": 32}


def files(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()} if path.is_dir() else {path.name: path.read_bytes()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("calibrated") / "model", layers=3)


def test_the_result_names_its_calibration_and_its_errors(model, tmp_path):
    said: list[object] = []
    result = tersor.quantize(model, tmp_path / "out", RECIPE, **OPTIONS, report=said.append)
    examination, *reports = said
    assert isinstance(examination, Examination) and examination.tokens == 128 and len(examination.inputs) == 12
    assert [r.index for r in reports] == [0, 1, 2] and all(len(r.errors) == 7 for r in reports)
    assert "block 2 of 3: output error in % q " in str(reports[1]) and reports[2].seconds_left == 0
    assert result.calibration["kind"] == "pydoc" and result.calibration["tokens"] == 128
    assert result.output_error is not None and 0 < result.output_error < 1
    layers = [t for t in result.tensors if ".layers." in t.name and len(t.shape) > 1]
    assert all(t.output_error is not None and t.method == "clip" for t in layers)
    assert not (tmp_path / "out.work").exists()
    assert tersor.load(tmp_path / "out").generate("def", max_tokens=2).tokens


def test_importance_lowers_the_error_of_the_outputs(model, tmp_path):
    """The same format with and without calibration, both judged on the same statistics of the first block."""
    weighted = tersor.quantize(model, tmp_path / "a", RECIPE, **OPTIONS)
    plain = tersor.quantize(model, tmp_path / "b", RECIPE + ", layers.2=clip:int4_g16", calib="pydoc", samples=4, seqlen=32)
    assert {t.name for t in weighted.tensors} == {t.name for t in plain.tensors}
    assert weighted.error >= tersor.quantize(model, tmp_path / "c", RECIPE).error  # of the weights alone the unweighted search is best


@pytest.mark.parametrize("target", ["out", "out.gguf"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(model, tmp_path, target):
    recipe = RECIPE if target == "out" else "clip:q4_0"
    (tmp_path / "undisturbed").mkdir()
    tersor.quantize(model, tmp_path / "undisturbed" / target, recipe, **OPTIONS)

    def stop(report: object) -> None:
        if isinstance(report, BlockReport) and report.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tersor.quantize(model, tmp_path / target, recipe, **OPTIONS, report=stop)
    assert not (tmp_path / target).exists()
    with pytest.raises(OutputError, match=r"out.*\.work holds an interrupted run; go on with --resume"):
        tersor.quantize(model, tmp_path / target, recipe, **OPTIONS)
    with pytest.raises(OutputError, match=r"another run, whose calibration's seed was 0, not 1; repeat its command"):
        tersor.quantize(model, tmp_path / target, recipe, **OPTIONS | {"seed": 1}, resume=True)
    went_on: list[BlockReport] = []
    tersor.quantize(model, tmp_path / target, recipe, **OPTIONS, resume=True, report=went_on.append)
    assert [r.index for r in went_on] == [2]
    assert files(tmp_path / target) == files(tmp_path / "undisturbed" / target)
    assert not (tmp_path / f"{target}.work").exists()


def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path):
    model = tiny_model(tmp_path / "model", layers=12)
    arguments = ["--recipe", RECIPE, "--calib", "pydoc", "--samples", "4", "--seqlen", "64"]
    command = [sys.executable, "-m", "tersor.cli", "quantize", str(model), *arguments]
    process = subprocess.Popen([*command, "-o", str(tmp_path / "out")], stderr=subprocess.DEVNULL)
    while not (tmp_path / "out.work" / "block-1.safetensors").exists() and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
    subprocess.run([*command, "-o", str(tmp_path / "out"), "--resume"], check=True, capture_output=True)
    subprocess.run([*command, "-o", str(tmp_path / "whole")], check=True, capture_output=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_process_killed_while_the_doctor_looks_goes_on(tmp_path, model):
    command = [sys.executable, "-m", "tersor.cli", "quantize", str(model), "-o", str(tmp_path / "out"), "--recipe", RECIPE]
    command += ["--calib", "pydoc", "--samples", "64", "--seqlen", "128"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (tmp_path / "out.work" / "doctor" / "run.json").exists() and process.poll() is None:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and (tmp_path / "out.work" / "doctor" / "run.json").exists()
    subprocess.run([*command, "--resume"], check=True, capture_output=True)
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize("cut", ["cut off", "missing"])
def test_a_run_whose_states_are_not_whole_is_not_gone_on_with(model, tmp_path, cut):
    def stop(report: object) -> None:
        if isinstance(report, BlockReport) and report.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tersor.quantize(model, tmp_path / "out", RECIPE, **OPTIONS, report=stop)
    states = tmp_path / "out.work" / "quantized-2"
    if cut == "missing":
        states.unlink()
    else:
        os.truncate(states, states.stat().st_size - 4)
    with pytest.raises(OutputError, match=r"quantized-2 is not whole, so the run cannot go on from it; remove .*out\.work"):
        tersor.quantize(model, tmp_path / "out", RECIPE, **OPTIONS, resume=True)
    assert (tmp_path / "out.work" / "block-1.safetensors").exists()


@pytest.mark.parametrize("recipe", ["clip:int4_g32", "awq+gptq(asymmetric=1):int4_g32"])
def test_states_in_files_give_the_bytes_of_those_in_memory(model, tmp_path, recipe, monkeypatch):
    tersor.quantize(model, tmp_path / "memory", recipe, **OPTIONS)
    monkeypatch.setattr("tersor.calibration.memory.KEPT_BYTES", 0)
    tersor.quantize(model, tmp_path / "files", recipe, **OPTIONS)
    assert files(tmp_path / "files") == files(tmp_path / "memory")


@pytest.mark.parametrize("failing", [1, 2, 3])  # blocks; what fails in the last one is seen when it is read
def test_a_disk_that_fills_while_the_next_block_is_made_is_told(model, tmp_path, failing, monkeypatch):
    from tersor.calibration import work

    written: list[Path] = []

    def full(path: Path, data: bytes) -> None:
        if path.name.startswith("block-"):
            written.append(path)
            if len(written) == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(work, "write_whole", full)
    with pytest.raises(OutputError, match=r"out\.work: the disk is full; the output needs \d+ bytes"):
        tersor.quantize(model, tmp_path / "out", RECIPE, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_nothing_to_resume(model, tmp_path):
    with pytest.raises(OutputError, match="there is no run to resume; start it without --resume"):
        tersor.quantize(model, tmp_path / "out", RECIPE, **OPTIONS, resume=True)


@pytest.mark.parametrize(
    ("recipe", "options", "says"),
    [
        ("rtn:int4_g32", {"calib": "pydoc"}, "has no use for calibration data; use clip or gptq"),
        (RECIPE, {"max_ram": 1 << 30}, "--max-ram is for calibrated runs"),
        (RECIPE, {"resume": True}, "--resume is for calibrated runs"),
        (RECIPE, {**OPTIONS, "max_ram": 1 << 20}, r"--max-ram 0.00 GiB is too little: .* needs [0-9.]+ GiB; give that much"),
    ],
)
def test_refusals(model, tmp_path, recipe, options, says):
    with pytest.raises(RecipeError, match=says):
        tersor.quantize(model, tmp_path / "out", recipe, **options)
    assert list(tmp_path.iterdir()) == []


def changed(path: Path, name: str, change) -> Path:
    """A tiny model one of whose tensors is changed."""
    import tiny

    config = tiny.tiny_config("llama", 64, 128, 2, 4, 2, True)
    tensors = tiny.tiny_tensors(config | {"dtype": "float32"}, 0)
    return tiny_model(path, change={name: change(tensors[name].copy())})


def test_an_activation_that_is_not_finite_names_block_and_layer(tmp_path):
    def huge(w: np.ndarray) -> np.ndarray:
        w[:] = 1e38
        return w

    path = changed(tmp_path / "model", "model.layers.0.self_attn.o_proj.weight", huge)
    with pytest.raises(
        ModelError,
        match=r"calibration: activations are NaN or infinite at the input of block 0 mlp.gate_proj and 6 more|block 0 mlp.gate_proj",
    ):
        tersor.quantize(path, tmp_path / "out", RECIPE + ", layers.0.o_proj=f32", **OPTIONS)


def test_an_input_that_is_always_zero_names_block_and_layer(tmp_path):
    path = changed(tmp_path / "model", "model.layers.1.mlp.up_proj.weight", lambda w: w * 0)
    with pytest.raises(ModelError, match=r"calibration: only zeros reach block 1 mlp.down_proj; give other text, or --force"):
        tersor.quantize(path, tmp_path / "out", RECIPE, **OPTIONS)
    assert not (tmp_path / "out.work").exists()
    tersor.quantize(path, tmp_path / "out", "gptq:int4_g32, layers.1.down_proj=f32", **OPTIONS)
    forced = tersor.quantize(path, tmp_path / "forced", "gptq:int4_g32", **OPTIONS, force=True)
    assert {t.name: t.method for t in forced.tensors}["model.layers.1.mlp.down_proj.weight"] == "clip"


def test_a_model_calibrates_on_what_it_writes_itself(model, tmp_path):
    first = tersor.quantize(model, tmp_path / "a", RECIPE, calib="self", samples=2, seqlen=16)
    again = tersor.quantize(model, tmp_path / "b", RECIPE, calib="self", samples=2, seqlen=16)
    assert first.calibration["kind"] == "self" and files(tmp_path / "a") == files(tmp_path / "b")
    assert first.calibration["sha256"] == again.calibration["sha256"]


def test_the_output_says_how_it_was_made(model, tmp_path):
    import json

    from gguf import GGUFReader

    tersor.quantize(model, tmp_path / "out", RECIPE, **OPTIONS)
    said = json.loads((tmp_path / "out" / "tersor.json").read_text())
    assert said["recipe"] == RECIPE and said["calibration"]["samples"] == 4 and len(said["calibration"]["sha256"]) == 64
    tersor.quantize(model, tmp_path / "out.gguf", "clip:q4_0", **OPTIONS)
    fields = GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tersor.recipe"].contents() == "clip:q4_0"
    assert json.loads(fields["tersor.calibration"].contents())["seqlen"] == 32
    assert fields["quantize.imatrix.dataset"].contents() == "pydoc_data.topics"
    tersor.quantize(tmp_path / "out.gguf", tmp_path / "again.gguf", "q4_0")  # what it came from was calibrated, this is not
    assert "quantize.imatrix.dataset" not in GGUFReader(tmp_path / "again.gguf").fields


@pytest.mark.parametrize(
    "recipe",
    [
        "gptq:int3_g32",
        "gptq(act_order; asymmetric=0.5):int3_g32",
        "gptq:q4_0",
        "awq+gptq:int3_g32",
        "smoothquant(alpha=0.3)+clip:int3_g32",
        "rotate+awq+gptq:int3_g32",
        "hqq:int3_g32, lm_head=gptq:int4_g32",
        "autoround(iterations=4):int3_g32",
        "gptq+tune:int3_g32",
        "rtn+distill:int3_g32",
        "rotate+gptq(fisher):int3_g32",
        "gptq(fisher):q4_0",
        "awq+gptq+tune+distill:int3_g32, layers.0.down_proj=f16, lm_head=gptq:int4_g32",
    ],
)
def test_every_step_runs_and_the_file_is_the_model_that_was_made(tmp_path, recipe):
    """What the file computes is not far from the original, though the tiny model's 3 bits are coarse."""
    untied = tiny_model(tmp_path / "model", layers=2, tie=False)
    target = tmp_path / ("out.gguf" if "q4_0" in recipe else "out")
    result = tersor.quantize(untied, target, recipe, **OPTIONS)
    assert result.recipe == recipe and not target.with_name(target.name + ".work").exists()
    judged = tersor.evaluate(target, against=untied, window=64, windows=2)
    coarse = tersor.quantize(untied, tmp_path / "coarse", "rtn:int1_g32")
    assert coarse.path and judged.kl_mean < tersor.evaluate(tmp_path / "coarse", against=untied, window=64, windows=2).kl_mean


def test_what_is_kept_follows_the_scales_that_its_input_was_given(tmp_path):
    """A source whose format a layer keeps: awq has divided the norm before it."""
    source = tiny_model(tmp_path / "model", layers=2, dtype="f16")
    divergences = {}
    for steps in ("gptq", "awq+gptq"):
        tersor.quantize(source, tmp_path / steps, f"{steps}:int8_g32, k_proj=f16", **OPTIONS)
        divergences[steps] = tersor.evaluate(tmp_path / steps, against=source, window=64, windows=2).kl_mean
    assert divergences["awq+gptq"] < 2 * divergences["gptq"]


def test_rotation_of_a_tied_model_says_what_it_costs(model, tmp_path):
    result = tersor.quantize(model, tmp_path / "out", "rotate+rtn:int4_g32")
    assert "rotate: the head is no longer the embedding" in result.note


def test_a_recipe_that_trains_a_part_of_a_block_is_refused(model, tmp_path):
    with pytest.raises(RecipeError, match=r"block 0: autoround trains a block's matrices together, but some are to be rounded by rtn"):
        tersor.quantize(model, tmp_path / "out", "autoround:int4_g32, layers.0.o_proj=rtn:int4_g32", **OPTIONS)


@pytest.mark.parametrize("activations", ["token", "minmax", "percentile", "mse", "entropy"])
def test_the_file_says_how_inputs_are_rounded(model, tmp_path, activations):
    from tersor.containers import open_checkpoint

    options = OPTIONS if activations != "token" else {}
    recipe = "smoothquant+rtn:int8_cs" if options else "rtn:int8_cs"
    tersor.quantize(model, tmp_path / "out", recipe, activations=activations, **options)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        scheme = checkpoint.description.activations
    assert scheme is not None and (scheme.scales is None) == (activations == "token")
    if scheme.scales is not None:
        assert len(scheme.scales) == 3 * 7 and all(scale > 0 for scale in scheme.scales.values())
    mode = "int8_token" if activations == "token" else "int8_static"
    assert tersor.load(tmp_path / "out", activations=mode).generate("def", max_tokens=2).tokens


def test_refusals_of_activations(model, tmp_path):
    with pytest.raises(RecipeError, match="unknown activations 'max'; known: entropy, minmax, mse, percentile, token"):
        tersor.quantize(model, tmp_path / "out", "int8_cs", activations="max")
    with pytest.raises(RecipeError, match="--activations mse needs calibration data"):
        tersor.quantize(model, tmp_path / "out", "int8_cs", activations="mse")
    with pytest.raises(ContainerError, match="gguf cannot say how inputs are rounded"):
        tersor.quantize(model, tmp_path / "out.gguf", "q8_0", activations="token")
