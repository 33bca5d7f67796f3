"""GPTQ directories: the layout against slow loops and gptqmodel's own bytes, foreign files with their quirks, every refusal."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from oracles.qweight_loops import gptq_parts, weights
from qweight_files import HEAD, UP, K, Q, foreign, numbers
from tersor import quantize
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.conversion import convert
from tersor.engine import load
from tersor.errors import ContainerError, TersorError
from tersor.formats import get_format
from tersor.formats.exact import exactly
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo
from tersor.verification.independent import independent_reader
from tiny import tiny_model

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gptq.json").read_text())
PLAIN = [i // 32 for i in range(64)]
SHUFFLED = [(i * 13 % 64) // 32 for i in range(64)]
MATRIX = list(product((2, 3, 4, 8), (False, True), (False, True)))
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, "checkpoint_format": "gptq_v2"}


def name_of(bits: int, symmetric: bool, ordered: bool) -> str:
    return f"int{bits}_g32{'s' * symmetric}{'o' * ordered}"


def parts_of(bits: int = 4, *, minus: int = 0, g_idx: list[int] = PLAIN, **kind: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns (the parts of a random layer, its weights)."""
    codes, zeros, scales = numbers(bits, **kind)
    return gptq_parts(codes, zeros, scales, g_idx, bits, minus), weights(codes, zeros, scales, g_idx)


def decoded(checkpoint: Checkpoint, module: str = Q) -> Array:
    tensor = checkpoint.read(f"{module}.weight")
    return get_format(tensor.format).dequantize(tensor)


def tensor_of(name: str, codes: list, zeros: list, scales: list, g_idx: list[int]) -> QuantizedTensor:
    """Returns our tensor of these numbers."""
    params = {
        "scale": np.array(scales, np.float16),
        "zero": np.array(zeros, np.uint8),
        "order": np.argsort(g_idx, kind="stable").astype(np.int32),
    }
    keep = {"scale"} | ({"zero"} if "s" not in name else set()) | ({"order"} if name.endswith("o") else set())
    return get_format(name).pack(np.array(codes, np.uint8), {key: params[key] for key in keep})


def written(path: Path, tensors: dict[str, QuantizedTensor]) -> dict[str, np.ndarray]:
    """Returns the safetensors tensors of a GPTQ directory with these layers of an otherwise float model."""
    with open_checkpoint(foreign_floats(path / "hf")) as source:
        ours = {name: source.read(name) for name in source.tensors} | tensors
        plan = [TensorInfo(name, t.format, t.shape, t.nbytes) for name, t in ours.items()]
        with CONTAINERS["gptq"].create(path / "out", source.description, plan) as writer:
            for name, tensor in ours.items():
                writer.write(name, tensor)
    return load_file(path / "out" / "model.safetensors")


def foreign_floats(path: Path) -> Path:
    return tiny_model(path, layers=1, hidden=64, intermediate=64, heads=2, kv_heads=2, tie=False)


# --- the layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "symmetric", "ordered"), MATRIX)
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_reads_what_the_loops_pack(bits: int, symmetric: bool, ordered: bool, version: str, tmp_path: Path) -> None:
    """Zeros go through all values, so that v1's wrap is read too."""
    parts, w = parts_of(bits, minus=int(version == "gptq"), g_idx=SHUFFLED if ordered else PLAIN, symmetric=symmetric)
    config = CONFIG | {"bits": bits, "sym": symmetric, "desc_act": ordered, "checkpoint_format": version}
    with open_checkpoint(foreign(tmp_path / "m", {Q: parts}, config)) as found:
        assert found.container == "gptq" and found.tensors[f"{Q}.weight"].format == name_of(bits, symmetric, ordered)
        np.testing.assert_array_equal(decoded(found), w)
        assert found.tensors[f"{K}.weight"].format == "f32"


@pytest.mark.parametrize(("bits", "symmetric", "ordered"), MATRIX)
def test_writes_what_the_loops_pack(bits: int, symmetric: bool, ordered: bool, tmp_path: Path) -> None:
    g_idx = SHUFFLED if ordered else PLAIN
    codes, zeros, scales = numbers(bits, symmetric=symmetric)
    found = written(tmp_path, {f"{Q}.weight": tensor_of(name_of(bits, symmetric, ordered), codes, zeros, scales, g_idx)})
    for part, expected in gptq_parts(codes, zeros, scales, g_idx, bits, int(symmetric)).items():
        np.testing.assert_array_equal(found[f"{Q}.{part}"], expected, err_msg=part)
        assert found[f"{Q}.{part}"].dtype == expected.dtype
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (bits, 32, symmetric, ordered)
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")


def golden_layer(name: str) -> tuple[list, list, list, list[int]]:
    """Returns what golden/make_gptq.py packed: codes, zeros, scales, g_idx."""
    bits, (rows, columns), symmetric = int(name[3]), GOLDEN["shape"], "s" in name.removeprefix("int")

    def noise(count: int, below: int, seed: int) -> Array:
        return np.array([((i + 1) * 2654435761 * (2 * seed + 1) % 2**32 >> 7) % below for i in range(count)])

    codes = noise(rows * columns, 2**bits, 1).reshape(rows, columns)
    zeros = np.full((rows, 2), 2 ** (bits - 1)) if symmetric else noise(rows * 2, 2**bits - 1, 2).reshape(rows, 2) + 1
    scales = (noise(rows * 2, 1000, 3).reshape(rows, 2) + 24) / 1024
    return codes.tolist(), zeros.tolist(), scales.tolist(), [(i * 13 % 64 if name.endswith("o") else i) // 32 for i in range(columns)]


@pytest.mark.parametrize("name", GOLDEN["gptq"])
def test_golden_bytes_of_gptqmodel(name: str, tmp_path: Path) -> None:
    """Loops and gptqmodel agree on every part, in both versions; we agree with the loops above, and here on the weights."""
    codes, zeros, scales, g_idx = golden_layer(name)
    for version, minus in (("gptq", 1), ("gptq_v2", 0)):
        parts = gptq_parts(codes, zeros, scales, g_idx, int(name[3]), minus)
        for part, array in parts.items():
            key = "qzeros_v1" if part == "qzeros" and minus else part
            assert base64.b64encode(array.tobytes()).decode() == GOLDEN["gptq"][name][key], (version, part)
        config = CONFIG | {"bits": int(name[3]), "sym": "s" in name.removeprefix("int"), "checkpoint_format": version}
        path = foreign(tmp_path / version, {Q: parts}, config, config={"head_dim": 16})
        with open_checkpoint(path) as found:
            assert found.tensors[f"{Q}.weight"].format == name
            assert hashlib.sha256(decoded(found).tobytes()).hexdigest() == GOLDEN["gptq"][name]["weights_sha256"]


# --- foreign files --------------------------------------------------------------------------------------------------------


def test_sym_with_other_zeros_is_asymmetric(tmp_path: Path) -> None:
    parts, w = parts_of(minus=1)
    path = foreign(tmp_path / "m", {Q: parts}, CONFIG | {"sym": True, "checkpoint_format": "gptq"})
    assert open_checkpoint(path).tensors[f"{Q}.weight"].format == "int4_g32"
    np.testing.assert_array_equal(decoded(open_checkpoint(path)), w)


def test_missing_g_idx_means_runs_of_columns(tmp_path: Path) -> None:
    parts, w = parts_of()
    del parts["g_idx"]
    checkpoint = open_checkpoint(foreign(tmp_path / "m", {Q: parts}, CONFIG))
    assert checkpoint.tensors[f"{Q}.weight"].format == "int4_g32"
    np.testing.assert_array_equal(decoded(checkpoint), w)


def test_g_idx_of_runs_is_plain_whatever_desc_act_says(tmp_path: Path) -> None:
    """Static groups with act-order: the columns were quantized in another order, but the groups are runs."""
    parts, w = parts_of()
    parts["g_idx"] = parts["g_idx"].astype(np.int64)
    checkpoint = open_checkpoint(foreign(tmp_path / "m", {Q: parts}, CONFIG | {"desc_act": True, "static_groups": True}))
    assert checkpoint.tensors[f"{Q}.weight"].format == "int4_g32"
    np.testing.assert_array_equal(decoded(checkpoint), w)


def test_rows_of_an_ordered_layer(tmp_path: Path) -> None:
    parts, w = parts_of(g_idx=SHUFFLED)
    checkpoint = open_checkpoint(foreign(tmp_path / "m", {Q: parts}, CONFIG))
    part = checkpoint.read(f"{Q}.weight", slice(3, 40))
    np.testing.assert_array_equal(get_format(part.format).dequantize(part), w[3:40])


@pytest.mark.parametrize(("size", "format"), [(-1, "int4_c"), (64, "int4_g64"), (128, "int4_c")])
def test_one_group_a_row(size: int, format: str, tmp_path: Path) -> None:
    codes, zeros, scales = numbers(4, groups=1)
    parts = gptq_parts(codes, zeros, scales, [0] * 64, 4, 0)
    checkpoint = open_checkpoint(foreign(tmp_path / "m", {Q: parts}, CONFIG | {"group_size": size}))
    assert checkpoint.tensors[f"{Q}.weight"].format == format
    np.testing.assert_array_equal(decoded(checkpoint), weights(codes, zeros, scales, [0] * 64))


def test_dynamic_takes_the_first_match(tmp_path: Path) -> None:
    (q, w), (head, v) = parts_of(8, groups=4, g_idx=[i // 16 for i in range(64)]), parts_of(rows=320)
    dynamic = {
        r"-:.*\.self_attn\.k_proj": {},
        r"+:.*\.q_proj$": {"bits": 8, "group_size": 16},
        r".*\.mlp\.": {"sym": True},
        r"+:.*": {"bits": 4},
    }
    up, u = parts_of(symmetric=True)
    path = foreign(tmp_path / "m", {Q: q, HEAD: head, UP: up}, CONFIG | {"lm_head": True, "dynamic": dynamic})
    checkpoint = open_checkpoint(path)
    formats = {module: checkpoint.tensors[f"{module}.weight"].format for module in (Q, K, UP, HEAD)}
    assert formats == {Q: "int8_g16", K: "f32", UP: "int4_g32s", HEAD: "int4_g32"}
    for module, expected in ((Q, w), (HEAD, v), (UP, u)):
        np.testing.assert_array_equal(decoded(checkpoint, module), expected)


def test_old_configs_without_a_version_are_v1(tmp_path: Path) -> None:
    parts, w = parts_of(minus=1)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "dynamic": None}
    np.testing.assert_array_equal(decoded(open_checkpoint(foreign(tmp_path / "m", {Q: parts}, config))), w)


def test_a_bias_stays_and_biases_of_zeros_everywhere_go(tmp_path: Path) -> None:
    parts, _ = parts_of()
    bias, none = np.ones(64, np.float16), np.zeros(64, np.float16)
    one = open_checkpoint(foreign(tmp_path / "one", {Q: parts | {"bias": bias}, K: parts | {"bias": none}}, CONFIG))
    assert f"{Q}.bias" in one.tensors and f"{K}.bias" not in one.tensors
    some = open_checkpoint(foreign(tmp_path / "some", {Q: parts | {"bias": none}, K: parts}, CONFIG))
    assert f"{Q}.bias" in some.tensors  # not AutoGPTQ's habit, so the model's own


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_wider_scales_are_kept_when_exact(dtype: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    parts, _ = parts_of()
    path = foreign(tmp_path / "m", {Q: parts}, CONFIG)
    tensors = load_file(path / "model.safetensors")
    exact = (tensors[f"{Q}.scales"].float() * 128).round() / 128
    tensors[f"{Q}.scales"] = exact.to({"bf16": torch.bfloat16, "f32": torch.float32}[dtype])
    save_file(tensors, path / "model.safetensors")
    with open_checkpoint(path) as found:
        assert found.read(f"{Q}.weight").fields["scale"].dtype == np.float16
        np.testing.assert_array_equal(found.read(f"{Q}.weight").fields["scale"].T, exact.numpy())
    tensors[f"{Q}.scales"] = exact.float() + 1e-6
    save_file(tensors, path / "model.safetensors")
    with open_checkpoint(path) as found:
        tensor = found.read(f"{Q}.weight")
        assert found.tensors[f"{Q}.weight"].format == tensor.format == "int4_g32f"
        np.testing.assert_array_equal(tensor.fields["scale"].T, tensors[f"{Q}.scales"].numpy())
        scales = tensors[f"{Q}.scales"].numpy().T.tolist()
        codes, zeros, _ = numbers(4)
        np.testing.assert_array_equal(decoded(found), weights(codes, zeros, scales, PLAIN))


@pytest.mark.parametrize("container", ["gptq", "awq"])
def test_float32_scales_are_not_written(container: str, tmp_path: Path) -> None:
    """Loaders round them; where they are float16 numbers, nothing is lost and they go."""
    model = foreign_floats(tmp_path / "hf")
    refusal = rf"{container} cannot hold int4_g32sf .*q_proj\.weight\)?: its scales are float32, there they are float16;"
    with pytest.raises(ContainerError, match=refusal):
        quantize(model, tmp_path / "out", "rtn:int4_g32sf", to=container)
    with pytest.raises(ContainerError, match=refusal):
        plan = [TensorInfo(f"{Q}.weight", "int4_g32sf", (64, 64), 1)]
        CONTAINERS[container].create(tmp_path / "out", open_checkpoint(model).description, plan)
    quantize(model, tmp_path / "wide", "rtn:int4_g32sf", to="compressed-tensors")
    text = rf"is int4_g32sf, whose numbers {container} cannot hold: its scales are float32, there they are float16; add --requantize"
    with pytest.raises(ContainerError, match=text):
        convert(tmp_path / "wide", tmp_path / "out", container)
    with pytest.raises(ContainerError, match="gguf cannot hold: its scales are float32, there they are float16; add --requantize"):
        convert(tmp_path / "wide", tmp_path / "out.gguf")
    convert(tmp_path / "wide", tmp_path / "again", container, requantize="rtn:int4_g32s")
    assert open_checkpoint(tmp_path / "again").tensors[f"{Q}.weight"].format == "int4_g32s"


def test_float32_scales_that_float16_has_are_converted(tmp_path: Path) -> None:
    with open_checkpoint(foreign_floats(tmp_path / "hf")) as source:
        ours = {name: source.read(name) for name in source.tensors}
        halves = get_format("int4_g32s").quantize(ours[f"{Q}.weight"].fields["values"])
        fields = {**halves.fields, "scale": halves.fields["scale"].astype(np.float32)}
        ours[f"{Q}.weight"] = QuantizedTensor("int4_g32sf", halves.shape, fields)
        plan = [TensorInfo(name, t.format, t.shape, t.nbytes) for name, t in ours.items()]
        with CONTAINERS["hqq"].create(tmp_path / "hqq", source.description, plan) as writer:
            for name, tensor in ours.items():
                writer.write(name, tensor)
        made = exactly(ours[f"{Q}.weight"], "int4_g32s")
    assert made is not None and made.fields["scale"].tobytes() == halves.fields["scale"].tobytes()
    changed = convert(tmp_path / "hqq", tmp_path / "out", "gptq")
    assert open_checkpoint(tmp_path / "out").read(f"{Q}.weight").fields["codes"].tobytes() == halves.fields["codes"].tobytes()
    assert all(change.error == 0 for change in changed.changes)


# --- refusals -------------------------------------------------------------------------------------------------------------

BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rotated": ({"rotation": "hadamard"}, "quantization_config has rotation hadamard, which is not supported"),
    "adapter": ({"adapter": {"rank": 8}}, "has adapter"),
    "words of 16 bits": ({"pack_dtype": "int16"}, "unknown pack_dtype 'int16'; known: int32"),
    "5 bits": ({"bits": 5}, "bits is 5; GPTQ layers of 2, 3, 4, 8 bits are supported"),
    "no bits": ({"bits": None}, "bits is None"),
    "group of text": ({"group_size": "x"}, "group_size is x, needs a number of columns, or -1"),
    "group of 0": ({"group_size": 0}, "group_size is 0"),
    "group not ours": ({"group_size": 24}, "int4_g24: group of 24; need a multiple of 16"),
    "group too long": ({"group_size": 48}, "64 columns, not a multiple of 48"),
    "sym is a number": ({"sym": 1}, "sym is 1, needs true or false"),
    "planar": ({"checkpoint_format": "gptq_p"}, "unknown checkpoint_format 'gptq_p'; known: gptq, gptq_v2"),
    "marlin": ({"checkpoint_format": None, "format": "marlin"}, "unknown checkpoint_format 'marlin'"),
    "two versions": ({"format": "gptq"}, "checkpoint_format is gptq_v2 but format gptq"),
    "dynamic is a list": ({"dynamic": ["x"]}, "needs expressions with an object each"),
    "dynamic of numbers": ({"dynamic": {"x": 4}}, "needs expressions with an object each"),
    "dynamic with a bad expression": ({"dynamic": {"+:(": {}}}, r"dynamic '\+:\(' is no regular expression"),
    "dynamic with 7 bits": ({"dynamic": {"+:x": {"bits": 7}}}, r"dynamic '\+:x': bits is 7"),
    "dynamic skips the layer": ({"dynamic": {"-:.*q_proj": {}}}, "q_proj is quantized, but `dynamic` says that it is not"),
    "other bits than the file": ({"bits": 8}, r"qzeros is I32 \[2, 8\]|scales is F16"),
    "other groups than the file": ({"group_size": 16}, r"scales is F16 \[2, 64\], int4_g16 of 64 x 64 needs F16 \[4, 64\]"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_refused(case: str, tmp_path: Path) -> None:
    change, says = BAD_CONFIGS[case]
    path = foreign(tmp_path / "m", {Q: parts_of()[0]}, CONFIG | change)
    with pytest.raises(ContainerError, match=says):
        open_checkpoint(path)


Parts = dict[str, np.ndarray]


def edited(**change: Any) -> Callable[[Parts], Parts]:
    return lambda parts: {k: v for k, v in {**parts, **change}.items() if v is not None}


BAD_PARTS: dict[str, tuple[Callable[[Parts], Parts], str]] = {
    "qweight of bytes": (lambda p: p | {"qweight": p["qweight"].view(np.uint8)}, r"qweight is U8 \[8, 256\], needs int32 with two axes"),
    "qweight of one axis": (lambda p: p | {"qweight": p["qweight"].reshape(-1)}, "needs int32 with two axes"),
    "weight too": (edited(weight=np.zeros((64, 64), np.float32)), "q_proj has both qweight and weight"),
    "no scales": (edited(scales=None), r"scales is missing, int4_g32 of 64 x 64 needs F16 \[2, 64\]"),
    "scales transposed": (lambda p: p | {"scales": p["scales"].T.copy()}, r"scales is F16 \[64, 2\]"),
    "scales of integers": (lambda p: p | {"scales": p["scales"].astype(np.int32)}, "scales is I32"),
    "no qzeros": (edited(qzeros=None), "qzeros is missing"),
    "qzeros cut": (lambda p: p | {"qzeros": p["qzeros"][:, :7].copy()}, r"qzeros is I32 \[2, 7\]"),
    "g_idx cut": (lambda p: p | {"g_idx": p["g_idx"][:63].copy()}, r"g_idx is I32 \[63\]"),
    "g_idx of floats": (lambda p: p | {"g_idx": p["g_idx"].astype(np.float32)}, "g_idx is F32"),
    "g_idx below 0": (lambda p: p | {"g_idx": p["g_idx"] - 1}, "g_idx goes from -1 to 0, needs 0 to 1"),
    "g_idx beyond": (lambda p: p | {"g_idx": p["g_idx"] + 1}, "g_idx goes from 1 to 2, needs 0 to 1"),
    "uneven groups": (lambda p: p | {"g_idx": np.array([0] * 33 + [1] * 31, np.int32)}, "gives group 0 33 columns, needs 32; such uneven"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_refused(case: str, tmp_path: Path) -> None:
    change, says = BAD_PARTS[case]
    path = foreign(tmp_path / "m", {Q: change(parts_of()[0])}, CONFIG)
    with pytest.raises(ContainerError, match=says):
        open_checkpoint(path)


def test_words_that_codes_do_not_fill(tmp_path: Path) -> None:
    parts, _ = parts_of(3)
    path = foreign(tmp_path / "m", {Q: parts | {"qweight": parts["qweight"][:5].copy()}}, CONFIG | {"bits": 3})
    with pytest.raises(ContainerError, match="qweight has 5 words a row, which 3-bit codes do not fill"):
        open_checkpoint(path)


WEIGHT = f"{Q}.weight"
BAD_PLANS = {
    "minimum": (TensorInfo(WEIGHT, "int4_g32m", (64, 64), 1), f"gptq cannot hold int4_g32m \\({re.escape(WEIGHT)}\\)"),
    "6 bits": (TensorInfo(WEIGHT, "int6_g64", (64, 64), 1), "gptq cannot hold int6_g64"),
    "per tensor": (TensorInfo(WEIGHT, "int8_ts", (64, 64), 1), "gptq cannot hold int8_ts"),
    "group of 96": (TensorInfo(WEIGHT, "int4_g96", (64, 96), 1), "gptq cannot hold int4_g96"),
    "embedding": (TensorInfo("model.embed_tokens.weight", "int4_g32", (64, 64), 1), r"is the embedding; .* \(recipe `embed_tokens=f16`\)"),
    "three axes": (TensorInfo(WEIGHT, "int4_g32", (2, 64, 64), 1), "has 3 axes; gptq holds quantized matrices only"),
    "rows": (TensorInfo(WEIGHT, "int4_g32", (48, 64), 1), "48 x 64; loaders of gptq need rows that are a multiple of 32 .*`q_proj=f16`"),
    "columns": (TensorInfo(WEIGHT, "int4_g16", (64, 48), 1), "64 x 48; loaders of gptq need .* columns of 32"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_plans_refused(case: str, tmp_path: Path) -> None:
    info, says = BAD_PLANS[case]
    with pytest.raises(ContainerError, match=says):
        CONTAINERS["gptq"].create(tmp_path / "m", ModelDescription({"model_type": "llama", "tie_word_embeddings": False}), [info])
    assert not list(tmp_path.iterdir())


def test_a_tied_embedding_is_refused_as_such(tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match=r"is the embedding, which is also the head \(tie_word_embeddings\)"):
        CONTAINERS["gptq"].create(tmp_path / "m", ModelDescription({"tie_word_embeddings": True}), [BAD_PLANS["embedding"][0]])


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 2**65),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["gptq", "+:.*", "-:(", "int32"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["+:.*", "bits", "group_size", "sym"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(st.sampled_from([*CONFIG, "dynamic", "pack_dtype", "format", "rotation"]), json_values, max_size=4))
def test_configs_of_random_values(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "m"
    if not path.exists():
        foreign(path, {Q: parts_of()[0]}, CONFIG)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG | change | {"quant_method": "gptq"}}))
    try:
        open_checkpoint(path).read(WEIGHT)
    except TersorError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    finally:
        (path / "config.json").write_text(json.dumps(config))


# --- whole models ---------------------------------------------------------------------------------------------------------

MIXED = "rtn:int4_g32, q_proj=int8_g64s, k_proj=int8_g64s, v_proj=int8_g64s, layers.1.up_proj=f16, lm_head=int3_g64"


def test_several_formats_are_overrides(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "hf", hidden=64, intermediate=128, kv_heads=2, heads=2, tie=False)
    quantize(model, tmp_path / "q", MIXED, to="gptq")
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"], config["lm_head"]) == (4, 32, False, True)
    # As gptqmodel and vLLM look them up: the first expression that matches from the start; vLLM by its names of fused layers.
    rules = [(re.compile(key[2:]), key[0], own) for key, own in config["dynamic"].items()]

    def rule(module: str) -> tuple[str, Any] | None:
        return next(((sign, own) for pattern, sign, own in rules if pattern.match(module)), None)

    eight = {"bits": 8, "group_size": 64, "sym": True}
    for name in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        assert rule(f"model.layers.1.self_attn.{name}") == ("+", eight)
    assert rule("lm_head") == ("+", {"bits": 3, "group_size": 64, "sym": False})
    assert rule("model.layers.1.mlp.up_proj") == ("-", {}) and rule("model.layers.0.mlp.up_proj") is None
    assert rule("model.layers.1.mlp.gate_up_proj") is None and rule("model.layers.10.self_attn.q_proj") is None
    (named,) = config["modules_in_block_to_quantize"]
    assert "model.layers.0.mlp.up_proj" in named and "model.layers.1.mlp.up_proj" not in named and len(named) == 14
    found = open_checkpoint(tmp_path / "q").tensors
    assert {found[f"model.layers.{i}.self_attn.{n}_proj.weight"].format for i in (0, 1) for n in "qkv"} == {"int8_g64s"}
    assert found["lm_head.weight"].format == "int3_g64" and found["model.embed_tokens.weight"].format == "f16"


CASES = [
    ("llama", MIXED),
    ("mistral", "rtn:int4_g32s"),
    ("qwen2", "rtn:int2_g64"),
    ("qwen3", "rtn:int8_c"),
    ("gemma3_text", "rtn:int3_g32"),
]


@pytest.mark.parametrize(("architecture", "recipe"), CASES)
def test_the_engine_runs_it_as_it_runs_compressed_tensors(architecture: str, recipe: str, tmp_path: Path) -> None:
    """The same codes by another file: the same text, and the same weights when converted back."""
    model = tiny_model(tmp_path / "hf", architecture, hidden=64, intermediate=128, kv_heads=2, heads=2, tie=recipe != MIXED)
    quantize(model, tmp_path / "ct", recipe, to="compressed-tensors")
    quantize(model, tmp_path / "gptq", recipe, to="gptq")
    texts = [load(tmp_path / name).generate("The quick brown fox", max_tokens=12).text for name in ("ct", "gptq")]
    assert texts[0] == texts[1]
    convert(tmp_path / "gptq", tmp_path / "back", "compressed-tensors")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(tmp_path / "ct" / "model.safetensors").keys()
    for name, array in load_file(tmp_path / "ct" / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(tmp_path / "back" / "model.safetensors")[name], array)


def test_calibrated_act_order_runs(tmp_path: Path) -> None:
    """What the method gptq orders is what the engine multiplies: the text of the file is that of its weights as floats."""
    model = tiny_model(tmp_path / "hf", hidden=64, intermediate=128, kv_heads=2, heads=2, tie=False)
    quantize(model, tmp_path / "q", "gptq:int4_g32so", to="gptq", calib="pydoc", samples=2, seqlen=32)
    checkpoint = open_checkpoint(tmp_path / "q")
    assert checkpoint.tensors[WEIGHT].format == "int4_g32so" and (checkpoint.read(WEIGHT).fields["order"] != np.arange(64)).any()
    convert(tmp_path / "q", tmp_path / "floats", "huggingface", dequantize="f32")
    texts = [load(tmp_path / name).generate("The quick brown fox", max_tokens=8).text for name in ("q", "floats")]
    assert texts[0] == texts[1]


def test_all_in_float_is_a_plain_directory(tmp_path: Path) -> None:
    quantize(foreign_floats(tmp_path / "hf"), tmp_path / "q", "f16", to="gptq")
    assert not (tmp_path / "q" / "quantize_config.json").exists()
    assert open_checkpoint(tmp_path / "q").container == "huggingface"


@pytest.mark.slow  # needs gptqmodel, which wants a numpy of its own: `make test-all` names its environment
@pytest.mark.parametrize("recipe", [MIXED, *(f"rtn:{name_of(*case)}" for case in MATRIX), "rtn:int4_c", "rtn:int8_cs"])
def test_gptqmodel_reads_exactly_what_was_meant(recipe: str, tmp_path: Path) -> None:
    reader = independent_reader("gptq")
    assert not isinstance(reader, str), reader
    model = tiny_model(tmp_path / "hf", hidden=64, intermediate=128, kv_heads=2, heads=2, tie=False)
    quantize(model, tmp_path / "q", recipe, to="gptq")
    with open_checkpoint(tmp_path / "q") as meant:
        found = dict(reader.weights(tmp_path / "q"))
        assert set(found) == set(meant.tensors)
        for name in found:
            tensor = meant.read(name)
            np.testing.assert_array_equal(found[name], get_format(tensor.format).dequantize(tensor), err_msg=name)


def test_what_auto_round_saves_by_itself_is_read(tmp_path: Path) -> None:
    """auto-round 0.16's own config, beside the buffers that it shares with GPTQ v1 (no g_idx)."""
    quantize(tiny_model(tmp_path / "hf", hidden=128, intermediate=256), tmp_path / "a", "int4_g32s", to="gptq", verify=False)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    own = {"bits": 4, "group_size": 32, "sym": True, "data_type": "int", "amp": False, "iters": 2, "block_name_to_quantize": "model.layers"}
    own |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "autoround_version": "0.16.0"}
    name = "model.layers.0.mlp.up_proj.weight"
    with open_checkpoint(tmp_path / "a") as before:
        want = get_format("int4_g32s").dequantize(before.read(name))
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"quantization_config": own}))
    with open_checkpoint(tmp_path / "a") as found:
        assert found.container == "gptq" and found.tensors[name].format == "int4_g32s"
        np.testing.assert_array_equal(get_format("int4_g32s").dequantize(found.read(name)), want)
    for change, text in (
        ({"packing_format": "auto_round:exllamav2x"}, "unknown packing_format"),
        ({"extra_config": {"x": {}}}, "extra_config"),
    ):
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"quantization_config": own | change}))
        with pytest.raises(ContainerError, match=text):
            open_checkpoint(tmp_path / "a")


def test_missing_order_is_refused(tmp_path: Path) -> None:
    """desc_act without g_idx: which scale a column has is lost, unless there is one only."""
    parts, _ = parts_of(g_idx=SHUFFLED)
    del parts["g_idx"]
    with pytest.raises(ContainerError, match=r"q_proj: g_idx is missing, but desc_act is true"):
        open_checkpoint(foreign(tmp_path / "m", {Q: parts}, CONFIG | {"desc_act": True}))
    whole, w = parts_of(groups=1, g_idx=[0] * 64)
    del whole["g_idx"]
    with open_checkpoint(foreign(tmp_path / "c", {Q: whole}, CONFIG | {"desc_act": True, "group_size": -1})) as found:
        np.testing.assert_array_equal(decoded(found), w)
    with pytest.raises(ContainerError, match="desc_act is yes, needs true or false"):
        open_checkpoint(foreign(tmp_path / "b", {Q: parts}, CONFIG | {"desc_act": "yes"}))
