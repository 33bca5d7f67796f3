"""Sizes from config.json alone: parameters of known models, true bytes, KV cache, and what is refused."""

from __future__ import annotations

import json

import pytest

from tersor.errors import FormatError, ModelError, RecipeError
from tersor.pipeline import quantize
from tersor.planning import parse_bytes, plan
from tiny import ARCHITECTURES, tiny_config, tiny_model, tiny_tensors

LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@pytest.fixture
def llama(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_7B))
    return path


def test_llama_7b(llama):
    result = plan(llama, context=2048)
    assert result.parameters == 6_738_415_616  # as the paper's checkpoint has
    assert result.embedding_parameters == 2 * 32000 * 4096
    assert [round(result.widths[bits] / 1e9, 2) for bits in (32, 16, 8, 4)] == [26.95, 13.48, 6.74, 3.37]
    assert result.kv_bytes_per_token == 2 * 32 * 4096 * 2  # keys and values, layers, width, float16
    sizes = {size.recipe: size for size in result.sizes}
    blocks = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    vectors = (2 * 32 + 1) * 4096
    assert sizes["q4_0"].nbytes == blocks * 18 // 32 + 2 * 32000 * 4096 * 34 // 32 + vectors * 4
    assert sizes["q4_0"].total_bytes == sizes["q4_0"].nbytes + 2048 * result.kv_bytes_per_token + (256 << 20)


def test_what_fits_follows_the_ram(llama):
    needed = plan(llama, recipes=["q4_0"]).sizes[0].total_bytes
    assert plan(llama, recipes=["q4_0"], ram=needed).sizes[0].fits
    assert not plan(llama, recipes=["q4_0"], ram=needed - 1).sizes[0].fits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie", [True, False])
def test_every_architecture_counts_its_tensors(tmp_path, architecture, tie):
    config = tiny_config(architecture, 64, 128, 3, 4, 2, tie)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan(tmp_path).parameters == sum(w.size for w in tiny_tensors(config).values())


@pytest.mark.parametrize(("recipe", "name"), [("q4_0, lm_head=q5_0", "a.gguf"), ("int4_g64", "a"), ("bf16", "b")])
def test_the_plan_is_what_the_pipeline_then_writes(tmp_path, recipe, name):
    model = tiny_model(tmp_path / "m", dtype="bf16")
    predicted = plan(model, recipes=[recipe]).sizes[0].nbytes
    assert predicted == sum(t.nbytes for t in quantize(model, tmp_path / name, recipe).tensors)


def test_the_plan_counts_the_head_that_a_rotation_unties(tmp_path):
    model, recipe = tiny_model(tmp_path / "m", tie=True, dtype="bf16"), "rotate+rtn:int4_g64, norm=f32"
    written = quantize(model, tmp_path / "a", recipe).tensors
    assert "lm_head.weight" in {t.name for t in written}
    matrices = sum(t.nbytes for t in written if len(t.shape) > 1)
    assert matrices < plan(model, recipes=[recipe]).sizes[0].nbytes <= sum(t.nbytes for t in written)


def test_default_recipes_that_do_not_fit_are_left_out_and_named_ones_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama", 48, 96, 2, 4, 2, True)))
    shown = [size.recipe for size in plan(tmp_path).sizes]
    assert shown == ["f16"]
    with pytest.raises(FormatError, match="48 columns"):
        plan(tmp_path, recipes=["q8_0"])


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (None, ModelError, "No such file"),
        ("{", ModelError, "is not JSON"),
        ("[]", ModelError, "holds a list"),
        ('{"model_type": "mamba"}', ModelError, "unknown architecture 'mamba'; known: gemma2"),
        ('{"model_type": "llama"}', ModelError, "hidden_size"),
    ],
)
def test_refused_configs(tmp_path, text, error, says):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=says):
        plan(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("options", "says"), [({"context": 0}, "at least 1"), ({"ram": 0}, "at least 1"), ({"context": 1 << 30}, "the model's is")]
)
def test_refused_settings(llama, options, says):
    with pytest.raises(RecipeError, match=says):
        plan(llama, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 << 30), ("8 g", 8 << 30), ("512MB", 512_000_000), ("1.5k", 1536), ("4000", 4000), ("2TiB", 2 << 40), ("100B", 100)],
)
def test_sizes_in_words(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "8 apples", "-1G", "0", "nan", "inf", "1e30G"])
def test_refused_sizes(text):
    with pytest.raises(RecipeError, match="write it like 8GiB"):
        parse_bytes(text)
