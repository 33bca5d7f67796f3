"""AWQ directories: the layout against slow loops, gptqmodel's own bytes and compressed-tensors, foreign files, every refusal."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from oracles.qweight_loops import awq_parts, weights
from qweight_files import HEAD, UP, K, Q, foreign, numbers
from tersor import quantize
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.conversion import convert
from tersor.engine import load
from tersor.errors import ContainerError, TersorError
from tersor.formats import get_format
from tersor.tensor import Array, ModelDescription, TensorInfo
from tersor.verification.readers import READERS
from tiny import tiny_model

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gptq.json").read_text())
PLAIN = [i // 32 for i in range(64)]
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
WEIGHT = f"{Q}.weight"


def parts_of(rows: int = 64, symmetric: bool = False, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns (the parts of a random layer, its weights)."""
    codes, zeros, scales = numbers(4, rows=rows, symmetric=symmetric, seed=seed)
    return awq_parts(codes, zeros, scales), weights(codes, zeros, scales, PLAIN)


def decoded(checkpoint: Checkpoint, module: str = Q) -> Array:
    tensor = checkpoint.read(f"{module}.weight")
    return get_format(tensor.format).dequantize(tensor)


# --- the layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_reads_what_the_loops_pack(symmetric: bool, tmp_path: Path) -> None:
    parts, w = parts_of(symmetric=symmetric)
    with open_checkpoint(foreign(tmp_path / "m", {Q: parts}, CONFIG)) as found:
        assert found.container == "awq" and found.tensors[WEIGHT].format == ("int4_g32s" if symmetric else "int4_g32")
        np.testing.assert_array_equal(decoded(found), w)


@pytest.mark.parametrize("symmetric", [False, True])
def test_writes_what_the_loops_pack(symmetric: bool, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "hf", layers=1, hidden=64, intermediate=64, heads=2, kv_heads=2, tie=False))
    codes, zeros, scales = numbers(4, symmetric=symmetric)
    params = {"scale": np.array(scales, np.float16)} | ({} if symmetric else {"zero": np.array(zeros, np.uint8)})
    tensor = get_format("int4_g32s" if symmetric else "int4_g32").pack(np.array(codes, np.uint8), params)
    ours = {name: source.read(name) for name in source.tensors} | {WEIGHT: tensor}
    plan = [TensorInfo(name, t.format, t.shape, t.nbytes) for name, t in ours.items()]
    with CONTAINERS["awq"].create(tmp_path / "out", source.description, plan) as writer:
        for name, each in ours.items():
            writer.write(name, each)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for part, expected in awq_parts(codes, zeros, scales).items():
        np.testing.assert_array_equal(found[f"{Q}.{part}"], expected, err_msg=part)
        assert found[f"{Q}.{part}"].dtype == expected.dtype
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    left = [HEAD, *(n.removesuffix(".weight") for n in source.tensors if "_proj" in n and n != WEIGHT)]
    assert config == CONFIG | {key: config[key] for key in ("modules_to_not_convert", "dynamic")}
    assert sorted(config["modules_to_not_convert"]) == sorted(left)
    ((key, own),) = config["dynamic"].items()
    assert key[:2] == "-:" and own == {}
    assert all(re.match(key[2:], module) for module in left[1:]) and not re.match(key[2:], Q)


@pytest.mark.parametrize("name", GOLDEN["awq"])
def test_golden_bytes_of_gptqmodel(name: str) -> None:
    rows, columns = GOLDEN["shape"]

    def noise(count: int, below: int, seed: int) -> Array:
        return np.array([((i + 1) * 2654435761 * (2 * seed + 1) % 2**32 >> 7) % below for i in range(count)])

    zeros = np.full((rows, 2), 8) if name.endswith("s") else noise(rows * 2, 15, 2).reshape(rows, 2) + 1
    codes, scales = noise(rows * columns, 16, 1).reshape(rows, columns), (noise(rows * 2, 1000, 3).reshape(rows, 2) + 24) / 1024
    for part, array in awq_parts(codes.tolist(), zeros.tolist(), scales.tolist()).items():
        assert base64.b64encode(array.tobytes()).decode() == GOLDEN["awq"][name][part], part


MIXED = "rtn:int4_g32, layers.1.up_proj=f16, layers.0.q_proj=int4_g32s"


@pytest.mark.parametrize("recipe", [MIXED, "rtn:int4_g16", "rtn:int4_g64s", "rtn:int4_c", "rtn:int4_cs"])
def test_compressed_tensors_reads_exactly_what_was_meant(recipe: str, tmp_path: Path) -> None:
    reader = READERS["awq"]
    assert reader.missing() is None
    quantize(tiny_model(tmp_path / "hf", hidden=64, intermediate=128, heads=4, kv_heads=1, tie=False), tmp_path / "q", recipe, to="awq")
    with open_checkpoint(tmp_path / "q") as meant:
        found = dict(reader.weights(tmp_path / "q"))
        assert set(found) == set(meant.tensors) and sum("int4" in info.format for info in meant.tensors.values()) >= 13
        for name in found:
            tensor = meant.read(name)
            np.testing.assert_array_equal(found[name], get_format(tensor.format).dequantize(tensor), err_msg=name)


@pytest.mark.parametrize("recipe", [MIXED, "rtn:int4_c"])
def test_the_engine_runs_it_as_it_runs_compressed_tensors(recipe: str, tmp_path: Path) -> None:
    """The same codes by another file: the same text, and the same weights when converted back."""
    model = tiny_model(tmp_path / "hf", hidden=64, intermediate=128, heads=4, kv_heads=1, tie=False)
    quantize(model, tmp_path / "ct", recipe, to="compressed-tensors")
    quantize(model, tmp_path / "awq", recipe, to="awq")
    texts = [load(tmp_path / name).generate("The quick brown fox", max_tokens=12).text for name in ("ct", "awq")]
    assert texts[0] == texts[1]
    convert(tmp_path / "awq", tmp_path / "back", "compressed-tensors")
    back = load_file(tmp_path / "back" / "model.safetensors")
    for name, array in load_file(tmp_path / "ct" / "model.safetensors").items():
        np.testing.assert_array_equal(back[name], array)


def test_to_gptq_and_back(tmp_path: Path) -> None:
    """The same grid in another order of bits: nothing is rounded again, and the files come back to the byte."""
    model = tiny_model(tmp_path / "hf", hidden=64, intermediate=128, heads=2, kv_heads=1, tie=False)
    quantize(model, tmp_path / "awq", MIXED, to="awq")
    convert(tmp_path / "awq", tmp_path / "gptq", "gptq")
    convert(tmp_path / "gptq", tmp_path / "back", "awq")
    assert open_checkpoint(tmp_path / "gptq").container == "gptq"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "awq" / name).read_bytes(), name


# --- foreign files --------------------------------------------------------------------------------------------------------


def test_without_zero_point_qzeros_may_be_missing(tmp_path: Path) -> None:
    parts, w = parts_of(symmetric=True)
    (some, v), config = parts_of(symmetric=True, seed=1), CONFIG | {"zero_point": False}
    del parts["qzeros"]
    with open_checkpoint(foreign(tmp_path / "m", {Q: parts, K: some}, config)) as found:
        assert found.tensors[WEIGHT].format == found.tensors[f"{K}.weight"].format == "int4_g32s"
        np.testing.assert_array_equal(decoded(found), w)
        np.testing.assert_array_equal(decoded(found, K), v)


def test_old_names_of_the_settings(tmp_path: Path) -> None:
    parts, w = parts_of()
    path = foreign(tmp_path / "m", {Q: parts}, {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"})
    np.testing.assert_array_equal(decoded(open_checkpoint(path)), w)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(5, 21), slice(63, 64), slice(8, 8), slice(40, 10), slice(0, 99)])
def test_rows_need_not_start_at_a_word(rows: slice, tmp_path: Path) -> None:
    parts, w = parts_of()
    part = open_checkpoint(foreign(tmp_path / "m", {Q: parts}, CONFIG)).read(WEIGHT, rows)
    np.testing.assert_array_equal(get_format(part.format).dequantize(part), w[rows])


def test_heads_and_biases_of_other_writers(tmp_path: Path) -> None:
    (head, w), (up, _) = parts_of(rows=320), parts_of()
    path = foreign(tmp_path / "m", {HEAD: head, UP: up | {"bias": np.ones(64, np.float16)}}, CONFIG | {"lm_head": True})
    checkpoint = open_checkpoint(path)
    np.testing.assert_array_equal(decoded(checkpoint, HEAD), w)
    assert checkpoint.tensors[f"{UP}.bias"].format == "f16"


# --- refusals -------------------------------------------------------------------------------------------------------------

BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "gemv": ({"version": "gemv"}, "unknown AWQ version 'gemv'; known: gemm"),
    "gemv_fast": ({"version": "gemv_fast"}, "unknown AWQ version 'gemv_fast'"),
    "no text": ({"version": 4}, "unknown AWQ version '4'"),
    "llm-awq": ({"backend": "llm-awq"}, "backend is llm-awq, which packs in another way"),
    "8 bits": ({"bits": 8}, "bits is 8; AWQ layers of 4 bits are supported"),
    "group of text": ({"group_size": "x"}, "group_size is x, needs a number of columns, or -1"),
    "group of 0": ({"group_size": 0}, "group_size is 0"),
    "group not ours": ({"group_size": 24}, "int4_g24: group of 24; need a multiple of 16"),
    "group too long": ({"group_size": 128}, "64 columns, not a multiple of 128"),
    "zero_point of text": ({"zero_point": "yes"}, "zero_point is yes, needs true or false"),
    "zeros without zero_point": ({"zero_point": False}, "qzeros are not all 8, but zero_point is false"),
    "other groups than the file": ({"group_size": 16}, r"scales is F16 \[2, 64\], int4_g16 of 64 x 64 needs F16 \[4, 64\]"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_refused(case: str, tmp_path: Path) -> None:
    change, says = BAD_CONFIGS[case]
    path = foreign(tmp_path / "m", {Q: parts_of()[0]}, CONFIG | change)
    with pytest.raises(ContainerError, match=says):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("part", "array", "says"),
    [
        ("qzeros", None, r"qzeros is missing, int4_g32 of 64 x 64 needs I32 \[2, 8\]"),
        ("qzeros", np.zeros((2, 7), np.int32), r"qzeros is I32 \[2, 7\]"),
        ("scales", None, "scales is missing"),
        ("scales", np.zeros((64, 2), np.float16), r"scales is F16 \[64, 2\]"),
        ("qweight", np.zeros((64, 8), np.float32), r"qweight is F32 \[64, 8\], needs int32 with two axes"),
        ("weight", np.zeros((64, 64), np.float32), "q_proj has both qweight and weight"),
    ],
)
def test_parts_refused(part: str, array: Array | None, says: str, tmp_path: Path) -> None:
    parts = {key: value for key, value in {**parts_of()[0], part: array}.items() if value is not None}
    with pytest.raises(ContainerError, match=says):
        open_checkpoint(foreign(tmp_path / "m", {Q: parts}, CONFIG))


def test_scales_that_are_no_float16(tmp_path: Path) -> None:
    codes, zeros, scales = numbers(4)
    wide = np.array(scales, np.float32) + np.float32(1e-6)
    path = foreign(tmp_path / "m", {Q: awq_parts(codes, zeros, scales) | {"scales": np.ascontiguousarray(wide.T)}}, CONFIG)
    with open_checkpoint(path) as found:
        assert found.tensors[WEIGHT].format == "int4_g32f"
        np.testing.assert_array_equal(decoded(found), weights(codes, zeros, wide.tolist(), PLAIN))


BAD_PLANS: dict[str, tuple[list[TensorInfo], str]] = {
    "3 bits": ([TensorInfo(WEIGHT, "int3_g32", (64, 64), 1)], "awq cannot hold int3_g32"),
    "minimum": ([TensorInfo(WEIGHT, "int4_g32m", (64, 64), 1)], "awq cannot hold int4_g32m"),
    "group of 256": ([TensorInfo(WEIGHT, "int4_g256", (64, 256), 1)], "awq cannot hold int4_g256"),
    "embedding": ([TensorInfo("model.embed_tokens.weight", "int4_g32", (64, 64), 1)], "is the embedding; awq quantizes linear layers only"),
    "head": ([TensorInfo("lm_head.weight", "int4_g32", (64, 64), 1)], "is the head, which loaders of awq expect in float"),
    "three axes": ([TensorInfo(WEIGHT, "int4_g32", (2, 64, 64), 1)], "has 3 axes; awq holds quantized matrices only"),
    "rows": ([TensorInfo(WEIGHT, "int4_g32", (60, 64), 1)], "60 x 64; loaders of awq need rows that are a multiple of 8"),
    "two group sizes": (
        [TensorInfo(WEIGHT, "int4_g32", (64, 64), 1), TensorInfo(f"{K}.weight", "int4_g64s", (64, 64), 1)],
        r"q_proj\.weight is int4_g32 and .*k_proj\.weight int4_g64s, but awq has one group size",
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_plans_refused(case: str, tmp_path: Path) -> None:
    plan, says = BAD_PLANS[case]
    with pytest.raises(ContainerError, match=says):
        CONTAINERS["awq"].create(tmp_path / "m", ModelDescription({"model_type": "llama", "tie_word_embeddings": False}), plan)
    assert not list(tmp_path.iterdir())


def test_no_order_of_columns_is_held() -> None:
    assert not CONTAINERS["awq"].holds("int4_g32o") and not CONTAINERS["awq"].holds("int4_g32so")


values = st.one_of(st.none(), st.booleans(), st.integers(-2, 2**65), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(st.sampled_from([*CONFIG, "w_bit", "q_group_size", "format", "backend"]), values, max_size=4))
def test_configs_of_random_values(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "m"
    if not path.exists():
        foreign(path, {Q: parts_of()[0]}, CONFIG)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG | change | {"quant_method": "awq"}}))
    try:
        open_checkpoint(path).read(WEIGHT)
    except TersorError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    finally:
        (path / "config.json").write_text(json.dumps(config))
