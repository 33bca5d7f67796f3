"""Recipes: grammar, patterns, defaults, and one test per refusal."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import FormatError, RecipeError
from tersor.methods import METHODS, Step
from tersor.recipe import Choice, Recipe, matches
from tersor.tensor import TensorInfo

BLOCK = "model.layers.{}.self_attn.q_proj.weight"


def tensors(source: str = "f32", columns: int = 256, tied: bool = False) -> dict[str, TensorInfo]:
    shapes = {"model.embed_tokens.weight": (320, columns)}
    for i in range(5):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (columns,)
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (64, columns)
        shapes[f"model.layers.{i}.self_attn.q_proj.bias"] = (64,)
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (columns, 512)
    if not tied:
        shapes["lm_head.weight"] = (320, columns)
    return {name: TensorInfo(name, source, shape, 0) for name, shape in shapes.items()}


def formats(text: str, gguf: bool = True, **options: object) -> dict[str, str]:
    infos = tensors(**options)  # type: ignore[arg-type]
    choices = Recipe.parse(text).assign(infos, gguf=gguf, tied="lm_head.weight" not in infos)
    return {name: choice.format_for(infos[name]) for name, choice in choices.items()}


def test_parse_gives_methods_formats_and_rules():
    recipe = Recipe.parse(" clip:q4_k | q5_0 , lm_head = q6_k, *.mlp.*=rtn:q8_0,embed=keep")
    assert recipe.default == Choice(Step(METHODS["clip"]), ("q4_k", "q5_0"))
    assert [(r.pattern, r.choice) for r in recipe.rules] == [
        ("lm_head", Choice(Step(METHODS["clip"]), ("q6_k",))),
        ("*.mlp.*", Choice(Step(METHODS["rtn"]), ("q8_0",))),
        ("embed", Choice(Step(METHODS["rtn"]), ("keep",))),
    ]


def test_a_recipe_without_a_method_is_rtn_and_case_does_not_matter():
    assert Recipe.parse("Q4_0") == Recipe.parse("RTN:q4_0")


@pytest.mark.parametrize(
    "text", ["q4_0", "clip:int4_g64|q8_0, lm_head=rtn:q6_k", "clip:keep, mlp=q4_0", "f16, layers.0-3=q8_0|f32, *norm*=bf16"]
)
def test_text_of_a_recipe_parses_to_the_same(text, tmp_path):
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    assert Recipe.parse(str(tmp_path / "r.toml")) == recipe


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", BLOCK.format(3), True),
        ("attn", BLOCK.format(3), True),
        ("mlp", BLOCK.format(3), False),
        ("proj", BLOCK.format(3), False),  # words match whole
        ("layers.0-3", BLOCK.format(3), True),
        ("layers.0-3", BLOCK.format(4), False),
        ("layers.0-3", BLOCK.format(13), False),
        ("layers.12-", BLOCK.format(13), True),
        ("layers.13", BLOCK.format(13), True),
        ("layers.1", BLOCK.format(13), False),
        ("layers.0-3.q_proj", BLOCK.format(2), True),
        ("q_proj.layers", BLOCK.format(2), False),  # in the order of the name
        ("embed", "model.embed_tokens.weight", True),
        ("lm_head", "lm_head.weight", True),
        (BLOCK.format(2), BLOCK.format(2), True),
        ("*.q_proj", BLOCK.format(2), True),
        ("*.q_proj.weight", BLOCK.format(2), True),
        ("*layers.[01].*", BLOCK.format(2), False),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_the_last_rule_that_matches_counts():
    got = formats("q4_0, attn=q8_0, layers.0=q5_0")
    assert [got[BLOCK.format(i)] for i in (0, 1)] == ["q5_0", "q8_0"]
    assert got["model.layers.1.mlp.down_proj.weight"] == "q4_0"


def test_defaults_in_gguf():
    got = formats("q4_k", source="bf16")
    assert {got["model.embed_tokens.weight"], got["lm_head.weight"]} == {"q8_0"}
    assert got["model.layers.0.input_layernorm.weight"] == got["model.layers.0.self_attn.q_proj.bias"] == "f32"
    assert got[BLOCK.format(0)] == "q4_k"
    assert formats("q4_0", columns=48 * 2)["lm_head.weight"] == "q8_0"
    assert formats("f16", columns=48)["lm_head.weight"] == "f16"


@pytest.mark.parametrize(("source", "edge"), [("f32", "f16"), ("bf16", "keep"), ("f16", "keep"), ("q8_0", "f16")])
def test_defaults_in_a_directory(source, edge):
    got = formats("int4_g64", gguf=False, source=source)
    assert {got["model.embed_tokens.weight"], got["lm_head.weight"]} == {edge}
    assert got["model.layers.0.input_layernorm.weight"] == "keep"


def test_a_cast_is_for_every_tensor_but_the_vectors_of_gguf():
    assert set(formats("bf16", gguf=False).values()) == {"bf16"}
    got = formats("f16")
    assert got["model.embed_tokens.weight"] == got[BLOCK.format(0)] == "f16"
    assert got["model.layers.0.input_layernorm.weight"] == "f32"


def test_the_first_format_that_fits_is_taken():
    got = formats("q4_k|q5_0", columns=64)
    assert got[BLOCK.format(0)] == "q5_0"
    assert got["model.layers.0.mlp.down_proj.weight"] == "q4_k"  # 512 columns


def test_lm_head_of_a_tied_model_is_its_embedding():
    assert formats("q4_0, lm_head=q5_0", tied=True)["model.embed_tokens.weight"] == "q5_0"
    assert formats("q4_0, lm_head=q5_0")["model.embed_tokens.weight"] == "q8_0"


def test_a_rule_that_also_meets_vectors_leaves_them():
    got = formats("q4_0, attn=q5_0")
    assert got["model.layers.0.self_attn.q_proj.bias"] == "f32"
    assert formats("int4_g64, attn=f16", gguf=False)["model.layers.0.self_attn.q_proj.bias"] == "f16"


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", RecipeError, "is empty at its start"),
        (", lm_head=q8_0", RecipeError, "is empty at its start"),
        ("lm_head=q8_0", RecipeError, "begins with a rule"),
        ("q4_0, q5_0", RecipeError, "'q5_0' is not a rule"),
        ("q4_0, lm_head=", RecipeError, "is not a rule"),
        ("q4_0,", RecipeError, "is not a rule"),
        ("gptqq:q4_0", RecipeError, "unknown method 'gptqq'; known: autoround, awq, clip, distill, gptq"),
        ("q4_0, lm_head=clap:q8_0", RecipeError, "unknown method 'clap'"),
        ("rtn:", RecipeError, "lacks a format"),
        ("q4_0|", RecipeError, "lacks a format"),
        ("q4_z", FormatError, "unknown format 'q4_z'"),
        ("iq1_s", FormatError, "can be read but not written"),
        ("missing.toml", RecipeError, "missing.toml: No such file"),
    ],
)
def test_refusals_of_the_grammar(text, error, says):
    with pytest.raises(error, match=says.replace("|", "\\|")) as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("default = ", "is not TOML"),
        ("default = 3", "needs default"),
        ("[rules]\nlm_head = 'q8_0'", "needs default"),
        ("default = 'q4_0'\nrules = 'x'", "needs default"),
        ("default = 'q4_0'\ngroup = 64", "unknown key 'group'"),
    ],
)
def test_refusals_of_toml(toml, says, tmp_path):
    (tmp_path / "r.toml").write_text(toml)
    with pytest.raises(RecipeError, match=says):
        Recipe.load(tmp_path / "r.toml")


@pytest.mark.parametrize(
    ("text", "gguf", "says"),
    [
        ("q4_0, q_prj=q8_0", True, "matches none of 22 tensors; nearest: .*q_proj"),
        ("q4_0, layers.9=q8_0", True, "matches none"),
        ("q4_0, input_layernorm=q8_0", True, "is a vector, which is f32 in GGUF"),
        ("q4_0, input_layernorm=f16", True, "is f32 in GGUF"),
        ("int4_g64, input_layernorm=int4_g64", False, "is kept or cast"),
    ],
)
def test_refusals_of_rules(text, gguf, says):
    with pytest.raises(RecipeError, match=says):
        formats(text, gguf=gguf)


def test_no_format_fits():
    with pytest.raises(FormatError, match=r"q4_k\|int4_g128: .*weight has 64 columns, which none of these divides"):
        formats("q4_k|int4_g128", columns=64)
    with pytest.raises(FormatError, match=r"int4_g128: model.layers.0.self_attn.q_proj.weight has 64 columns"):
        formats("int4_g128", columns=64)


@given(st.text(alphabet=string.ascii_lowercase + string.digits + ":|=,*. _-", max_size=40))
def test_any_text_parses_or_is_refused_in_one_line(text):
    try:
        recipe = Recipe.parse(text)
    except (RecipeError, FormatError) as error:
        assert "\n" not in str(error)
    else:
        assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    "text",
    [
        "rotate+awq+gptq(act_order; damp=0.02):int3_g64|int3_g32, lm_head=clip:q8_0",
        "smoothquant(alpha=0.7)+rtn:int8_cs",
        "gptq+tune+distill(epochs=2.0):int2_g64, layers.0=gptq(refine=3):int4_g64",
        "rotate(kind=random; seed=3):f16",
    ],
)
def test_steps_and_options_come_back(text, tmp_path):
    recipe = Recipe.parse(text)
    assert str(recipe) == text and Recipe.parse(str(recipe)) == recipe
    (tmp_path / "r.toml").write_text(recipe.to_toml())
    assert Recipe.load(tmp_path / "r.toml") == recipe


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gptq+awq:int4_g64", "awq works on unquantized blocks, so it comes before gptq; write it first"),
        ("awq+rotate+gptq:int4_g64", "rotate works on the unquantized model, so it comes before awq"),
        ("gptq+rtn:int4_g64", "gptq and rtn both choose the codes; choose one"),
        ("awq+smoothquant+rtn:int4_g64", "awq and smoothquant both scale the channels; choose one"),
        ("gptq+gptq:int4_g64", "gptq is named twice"),
        ("gptq:f16", "f16 is a cast, which rounds to no grid; gptq cannot choose codes for it"),
        ("awq:keep", "keep is a cast, which rounds to no grid; awq has nothing to work for"),
        ("distill:bf16", "distill has nothing to work for"),
        ("rtn:int4_g64, layers.0=awq+rtn:int4_g64", "awq works on the whole model, not on some tensors"),
        ("gptq(dampp=1):int4_g64", "unknown option of gptq 'dampp'; known: act_order, asymmetric, damp, fisher, refine, search"),
        ("gptq(damp=big):int4_g64", "'big' is not a value of type float"),
        ("gptq(act_order=yes):int4_g64", "'yes' is not true or false"),
        ("gptq(damp=2):int4_g64", "damp=2; need more than 0 and at most 1"),
        ("gptq(refine=1:int4_g64", "lacks its closing parenthesis"),
        ("rtn(damp=1):int4_g64", "rtn has no options, got 'damp=1'"),
    ],
)
def test_refusals_of_steps(text, says):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert says in str(caught.value) and "\n" not in str(caught.value)
