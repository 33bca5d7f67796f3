"""bitsandbytes directories: the package decodes what we meant, transformers runs it, we read what bitsandbytes stores, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from directories import Edit, check_reader, config_edit, linears, quantized, tensor_edit, values
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.engine import load
from tersor.engine.continuation import Request
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.pipeline import quantize
from tersor.tensor import QuantizedTensor, TensorInfo
from tersor.verification.readers import READERS
from tiny import tiny_model

FOUR_BITS = ["nf4", "fp4", "nf4_dq", "fp4_dq"]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """384 and 128 columns: 4-bit blocks end with the row; 320 rows of the head: nested blocks do not."""
    return tiny_model(tmp_path_factory.mktemp("m") / "m", hidden=128, intermediate=384, layers=2, tie=False)


@pytest.mark.parametrize("format", [*FOUR_BITS, "int8_row"])
def test_the_package_decodes_our_weights(format: str, model: Path, tmp_path: Path) -> None:
    check_reader("bnb", tmp_path / "m", quantized("bnb", tmp_path / "m", model, linears(format)))


@pytest.mark.parametrize("format", ["nf4", "int8_row"])
def test_biases_stay_as_they_are(format: str, tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "hf", "qwen2", layers=1)
    tensors = quantized("bnb", tmp_path / "m", source, linears(format))
    check_reader("bnb", tmp_path / "m", tensors)
    checkpoint = open_checkpoint(tmp_path / "m")
    for name in (n for n in tensors if n.endswith("bias")):
        np.testing.assert_array_equal(values(checkpoint.read(name)), values(tensors[name]))


def transformers_model(path: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def logits(theirs: Any, path: Path, activations: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits of some tokens by transformers and by our engine."""
    tokens = np.random.default_rng(0).integers(3, 300, 40, dtype=np.int32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    ours = load(path, activations=activations, kv="f32")
    return want, ours.head(ours.forward(tokens, ours.new_cache(64)))


@pytest.mark.parametrize("format", FOUR_BITS)
def test_transformers_runs_it(format: str, model: Path, tmp_path: Path) -> None:
    """Also with a quantized head, and one projection kept in float."""
    import bitsandbytes as bnb

    kept = "model.layers.1.mlp.up_proj.weight"
    choose = lambda n: format if n != kept and ("_proj" in n or n == "lm_head.weight") else None  # noqa: E731
    tensors = quantized("bnb", tmp_path / "m", model, choose)
    theirs = transformers_model(tmp_path / "m")
    layers = {f"{n}.weight": layer for n, layer in theirs.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    assert set(layers) == {n for n, t in tensors.items() if t.format == format} and len(layers) == 14
    for name, layer in layers.items():
        found = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        np.testing.assert_array_equal(found.numpy(), values(tensors[name]))
        layer.support_avx512bf16_for_cpu = False  # kernels that compute in bfloat16, where the CPU can
    want, got = logits(theirs, tmp_path / "m", "float")
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_transformers_runs_int8(model: Path, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    tensors = quantized("bnb", tmp_path / "m", model, linears("int8_row"))
    theirs = transformers_model(tmp_path / "m")
    layers = {f"{n}.weight": layer for n, layer in theirs.named_modules() if isinstance(layer, bnb.nn.Linear8bitLt)}
    assert len(layers) == 14
    for name, layer in layers.items():
        np.testing.assert_array_equal(layer.weight.data.numpy(), tensors[name].fields["codes"])
        np.testing.assert_array_equal(layer.weight.SCB.numpy(), tensors[name].fields["scb"][:, 0])
    want, got = logits(theirs, tmp_path / "m", "llm_int8")
    assert np.abs(got - want).mean() < 0.05 * np.abs(want).mean()  # theirs rounds inputs to 8 bits


@pytest.mark.parametrize("kind", ["nf4", "fp4_dq", "int8_row", "nf4 in bfloat16"])
def test_reads_what_transformers_saves(kind: str, model: Path, tmp_path: Path) -> None:
    """A float model that transformers quantizes with bitsandbytes and saves."""
    import bitsandbytes as bnb
    import transformers

    format = kind.partition(" ")[0]
    how = {"load_in_8bit": True} if format == "int8_row" else {"load_in_4bit": True, "bnb_4bit_quant_type": format[:3]}
    how |= {"bnb_4bit_use_double_quant": format.endswith("_dq"), "bnb_4bit_quant_storage": kind.partition("in ")[2] or "uint8"}
    config = transformers.BitsAndBytesConfig(**how)
    saved = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=config)
    saved.save_pretrained(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.container == "bnb" and checkpoint.note == ""
    assert {i.format for n, i in checkpoint.tensors.items() if "_proj" in n} == {format}
    expected = dict(READERS["bnb"].weights(tmp_path / "m"))
    assert set(expected) == set(checkpoint.tensors)
    for name in expected:
        np.testing.assert_array_equal(values(checkpoint.read(name)), expected[name])
    for name, layer in saved.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            found = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            np.testing.assert_array_equal(values(checkpoint.read(f"{name}.weight")), found.numpy())


def stored(state: Any, packed: torch.Tensor) -> Edit:
    """Returns a change of q_proj to these codes and statistics."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(Q)]:
            del tensors[name]
        tensors |= {Q: packed, **{f"{Q}.{n}": t.contiguous() for n, t in state.as_dict(packed=True).items()}}

    return tensor_edit(change)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 128, 256, 4096])
@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_reads_longer_blocks(table: str, block: int, nested: bool, tmp_path: Path) -> None:
    """Blocks that span rows, and the last one short, become blocks of 64 with the same absmax."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    weight = torch.randn(55, 192)
    packed, state = quantize_4bit(weight, blocksize=block, quant_type=table, compress_statistics=nested)
    quantized("bnb", tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), linears("nf4"))
    stored(state, packed)(tmp_path / "m")
    checkpoint = open_checkpoint(tmp_path / "m")
    info, tensor = checkpoint.tensors[Q], checkpoint.read(Q)
    assert info.format == tensor.format == (f"{table}_dq" if nested and block == 64 else table)
    assert info.nbytes == tensor.nbytes and info.shape == tensor.shape == (55, 192)
    state.shape = torch.Size([1, 55 * 192])  # as one row: their AVX-512 kernel takes a row's first block for a whole one
    np.testing.assert_array_equal(values(tensor), dequantize_4bit(packed, state).reshape(55, 192).numpy())
    if tensor.format == table:
        np.testing.assert_array_equal(values(checkpoint.read(Q, slice(3, 9))), values(tensor)[3:9])


def test_a_foreign_map_of_absmax_is_decoded(tmp_path: Path) -> None:
    """torch.linspace may round otherwise on another CPU; the map that is stored counts."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(64, 128), quant_type="nf4", compress_statistics=True)
    state.state2.code = torch.nextafter(state.state2.code, torch.tensor(2.0))
    quantized("bnb", tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), linears("nf4"))
    stored(state, packed)(tmp_path / "m")
    tensor_edit(lambda t: t.update({n: t[n][:, None] for n in t if "quant_map" in n}))(tmp_path / "m")  # the shape does not matter
    tensor = open_checkpoint(tmp_path / "m").read(Q)
    assert tensor.format == "nf4"
    np.testing.assert_array_equal(values(tensor), dequantize_4bit(packed, state).numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_absmax_and_scb_in_half_precision(dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    name = f"{Q}.absmax"
    tensors = quantized("bnb", tmp_path / "4", model, linears("nf4"))
    tensor_edit(lambda t: t.update({name: t[name].to(dtype)}))(tmp_path / "4")
    rounded = torch.from_numpy(tensors[Q].fields["absmax"]).to(dtype).float().numpy()
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "4").read(Q).fields["absmax"], rounded)
    name = Q.replace("weight", "SCB")
    tensors = quantized("bnb", tmp_path / "8", model, linears("int8_row"))
    tensor_edit(lambda t: t.update({name: t[name].to(dtype)}))(tmp_path / "8")
    rounded = torch.from_numpy(tensors[Q].fields["scb"]).to(dtype).float().numpy()
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "8").read(Q).fields["scb"], rounded)


def test_config(model: Path, tmp_path: Path) -> None:
    """What transformers itself makes of it, and what is said of float layers."""
    import transformers

    quantized("bnb", tmp_path / "m", model, lambda n: "nf4_dq" if n == Q else None)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    found = transformers.BitsAndBytesConfig(**{k: v for k, v in config.items() if k != "quant_method"})
    assert found.quantization_method() == "nf4" and found.bnb_4bit_use_double_quant and found.bnb_4bit_compute_dtype == torch.float32
    assert len(config["llm_int8_skip_modules"]) == 14 and "lm_head" in config["llm_int8_skip_modules"]
    tied = tiny_model(tmp_path / "tied", layers=1, dtype="bf16")
    quantized("bnb", tmp_path / "t", tied, linears("int8_row"))
    config = json.loads((tmp_path / "t" / "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] and config["llm_int8_skip_modules"] == ["lm_head"] and config["bnb_4bit_compute_dtype"] == "bfloat16"


def test_every_float_lies_at_a_multiple_of_its_size(model: Path, tmp_path: Path) -> None:
    from tersor.containers.safetensors_file import DTYPES, SafetensorsFile

    quantized("bnb", tmp_path / "m", model, linears("nf4_dq"))
    entries = SafetensorsFile(tmp_path / "m" / "model.safetensors").entries.values()
    assert all(entry.begin % DTYPES[entry.dtype].itemsize == 0 for entry in entries)


def test_float_weights_to_be_quantized_at_load(model: Path, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m", layers=1)
    config_edit(lambda c: c.update(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}))(path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.container == "bnb" and checkpoint.read(Q).format == "f32"
    assert "asks bitsandbytes to quantize them when it loads them" in checkpoint.note


@pytest.mark.parametrize("format", ["nf4", "fp4", "nf4_dq", "int8_row"])
def test_end_to_end(format: str, model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "m", f"rtn:{format}", to="bnb")
    engine = load(tmp_path / "m")
    assert engine.session().generate("The quick", Request(max_tokens=4)).tokens


def test_without_a_recipe(model: Path, tmp_path: Path) -> None:
    result = quantize(model, tmp_path / "m", to="bnb")
    assert {r.format for r in result.tensors if "_proj" in r.name} == {"nf4_dq"}


# --- refusals ---------------------------------------------------------------------------------------------------------------


def state_edit(name: str = f"{Q}.quant_state.bitsandbytes__nf4", **changes: Any) -> Edit:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(tensors[name].tolist())) | changes
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return tensor_edit(change)


def part_edit(part: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Edit:
    """Returns a change of one stored tensor of q_proj, removed by None."""
    return tensor_edit(lambda t: t.pop(part) if change is None else t.update({part: change(t[part])}))


STATE, SCB, ORDER = f"{Q}.quant_state.bitsandbytes__nf4", Q.replace("weight", "SCB"), Q.replace("weight", "weight_format")
REFUSED: dict[str, tuple[str, Edit, str]] = {
    "unknown table": ("nf4", tensor_edit(lambda t: t.update({STATE.replace("nf4", "af4"): t.pop(STATE)})), "unknown quant_type 'af4'"),
    "two tables": ("nf4", state_edit(quant_type="fp4"), "quant_type is fp4 in a state named nf4"),
    "no shape": ("nf4", state_edit(shape=None), "quant_state says shape None, needs [rows, columns]"),
    "negative shape": ("nf4", state_edit(shape=[-128, -128]), "quant_state says shape [-128, -128]"),
    "true as shape": ("nf4", state_edit(shape=[True, 128]), "quant_state says shape [True, 128]"),
    "another shape": ("nf4", state_edit(shape=[128, 256]), "the codes are 8192 bytes, 32768 values of 4 bits need 16384 bytes"),
    "blocks across rows": ("nf4", state_edit(shape=[512, 32]), "has 32 columns, not a multiple of 64: blocks across rows"),
    "blocks of 32": ("nf4", state_edit(blocksize=32), "blocksize 32 is not supported, only multiples of 64 up to 4096"),
    "blocks as text": ("nf4", state_edit(blocksize="64"), "blocksize 64 is not supported"),
    "another block": ("nf4", state_edit(blocksize=128), "absmax is ('F32', (256,)), needs F32 (128,)"),
    "another map": ("nf4", part_edit(f"{Q}.quant_map", lambda t: t * 2), "quant_map is not the table of nf4"),
    "no map": ("nf4", part_edit(f"{Q}.quant_map", None), "quant_map is missing"),
    "no absmax": ("nf4", part_edit(f"{Q}.absmax", None), "absmax is missing, needs F32 (256,)"),
    "no codes": ("nf4", part_edit(Q, None), "the codes are missing"),
    "state of floats": ("nf4", part_edit(STATE, lambda t: t.float()), "quant_state is F32"),
    "long state": ("nf4", part_edit(STATE, lambda t: t.repeat(99)), "needs at most 4096 bytes of JSON"),
    "state no JSON": ("nf4", part_edit(STATE, lambda t: t[1:].contiguous()), "quant_state is not valid JSON"),
    "state a list": ("nf4", part_edit(STATE, lambda t: torch.tensor([91, 93], dtype=torch.uint8)), "quant_state holds a JSON list"),
    "nested block": ("nf4_dq", state_edit(nested_blocksize=0), "nested_blocksize 0 is not in 1..4096"),
    "another nested block": ("nf4_dq", state_edit(nested_blocksize=128), "nested_absmax is ('F32', (1,)), needs F32 (2,)"),
    "no offset": ("nf4_dq", state_edit(nested_offset=None), "nested_offset is None, needs a finite number"),
    "infinite offset": ("nf4_dq", state_edit(nested_offset=float("inf")), "nested_offset is inf, needs a finite number"),
    "nested absmax of floats": ("nf4_dq", part_edit(f"{Q}.absmax", lambda t: t.float()), "absmax is ('F32', (256,)), needs U8 (256,)"),
    "no nested map": ("nf4_dq", part_edit(f"{Q}.nested_quant_map", None), "nested_quant_map is missing"),
    "no scb": ("int8_row", part_edit(SCB, None), "SCB is missing, int8 of 128 rows needs F32 (128,)"),
    "short scb": ("int8_row", part_edit(SCB, lambda t: t[1:].contiguous()), "SCB is ('F32', (127,))"),
    "three axes": ("int8_row", part_edit(Q, lambda t: t[None]), "has shape [1, 128, 128], needs (rows, columns)"),
    "column order": ("int8_row", part_edit(ORDER, lambda t: t + 2), "weight_format is not 0"),
    "config of 8 bits": (
        "nf4",
        config_edit(lambda c: c["quantization_config"].update(load_in_4bit=False, load_in_8bit=True)),
        "says load_in_8bit, but model.layers.0.self_attn.q_proj.weight is nf4",
    ),
    "config of 4 bits": (
        "int8_row",
        config_edit(lambda c: c["quantization_config"].update(load_in_4bit=True, load_in_8bit=False)),
        "says load_in_4bit, but model.layers.0.self_attn.q_proj.weight is int8_row",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    format, change, text = REFUSED[case]
    quantized("bnb", tmp_path / "m", model, lambda n: format if n == Q else None)
    change(tmp_path / "m")
    with pytest.raises(ContainerError) as caught:
        open_checkpoint(tmp_path / "m")
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_refused_when_read(model: Path, tmp_path: Path) -> None:
    quantized("bnb", tmp_path / "8", model, lambda n: "int8_row" if n == Q else None)
    part_edit(Q, lambda t: torch.where(t == t.min(), -128, t).to(torch.int8))(tmp_path / "8")
    with pytest.raises(ContainerError, match=r"q_proj\.weight holds the code -128"):
        open_checkpoint(tmp_path / "8").read(Q)
    quantized("bnb", tmp_path / "4", model, lambda n: "nf4_dq" if n == Q else None)
    with pytest.raises(ContainerError, match=r"q_proj\.weight is nf4_dq, whose rows share their statistics; read it whole"):
        open_checkpoint(tmp_path / "4").read(Q, slice(0, 1))


def planned(name: str, format: str, shape: tuple[int, ...] = (128, 128)) -> TensorInfo:
    return TensorInfo(name, format, shape, get_format(format).nbytes(shape))


def test_what_no_loader_takes_is_not_written(model: Path, tmp_path: Path) -> None:
    description = open_checkpoint(model).description
    for info in (
        planned("model.embed_tokens.weight", "nf4"),
        planned("model.layers.0.mlp.experts.weight", "nf4", (2, 64, 64)),
        planned("model.layers.0.mlp.experts", "int8_row"),
    ):
        with pytest.raises(ContainerError, match=f"{info.name} is no linear layer, which is all that bitsandbytes quantizes"):
            CONTAINERS["bnb"].create(tmp_path / "m", description, [info])
    for other in ("fp4", "nf4_dq", "int8_row"):
        with pytest.raises(ContainerError, match=f"a.weight is nf4 and b.weight is {other}; a bitsandbytes directory holds one kind"):
            CONTAINERS["bnb"].create(tmp_path / "m", description, [planned("a.weight", "nf4"), planned("b.weight", other)])
    assert list(tmp_path.iterdir()) == []


def test_offsets_of_any_size_fit(model: Path, tmp_path: Path) -> None:
    """nested_offset is written after its length was announced."""
    weight = open_checkpoint(model).read(Q).fields["values"]
    for number, factor in enumerate((1e-30, 1.2345678e-20, 0.0, 7e20)):
        tensor = get_format("nf4_dq").quantize(weight * np.float32(factor))
        path = tmp_path / str(number)
        with CONTAINERS["bnb"].create(path, open_checkpoint(model).description, [planned(Q, "nf4_dq")]) as writer:
            writer.write(Q, QuantizedTensor("nf4_dq", (128, 128), tensor.fields))
        check_reader("bnb", path, {Q: tensor})
