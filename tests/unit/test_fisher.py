"""Fisher information beside the whole model's own gradients, and what a calibrated run makes of it."""

from __future__ import annotations

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save

import tersor
from tersor.calibrated import BlockReport, Calibrator
from tersor.calibration import guides
from tersor.calibration.blocks import Rows
from tersor.calibration.guides import Guide
from tersor.calibration.work import Work, write_whole
from tersor.containers import open_checkpoint
from tersor.errors import ModelError, OutputError, RecipeError
from tersor.formats import get_format
from tersor.models import spec_of
from tersor.models.spec import GROUPS
from tersor.tensor import output_blocks
from tersor.training import fisher
from tersor.training.decoder import final_norm, logits_of, run_block
from tiny import VOCABULARY, tiny_model

OPTIONS = {"calib": "pydoc", "samples": 4, "seqlen": 32}
SHAPE = (3, 16)
LINEARS = [f"{part}.weight" for group in GROUPS for part in group]


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def model(request, tmp_path_factory):
    """(spec, read, every tensor as float32, tokens, folder)."""
    folder = tmp_path_factory.mktemp("m")
    checkpoint = open_checkpoint(tiny_model(folder / "m", request.param))
    formats = {name: get_format(info.format) for name, info in checkpoint.tensors.items()}
    tensors = {name: torch.from_numpy(np.array(f.dequantize(checkpoint.read(name)))) for name, f in formats.items()}
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, SHAPE)
    return spec_of(checkpoint.description.config), checkpoint.read, tensors, torch.from_numpy(tokens), folder


def test_what_is_measured_is_of_the_whole_models_gradients(model, monkeypatch):
    """Every layer's |g| and sums of g g^T / |g| against autograd through the model at once."""
    monkeypatch.setattr(fisher, "DTYPE", torch.float32)
    monkeypatch.setattr("tersor.tensor.OUTPUT_BLOCK", 24)  # some layers have more outputs, none a multiple of it
    spec, read, tensors, tokens, folder = model
    states = [Rows(folder / f"s{i}", spec.hidden_size) for i in range(len(spec.layers) + 1)]
    measured = fisher.Measurement(spec, read, SHAPE, states.__getitem__, Rows(folder / "g", spec.hidden_size), batch=2)
    embedded = tensors["model.embed_tokens.weight"][tokens] * spec.embedding_scale
    states[0].write(0, embedded.flatten(0, 1).numpy())
    for i in range(len(spec.layers)):
        measured.forward(i)
    measured.labels(seed=5)
    found = {i: measured.backward(i, LINEARS) for i in reversed(range(len(spec.layers)))}

    outputs, x = {}, embedded.clone().requires_grad_()
    for i, layer in enumerate(spec.layers):

        def product(name, h, i=i):
            outputs[i, name] = h @ tensors[f"model.layers.{i}.{name}"].T
            outputs[i, name].retain_grad()
            return outputs[i, name]

        x = run_block(spec, layer, x, product, lambda name, i=i: tensors[f"model.layers.{i}.{name}"].reshape(-1))
    head = tensors["model.embed_tokens.weight" if spec.tied else "lm_head.weight"]
    log_p = torch.log_softmax(logits_of(spec, final_norm(spec, x, tensors["model.norm.weight"]), head), -1).flatten(0, 1)
    sums = log_p.detach().exp().cumsum(-1)
    chances = torch.from_numpy(np.random.default_rng(5).random(len(log_p), np.float32))
    labels = (sums < (chances * sums[:, -1])[:, None]).sum(-1)
    (-log_p[torch.arange(len(log_p)), labels].sum()).backward()

    assert len(outputs) == 7 * len(spec.layers) == sum(map(len, found.values()))
    for (i, name), y in outputs.items():
        g = y.grad.flatten(0, 1)
        size = g.norm(dim=1)
        np.testing.assert_allclose(found[i][name].tokens, size, rtol=2e-3, atol=1e-5)
        whole, begin = (g.T @ (g / size.clamp_min(1e-30)[:, None])).numpy(), 0
        for block in found[i][name].outputs:
            end = begin + len(block)
            np.testing.assert_allclose(block, whole[begin:end, begin:end], rtol=2e-3, atol=2e-3 * np.abs(whole).max())
            begin = end
        assert begin == g.shape[1] and len(found[i][name].outputs) == -(-g.shape[1] // 24)


def test_labels_are_drawn_from_what_the_model_predicts(model):
    """Over labels the gradients' mean is 0 and their second moments are the second derivatives of the divergence."""
    spec, _, tensors, _, _ = model
    norm, head = tensors["model.norm.weight"], tensors["model.embed_tokens.weight" if spec.tied else "lm_head.weight"]
    x = torch.randn(1, spec.hidden_size, generator=torch.Generator().manual_seed(1))
    n = 1 << 15
    chances = (torch.arange(n) + 0.5) / n
    gradients = fisher._label_gradient(spec, x.expand(n, -1), norm, head, chances).double()

    def divergence(moved):
        log_p, log_q = (torch.log_softmax(logits_of(spec, final_norm(spec, s, norm), head.double()), -1) for s in (x.double(), moved))
        return (log_p.exp() * (log_p - log_q)).sum()

    exact = torch.autograd.functional.hessian(divergence, x.double()).reshape(spec.hidden_size, -1)
    size = gradients.norm(dim=1).mean()
    assert gradients.mean(0).norm() < 1e-3 * size
    torch.testing.assert_close(gradients.T @ gradients / n, exact, rtol=2e-2, atol=2e-3 * float(exact.abs().max()))


def test_blocks_are_of_all_outputs():
    assert output_blocks(192) == [192] and output_blocks(8960) == [2048] * 4 + [768]


def test_a_rescaled_guide_charges_the_same_for_the_same_error():
    rng = np.random.default_rng(0)
    blocks = tuple(m @ m.T for m in (rng.standard_normal((n, n)) for n in (3, 2)))
    scale, error = rng.uniform(0.5, 2, 5), rng.standard_normal(5)
    guide = Guide(np.ones(4, np.float32), blocks)

    def cost(of, e):
        return e[:3] @ of.outputs[0] @ e[:3] + e[3:] @ of.outputs[1] @ e[3:]

    assert cost(guide.rescaled(scale), error / scale) == pytest.approx(cost(guide, error))


def test_a_guide_is_read_in_the_scale_of_its_layer(tmp_path):
    work = Work(tmp_path / "work", {}, resume=False)
    write_whole(work.guide(0), save({"v|tokens": np.float32([1, 3]), "v|0": np.eye(2, dtype=np.float32)}))
    read = guides.Guides(work, 0)
    read.rescale("model.layers.0.v", np.float32([1, 2]))
    guide = read["model.layers.0.v"]
    np.testing.assert_array_equal(guide.tokens, [0.5, 1.5])
    np.testing.assert_array_equal(guide.outputs[0], np.diag([1, 4]))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("fisher") / "model", layers=3)


def files(path):
    return {f.name: f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def test_an_interrupted_run_goes_on_with_what_was_measured(small, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    recipe = "awq+gptq(fisher; asymmetric=0.5):int4_g32, layers.1.down_proj=gptq:int3_g32, layers.2.k_proj=f16"
    told = []
    tersor.quantize(small, tmp_path / "whole" / "out", recipe, **OPTIONS, progress=lambda *what: told.append(what))
    assert ("fisher", 0, 6) in told and ("fisher", 6, 6) in told

    def stop(report: object) -> None:
        if isinstance(report, BlockReport) and report.index == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tersor.quantize(small, tmp_path / "out", recipe, **OPTIONS, report=stop)
    left = sorted(f.name for f in (tmp_path / "out.work").iterdir())
    assert {"guide-1.safetensors", "guide-2.safetensors"} <= set(left) and not any(name.startswith(("fisher-", "guide-0")) for name in left)
    with monkeypatch.context() as patched:  # not measured again
        patched.setattr(fisher, "Measurement", None)
        tersor.quantize(small, tmp_path / "out", recipe, **OPTIONS, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole" / "out")
    assert not (tmp_path / "out.work").exists()


def test_a_run_stopped_while_it_measures_begins_anew(small, tmp_path, monkeypatch):
    def stop(stage, done, total):
        if (stage, done) == ("fisher", 4):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tersor.quantize(small, tmp_path / "out", "gptq(fisher):int4_g32", **OPTIONS, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_process_killed_while_it_measures_goes_on_to_the_same_bytes(small, tmp_path):
    """It kills itself when it begins to measure block 0."""
    killed = f"""
import os, signal, tersor
def progress(*at):
    if at == ("fisher", 5, 6):
        os.kill(os.getpid(), signal.SIGKILL)
tersor.quantize({str(small)!r}, {str(tmp_path / "out")!r}, "gptq(fisher):int4_g32", **{OPTIONS!r}, progress=progress)
"""
    assert subprocess.run([sys.executable, "-c", killed], capture_output=True).returncode == -signal.SIGKILL
    left = {file.name for file in (tmp_path / "out.work").iterdir()}
    assert {"guide-1.safetensors", "guide-2.safetensors", "fisher-gradients"} <= left and "guide-0.safetensors" not in left
    tersor.quantize(small, tmp_path / "out", "gptq(fisher):int4_g32", **OPTIONS, resume=True)
    tersor.quantize(small, tmp_path / "whole", "gptq(fisher):int4_g32", **OPTIONS)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_only_the_layers_that_ask_for_it_are_weighed(small, tmp_path, monkeypatch):
    """The others have the statistics that they have without it, those in the same group too; awq's scales reach v's and up's guides."""
    measured, rescaled, seen = [], [], {}
    backward, rescale, statistics = fisher.Measurement.backward, guides.Guides.rescale, Calibrator._statistics

    def spied(self, walk, group, *rest):
        seen[tuple(group)] = statistics(self, walk, group, *rest)
        return seen[tuple(group)]

    def noted(self, index, wanted):
        measured.append((index, set(wanted)))
        return backward(self, index, wanted)

    monkeypatch.setattr(fisher.Measurement, "backward", noted)
    monkeypatch.setattr(guides.Guides, "rescale", lambda self, name, scale: rescaled.append(name) or rescale(self, name, scale))
    monkeypatch.setattr(Calibrator, "_statistics", spied)
    tersor.quantize(small, tmp_path / "plain", "awq+gptq:int4_g32", **OPTIONS)
    plain, seen = seen, {}
    tersor.quantize(small, tmp_path / "out", "awq+gptq:int4_g32, layers.0.v_proj=gptq(fisher):int4_g32", **OPTIONS)
    assert measured == [(2, set()), (1, set()), (0, {"self_attn.v_proj.weight"})]
    q, k, v = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv")
    np.testing.assert_array_equal(seen[q, k].gram, plain[q, k, v].gram)
    assert len(seen[v,].outputs) == 1 and not np.allclose(seen[v,].gram, plain[q, k, v].gram, rtol=0.01)
    np.testing.assert_array_equal(seen[v,].absmax, plain[q, k, v].absmax)
    assert {v, "model.layers.0.mlp.up_proj.weight"} <= set(rescaled)


def test_layers_that_no_gradient_reaches_are_rounded_as_ever(small, tmp_path, monkeypatch):
    observe = fisher._observe

    def dead(gradient, tokens, outputs):
        observe(gradient * 0 if gradient.shape[-1] == 128 else gradient, tokens, outputs)  # gate and up

    tersor.quantize(small, tmp_path / "plain", "gptq:int4_g32", **OPTIONS)
    monkeypatch.setattr(fisher, "_observe", dead)
    tersor.quantize(small, tmp_path / "out", "gptq:int4_g32, layers.0.up_proj=gptq(fisher):int4_g32", **OPTIONS)
    weights = []
    for out in ("plain", "out"):
        with open_checkpoint(tmp_path / out) as checkpoint:
            weights.append(checkpoint.read("model.layers.0.mlp.up_proj.weight"))
    assert all(np.array_equal(weights[0].fields[k], weights[1].fields[k]) for k in weights[0].fields)


def test_gradients_that_are_not_finite_name_block_and_layer(small, tmp_path, monkeypatch):
    observe = fisher._observe
    monkeypatch.setattr(fisher, "_observe", lambda g, tokens, outputs: observe(g * float("nan"), tokens, outputs))
    with pytest.raises(ModelError, match=r"model\.layers\.2\..*: the gradient of its output is not finite; use gptq without fisher"):
        tersor.quantize(small, tmp_path / "out", "gptq(fisher):int4_g32", **OPTIONS)


def test_a_disk_that_is_too_small_is_told_before_anything_is_measured(small, tmp_path, monkeypatch):
    monkeypatch.setattr(guides, "_disk_bytes", lambda *what: 1 << 60)
    monkeypatch.setattr(fisher, "Measurement", None)
    with pytest.raises(OutputError, match=r"gptq\(fisher\) keeps 1073741824.0 GiB of hidden states there while it measures"):
        tersor.quantize(small, tmp_path / "out", "gptq(fisher):int4_g32", **OPTIONS, force=True)


def test_the_measurement_counts_in_max_ram(small, tmp_path):
    with pytest.raises(RecipeError, match=r"is too little: measuring the float model's gradients needs [0-9.]+ GiB; give that much"):
        tersor.quantize(small, tmp_path / "out", "gptq(fisher):int4_g32", **OPTIONS, max_ram=1 << 20)


def test_the_predictions_are_nearer_than_by_the_layers_own_errors(small, tmp_path):
    """On the text that both were calibrated on, where a random tiny model's information says something."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"def f{i}(x): return x + {i}" for i in range(400)))
    options = {"calib": text, "samples": 32, "seqlen": 64}
    divergences = []
    for recipe in ("gptq:int2_g32", "gptq(fisher):int2_g32"):
        out = tmp_path / recipe.partition(":")[0]
        tersor.quantize(small, out, recipe, **options)
        divergences.append(tersor.evaluate(out, text=text, against=small, window=64, windows=32).kl_mean)
    assert divergences[1] < 0.97 * divergences[0], divergences
