"""HQQ directories: what hqq itself stored (golden), slow loops from its packing, the package where it is installed, and refusals."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from directories import Edit, check_reader, config_edit, linears, quantized, tensor_edit, values, write
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.engine import load
from tersor.engine.continuation import Request
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.pipeline import quantize
from tersor.tensor import QuantizedTensor, TensorInfo
from tersor.verification.readers import READERS
from tiny import tiny_model

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "hqq_layers.json").read_text())
FORMAT_OF = {
    "8 bits": "int8_g64z",
    "6 bits": "int6_g64z",
    "5 bits": "int5_g64z",
    "4 bits": "int4_g64z",
    "3 bits": "int3_g64z",
    "2 bits": "int2_g64z",
    "1 bits": "int1_g64z",
    "1.58 bits": "int2_g32z",
    "4 bits, groups of 32 as bfloat16": "int4_g32z",
    "3 bits, groups of 32 as float16": "int3_g32z",
    "2 bits, a group a row": "int2_g192z",
    "4 bits, only rounded": "int4_g64",
}
WRITTEN = [*(f"int{bits}_g64z" for bits in (1, 2, 3, 4, 8)), "int1_g32", "int2_g16s", "int3_c", "int3_g128s", "int4_g32", "int8_cz"]
M = "model.layers.0.self_attn.q_proj"
Q = f"{M}.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m") / "m", hidden=128, intermediate=384, layers=1, tie=False)


def golden_tensors(case: str) -> dict[str, torch.Tensor]:
    """Returns what hqq stored of the layer."""
    tensors = {}
    for name, entry in GOLDEN["layers"][case]["tensors"].items():
        raw = torch.frombuffer(bytearray(base64.b64decode(entry["data"])), dtype=torch.uint8)
        tensors[name] = raw.view(getattr(torch, entry["dtype"])).reshape(entry["shape"])
    return tensors


def golden_directory(case: str, model: Path, path: Path) -> Path:
    """Writes a directory whose q_proj is a golden layer."""
    quantized("hqq", path, model, lambda n: "int4_g64z" if n == Q else None)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(f"{M}.")]:
            del tensors[name]
        tensors |= {f"{M}.{part}": tensor for part, tensor in golden_tensors(case).items()}

    tensor_edit(change)(path)
    return path


@pytest.mark.parametrize("case", FORMAT_OF)
def test_reads_what_hqq_stores(case: str, model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(golden_directory(case, model, tmp_path / "m"))
    info, tensor = checkpoint.tensors[Q], checkpoint.read(Q)
    assert info.format == tensor.format == FORMAT_OF[case] and list(info.shape) == list(tensor.shape) == GOLDEN["shape"]
    assert info.nbytes == tensor.nbytes
    assert [float(v).hex() for v in values(tensor).reshape(-1)[:8]] == GOLDEN["layers"][case]["first"]
    assert hashlib.sha256(values(tensor).tobytes()).hexdigest() == GOLDEN["layers"][case]["sha256"]
    for rows in (slice(0, 1), slice(5, 14), slice(9, 99), slice(3, 3)):
        for field, array in checkpoint.read(Q, rows).fields.items():
            np.testing.assert_array_equal(array, tensor.fields[field][rows])


@pytest.mark.parametrize("case", [case for case, format in FORMAT_OF.items() if format[3] in "12348" and " as " not in case])
def test_writes_what_hqq_stores(case: str, model: Path, tmp_path: Path) -> None:
    """All of it but what tells how the numbers were found; 1.58 bits are written as 2."""
    from safetensors.torch import load_file

    tensor = open_checkpoint(golden_directory(case, model, tmp_path / "m")).read(Q)
    write("hqq", tmp_path / "w", model, {Q: tensor})
    found = {name.removeprefix(f"{M}."): t for name, t in load_file(tmp_path / "w" / "model.safetensors").items()}
    expected = golden_tensors(case)
    assert set(found) == set(expected)
    if case == "1.58 bits":
        expected["nbits"] = torch.tensor(2, dtype=torch.int32)
    for part in set(expected) - {"optimize", "round_zero"}:
        assert found[part].dtype == expected[part].dtype and found[part].shape == expected[part].shape, part
        assert torch.equal(found[part], expected[part]), part


def slow_values(stored: dict[str, torch.Tensor], bits: int) -> np.ndarray:
    """Returns the weights by loops over groups and values."""
    per, width = {8: (1, 8), 4: (2, 4), 3: (10, 3), 2: (4, 2), 1: (8, 1)}[bits]
    packed, rows = stored["W_q"].tolist(), len(stored["W_q"])
    out = []
    for group, (scale, zero) in enumerate(zip(stored["scale"].flatten().tolist(), stored["zero"].flatten().tolist())):
        shift = width * (per - 1 - group // rows)
        out.append([np.float32(np.float32((word >> shift) % 2**width - zero) * scale) for word in packed[group % rows]])
    return np.array(out, np.float32).reshape(stored["shape"].tolist())


@pytest.mark.parametrize("format", WRITTEN)
def test_slow_loops_decode_our_weights(format: str, model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = quantized("hqq", tmp_path / "m", model, lambda n: format if "q_proj" in n or "down_proj" in n else None)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    for module in (M, "model.layers.0.mlp.down_proj"):
        parts = {name.rpartition(".")[2]: t for name, t in stored.items() if name.startswith(f"{module}.")}
        np.testing.assert_array_equal(slow_values(parts, int(format[3])), values(tensors[f"{module}.weight"]))
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.container == "hqq"
    for name, tensor in tensors.items():
        found = checkpoint.read(name)
        np.testing.assert_array_equal(values(found), values(tensor))
        assert found.format == tensor.format or (tensor.columns == 128 and "_c" in format)  # a row of 128 is a group as well


@pytest.mark.parametrize("format", WRITTEN)
def test_the_package_decodes_our_weights(format: str, model: Path, tmp_path: Path) -> None:
    check_reader("hqq", tmp_path / "m", quantized("hqq", tmp_path / "m", model, linears(format)))


@pytest.mark.parametrize("case", FORMAT_OF)
def test_the_reader_reads_what_hqq_stores(case: str, model: Path, tmp_path: Path) -> None:
    found = dict(READERS["hqq"].weights(golden_directory(case, model, tmp_path / "m")))
    assert hashlib.sha256(found[Q].tobytes()).hexdigest() == GOLDEN["layers"][case]["sha256"]


def test_a_layer_of_hqq_loads_and_multiplies(model: Path, tmp_path: Path) -> None:
    """hqq's own HQQLinear takes our tensors, as transformers hands them over."""
    from hqq.core.quantize import HQQLinear
    from safetensors.torch import load_file

    tensors = quantized("hqq", tmp_path / "m", model, linears("int4_g64z"))
    stored = load_file(tmp_path / "m" / "model.safetensors")
    layer = HQQLinear(None, None, compute_dtype=torch.float32, device="cpu")
    own = {name.rpartition(".")[2]: t for name, t in stored.items() if name.startswith(f"{M}.")}
    assert set(own) == layer.state_dict_keys() - {"bias"}
    layer.load_state_dict(own)
    np.testing.assert_array_equal(layer.dequantize().numpy(), values(tensors[Q]))
    x = torch.randn(3, 128)
    np.testing.assert_allclose(layer(x).numpy(), x.numpy() @ values(tensors[Q]).T, rtol=1e-4, atol=1e-5)


def test_zeros_that_are_no_codes_are_floats(model: Path, tmp_path: Path) -> None:
    """Rounded zeros may lie outside the codes: then the layer is read with float zeros."""
    tensors = quantized("hqq", tmp_path / "m", model, lambda n: "int4_g64" if n == Q else None)
    for zero in (16.0, -1.0, 2.5):
        tensor_edit(lambda t, zero=zero: t.update({f"{M}.zero": t[f"{M}.zero"].index_fill(0, torch.tensor([5]), zero)}))(tmp_path / "m")
        found = open_checkpoint(tmp_path / "m").read(Q)
        assert found.format == "int4_g64z" and found.fields["zero"][2, 1] == zero
        np.testing.assert_array_equal(found.fields["codes"], tensors[Q].fields["codes"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_types(dtype: torch.dtype, model: Path, tmp_path: Path) -> None:
    """Exactly, as float16 or as float32."""
    from safetensors.torch import load_file

    quantized("hqq", tmp_path / "m", model, lambda n: "int4_g64z" if n == Q else None)
    tensor_edit(lambda t: t.update({f"{M}.scale": t[f"{M}.scale"].bfloat16().to(dtype)}))(tmp_path / "m")
    assert open_checkpoint(tmp_path / "m").read(Q).fields["scale"].dtype == np.float16
    tensor_edit(lambda t: t.update({f"{M}.scale": (t[f"{M}.scale"].float() * 1e-7).to(dtype)}))(tmp_path / "m")
    found = open_checkpoint(tmp_path / "m").read(Q)
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert found.format == "int4_g64zf"
    for part in ("scale", "zero"):
        np.testing.assert_array_equal(found.fields[part].ravel(), stored[f"{M}.{part}"].float().numpy().ravel())


def test_every_float_lies_at_a_multiple_of_its_size(model: Path, tmp_path: Path) -> None:
    from tersor.containers.safetensors_file import DTYPES, SafetensorsFile

    quantized("hqq", tmp_path / "m", model, linears("int3_g64z"))
    entries = SafetensorsFile(tmp_path / "m" / "model.safetensors").entries.values()
    assert all(entry.begin % DTYPES[entry.dtype].itemsize == 0 for entry in entries)


def test_config(model: Path, tmp_path: Path) -> None:
    def config(name: str, choose: Callable[[str], str | None], source: Path) -> dict[str, Any]:
        quantized("hqq", tmp_path / name, source, choose)
        found: dict[str, Any] = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        return found

    weights = {"channel_wise": True, "optimize": False, "axis": 1, "view_as_float": False}
    rest = {"scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
    one = weights | {"nbits": 4, "group_size": 64, "round_zero": False}
    other = weights | {"nbits": 3, "group_size": 384, "round_zero": True}
    assert config("one", linears("int4_g64z"), model) == {
        "quant_method": "hqq",
        "quant_config": {"weight_quant_params": one} | rest,
        "skip_modules": ["lm_head"],
    }
    tied = tiny_model(tmp_path / "tied", hidden=64, intermediate=384, layers=2)
    two = config("two", lambda n: {"down_proj": "int3_cs", "up_proj": "int4_g64z"}.get(n.split(".")[-2]), tied)
    assert two["quant_config"] == {
        "mlp.up_proj": {"weight_quant_params": one} | rest,
        "mlp.down_proj": {"weight_quant_params": other} | rest,
    }
    assert two["skip_modules"][0] == "lm_head" and "model.layers.1.mlp.gate_proj" in two["skip_modules"] and len(two["skip_modules"]) == 11


@pytest.mark.parametrize("recipe", ["hqq:int4_g64z", "hqq:int4_g64", "rtn:int3_g64s", "rtn:int8_cz"])
def test_end_to_end(recipe: str, model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "m", recipe, to="hqq")
    ours = load(tmp_path / "m", activations="float", kv="f32")
    assert ours.session().generate("The quick", Request(max_tokens=4)).tokens
    checkpoint = open_checkpoint(tmp_path / "m")
    decoded = {name: values(checkpoint.read(name)) for name in checkpoint.tensors}
    tiny_model(tmp_path / "f", hidden=128, intermediate=384, layers=1, tie=False, change=decoded)
    plain = load(tmp_path / "f", activations="float", kv="f32")
    tokens = np.random.default_rng(0).integers(3, 300, 20, dtype=np.int32)
    got, want = (m.head(m.forward(tokens, m.new_cache(64))) for m in (ours, plain))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_without_a_recipe(model: Path, tmp_path: Path) -> None:
    result = quantize(model, tmp_path / "m", to="hqq")
    assert {r.format for r in result.tensors if "_proj" in r.name} == {"int4_g64z"}


# --- refusals ---------------------------------------------------------------------------------------------------------------


def part_edit(part: str, value: Any) -> Edit:
    """Returns a change of one small tensor of q_proj: another number or text of the same type, a tensor, or none."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{M}.{part}"
        if value is None:
            del tensors[name]
        elif isinstance(value, str):
            tensors[name] = torch.tensor(list(value.encode()), dtype=torch.uint8)
        else:
            tensors[name] = value if torch.is_tensor(value) else torch.full_like(tensors[name], value)

    return tensor_edit(change)


REFUSED: dict[str, tuple[Edit, str]] = {
    "along the column": (part_edit("axis", 0), "axis 0: groups run along the rows; only axis=1, along the columns, is supported"),
    "quantized scales": (part_edit("quant_scale", 1), "quant_scale: scales and zeros are themselves quantized"),
    "quantized zeros": (part_edit("quant_zero", 1), "quant_zero: scales and zeros are themselves quantized"),
    "offloaded": (part_edit("zero_scale", torch.zeros(2, 256, 1)), "zero_scale: scales and zeros are offloaded together"),
    "seven bits": (part_edit("nbits", 7), "nbits is 7; only 1, 2, 3, 4, 5, 6, 8 are supported"),
    "two and a half bits": (part_edit("nbits", torch.tensor(2.5)), "nbits is 2.5; only"),
    "no bits": (part_edit("nbits", float("nan") * torch.ones(())), "nbits is nan; only"),
    "other bits": (part_edit("nbits", 2), "packing '4bit_u8' of 2 bits, needs '2bit_u8'"),
    "unknown packing": (part_edit("packing", "9bit_u8"), "packing '9bit_u8' of 4 bits, needs '4bit_u8'"),
    "long packing": (part_edit("packing", "4" * 65), "packing is ('U8', (65,)), needs the bytes of a short text"),
    "no packing": (part_edit("packing", None), "packing is missing, needs the bytes of a short text"),
    "no shape": (part_edit("shape", None), "shape is missing, needs 2 integers"),
    "a shape of three": (part_edit("shape", torch.tensor([128, 64, 2])), "shape is ('I64', (3,)), needs 2 integers"),
    "negative shape": (part_edit("shape", torch.tensor([-128, -128])), "has shape [-128, -128], needs (rows, columns)"),
    "another shape": (
        part_edit("shape", torch.tensor([64, 128])),
        "64 x 128 in 4 bits and groups of 64 need 4096 bytes",
    ),
    "groups across rows": (part_edit("group_size", 96), "groups of 96 do not divide rows of 128 columns"),
    "longer than a row": (part_edit("group_size", 256), "groups of 256 do not divide rows of 128 columns"),
    "negative groups": (part_edit("group_size", -64), "groups of -64 do not divide"),
    "a float group": (part_edit("group_size", torch.tensor(64.0)), "groups of 64.0 do not divide"),
    "small groups": (part_edit("group_size", 8), "int4_g8z: group of 8; need a multiple of 16"),
    "two group sizes": (part_edit("group_size", torch.tensor([64, 64])), "group_size is ('I64', (2,)), needs one number"),
    "no group size": (part_edit("group_size", None), "group_size is missing, needs one number"),
    "short codes": (part_edit("W_q", torch.zeros(127, 64, dtype=torch.uint8)), "W_q is U8 [127, 64], 128 x 128 in 4 bits"),
    "no scale": (part_edit("scale", None), "scale is missing, needs F16 (256, 1)"),
    "short zero": (part_edit("zero", torch.zeros(255, 1)), "zero is ('F32', (255, 1)), needs F16 (256, 1)"),
    "integer scale": (part_edit("scale", torch.zeros(256, 1, dtype=torch.uint8)), "scale is ('U8', (256, 1)), needs F16"),
    "a weight too": (part_edit("weight", torch.zeros(128, 128)), "q_proj has both a weight and W_q"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    change, text = REFUSED[case]
    quantized("hqq", tmp_path / "m", model, lambda n: "int4_g64z" if n == Q else None)
    change(tmp_path / "m")
    with pytest.raises(ContainerError) as caught:
        open_checkpoint(tmp_path / "m")
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_groups_along_the_column_as_hqq_stores_them_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="only axis=1, along the columns, is supported"):
        open_checkpoint(golden_directory("4 bits along the column", model, tmp_path / "m"))


def test_codes_of_more_bits_are_refused_when_read(model: Path, tmp_path: Path) -> None:
    path = golden_directory("5 bits", model, tmp_path / "m")
    tensor_edit(lambda t: t[f"{M}.W_q"][3].fill_(32))(path)
    with pytest.raises(ContainerError, match="q_proj holds the code 32 in 5 bits"):
        open_checkpoint(path).read(Q)


def test_pickles_are_refused(model: Path, tmp_path: Path) -> None:
    """hqq's save_quantized writes qmodel.pt beside config.json."""
    quantized("hqq", tmp_path / "m", model, linears("int4_g64z"))
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "qmodel.pt")
    for edit in (lambda p: None, config_edit(lambda c: c.pop("quantization_config"))):
        edit(tmp_path / "m")
        with pytest.raises(ContainerError, match=r"weights are pickled \(qmodel\.pt\), which can run code when loaded"):
            open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "format", "shape", "text"),
    [
        ("model.embed_tokens.weight", "int4_g64", (64, 128), "is no linear layer, which is all that hqq quantizes"),
        ("a.weight", "int4_g64z", (2, 64, 64), "is no linear layer"),
        ("a.experts", "int4_g64z", (64, 64), "is no linear layer"),
        ("a.weight", "int4_g64z", (3, 64), "has 3 groups, which hqq cannot split into bytes of 2 4-bit codes; use 8 or 3 bits"),
        ("a.weight", "int1_g64", (2, 128), "has 4 groups, which hqq cannot split into bytes of 8 1-bit codes"),
    ],
)
def test_what_hqq_cannot_pack_is_not_written(
    name: str, format: str, shape: tuple[int, ...], text: str, model: Path, tmp_path: Path
) -> None:
    info = TensorInfo(name, format, shape, get_format(format).nbytes(shape))
    with pytest.raises(ContainerError, match=text):
        CONTAINERS["hqq"].create(tmp_path / "m", open_checkpoint(model).description, [info])


@pytest.mark.parametrize("format", ["int5_g64z", "int6_g64", "int4_g64m", "int4_t", "int4_g64o", "nf4"])
def test_not_held(format: str) -> None:
    assert not CONTAINERS["hqq"].holds(format)


def test_three_bits_need_no_split(model: Path, tmp_path: Path) -> None:
    tensor = get_format("int3_g64z").quantize(np.random.default_rng(0).standard_normal((7, 64), np.float32))
    write("hqq", tmp_path / "m", model, {"a.weight": QuantizedTensor("int3_g64z", (7, 64), tensor.fields)})
    np.testing.assert_array_equal(values(open_checkpoint(tmp_path / "m").read("a.weight")), values(tensor))
