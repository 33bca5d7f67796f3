"""Calibration of a decoder that only transformers knows: quantized block by block, loaded by transformers, resumed, refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

import tersor
from tersor.calibrated import BlockReport
from tersor.errors import RecipeError
from tersor.evaluation.text import pydoc_text
from tiny import tiny_model, tokenizer_json

TOKENIZER = Tokenizer.from_str(tokenizer_json())
OPTIONS = {"calib": "pydoc", "samples": 4, "seqlen": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableLM, whose LayerNorms and partial rotation tersor's own decoder has not, with the tokenizer of a tiny llama."""
    folder = tmp_path_factory.mktemp("stablelm")
    path, llama = folder / "model", tiny_model(folder / "llama")
    config = transformers.StableLmConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, path / name)
    return path


def logits(path: Path) -> np.ndarray:
    """Transformers' logits on some of the text that is calibrated on: what a random model does on other tokens is another matter."""
    config = {} if path.name == "model" else {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **config).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENIZER.encode(pydoc_text()[200_000:202_000]).ids[:200])[None]).logits[0].numpy()


def test_gptq_is_nearer_than_round_to_nearest_and_transformers_loads_it(model, tmp_path):
    result = tersor.quantize(model, tmp_path / "gptq", "gptq:int3_g32", calib="pydoc", samples=24, seqlen=64)
    tersor.quantize(model, tmp_path / "rtn", "rtn:int3_g32")
    layers = [t for t in result.tensors if ".layers." in t.name and len(t.shape) > 1]
    assert len(layers) == 21 and all(t.method == "gptq" and t.output_error is not None for t in layers)
    original, ours, plain = logits(model), logits(tmp_path / "gptq"), logits(tmp_path / "rtn")
    assert np.square(ours - original).mean() < 0.85 * np.square(plain - original).mean()


def test_an_interrupted_run_goes_on_to_the_same_bytes(model, tmp_path):
    def stop(report: object) -> None:
        if isinstance(report, BlockReport) and report.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tersor.quantize(model, tmp_path / "out", "gptq:int4_g32", **OPTIONS, report=stop)
    tersor.quantize(model, tmp_path / "out", "gptq:int4_g32", **OPTIONS, resume=True)
    tersor.quantize(model, tmp_path / "whole", "gptq:int4_g32", **OPTIONS)
    for name in ("model.safetensors", "config.json", "tersor.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("recipe", "options", "says"),
    [
        ("awq+gptq:int4_g32", {}, "awq works on tersor's own architectures on the CPU, not on stablelm by transformers on cpu; use gptq"),
        ("gptq(asymmetric=0.5):int4_g32", {}, r"gptq\(asymmetric=0.5\) works on tersor's own"),
        ("gptq(fisher):int4_g32", {}, r"gptq\(fisher\) works on tersor's own"),
        ("gptq:int4_g32", {"max_ram": 1 << 32}, "--max-ram is kept for tersor's own architectures on the CPU, not for stablelm"),
        ("gptq:int4_g32", {"device": "tpu"}, "unknown device 'tpu'; known: cpu, cuda"),
    ],
)
def test_refusals(model, tmp_path, recipe, options, says):
    with pytest.raises(RecipeError, match=says):
        tersor.quantize(model, tmp_path / "out", recipe, **OPTIONS, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(model, tmp_path):
    with pytest.raises(RecipeError, match="--device cuda: torch finds no CUDA device here; use --device cpu"):
        tersor.quantize(model, tmp_path / "out", "gptq:int4_g32", **OPTIONS, device="cuda")
