"""The budget solver against every mix there is, and predicted divergences against those of transformers."""

import sys
from itertools import product

import numpy as np
import pytest
import torch

import tersor
from tersor.containers import open_checkpoint
from tersor.errors import FormatError, RecipeError
from tersor.formats import get_format
from tersor.models import spec_of
from tersor.planning.budget import GGUF_FORMATS, candidates, mixed, options_of, parse_budget
from tersor.planning.mix import Candidate, choose
from tersor.planning.sensitivity import Sensitivity, measure
from tersor.recipe import Recipe
from tersor.training import require_torch
from tiny import VOCABULARY, tiny_model


def problem(seed: int) -> dict[str, list[Candidate]]:
    """Five tensors of up to four formats; sizes share a divisor; some losses rise with size, as badly suited formats' do."""
    rng = np.random.default_rng(seed)
    return {
        f"t{t}": [Candidate(f"f{i}", int(rng.integers(1, 40)) * 18, float(rng.exponential())) for i in range(rng.integers(1, 5))]
        for t in range(5)
    }


def best(candidates: dict[str, list[Candidate]], budget: int) -> float:
    """The least loss of all mixes within the budget, by trying every one."""
    return min(sum(c.loss for c in mix) for mix in product(*candidates.values()) if sum(c.nbytes for c in mix) <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_no_mix_within_the_budget_is_better(seed):
    candidates = problem(seed)
    smallest, largest = (sum(f(c.nbytes for c in options) for options in candidates.values()) for f in (min, max))
    for budget in np.linspace(smallest, largest + 100, 7).astype(int):
        mix = choose(candidates, int(budget))
        assert all(mix[name] in options for name, options in candidates.items()) and list(mix) == list(candidates)
        assert sum(c.nbytes for c in mix.values()) <= budget
        assert sum(c.loss for c in mix.values()) == pytest.approx(best(candidates, int(budget)), rel=1e-12)


def test_sizes_without_a_common_divisor_cost_at_most_a_unit_each(monkeypatch):
    monkeypatch.setattr("tersor.planning.mix.UNITS", 64)
    candidates = {name: [Candidate(c.format, c.nbytes * 977 + i, c.loss) for i, c in enumerate(o)] for name, o in problem(3).items()}
    smallest, largest = (sum(f(c.nbytes for c in options) for options in candidates.values()) for f in (min, max))
    budget = (smallest + largest) // 2
    mix = choose(candidates, budget)
    unit = -(-(budget - smallest) // 64)
    assert sum(c.nbytes for c in mix.values()) <= budget
    assert best(candidates, budget) <= sum(c.loss for c in mix.values()) <= best(candidates, budget - len(candidates) * unit)


def test_a_budget_below_the_smallest_mix_is_refused():
    candidates = {"a": [Candidate("q4_0", 100, 1.0), Candidate("q8_0", 200, 0.0)], "b": [Candidate("q4_0", 50, 1.0)]}
    assert choose(candidates, 150)["a"].format == "q4_0"
    with pytest.raises(RecipeError, match="budget of 149 bytes; need at least 150"):
        choose(candidates, 149)


@pytest.mark.parametrize("tie", [True, False])
def test_predicted_divergence_is_that_of_transformers(tmp_path, tie):
    """Small random errors in one matrix at a time, the divergences of several draws averaged."""
    from transformers import AutoModelForCausalLM

    path = tiny_model(tmp_path / "m", tie=tie)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (16, 48)).astype(np.int32)
    with open_checkpoint(path) as checkpoint:
        found = measure(spec_of(checkpoint.description.config), checkpoint.read, tokens)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    weights, ids = dict(model.named_parameters()), torch.from_numpy(tokens).long()
    assert set(found) == {name for name, w in weights.items() if w.ndim == 2}
    rng = np.random.default_rng(1)
    with torch.no_grad():
        before = torch.log_softmax(model(ids).logits, -1)
        for name in [n for n in found if ".layers." not in n or ".layers.1." in n]:
            w, predicted, true = weights[name], 0.0, 0.0
            kept = w.clone()
            for _ in range(6):
                error = 0.02 * kept.abs().mean().item() * rng.standard_normal(kept.shape)
                w.copy_(kept + torch.from_numpy(error))
                true += (before.exp() * (before - torch.log_softmax(model(ids).logits, -1))).sum(-1).mean().item()
                predicted += sum(use.divergence(error) for use in found[name])
            w.copy_(kept)
            assert predicted == pytest.approx(true, rel=0.35), name


def test_a_tied_head_is_rounded_with_the_statistics_of_its_input(tmp_path):
    path = tiny_model(tmp_path / "m")
    options = {"calib": "pydoc", "samples": 4, "seqlen": 32}
    result = tersor.quantize(path, tmp_path / "out.gguf", "gptq:q8_0, lm_head=gptq:q4_0", **options)
    (head,) = (t for t in result.tensors if t.name == "model.embed_tokens.weight")
    assert (head.format, head.method) == ("q4_0", "gptq") and head.output_error is not None
    plain = tersor.quantize(path, tmp_path / "plain.gguf", "gptq:q8_0, lm_head=rtn:q4_0", **options)
    assert result.file_bytes == plain.file_bytes
    with open_checkpoint(tmp_path / "out.gguf") as ours, open_checkpoint(tmp_path / "plain.gguf") as theirs:
        name = "model.embed_tokens.weight"
        assert any(a.tobytes() != b.tobytes() for a, b in zip(ours.read(name).fields.values(), theirs.read(name).fields.values()))


def test_sensitivity_without_torch_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("tersor.training.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"tersor\[torch\]"):
        require_torch("sensitivity")


@pytest.mark.parametrize("tie", [True, False])
def test_a_recipe_within_a_budget_fills_it_and_reads_back(tmp_path, tie):
    path = tiny_model(tmp_path / "m", tie=tie)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 32)).astype(np.int32)
    with open_checkpoint(path) as checkpoint:
        found = measure(spec_of(checkpoint.description.config), checkpoint.read, tokens)
        matrices = [t for t in checkpoint.tensors.values() if len(t.shape) == 2]
        budget = sum(get_format("q5_0").nbytes(t.shape) for t in matrices)
        options = options_of(checkpoint.read, found, GGUF_FORMATS)
        recipe, loss = mixed(options, budget, Recipe.frame("clip", GGUF_FORMATS))
    uniform = sum(c.loss for of in options.values() for c in of if c.format == "q5_0")
    assert 0 < loss < uniform
    assert Recipe.parse(str(recipe)) == recipe
    result = tersor.quantize(path, tmp_path / "out.gguf", recipe)
    used = sum(get_format(t.format).nbytes(t.shape) for t in result.tensors if len(t.shape) == 2)
    assert used <= budget < used * 1.05


CALIBRATION = {"calib": "pydoc", "samples": 4, "seqlen": 32}


@pytest.mark.parametrize("out", ["out.gguf", "out"])
@pytest.mark.parametrize("steps", [None, "gptq"])
def test_an_output_fills_its_budget_to_the_byte_that_formats_allow(tmp_path, out, steps):
    path = tiny_model(tmp_path / "m", hidden=128, intermediate=256, tie=False)
    floor = tersor.quantize(path, tmp_path / f"floor-{out}", "q4_0" if out.endswith("gguf") else "rtn:int4_g64s").file_bytes
    losses = []
    for budget in (int(floor * 1.1), int(floor * 1.3)):
        result = tersor.quantize(path, tmp_path / out, steps, budget=budget, **CALIBRATION, force=True)
        assert budget * 0.95 < result.file_bytes <= budget
        assert result.file_bytes == sum(f.stat().st_size for f in _files(tmp_path / out))
        losses.append(result.output_error)
        assert result.verification.verdict == "verified"
        method = {t.method for t in result.tensors if t.format not in ("f32", "f16")}
        assert method == {"clip", steps or "clip"} if out.endswith("gguf") else {steps or "clip"}
    assert losses[1] < losses[0]


def _files(path):
    return [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file() and f.name != "verification.json"]


def test_what_engines_join_gets_one_format(tmp_path):
    path = tiny_model(tmp_path / "m", hidden=128, intermediate=256)
    result = tersor.quantize(path, tmp_path / "out", budget=300_000, to="sglang", **CALIBRATION)
    formats = {t.name.removesuffix(".weight"): t.format for t in result.tensors}
    assert len({f for f in formats.values() if f not in ("f32", "f16")}) > 1, "one width tells nothing"
    assert set(formats.values()) <= {"f32", "f16", "int4_g128s", "int4_g64s", "int4_g32s", "int8_cs"}, "what its kernels have"
    for i in range(2):
        layer = f"model.layers.{i}."
        assert len({formats[f"{layer}self_attn.{p}_proj"] for p in "qkv"}) == 1
        assert formats[f"{layer}mlp.gate_proj"] == formats[f"{layer}mlp.up_proj"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 100_000}, "give --calib"),
        ({"budget": 100_000, **CALIBRATION, "recipe": "gptq:q4_k"}, "name the steps alone"),
        ({"budget": 100_000, **CALIBRATION, "recipe": "q4_k, lm_head=q6_k"}, "name the steps alone"),
        ({"budget": 100, **CALIBRATION}, "budget of 100 bytes; need at least .* for the rest of the output"),
        ({"budget": "many", **CALIBRATION}, "budget 'many' is none"),
        ({"budget": "4bpw", **CALIBRATION, "activations": "token"}, "does not count the scales"),
        ({"budget": "4bpw", **CALIBRATION, "to": "awq"}, "awq files hold one kind of numbers"),
        ({"budget": "8bpw", **CALIBRATION, "max_ram": 1 << 20}, "in float32, which takes"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_written(tmp_path, arguments, message):
    path = tiny_model(tmp_path / "m")
    out = tmp_path / ("out" if "to" in arguments else "out.gguf")
    with pytest.raises(RecipeError, match=message):
        tersor.quantize(path, out, **arguments)
    assert {p.name for p in tmp_path.iterdir()} == {"m"}


def test_bits_per_weight_are_those_of_the_whole_output():
    assert parse_budget("4.25bpw", 1000) == 531
    assert parse_budget("1KiB", 1000) == parse_budget(1024, 1000) == 1024


def test_a_tensor_that_no_format_fits_is_refused():
    use = Sensitivity(np.ones(2), np.ones(48))
    with pytest.raises(FormatError, match="none of q4_0, q6_k fits 48 columns"):
        candidates(np.ones((2, 48), np.float32), (use,), ("q4_0", "q6_k"))
