"""ONNX directories: onnxruntime computes what the engine computes, its operators decode what was meant, and hostile graphs are refused.

Oracles: onnx.checker, onnxruntime (whole graphs, single operators), graphs made by hand in the layout of onnxruntime-genai's builder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_fuzz_containers import mutations, survives
from typer.testing import CliRunner

import tersor.engine as engine
from tersor.cli.app import app
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.containers.onnx import Onnx
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.tensor import ModelDescription, QuantizedTensor, TensorInfo
from tersor.verification.readers import READERS
from tersor.verification.runtimes.onnx import Decoding, logits
from tiny import ARCHITECTURES, tiny_model

TOKENS = np.random.default_rng(3).integers(0, 320, 24)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{architecture: (architecture, {}) for architecture in ARCHITECTURES},
    "windows": ("mistral", {"sliding_window": 3}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "yarn": ("llama", {"rope_scaling": YARN, "max_position_embeddings": 512}),
    "wide heads": ("qwen3", {"head_dim": 32}),
    "tanh": ("gemma2", {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 4}),
}


def chosen(model: Checkpoint, format: str, where: Callable[[str], bool] = lambda name: True) -> dict[str, QuantizedTensor]:
    """Returns the model's tensors, its matrices for which `where` holds in this format."""
    tensors = {name: model.read(name) for name in model.tensors}
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2 and where(name):
            tensors[name] = get_format(format).quantize(get_format(tensor.format).dequantize(tensor))
    return tensors


def export(
    path: Path, model: Checkpoint, format: str, where: Callable[[str], bool] = lambda name: True, container: Onnx | None = None
) -> Path:
    """Writes the model with its matrices for which `where` holds in this format."""
    tensors = chosen(model, format, where)
    plan = [TensorInfo(name, t.format, t.shape, t.nbytes) for name, t in tensors.items()]
    with (container or Onnx()).create(path, model.description, plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path


def is_projection(name: str) -> bool:
    return "_proj" in name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny untied llama, one layer, 256 columns everywhere."""
    return open_checkpoint(tiny_model(tmp_path_factory.mktemp("m") / "m", hidden=256, intermediate=256, layers=1, tie=False))


@pytest.fixture(scope="module")
def written(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("o") / "o", model, "int4_g32", is_projection)


# --- what onnxruntime computes --------------------------------------------------------------------------------------------


def tolerance(reference: np.ndarray) -> float:
    """Returns how far float32 logits may lie apart: n u for a sum of n terms, u = 2^-24 (Higham, Accuracy and Stability, section 3.1),
    added over the products between embedding and logits. What is wrong in a graph moves logits by 0.01 or more."""
    layers, products, longest = 2, 6, 128  # q/k/v, scores, mix, o, gate/up, down; intermediate size
    return float(np.abs(reference).max()) * (layers * products + 1) * longest * 2.0**-24


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_logits_agree_with_the_engine(case: str, tie: bool, tmp_path: Path) -> None:
    architecture, config = CASES[case]
    tiny = open_checkpoint(tiny_model(tmp_path / "m", architecture, tie=tie, config=config, dtype="bf16"))
    path = export(tmp_path / "o", tiny, "int4_g32" if tie else "int8_g16s", is_projection if case == "windows" else lambda name: True)
    onnx.checker.check_model(path / "model.onnx")
    running = engine.load(path, activations="float", kv="f32")
    expected = running.head(running.forward(TOKENS.astype(np.int32), running.new_cache(32)))
    allowed = tolerance(expected)
    assert allowed < 1e-3
    assert np.abs(logits(path, TOKENS) - expected).max() < allowed
    steps = Decoding(path, threads=1)
    parts = [TOKENS[:9], TOKENS[9:14], *TOKENS[14:, None]]  # a prompt, some more, then one by one
    assert np.abs(np.concatenate([steps.step(part) for part in parts]) - expected).max() < allowed


@pytest.mark.parametrize("config", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases(config: dict[str, bool], tmp_path: Path) -> None:
    names = {"attention_bias": ["self_attn." + n for n in ("q_proj", "k_proj", "v_proj", "o_proj")]}.get(
        next(iter(config)), ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    )
    rows = {"k_proj": 32, "v_proj": 32, "gate_proj": 128, "up_proj": 128}
    rng = np.random.default_rng(0)
    change = {
        f"model.layers.{i}.{n}.bias": rng.standard_normal(rows.get(n.split(".")[1], 64)).astype(np.float32) for i in range(2) for n in names
    }
    path = export(tmp_path / "o", open_checkpoint(tiny_model(tmp_path / "m", config=config, change=change)), "f16")
    running = engine.load(path, activations="float", kv="f32")
    expected = running.head(running.forward(TOKENS.astype(np.int32), running.new_cache(32)))
    assert np.abs(logits(path, TOKENS) - expected).max() < tolerance(expected)


def test_accuracy_level_is_of_every_product(model: Checkpoint, tmp_path: Path) -> None:
    path = export(tmp_path / "o", model, "int4_g32", container=Onnx(accuracy_level=4))
    nodes = [node for node in onnx.load(path / "model.onnx", load_external_data=False).graph.node if node.op_type == "MatMulNBits"]
    levels = {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level"}
    assert (len(nodes), levels) == (8, {4})
    exact = engine.load(path, activations="float", kv="f32")
    expected = exact.head(exact.forward(TOKENS.astype(np.int32), exact.new_cache(32)))
    assert 1e-3 < np.abs(logits(path, TOKENS) - expected).max() < 0.5  # inputs are rounded to 8 bits
    with pytest.raises(ContainerError, match=r"accuracy_level is 3; need one of \(0, 1, 4\)"):
        Onnx(accuracy_level=3)


# --- what onnxruntime decodes ---------------------------------------------------------------------------------------------

HELD = [f"int{bits}_g{group}{kind}" for bits in (2, 4, 8) for group in (16, 32, 64, 128, 256) for kind in ("", "s")]


@pytest.mark.parametrize("format", ["f32", "f16", "bf16", *HELD])
def test_operators_decode_what_was_meant(format: str, model: Checkpoint, tmp_path: Path) -> None:
    assert CONTAINERS["onnx"].holds(format)
    path = export(tmp_path / "o", model, format)  # the embedding and the head too
    meant, found = chosen(model, format), dict(READERS["onnx"].weights(path))
    assert set(found) == set(meant)
    for name, values in found.items():
        tensor = meant[name]
        np.testing.assert_array_equal(values, get_format(tensor.format).dequantize(tensor), err_msg=name)


def test_operators_decode_a_tied_head_once(tmp_path: Path) -> None:
    tiny = open_checkpoint(tiny_model(tmp_path / "m", hidden=96, heads=3, kv_heads=3, intermediate=160))  # 3 and 5 blocks: odd zeros
    path = export(tmp_path / "o", tiny, "int4_g32")
    names = [name for name, _ in READERS["onnx"].weights(path)]
    assert sorted(names) == sorted(tiny.tensors) and "lm_head.weight" not in names
    for name, values in READERS["onnx"].weights(path):
        tensor = chosen(tiny, "int4_g32")[name]
        np.testing.assert_array_equal(values, get_format(tensor.format).dequantize(tensor), err_msg=name)
    stored = {t.name: t for t in onnx.load(path / "model.onnx", load_external_data=False).graph.initializer}
    once, twice = ({e.key: e.value for e in stored[f"model.embed_tokens.{n}"].external_data} for n in ("qweight", "qrows"))
    assert once == twice


@pytest.mark.parametrize(
    "format", ["int1_g32", "int3_g32", "int5_g64", "int6_g64", "int4_g96", "int4_c", "int4_t", "int4_g64m", "nf4", "q4_k", "int8_row"]
)
def test_what_onnxruntime_cannot_multiply_is_not_held(format: str) -> None:
    get_format(format)  # exists
    assert not CONTAINERS["onnx"].holds(format)


# --- files ----------------------------------------------------------------------------------------------------------------


def test_weights_lie_outside_and_aligned(written: Path) -> None:
    graph = onnx.load(written / "model.onnx", load_external_data=False).graph
    size = (written / "model.onnx.data").stat().st_size
    spans = []
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            assert len(tensor.raw_data) <= 64, tensor.name
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        offset, length = int(place["offset"]), int(place["length"])
        assert place["location"] == "model.onnx.data" and offset % (4096 if length >= 65536 else 64) == 0
        spans.append((offset, offset + length))
    spans.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans)) and spans[-1][1] == size


def test_genai_config_names_what_the_graph_has(written: Path) -> None:
    config = json.loads((written / "genai_config.json").read_text())
    graph = onnx.load(written / "model.onnx", load_external_data=False).graph
    decoder = config["model"]["decoder"]

    def names(given: dict[str, str]) -> set[str]:
        return {name % i if "%d" in name else name for name in given.values() for i in range(decoder["num_hidden_layers"])}

    assert names(decoder["inputs"]) == {value.name for value in graph.input}
    assert names(decoder["outputs"]) == {value.name for value in graph.output}
    assert (config["model"]["type"], decoder["head_size"], decoder["num_key_value_heads"]) == ("llama", 64, 2)
    assert (config["model"]["bos_token_id"], config["model"]["eos_token_id"], config["model"]["pad_token_id"]) == (1, 2, 2)
    assert config["search"] == {"max_length": 2048, "past_present_share_buffer": True}


def test_special_tokens_of_genai(model: Checkpoint, tmp_path: Path) -> None:
    def config(generation: bytes, **change: Any) -> Any:
        files = {**model.description.files, "generation_config.json": generation}
        described = ModelDescription({**model.description.config, **change}, files)
        plan = list(model.tensors.values())
        writer = CONTAINERS["onnx"].create(tmp_path / "o", described, plan)
        found = json.loads(next(tmp_path.glob(".o.*/genai_config.json")).read_text())
        writer.abort()
        return found

    many = config(b'{"eos_token_id": [2, 7], "pad_token_id": null, "temperature": 0.6, "top_k": 20}')
    assert (many["model"]["eos_token_id"], many["model"]["pad_token_id"]) == ([2, 7], 2)
    assert (many["search"]["temperature"], many["search"]["top_k"]) == (0.6, 20)
    for damaged in (b"{", b"[]", b"\xff"):
        assert config(damaged)["model"]["eos_token_id"] == 2
    assert "eos_token_id" not in config(b"{}", eos_token_id=None)["model"]


def test_command_line_to_generation(tmp_path: Path) -> None:
    source, out = tiny_model(tmp_path / "m"), tmp_path / "o"
    result = CliRunner().invoke(app, ["quantize", str(source), "-o", str(out), "--recipe", "rtn:int4_g32, embed=int8_g32s", "--to", "onnx"])
    assert result.exit_code == 0, result.output
    onnx.checker.check_model(out / "model.onnx")
    formats = {info.format for info in open_checkpoint(out).tensors.values()}
    assert {"int4_g32", "int8_g32s"} <= formats
    running = engine.load(out, activations="float", kv="f32")
    produced = running.generate("The quick", max_tokens=8, temperature=0.0)
    tokens = running.prompt_tokens("The quick")
    steps, following = Decoding(out), []
    scores = steps.step(tokens)
    for _ in range(8):
        following.append(int(scores[-1].argmax()))
        scores = steps.step(following[-1:])
    assert list(produced.tokens)[: len(following)] == following[: len(produced.tokens)] and len(produced.tokens) > 0


# --- refusals of the writer -----------------------------------------------------------------------------------------------


def refused(model: Checkpoint, path: Path, match: str, plan: Sequence[TensorInfo] | None = None, **config: Any) -> None:
    described = ModelDescription({**model.description.config, **config}, model.description.files)
    with pytest.raises(ContainerError, match=match):
        CONTAINERS["onnx"].create(path / "o", described, list(model.tensors.values()) if plan is None else plan)
    assert list(path.iterdir()) == []


def test_decoders_that_cannot_be_written(model: Checkpoint, tmp_path: Path) -> None:
    plan = list(model.tensors.values())
    refused(model, tmp_path, "whole decoders only: config.json: unknown architecture 'mamba'", model_type="mamba")
    refused(
        model,
        tmp_path,
        r"the tensors do not fit config.json: missing model.norm.weight$",
        [i for i in plan if i.name != "model.norm.weight"],
    )
    vectors = [TensorInfo(i.name, "int4_g32", i.shape, 1) if i.name == "model.norm.weight" else i for i in plan]
    refused(model, tmp_path, r"model.norm.weight has 1 axes; onnx holds quantized matrices only", vectors)
    refused(model, tmp_path, r"the cosines of 16777216 positions need \d+ bytes", max_position_embeddings=1 << 24)


def test_heads_that_are_not_rotated(tmp_path: Path) -> None:
    tiny = open_checkpoint(tiny_model(tmp_path / "m" / "m", heads=8, kv_heads=8, hidden=192))
    (tmp_path / "out").mkdir()
    refused(tiny, tmp_path / "out", "head_dim is 24; onnxruntime's GroupQueryAttention rotates multiples of 16 only")


def test_without_the_onnx_package(model: Checkpoint, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused(model, tmp_path, r"writing it needs the onnx package .*; install it with: pip install 'tersor\[onnx\]'")
    with pytest.raises(ContainerError, match=r"reading it needs the onnx package .*; install it with: pip install 'tersor\[onnx\]'"):
        open_checkpoint(written)


# --- graphs of others -----------------------------------------------------------------------------------------------------


def codes_of(values: np.ndarray, bits: int) -> np.ndarray:
    """Returns the bytes of rows of codes, by the definition: code i is bits [i B, i B + B) of its row, LSB first."""
    out = np.zeros((len(values), -(-values.shape[1] * bits // 8)), np.uint8)
    for (row, i), value in np.ndenumerate(values):
        out[row, i * bits // 8] |= value << (i * bits % 8)
    return out


class Foreign:
    """A graph in the layout of onnxruntime-genai's builder, written by hand. Only what a reader looks at: no graph that runs."""

    def __init__(self, path: Path, **config: Any) -> None:
        self.path = path
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        tiny_model(path, layers=1, hidden=64, intermediate=128, heads=4, kv_heads=2, config=config)
        (path / "model.safetensors").unlink()

    def floats(self, name: str, values: np.ndarray) -> None:
        self.tensors.append(numpy_helper.from_array(values, name))

    def blocks(
        self, node: str, tensor: str, rows: int, columns: int, *, zeros: bool, scale: type = np.float16, seed: int = 0
    ) -> np.ndarray:
        """Adds a MatMulNBits of 4 bits in blocks of 32; returns its weights."""
        rng = np.random.default_rng(seed)
        codes, zero = rng.integers(0, 16, (rows, columns)), rng.integers(0, 16, (rows, columns // 32))
        scales = rng.standard_normal((rows, columns // 32)).astype(np.float32).astype(scale)
        self.floats(f"{tensor}_Q4", codes_of(codes, 4).reshape(rows, columns // 32, 16))
        self.floats(f"{tensor}_scales", scales)
        inputs = ["x", f"{tensor}_Q4", f"{tensor}_scales"]
        if zeros:
            self.floats(f"{tensor}_zp", codes_of(zero, 4))
            inputs.append(f"{tensor}_zp")
        self.nodes.append(
            helper.make_node("MatMulNBits", inputs, ["y"], name=node, domain="com.microsoft", K=columns, N=rows, bits=4, block_size=32)
        )
        shift = zero if zeros else np.full_like(zero, 8)
        return np.asarray((codes - shift.repeat(32, axis=1)).astype(np.float32) * scales.astype(np.float32).repeat(32, axis=1))

    def save(self, external: bool = False, producer: str = "onnxruntime-genai") -> Path:
        graph = helper.make_graph(self.nodes, "g", [], [], self.tensors)
        proto = helper.make_model(graph, producer_name=producer)
        onnx.save(proto, self.path / "model.onnx", save_as_external_data=external, location="weights", size_threshold=0)
        return self.path


@pytest.fixture
def foreign(tmp_path: Path) -> Foreign:
    return Foreign(tmp_path / "g")


LAYER = "/model/layers.0"


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
def test_graphs_of_genai_are_read(external: bool, zeros: bool, foreign: Foreign) -> None:
    rng = np.random.default_rng(5)
    joined = foreign.blocks(f"{LAYER}/attn/qkv_proj/MatMul_Q4", "model.layers.0.attn.qkv_proj.MatMul.weight", 128, 64, zeros=zeros)
    down = foreign.blocks(f"{LAYER}/mlp/down_proj/MatMulNBits", "model.layers.0.mlp.down_proj.MatMulNBits.q", 64, 128, zeros=zeros)
    up = foreign.blocks(
        f"{LAYER}/mlp/up_proj/MatMul_Q4", "model.layers.0.mlp.up_proj.MatMul.weight", 128, 64, zeros=zeros, scale=np.float32
    )
    head = foreign.blocks("/lm_head/MatMul_Q4", "lm_head.MatMul.weight", 320, 64, zeros=zeros, scale=np.float32)
    o = rng.standard_normal((64, 64)).astype(np.float16)
    vectors = {name: rng.standard_normal(n).astype(np.float32) for name, n in (("bias", 128), ("norm", 64), ("final", 64), ("k", 16))}
    table = rng.standard_normal((320, 64)).astype(np.float32)
    foreign.floats("model.layers.0.attn.o_proj.MatMul.weight", np.ascontiguousarray(o.T))
    foreign.floats("model.layers.0.attn.qkv_proj.Add.bias", vectors["bias"])
    foreign.floats("model.layers.0.input_layernorm.weight", vectors["norm"])
    foreign.floats("model.layers.0.attn.k_norm.layernorm.weight", vectors["k"])
    foreign.floats("model.layers.1.final_norm_layernorm.weight", vectors["final"])
    foreign.floats("model.embed_tokens.weight", table)
    foreign.floats("cos_cache", table)
    checkpoint = open_checkpoint(foreign.save(external))
    layer = "model.layers.0"
    expected = {
        f"{layer}.self_attn.q_proj.weight": joined[:64],
        f"{layer}.self_attn.k_proj.weight": joined[64:96],
        f"{layer}.self_attn.v_proj.weight": joined[96:],
        f"{layer}.self_attn.q_proj.bias": vectors["bias"][:64],
        f"{layer}.self_attn.k_proj.bias": vectors["bias"][64:96],
        f"{layer}.self_attn.v_proj.bias": vectors["bias"][96:],
        f"{layer}.self_attn.o_proj.weight": o.astype(np.float32),
        f"{layer}.self_attn.k_norm.weight": vectors["k"],
        f"{layer}.input_layernorm.weight": vectors["norm"],
        f"{layer}.mlp.up_proj.weight": up,
        f"{layer}.mlp.down_proj.weight": down,
        "model.norm.weight": vectors["final"],
        "model.embed_tokens.weight": table,
        "lm_head.weight": head,
    }
    assert set(checkpoint.tensors) == set(expected) and checkpoint.description.config["tie_word_embeddings"] is False
    kept = "int4_g32" if zeros else "int4_g32s"
    formats = {name: info.format for name, info in checkpoint.tensors.items()}
    assert {n for n, f in formats.items() if f == kept} == {f"{layer}.self_attn.{p}_proj.weight" for p in "qkv"} | {
        f"{layer}.mlp.down_proj.weight"
    }
    assert formats[f"{layer}.self_attn.o_proj.weight"] == "f16" and formats["lm_head.weight"] == f"{kept}f"  # float32 scales
    for name, values in expected.items():
        tensor = checkpoint.read(name)
        assert (tensor.format, tensor.shape, tensor.nbytes) == (formats[name], values.shape, checkpoint.tensors[name].nbytes)
        np.testing.assert_array_equal(get_format(tensor.format).dequantize(tensor), values, err_msg=name)
        rows = checkpoint.read(name, slice(3, 9))
        if len(values.shape) == 2:
            np.testing.assert_array_equal(get_format(rows.format).dequantize(rows), values[3:9], err_msg=name)


def test_a_head_that_rows_are_looked_up_in_is_tied(foreign: Foreign) -> None:
    head = foreign.blocks("/lm_head/MatMul_Q4", "lm_head.MatMul.weight", 320, 64, zeros=False)
    foreign.nodes[:0] = [
        helper.make_node("Reshape", ["lm_head.MatMul.weight_Q4", "shape"], ["flat"], name="/model/embed_tokens/Reshape"),
        helper.make_node(
            "GatherBlockQuantized",
            ["flat", "input_ids", "lm_head.MatMul.weight_scales"],
            ["x"],
            domain="com.microsoft",
            bits=4,
            block_size=32,
        ),
    ]
    checkpoint = open_checkpoint(foreign.save())
    assert list(checkpoint.tensors) == ["model.embed_tokens.weight"] and checkpoint.description.config["tie_word_embeddings"] is True
    np.testing.assert_array_equal(get_format("int4_g32s").dequantize(checkpoint.read("model.embed_tokens.weight")), head)


def test_a_float_head_may_be_the_embedding(foreign: Foreign) -> None:
    table = np.random.default_rng(0).standard_normal((320, 64)).astype(np.float32)
    foreign.floats("lm_head.MatMul.weight", np.ascontiguousarray(table.T))
    checkpoint = open_checkpoint(foreign.save())
    assert list(checkpoint.tensors) == ["model.embed_tokens.weight"]
    np.testing.assert_array_equal(checkpoint.read("model.embed_tokens.weight").fields["values"], table)


# --- refusals of the reader -----------------------------------------------------------------------------------------------


def change(foreign: Foreign, **attributes: int) -> None:
    """Replaces attributes of the only node."""
    node = foreign.nodes[0]
    kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in attributes.items())])


def replaced(foreign: Foreign, suffix: str, values: np.ndarray) -> None:
    """Replaces an initializer of the only node."""
    index = next(i for i, tensor in enumerate(foreign.tensors) if tensor.name.endswith(suffix))
    foreign.tensors[index] = numpy_helper.from_array(values, foreign.tensors[index].name)


def rejects(foreign: Foreign, match: str) -> None:
    with pytest.raises(ContainerError, match=match):
        open_checkpoint(foreign.save())


@pytest.fixture
def product(foreign: Foreign) -> Foreign:
    """One quantized product with zeros."""
    foreign.blocks(f"{LAYER}/mlp/up_proj/MatMul_Q4", "model.layers.0.mlp.up_proj.MatMul.weight", 128, 64, zeros=True)
    return foreign


@pytest.mark.parametrize(
    ("attributes", "match"),
    [
        ({"bits": 3}, r"up_proj \(MatMulNBits\) has 3 bits in blocks of 32; need 2, 4 or 8 bits in blocks of 16, 32, 64, 128 or 256"),
        ({"block_size": 48}, "has 4 bits in blocks of 48"),
        ({"block_size": -32}, "has 4 bits in blocks of -32"),
        ({"K": 80}, "is 128 x 80 in blocks of 32; need whole blocks"),
        ({"N": 0}, "is 0 x 64 in blocks of 32"),
        ({"N": 64}, "weight_Q4' is type 2 .*, needs 2048 values of type 2"),
        ({"bits": 8}, "needs 8192 values of type 2"),
    ],
)
def test_products_that_do_not_fit(attributes: dict[str, int], match: str, product: Foreign) -> None:
    change(product, **attributes)
    rejects(product, match)


def test_parts_that_do_not_fit(product: Foreign) -> None:
    replaced(product, "_zp", np.zeros((128, 2), np.uint8))
    rejects(product, "weight_zp' is type 2 .128, 2., needs 128 values of type 2")
    replaced(product, "_zp", np.zeros((128, 2), np.float32))  # float zero points
    rejects(product, "weight_zp' is type 1")
    replaced(product, "_zp", np.zeros((128, 1), np.uint8))
    replaced(product, "_scales", np.zeros((128, 1), np.float32))
    rejects(product, "weight_scales' is type 1 .128, 1., needs 256 values of type 1")
    replaced(product, "_Q4", np.zeros((128, 2, 16), np.float32))
    rejects(product, r"its codes 'model.layers.0.mlp.up_proj.MatMul.weight_Q4' are no uint8 initializer")
    product.nodes[0].input[1] = "elsewhere"
    rejects(product, "its codes 'elsewhere' are no uint8 initializer")


@pytest.mark.parametrize(("inputs", "match"), [(["order"], "has g_idx, which is not read yet"), (["", "b"], "has a fused bias")])
def test_inputs_that_are_not_read(inputs: list[str], match: str, product: Foreign) -> None:
    product.nodes[0].input.extend(inputs)
    rejects(product, match)


def test_all_scales_are_looked_at(product: Foreign) -> None:
    scales = np.ones((4096, 2), np.float32)
    scales[-1] = 0.1
    replaced(product, "_Q4", np.zeros((4096, 2, 16), np.uint8))
    replaced(product, "_scales", scales)
    replaced(product, "_zp", np.zeros((4096, 1), np.uint8))
    change(product, N=4096)
    checkpoint, name = open_checkpoint(product.save()), "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.read(name, slice(0, 4000)).format == checkpoint.tensors[name].format == "int4_g32f"
    np.testing.assert_array_equal(checkpoint.read(name).fields["scale"], scales)


def test_joined_rows_that_do_not_fit(foreign: Foreign) -> None:
    foreign.floats("model.layers.0.attn.qkv_proj.MatMul.weight", np.zeros((64, 96), np.float32))
    rejects(foreign, "qkv_proj.weight has 96 rows, config.json's heads need 128")


@pytest.mark.parametrize("shape", [(2, 0), (2, 2, 2), ()])
def test_floats_that_are_no_matrix(shape: tuple[int, ...], foreign: Foreign) -> None:
    foreign.floats("model.norm.weight", np.zeros(shape, np.float32))
    if 0 in shape:  # no bytes: lies outside
        foreign.tensors[0].data_location = TensorProto.EXTERNAL
        foreign.tensors[0].external_data.add(key="location", value="config.json")
    rejects(foreign, "'model.norm.weight' has shape .*, needs one or two axes of at least one value")


def test_foreign_norms_of_gemma(tmp_path: Path) -> None:
    foreign = Foreign(tmp_path / "g", model_type="gemma2")
    foreign.floats("model.norm.weight", np.ones(64, np.float32))
    rejects(foreign, "its norms hold weight . 1")


def test_graphs_of_nobody_we_know(foreign: Foreign) -> None:
    foreign.floats("onnx::MatMul_17", np.ones((64, 64), np.float32))
    rejects(foreign, r"no weight has a name that is known here \(made by 'onnxruntime-genai'\)")
    (foreign.path / "config.json").unlink()
    rejects(foreign, "has model.onnx but no config.json; copy that of the original model into it")


def test_initializers_that_lie(foreign: Foreign) -> None:
    foreign.floats("model.norm.weight", np.ones(64, np.float32))
    foreign.tensors.append(foreign.tensors[0])
    rejects(foreign, "'model.norm.weight' appears twice")
    del foreign.tensors[1]
    foreign.tensors[0].dims[0] = 65
    rejects(foreign, "holds 256 bytes, its shape needs 260")
    foreign.tensors[0].dims[0] = -64
    rejects(foreign, r"has shape \[-64\]")
    foreign.tensors[0].dims[:] = [2**62, 2]
    rejects(foreign, "has shape")


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ({}, "'' is no name of a file in this directory"),
        ({"location": "../weights"}, "'../weights' is no name of a file"),
        ({"location": "/etc/passwd"}, "'/etc/passwd' is no name of a file"),
        ({"location": ".."}, "'..' is no name of a file"),
        ({"location": "gone"}, "its file 'gone' is missing"),
        ({"location": "a\0b"}, "is missing"),
        ({"location": "weights", "offset": "-4"}, "offset and length are .*, need bytes"),
        ({"location": "weights", "length": "9" * 40}, "offset and length are .*, need bytes"),
        ({"location": "weights", "offset": "4"}, "256 bytes at 4 of weights, which has 256; its shape needs 256"),
        ({"location": "weights", "length": "128"}, "128 bytes at 0 of weights"),
    ],
)
def test_places_that_lie(place: dict[str, str], match: str, foreign: Foreign) -> None:
    (foreign.path / "weights").write_bytes(bytes(256))
    tensor = TensorProto(name="model.norm.weight", data_type=TensorProto.FLOAT, dims=[64], data_location=TensorProto.EXTERNAL)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    proto = helper.make_model(helper.make_graph([], "g", [], [], [tensor]))
    (foreign.path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ContainerError, match=match):
        open_checkpoint(foreign.path)


def test_no_onnx_at_all(foreign: Foreign, monkeypatch: pytest.MonkeyPatch) -> None:
    file = foreign.path / "model.onnx"
    file.write_bytes(b"not a protobuf")
    with pytest.raises(ContainerError, match=r"model.onnx: is no ONNX model"):
        open_checkpoint(foreign.path)
    monkeypatch.setattr("tersor.containers.onnx_file.MAX_GRAPH_BYTES", 10)
    with pytest.raises(ContainerError, match="14 bytes, above the limit of 10 for a graph"):
        open_checkpoint(foreign.path)
    monkeypatch.undo()
    whole = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path == file:
            raise OSError(5, "Input/output error")
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(ContainerError, match=r"model.onnx: cannot read: Input/output error"):
        open_checkpoint(foreign.path)


def test_a_name_that_is_no_text(foreign: Foreign) -> None:
    foreign.floats("model.norm.weight", np.ones(64, np.float32))
    file = foreign.save() / "model.onnx"
    file.write_bytes(file.read_bytes().replace(b"model.norm.weight", b"model.\xff\xfe\xfd\xfc.weight"))
    with pytest.raises(ContainerError, match="a name is no text: b'model"):
        open_checkpoint(foreign.path)


def test_a_graph_beside_safetensors_is_not_the_model(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m")
    (path / "model.onnx").write_bytes(b"whatever")
    assert open_checkpoint(path).container == "huggingface"


@pytest.mark.parametrize("name", ["model.onnx", "config.json", "model.onnx.data"])
def test_damaged_directories(name: str, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(tmp_path / "m", layers=1, hidden=32, intermediate=32, heads=2, kv_heads=1))
    path = export(tmp_path / "o", source, "int4_g16", is_projection)
    (path / "tokenizer.json").write_bytes(b"{}")
    whole, head, accepted = (path / name).read_bytes(), 1 << 14, 0
    for data in mutations(whole[:head], seed=2, count=400):
        (path / name).unlink()
        (path / name).write_bytes(data + whole[head:])
        accepted += survives(path)
    assert accepted < 400 or name == "model.onnx.data"
