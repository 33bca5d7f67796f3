"""The walk through a block, against transformers: the inputs of every linear layer, with weights exchanged on the way."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tersor.calibrated import Calibrator
from tersor.calibration.blocks import Rows
from tersor.calibration.work import Work
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.errors import OutputError
from tersor.formats import get_format
from tersor.models import ARCHITECTURES
from tersor.outputs import plan_tensors
from tersor.recipe import Recipe
from tersor.tensor import InputStatistics
from tiny import tiny_model

TOKENS = np.random.default_rng(3).integers(3, 200, (3, 40)).astype(np.int32)


def calibrator(path: Path, recipe: str, **options: object) -> Calibrator:
    checkpoint, parsed = open_checkpoint(path), Recipe.parse(recipe)
    choices = parsed.assign(checkpoint.tensors, gguf=False, tied=bool(checkpoint.description.config["tie_word_embeddings"]))
    plan = plan_tensors(checkpoint.tensors, choices, CONTAINERS["compressed-tensors"])
    return Calibrator(checkpoint, parsed, choices, plan, TOKENS, **options)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_statistics_are_those_of_the_inputs_that_the_rounded_model_computes(model_type, tmp_path, monkeypatch):
    """True sequential order: when a layer is rounded, all before it are rounded already, in its own block too."""
    path = tiny_model(tmp_path / "model", model_type, layers=3)
    seen: dict[str, InputStatistics] = {}
    run = calibrator(path, "clip:int8_g16, layers.0.o_proj=f32")
    round_group = run._round_group

    def spy(weights, statistics):
        seen.update(dict.fromkeys(weights, statistics))
        return round_group(weights, statistics)

    monkeypatch.setattr(run, "_round_group", spy)
    work = Work(tmp_path / "work", {}, resume=False)
    run.run(work)

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "lm_head" not in name}
    assert {f"{name}.weight" for name in layers} == set(seen)
    with torch.no_grad():
        for name, module in layers.items():
            module.weight.copy_(
                torch.from_numpy(get_format(work.read(f"{name}.weight").tensor.format).dequantize(work.read(f"{name}.weight").tensor))
            )
    inputs: dict[str, np.ndarray] = {}
    for name, module in layers.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({f"{name}.weight": args[0].double().numpy()}))
    with torch.no_grad():
        model(torch.from_numpy(TOKENS.astype(np.int64)))
    for name, x in inputs.items():
        x = x.reshape(-1, x.shape[-1])
        assert seen[name].tokens == TOKENS.size
        np.testing.assert_allclose(seen[name].mean_square, np.square(x).mean(axis=0), rtol=2e-4, err_msg=name)
        np.testing.assert_allclose(seen[name].mean_abs, np.abs(x).mean(axis=0), rtol=2e-4)
        np.testing.assert_allclose(seen[name].absmax, np.abs(x).max(axis=0), rtol=2e-4)


def test_rows_are_written_and_read_in_any_order(tmp_path):
    rows, x = Rows(tmp_path / "rows", 5), np.arange(50, dtype=np.float32).reshape(10, 5)
    rows.write(6, x[6:])
    rows.write(0, x[:6])
    assert np.array_equal(rows.read(3, 8), x[3:8])
    with pytest.raises(OutputError, match="rows is not whole, so the run cannot go on from it; remove"):
        rows.read(9, 11)
    rows.close()
    assert np.array_equal(Rows(tmp_path / "rows", 5).read(0, 10), x)


def test_rows_kept_in_memory_are_on_disk_when_stored(tmp_path):
    rows, x = Rows(tmp_path / "rows", 5, kept=10), np.arange(50, dtype=np.float32).reshape(10, 5)
    rows.write(6, x[6:])
    rows.write(0, x[:6])
    assert np.array_equal(rows.read(3, 8), x[3:8])
    with pytest.raises(ValueError, match="read-only"):
        rows.read(3, 8)[0] = 0
    rows.close()
    assert not rows.path.exists()
    rows.store()
    for kept in (0, 10):
        assert np.array_equal(Rows(tmp_path / "rows", 5, kept).read(0, 10), x)
    os.truncate(tmp_path / "rows", 199)
    for kept in (0, 10):
        cut_off = Rows(tmp_path / "rows", 5, kept)
        assert np.array_equal(cut_off.read(0, 9), x[:9])
        with pytest.raises(OutputError, match="rows is not whole"):
            cut_off.read(0, 10)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
@pytest.mark.parametrize("rows", [1, 10, 100_000])  # also what ends in a buffer
def test_rows_that_do_not_fit_on_the_disk_are_told(tmp_path, rows):
    kept = Rows(tmp_path / "rows", 5, kept=rows)
    kept.write(0, np.ones((rows, 5), np.float32))
    (tmp_path / "rows").symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        kept.store()
    assert raised.value.errno == errno.ENOSPC
