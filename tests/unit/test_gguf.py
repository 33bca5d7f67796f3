"""GGUF as a container: names, row orders, norms, config and rope on the way in and out, against the gguf package and slow loops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import gguf_bytes as g
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.containers.config_from_gguf import read_config
from tersor.containers.config_to_gguf import write_metadata
from tersor.containers.container import Checkpoint
from tersor.containers.gguf_names import ARCHITECTURES as GGUF_ARCHITECTURES
from tersor.containers.gguf_names import to_gguf, to_hugging_face
from tersor.containers.gguf_rope import llama3_scaling, rope_factors
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.tensor import ModelDescription, TensorInfo
from tiny import ARCHITECTURES, tiny_config, tiny_model

GGUF = CONTAINERS["gguf"]
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def write(path: Path, source: Checkpoint, description: ModelDescription | None = None) -> Path:
    plan = list(source.tensors.values())
    with GGUF.create(path, description or source.description, plan, force=True) as writer:
        for info in plan:
            writer.write(info.name, source.read(info.name))
    return path


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows of q or k as GGUF's llama stores them, by the loop that llama.cpp's docs describe: pair j of a head is rows
    2j and 2j+1, which Hugging Face keeps at j and j + half."""
    size = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for j in range(size // 2):
            out[head * size + 2 * j] = rows[head * size + j]
            out[head * size + 2 * j + 1] = rows[head * size + size // 2 + j]
    return out


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_round_trip_of_every_architecture(model_type: str, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "hf", model_type, layers=4, tie=model_type != "qwen3"))
    found = open_checkpoint(write(tmp_path / "m.gguf", source))
    assert list(found.tensors) == list(source.tensors)
    for name in source.tensors:
        np.testing.assert_allclose(found.read(name).fields["values"], source.read(name).fields["values"], atol=1e-7, err_msg=name)
    for key, value in source.description.config.items():
        if key not in ("dtype", "architectures", "model_type", "hidden_act"):
            assert found.description.config.get(key) == value, key
    expected = {"mistral": "llama"}.get(model_type, model_type)  # GGUF does not tell the two apart
    assert found.description.config["model_type"] == expected
    assert found.description.config["architectures"] == [ARCHITECTURES[expected]]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_names_are_llama_cpps(model_type: str) -> None:
    architecture = GGUF_ARCHITECTURES["gemma3" if model_type == "gemma3_text" else "llama" if model_type == "mistral" else model_type]
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture.name], 3)
    stems = ["model.embed_tokens", "model.norm", *(f"model.layers.{i}.{part}" for i in (0, 2) for part in architecture.layer)]
    for stem in stems:
        ours = to_gguf(architecture, f"{stem}.weight")
        assert ours == names.get_name(stem) + ".weight"
        assert ours is not None and to_hugging_face(architecture, ours) == f"{stem}.weight"


def test_llama_rows_are_interleaved_and_norms_are_not_shifted(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "hf", heads=4, kv_heads=2))
    write(tmp_path / "m.gguf", source)
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    prefix = "model.layers.1.self_attn"
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        expected = interleave(source.read(f"{prefix}.{ours}.weight").fields["values"], heads)
        np.testing.assert_array_equal(stored[f"blk.1.{theirs}.weight"], expected)
    for ours, theirs in (("v_proj", "attn_v"), ("o_proj", "attn_output")):
        np.testing.assert_array_equal(stored[f"blk.1.{theirs}.weight"], source.read(f"{prefix}.{ours}.weight").fields["values"])
    np.testing.assert_array_equal(stored["output_norm.weight"], source.read("model.norm.weight").fields["values"][0])


@pytest.mark.parametrize("rows", [None, slice(0, 1), slice(5, 40), slice(60, 999)])
def test_quantized_rows_are_permuted_not_requantized(rows: slice | None, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "hf"))
    name = "model.layers.0.self_attn.q_proj.weight"
    tensor = get_format("q5_0").quantize(source.read(name).fields["values"])
    plan = [TensorInfo(name, "q5_0", tensor.shape, tensor.nbytes) if i.name == name else i for i in source.tensors.values()]
    with GGUF.create(tmp_path / "m.gguf", source.description, plan) as writer:
        for info in plan:
            writer.write(info.name, tensor if info.name == name else source.read(info.name))
    stored = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.attn_q.weight")
    np.testing.assert_array_equal(stored.data, interleave(tensor.fields["blocks"], 4))
    found = open_checkpoint(tmp_path / "m.gguf").read(name, rows)
    np.testing.assert_array_equal(found.fields["blocks"], tensor.fields["blocks"][rows or slice(None)])
    assert found.shape == (len(found.fields["blocks"]), 64)


def test_llama_biases_are_interleaved(tmp_path: Path) -> None:
    bias = np.arange(64, dtype=np.float32)
    names = [f"model.layers.{i}.self_attn.q_proj.bias" for i in range(2)]
    source = open_checkpoint(tiny_model(tmp_path / "hf", config={"attention_bias": True}, change=dict.fromkeys(names, bias)))
    found = open_checkpoint(write(tmp_path / "m.gguf", source))
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    np.testing.assert_array_equal(stored["blk.0.attn_q.bias"], interleave(bias, 4))
    np.testing.assert_array_equal(found.read(names[1]).fields["values"], bias[None])
    assert found.description.config["attention_bias"] is True


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_gemma_norms_hold_the_one(model_type: str, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "hf", model_type, dtype="bf16"))
    found = open_checkpoint(write(tmp_path / "m.gguf", source))
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    names = [n for n in source.tensors if n.endswith("norm.weight")]
    assert len(names) == 1 + 2 * (6 if model_type == "gemma3_text" else 4)
    for name in names:
        weight = (source.read(name).fields["values"].astype(np.uint32) << 16).view(np.float32)
        theirs = to_gguf(GGUF_ARCHITECTURES[model_type.removesuffix("_text")], name)
        np.testing.assert_array_equal(stored[theirs], weight[0] + np.float32(1))
        np.testing.assert_array_equal(found.read(name).fields["values"], weight)  # exact: bfloat16 near 0 plus 1 fits float32


def test_vectors_become_float32_and_matrices_stay(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "hf", dtype="f16"))
    found = open_checkpoint(write(tmp_path / "m.gguf", source))
    assert {len(i.shape): i.format for i in found.tensors.values()} == {1: "f32", 2: "f16"}


def test_release_gives_pages_back_and_views_stay_right(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    content, arrays = g.llama_bytes()
    path.write_bytes(content)
    checkpoint = open_checkpoint(path)
    view = checkpoint.read("model.layers.0.mlp.up_proj.weight").fields["values"]
    checkpoint.release()
    checkpoint.close()
    np.testing.assert_array_equal(view, arrays["blk.0.ffn_up.weight"])
    assert not view.flags.writeable


# --- config -------------------------------------------------------------------------------------------------------------


def config_of(**changes: Any) -> dict[str, Any]:
    return tiny_config("llama", 64, 128, 2, 4, 2, True) | changes


def back(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config after a way to GGUF's keys and back."""
    metadata, freqs = write_metadata("out", config)
    architecture = GGUF_ARCHITECTURES[metadata["general.architecture"][1]]
    shapes = {"model.embed_tokens.weight": (320, 64)} | {
        f"model.layers.{i}.mlp.up_proj.weight": (128, 64) for i in range(config["num_hidden_layers"])
    }
    return read_config("in", architecture, metadata, shapes, freqs)


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA31,
        LLAMA31 | {"factor": 32.0},
        LLAMA31 | {"high_freq_factor": 8.0, "original_max_position_embeddings": 4096},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32.0, "beta_slow": 1.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "beta_fast": 16.0, "beta_slow": 2.0},
    ],
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_survives(scaling: dict[str, Any], spelling: str) -> None:
    config = config_of(head_dim=128, rope_theta=500000.0, max_position_embeddings=131072)
    if spelling == "rope_parameters":
        config |= {"rope_parameters": {"rope_theta": 500000.0, **scaling}}
        del config["rope_theta"]
    else:
        config["rope_scaling"] = scaling
    found = back(config)
    assert found["rope_theta"] == 500000.0 and found["rope_scaling"] == scaling


def test_llama3_factors_are_the_published_formula() -> None:
    """The loop of the Llama 3.1 reference (apply_scaling in llama_models), written out."""
    factors = rope_factors("x", LLAMA31, 500000.0, 128, 131072)
    for i, found in enumerate(factors):
        frequency = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected = 1.0
        elif wavelength > 8192 / 1:
            expected = 8.0
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = frequency / ((1 - smooth) * frequency / 8 + smooth * frequency)
        assert found == pytest.approx(expected, rel=1e-6)


def test_divisors_of_no_formula_are_listed() -> None:
    factors = np.array([1, 1.5, 1.25, 3], np.float32)
    found = llama3_scaling(factors, 10000.0, 2048)
    assert found["rope_type"] == "longrope" and found["long_factor"] == found["short_factor"] == [1.0, 1.5, 1.25, 3.0]
    _, freqs = write_metadata("out", config_of(head_dim=8, rope_scaling=found))
    np.testing.assert_array_equal(freqs, factors)


def test_rope_freqs_are_read_from_and_written_to_the_tensor(tmp_path: Path) -> None:
    config = {"head_dim": 16, "rope_theta": 500000.0, "rope_scaling": LLAMA31, "max_position_embeddings": 131072}
    source = open_checkpoint(tiny_model(tmp_path / "hf", config=config))
    path = write(tmp_path / "m.gguf", source)
    tensor = gguf.GGUFReader(path).tensors[0]
    assert tensor.name == "rope_freqs.weight" and tensor.data.tolist() == rope_factors("", LLAMA31, 500000.0, 16, 131072).tolist()
    found = open_checkpoint(path)
    assert found.description.config["rope_scaling"]["rope_type"] == "llama3" and list(found.tensors) == list(source.tensors)
    again = gguf.GGUFReader(write(tmp_path / "again.gguf", found)).tensors[0]  # GGUF to GGUF carries it too
    np.testing.assert_allclose(again.data, tensor.data, rtol=1e-5)


def test_gemma3_config_from_either_spelling() -> None:
    new = tiny_config("gemma3_text", 64, 128, 7, 4, 2, True)
    del new["rope_theta"], new["rope_local_base_freq"], new["layer_types"]
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    }
    found = back(new)
    assert (found["rope_theta"], found["rope_local_base_freq"], found["rope_scaling"]) == (1e6, 5e3, {"rope_type": "linear", "factor": 8.0})
    assert found["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert found["sliding_window"] == 16 and found["query_pre_attn_scalar"] == 16


def test_mistral_keeps_its_window() -> None:
    found = back(config_of(model_type="mistral", sliding_window=4096))
    assert (found["model_type"], found["sliding_window"], found["architectures"]) == ("mistral", 4096, ["MistralForCausalLM"])


GEMMA2 = tiny_config("gemma2", 64, 128, 2, 4, 2, True)
REFUSED_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown model_type": (config_of(model_type="mamba"), "unknown model_type 'mamba'; known: gemma2"),
    "no hidden_size": (config_of(hidden_size=None), "hidden_size is None, needs an integer"),
    "huge": (config_of(vocab_size=2**40), "vocab_size is 1099511627776"),
    "text as number": (config_of(rms_norm_eps="1e-5"), "rms_norm_eps is 1e-5, needs a number"),
    "multimodal": (config_of(text_config={}), "multimodal"),
    "unknown scaling": (
        config_of(rope_scaling={"rope_type": "dynamic", "factor": 2}),
        "'dynamic' with these settings has no place in GGUF",
    ),
    "scaling without factor": (config_of(rope_scaling={"rope_type": "linear"}), "factor is None, needs a number"),
    "scaling is text": (config_of(rope_scaling="linear"), "rope settings are linear, need an object"),
    "llama3 turned round": (config_of(rope_scaling=LLAMA31 | {"high_freq_factor": 1.0}), "needs high_freq_factor 1.0 above"),
    "yarn with mscale": (config_of(rope_scaling={"rope_type": "yarn", "factor": 2, "mscale": 1.0}), "has no place in GGUF"),
    "listed factors too few": (
        config_of(rope_scaling={"rope_type": "longrope", "long_factor": [1], "short_factor": [1], "attention_factor": 1.0}),
        "needs 8 numbers",
    ),
    "partial rotary": (config_of(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "qwen2 window": (config_of(model_type="qwen2", use_sliding_window=True, sliding_window=64), "no sliding window"),
    "gemma query scale": (
        GEMMA2 | {"query_pre_attn_scalar": 99},
        "query_pre_attn_scalar is 99; GGUF's gemma2 with 2 layers always means 16",
    ),
    "gemma2 without caps": (GEMMA2 | {"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
    "irregular layers": (GEMMA2 | {"layer_types": ["full_attention", "sliding_attention"]}, "no regular period"),
    "layer_types too short": (GEMMA2 | {"layer_types": ["full_attention"]}, "one type for each of 2 layers"),
}


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_config_that_gguf_cannot_hold_is_refused(case: str) -> None:
    config, text = REFUSED_CONFIGS[case]
    with pytest.raises(ContainerError) as caught:
        write_metadata("out.gguf", config)
    assert text in str(caught.value) and "\n" not in str(caught.value)


# --- refusals of a reader -----------------------------------------------------------------------------------------------

REFUSED_KEYS: dict[str, tuple[dict[str, tuple[Any, Any]], str]] = {
    "unknown architecture": ({"general.architecture": (g.STRING, "mamba")}, "unknown architecture 'mamba'; known: gemma2, gemma3, llama"),
    "architecture is a number": ({"general.architecture": (g.U32, 3)}, "unknown architecture '3'"),
    "split": ({"split.count": (g.U16, 2)}, "is one of 2 files of a model, which are called name-00001-of-00002.gguf"),
    "no layers": ({"llama.block_count": (g.U32, 0)}, "llama.block_count is 0, needs one integer"),
    "2^31 layers": ({"llama.block_count": (g.U32, 2**31)}, "llama.block_count is 2147483648"),
    "more layers than tensors": ({"llama.block_count": (g.U32, 1000)}, "announces 1000 layers but holds 11 tensors"),
    "heads per layer": ({"llama.attention.head_count": ((g.ARRAY, g.I32), [2, 4])}, "needs one integer"),
    "heads of no size": ({"llama.attention.head_count": (g.U32, 3)}, "8 rows, but llama's keys announce 3 heads of 2"),
    "odd heads": ({"llama.attention.key_length": (g.U32, 3)}, "heads of 3"),
    "eps of zero": ({"llama.attention.layer_norm_rms_epsilon": (g.F32, 0.0)}, "needs a number above 0"),
    "eps is NaN": ({"llama.attention.layer_norm_rms_epsilon": (g.F32, float("nan"))}, "is nan, needs a number above 0"),
    "theta is text": ({"llama.rope.freq_base": (g.STRING, "10000")}, "llama.rope.freq_base is 10000, needs a number"),
    "rope of half a head": ({"llama.rope.dimension_count": (g.U32, 2), "llama.attention.key_length": (g.U32, 4)}, "2 of 4 dimensions"),
    "unknown scaling": ({"llama.rope.scaling.type": (g.STRING, "longrope")}, "unknown rope scaling 'longrope'; known: linear, none, yarn"),
    "bos outside": ({"tokenizer.ggml.bos_token_id": (g.U32, 10)}, "bos_token_id is 10, the vocabulary has 10"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_KEYS)
def test_contradictory_keys_are_refused(case: str, tmp_path: Path) -> None:
    pairs, text = REFUSED_KEYS[case]
    (tmp_path / "m.gguf").write_bytes(g.llama_bytes(pairs)[0])
    with pytest.raises(ContainerError) as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_constant_heads_per_layer_are_fine(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(g.llama_bytes({"llama.attention.head_count_kv": ((g.ARRAY, g.I32), [1])})[0])
    assert open_checkpoint(tmp_path / "m.gguf").description.config["num_key_value_heads"] == 1


@pytest.mark.parametrize(
    ("name", "kind", "dims", "text"),
    [
        ("blk.0.ssm_in.weight", 0, (8, 4), "'blk.0.ssm_in.weight' is not part of llama"),
        ("blk.x.attn_q.weight", 0, (8, 4), "is not part of llama"),
        ("blk.00.ffn_up.weight", 0, (8, 16), "are both model.layers.0.mlp.up_proj.weight"),
        ("blk.0.attn_v.bias", 8, (32,), "vector 'blk.0.attn_v.bias' is q8_0"),
        ("rope_freqs.weight", 1, (8,), "rope_freqs.weight must be finite f32 values above 0"),
        ("rope_freqs.weight", 0, (2,), "rope_freqs.weight must be finite f32 values above 0"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(name: str, kind: int, dims: tuple[int, ...], text: str, tmp_path: Path) -> None:
    content, arrays = g.llama_bytes()
    data = content[-sum(a.nbytes + -a.nbytes % 32 for a in arrays.values()) :]
    infos, end = [], 0
    for own, array in arrays.items():
        infos.append(g.Tensor(own, 0, tuple(reversed(array.shape)), end))
        end += array.nbytes + -array.nbytes % 32
    infos.append(g.Tensor(name, kind, dims, end))
    (tmp_path / "m.gguf").write_bytes(g.gguf_bytes(g.LLAMA_PAIRS, infos, data + bytes(512)))
    with pytest.raises(ContainerError) as caught:
        open_checkpoint(tmp_path / "m.gguf")
    assert text in str(caught.value)


def test_no_embedding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(g.gguf_bytes(g.LLAMA_PAIRS, [g.Tensor("output_norm.weight", 0, (8,), 0)], bytes(32)))
    with pytest.raises(ContainerError, match=r"has no matrix token_embd\.weight"):
        open_checkpoint(tmp_path / "m.gguf")


# --- metadata of the writer ---------------------------------------------------------------------------------------------


def test_metadata_of_a_gguf_source_is_carried_verbatim(tmp_path: Path) -> None:
    extra: dict[str, tuple[Any, Any]] = {
        "general.license": (g.STRING, "apache-2.0"), "custom.list": ((g.ARRAY, g.U8), [1, 2]), "general.file_type": (g.U32, 7),
        "split.no": (g.U16, 0), "tersor.writer": (g.STRING, "somebody else"),
    }  # fmt: skip
    (tmp_path / "a.gguf").write_bytes(g.llama_bytes(extra)[0])
    write(tmp_path / "b.gguf", open_checkpoint(tmp_path / "a.gguf"))
    old, new = (gguf.GGUFReader(tmp_path / f"{n}.gguf").fields for n in "ab")
    written = {"general.file_type", "general.quantization_version", "tersor.writer"}
    for key in set(old) - written - {"split.no"}:
        if not key.startswith("GGUF."):
            assert (new[key].contents(), new[key].types) == (old[key].contents(), old[key].types), key
    assert new["general.file_type"].contents() == 0 and new["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION
    assert new["tersor.writer"].contents().startswith("tersor") and "split.no" not in new


def test_metadata_of_a_directory_is_what_llama_cpp_needs(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", open_checkpoint(tiny_model(tmp_path / "hf", config={"_name_or_path": "org/My-Model"})))
    fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    expected = {
        "general.architecture": "llama", "general.name": "My-Model", "llama.block_count": 2, "llama.context_length": 2048,
        "llama.embedding_length": 64, "llama.feed_forward_length": 128, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0, "llama.vocab_size": 320, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    assert {k: fields[k] for k in expected} == expected
    assert len(fields["tokenizer.ggml.tokens"]) == 320 and "<|im_start|>" in fields["tokenizer.chat_template"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_attention_heads": 8, "head_dim": 16}, "q_proj.weight has 64 rows, but the config says 8 heads of 16"),
        ({"vocab_size": 321}, "embed_tokens.weight has 320 rows, but the config says vocab_size 321"),
        (
            {"model_type": "gemma2", **{k: GEMMA2[k] for k in ("attn_logit_softcapping", "final_logit_softcapping")}},
            "no place for tensor 'lm_head.weight'",
        ),
    ],
)
def test_plan_that_contradicts_the_config_is_refused(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "hf", tie=False))
    description = ModelDescription({**source.description.config, **change}, source.description.files)
    with pytest.raises(ContainerError) as caught:
        write(tmp_path / "m.gguf", source, description)
    assert text in str(caught.value) and [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_transformers_loads_what_we_write(tmp_path: Path) -> None:
    import torch
    import transformers

    hf = tiny_model(tmp_path / "hf", "llama")
    write(tmp_path / "m.gguf", open_checkpoint(hf))
    transformers.logging.set_verbosity_error()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)(ids).logits
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_description_files_are_built_on_demand(tmp_path: Path) -> None:
    """A tokenizer that cannot be translated stops who needs it, and nobody else."""
    (tmp_path / "m.gguf").write_bytes(g.llama_bytes({"tokenizer.ggml.model": (g.STRING, "rwkv")})[0])
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.read("model.norm.weight").shape == (8,)
    with pytest.raises(ContainerError, match="unknown tokenizer model 'rwkv'; known: gpt2, llama"):
        len(checkpoint.description.files)
    (tmp_path / "n.gguf").write_bytes(g.llama_bytes()[0])
    assert dict(open_checkpoint(tmp_path / "n.gguf").description.files) == {}
    assert json.dumps(open_checkpoint(tmp_path / "n.gguf").description.config)
