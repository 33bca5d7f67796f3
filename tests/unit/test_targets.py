"""Engines as targets: which container each gets, what each refuses, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tersor.containers import CONTAINERS, open_checkpoint
from tersor.conversion import convert
from tersor.errors import RecipeError
from tersor.pipeline import quantize
from tersor.targets import TARGETS
from tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m") / "m", hidden=128, intermediate=256, tie=False)


def test_targets_name_containers() -> None:
    assert all(name in CONTAINERS for target in TARGETS.values() for name in target.containers)
    assert not set(TARGETS) & set(CONTAINERS)


@pytest.mark.parametrize(
    ("to", "recipe", "container"),
    [
        *(("vllm", "rtn:int4_g64s", "compressed-tensors"), ("sglang", "rtn:int8_cs", "compressed-tensors")),
        *(("llama.cpp", None, "gguf"), ("ollama", "q4_0", "gguf"), ("lm-studio", "q8_0", "gguf")),
        *(("transformers", "nf4", "bnb"), ("transformers", "int4_g64s", "compressed-tensors"), ("bitsandbytes", None, "bnb")),
        *(("mlx-lm", None, "mlx"), ("onnxruntime", "int4_g32", "onnx")),
    ],
)
def test_an_engine_gets_a_container_that_it_loads(to: str, recipe: str | None, container: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / ("a.gguf" if container == "gguf" else "a")
    result = quantize(model, out, recipe, to=to, verify=False)
    assert result.container == container
    assert open_checkpoint(out).container == container


@pytest.mark.parametrize(
    ("to", "recipe", "text"),
    [
        (
            "vllm",
            "int4_g64, q_proj=int8_cs",
            r"\[q_proj\|k_proj\|v_proj\] are int8_cs, int4_g64, int4_g64 \(2 such\); .* one format in the recipe",
        ),
        ("vllm", "int4_g64, up_proj=int4_g32", r"\[gate_proj\|up_proj\] are int4_g64, int4_g32"),
        ("vllm", "int4_g64, lm_head=int4_g64", r"lm_head\.weight is int4_g64, and it reads embedding and head as floats"),
        ("vllm", "int3_g64s", r"is int3_g64s; its kernels have 4 and 8 bits in groups of 32, 64 or 128"),
        ("sglang", "int4_g16", r"is int4_g16; its kernels have"),
        ("vllm", "int8_g64", r"no 8 bits in groups with zero points; use int8_g64s"),
        ("transformers", "int4_g64", r"is int4_g64; it makes room for zero points of another shape .*; use int4_g64s, or --to gptq"),
        ("bitsandbytes", "int4_g64", "int4_g64 is in no container that it loads \\(bnb\\)"),
        ("llama.cpp", "int4_g64", "int4_g64 is in no container that it loads"),
        ("tensorrt", "int4_g64", "unknown container or engine 'tensorrt'; known: awq"),
    ],
)
def test_what_an_engine_cannot_load_is_refused_before_anything_is_written(
    to: str, recipe: str, text: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=text):
        quantize(model, tmp_path / ("a.gguf" if to == "llama.cpp" else "a"), recipe, to=to)
    assert list(tmp_path.iterdir()) == []


def test_convert_minds_them_too(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "mixed", "int4_g64, q_proj=int8_cs", verify=False)
    with pytest.raises(RecipeError, match=r"--to vllm: .*joins them into one product"):
        convert(tmp_path / "mixed", tmp_path / "b", to="vllm")
    assert not (tmp_path / "b").exists()
    quantize(model, tmp_path / "plain", "int4_g64s", verify=False)
    convert(tmp_path / "plain", tmp_path / "c.gguf", to="ollama", verify=False)
    assert open_checkpoint(tmp_path / "c.gguf").container == "gguf"
