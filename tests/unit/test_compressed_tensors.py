"""compressed-tensors directories: the package decompresses exactly what we meant, we read what the package writes, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compressed import check_read_back, config_edit, decompressed, group_edit, linears, quantized, tensor_edit, values, weights_edit
from tersor.containers import open_checkpoint
from tersor.containers.compressed_tensors_config import read_schemes, write_quantization
from tersor.containers.safetensors_file import SafetensorsFile
from tersor.conversion import convert
from tersor.engine import load
from tersor.errors import ContainerError, ModelError
from tersor.formats import get_format
from tersor.tensor import ActivationScheme, TensorInfo
from tersor.verification.readers import READERS
from tiny import tiny_model

FORMATS = [
    *(f"int{bits}_g{group}{kind}" for bits in (2, 3, 4, 5, 6, 8) for group in (16, 96) for kind in ("", "s")),
    *("int1_g32", "int1_c", "int3_c", "int4_cs", "int8_c", "int8_cs", "int2_t", "int4_ts", "int8_t", "int8_ts"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m") / "m", hidden=96, intermediate=192, heads=4, kv_heads=1, layers=1, tie=False)


@pytest.mark.parametrize("format", FORMATS)
def test_the_package_decompresses_our_weights(format: str, model: Path, tmp_path: Path) -> None:
    tensors = quantized(tmp_path / "m", model, linears(format))
    exact, rounded = decompressed(tmp_path / "m", wide=True), decompressed(tmp_path / "m", wide=False)
    assert set(exact) == {name for name, t in tensors.items() if t.format == format} and len(exact) == 7
    for name in exact:
        expected = values(tensors[name])
        assert exact[name].dtype == np.float32 and rounded[name].dtype == np.float16
        np.testing.assert_array_equal(exact[name], expected)
        np.testing.assert_array_equal(rounded[name], expected.astype(np.float16))


def test_mixed_formats(model: Path, tmp_path: Path) -> None:
    tensors = quantized(
        tmp_path / "m",
        model,
        lambda n: "int8_cs" if "down" in n else "int3_g96" if "q_proj" in n else "int4_g32s" if "lm_head" in n else None,
    )
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert sorted(g["format"] for g in config["config_groups"].values()) == ["int-quantized", "pack-quantized", "pack-quantized"]
    assert set(config["ignore"]) == {
        f"model.layers.0.{m}" for m in ("self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    found = decompressed(tmp_path / "m", wide=True)
    assert set(found) == {"model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"}
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, values(tensors[name]))
    check_read_back(tmp_path / "m", tensors)


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip(format: str, model: Path, tmp_path: Path) -> None:
    check_read_back(tmp_path / "m", quantized(tmp_path / "m", model, linears(format)))


@pytest.mark.parametrize("format", ["int4_g32", "int4_g32s", "int8_cs", "int3_c"])
def test_transformers_loads_it(format: str, model: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    tensors = quantized(tmp_path / "m", model, linears(format))
    transformers.logging.set_verbosity_error()
    config = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, quantization_config=config).state_dict()
    for name, tensor in tensors.items():
        expected = values(tensor)
        expected = expected if tensor.format == "f32" else expected.astype(np.float16).astype(np.float32)  # in the scale's type
        np.testing.assert_array_equal(loaded[name].numpy(), expected.reshape(loaded[name].shape))


@pytest.mark.parametrize("scale_type", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("bits", "symmetric", "strategy"), [(4, True, "group"), (4, False, "group"), (3, False, "channel"), (8, True, "tensor")]
)
def test_reads_what_the_package_compresses(bits: int, symmetric: bool, strategy: str, scale_type: str, tmp_path: Path) -> None:
    """A directory whose layer was compressed by the package itself, with scales in any float type."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file, save_file

    path = tiny_model(tmp_path / "m", layers=1)
    group = {
        "targets": ["re:.*q_proj"],
        "format": "pack-quantized",
        "weights": {"num_bits": bits, "symmetric": symmetric, "strategy": strategy},
    }
    if strategy == "group":
        group["weights"]["group_size"] = 32
    scheme = QuantizationScheme.model_validate(group)
    torch.manual_seed(0)
    module, weight = "model.layers.0.self_attn.q_proj", torch.randn(64, 64)
    scale_shape = {"group": (64, 2), "channel": (64, 1), "tensor": (1,)}[strategy]
    scale = (torch.rand(scale_shape) * 0.1 + 0.01).to(torch.bfloat16).to(getattr(torch, scale_type))  # numbers of every float type
    state = {"weight": weight, "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), scale_shape, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress(state, scheme)
    tensors = load_file(path / "model.safetensors")
    del tensors[f"{module}.weight"]
    save_file(tensors | {f"{module}.{k}": v for k, v in packed.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    (path / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(path).read(f"{module}.weight")
    assert found.format == f"int{bits}_{ {'group': 'g32', 'channel': 'c', 'tensor': 't'}[strategy] }{'s' if symmetric else ''}"
    expected = compressor.decompress(packed | {"weight_scale": scale.float()}, scheme)["weight"].numpy()
    np.testing.assert_array_equal(values(found), expected)


# --- refusals ---------------------------------------------------------------------------------------------------------------


Q = "model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no groups": (config_edit(lambda q: q.pop("config_groups")), "needs config_groups"),
    "preset instead of a scheme": (config_edit(lambda q: q.update(config_groups={"W4A16": ["Linear"]})), "needs config_groups"),
    "kv cache": (config_edit(lambda q: q.update(kv_cache_scheme={"num_bits": 8})), "has a kv_cache_scheme, which is not supported"),
    "transform": (config_edit(lambda q: q.update(transform_config={"a": 1})), "has a transform_config"),
    "complex weights": (weights_edit(type="complex"), "need an object of type int or float"),
    "float weights": (
        weights_edit(type="float"),
        "known, all symmetric: 8 bits by channel, 8 bits by tensor, 8 bits by block of (128, 128)",
    ),
    "no weights": (group_edit(weights=None), "weights are None, need an object of type int or float"),
    "static activations without scales": (group_edit(input_activations={"num_bits": 8, "dynamic": False}), "input_scale is missing, needs"),
    "static activations of another kind": (
        group_edit(input_activations={"num_bits": 8, "dynamic": False, "strategy": "channel"}),
        "input_activations with calibrated scales are {'num_bits': 8",
    ),
    "asymmetric static activations": (
        group_edit(input_activations={"num_bits": 8, "dynamic": False, "symmetric": False}),
        "only symmetric int8 of the whole tensor is supported",
    ),
    "activations as text": (group_edit(input_activations="int8"), "input_activations are int8; the config is damaged"),
    "output activations": (group_edit(output_activations={"num_bits": 8}), "output_activations are not supported"),
    "token strategy": (weights_edit(strategy="token"), "unknown strategy 'token'; known: block, channel, group, tensor, tensor_group"),
    "block strategy": (weights_edit(strategy="block"), "integer weights with strategy block, which are not supported"),
    "bits as text": (weights_edit(num_bits="4"), "num_bits 4 and group_size 32 must be integers"),
    "targets as text": (group_edit(targets="Linear"), "targets are Linear, need a list of strings"),
    "format as a list": (group_edit(format=["pack-quantized"]), "unknown format"),
    "unknown format": (
        group_edit(format="mxfp8-quantized"),
        "known: float-quantized, int-quantized, mxfp4-pack-quantized, naive-quantized",
    ),
    "bad expression": (group_edit(targets=["re:("]), "'(' is no regular expression"),
    "nothing targets it": (group_edit(targets=["re:.*k_proj"]), "no config group with that format targets it"),
    "other format targets it": (group_edit(format="int-quantized"), "is stored pack-quantized, but no config group"),
    "seven bits": (weights_edit(num_bits=7), "7-bit codes"),
    "other bits": (weights_edit(num_bits=8), "weight_packed is ('I32', (64, 8)), int8_g32 of 64 x 64 needs I32 (64, 16)"),
    "other groups": (weights_edit(group_size=16), "weight_scale is ('F16', (64, 2)), int4_g16 of 64 x 64 needs F16 (64, 4)"),
    "groups that do not divide": (weights_edit(group_size=48), "not a multiple of 48"),
    "zeros missing": (tensor_edit(lambda t: t.pop(f"{Q}.weight_zero_point")), "weight_zero_point is missing"),
    "scale missing": (tensor_edit(lambda t: t.pop(f"{Q}.weight_scale")), "weight_scale is missing"),
    "shape missing": (tensor_edit(lambda t: t.pop(f"{Q}.weight_shape")), "weight_shape is missing"),
    "shape lies": (tensor_edit(lambda t: t.update({f"{Q}.weight_shape": ("I64", np.array([64, 32]))})), "weight_packed is"),
    "shape negative": (tensor_edit(lambda t: t.update({f"{Q}.weight_shape": ("I64", np.array([-64, 64]))})), "has shape [-64, 64]"),
    "scale of integers": (
        tensor_edit(lambda t: t.update({f"{Q}.weight_scale": ("I16", np.ones((64, 2), np.int16))})),
        "weight_scale is ('I16'",
    ),
    "order without its groups": (weights_edit(actorder="group"), "weight_g_idx is missing, but the config says actorder"),
    "uneven groups": (
        tensor_edit(lambda t: t.update({f"{Q}.weight_g_idx": ("I32", np.array([0] * 31 + [1] * 33, np.int32))})),
        "weight_g_idx does not give each of 2 groups 32 columns",
    ),
    "groups that are not there": (
        tensor_edit(lambda t: t.update({f"{Q}.weight_g_idx": ("I32", np.array([0, 2] * 32, np.int32))})),
        "weight_g_idx does not give each of 2 groups 32 columns",
    ),
    "order of other columns": (
        tensor_edit(lambda t: t.update({f"{Q}.weight_g_idx": ("I32", np.zeros(32, np.int32))})),
        "weight_g_idx is I32 (32,), needs I32 (64,)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_is_refused(case: str, tmp_path: Path) -> None:
    change, text = REFUSED[case]
    quantized(tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), lambda n: "int4_g32" if "q_proj" in n else None)
    change(tmp_path / "m")
    with pytest.raises(ContainerError) as caught:
        open_checkpoint(tmp_path / "m")
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_trivial_order_of_columns_is_fine(tmp_path: Path) -> None:
    tensors = quantized(tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), lambda n: "int4_g32" if "q_proj" in n else None)
    tensor_edit(lambda t: t.update({f"{Q}.weight_g_idx": ("I32", np.arange(64, dtype=np.int32) // 32)}))(tmp_path / "m")
    check_read_back(tmp_path / "m", tensors)


@pytest.mark.parametrize("format", ["int4_g32o", "int4_g32so", "int3_g16o", "int8_g32so"])
def test_order_of_columns(format: str, tmp_path: Path) -> None:
    """Every column is its code less its group's zero, times its group's scale, the group being what weight_g_idx says."""
    tensors = quantized(tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), lambda n: format if "q_proj" in n else None)
    bits, size = get_format(format).bits, get_format(format).group_size
    file = SafetensorsFile(tmp_path / "m" / "model.safetensors")
    groups, scale, packed = (file.array(f"{Q}.{part}") for part in ("weight_g_idx", "weight_scale", "weight_packed"))
    assert sorted(groups.tolist()) == [c // size for c in range(64)] != groups.tolist() and groups.dtype == np.int32
    expected = values(tensors[f"{Q}.weight"])
    for row in (0, 37, 63):
        stream = int.from_bytes(packed[row].tobytes(), "little")
        for column in range(64):
            group = int(groups[column])
            code, zero = stream >> int(column * bits) & 2**bits - 1, 2 ** (bits - 1)
            if "so" not in format:
                words = file.array(f"{Q}.weight_zero_point")[:, group]
                zero = int.from_bytes(words.tobytes(), "little") >> int(row * bits) & 2**bits - 1
            assert np.float32(code - zero) * np.float32(scale[row, group]) == expected[row, column]
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["actorder"] == "group"
    found = open_checkpoint(tmp_path / "m").read(f"{Q}.weight")
    assert found.format == format and all(np.array_equal(found.fields[k], v) for k, v in tensors[f"{Q}.weight"].fields.items())
    rows = open_checkpoint(tmp_path / "m").read(f"{Q}.weight", slice(5, 9))
    np.testing.assert_array_equal(values(rows), expected[5:9])


def test_unset_order_of_columns_is_none(tmp_path: Path) -> None:
    tensors = quantized(tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), lambda n: "int4_g32" if "q_proj" in n else None)
    tensor_edit(lambda t: t.update({f"{Q}.weight_g_idx": ("I32", np.full(64, -1, np.int32))}))(tmp_path / "m")
    check_read_back(tmp_path / "m", tensors)


def test_dynamic_activations_are_fine(tmp_path: Path) -> None:
    tensors = quantized(tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), linears("int8_cs"))
    group_edit(input_activations={"num_bits": 8, "dynamic": True, "strategy": "token"})(tmp_path / "m")
    check_read_back(tmp_path / "m", tensors)
    assert open_checkpoint(tmp_path / "m").description.activations == ActivationScheme()
    group_edit(input_activations={"num_bits": 8, "dynamic": True, "strategy": "group", "group_size": 32})(tmp_path / "m")
    assert open_checkpoint(tmp_path / "m").description.activations is None


LINEARS = tuple(f"self_attn.{p}_proj" for p in "qkvo") + tuple(f"mlp.{p}_proj" for p in ("gate", "up", "down"))


def scales_of(*modules: str) -> ActivationScheme:
    """Layers that share an input share its scale."""
    found = {module: scale for module, scale in zip(LINEARS, (0.02, 0.02, 0.02, 0.004, 0.021, 0.021, 0.003)) if module in modules}
    return ActivationScheme({f"model.layers.0.{module}": scale for module, scale in found.items()})


@pytest.mark.parametrize("format", ["int8_cs", "int4_g32s"])
@pytest.mark.parametrize("activations", [ActivationScheme(), scales_of(*LINEARS)])
def test_the_package_rounds_inputs_as_we_do(format: str, activations: ActivationScheme, tmp_path: Path) -> None:
    """W8A8 and W4A8: what transformers computes with compressed-tensors is what our engine computes with int8_token or int8_static."""
    import torch
    from transformers import AutoModelForCausalLM

    quantized(tmp_path / "m", tiny_model(tmp_path / "hf", layers=1, dtype="f32"), linears(format), activations)
    found = open_checkpoint(tmp_path / "m").description.activations
    assert found is not None and (found.scales is None) == (activations.scales is None)
    for module, scale in (activations.scales or {}).items():
        assert found.scales is not None and found.scales[module] == np.float32(scale)
    tokens = np.random.default_rng(0).integers(3, 300, 40, dtype=np.int32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()

    def distance(how: str) -> float:
        ours = load(tmp_path / "m", activations=how, kv="f32")
        return float(np.abs(ours.head(ours.forward(tokens, ours.new_cache(64))) - want).max() / np.abs(want).max())

    # Their dynamic scale is absmax / 127.5, ours absmax / 127; static ones are the same.
    if activations.scales is None:
        assert distance("int8_token") < 0.06
    else:  # which cut off much here; codes differ where a rounding decides between two
        assert distance("int8_static") < 0.05 < 0.5 < distance("float")


def test_scales_of_some_layers_only(tmp_path: Path) -> None:
    activations = scales_of("self_attn.q_proj", "mlp.down_proj")
    tensors = quantized(tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), linears("int8_cs"), activations)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    rounded = {g["input_activations"] is not None: g["targets"] for g in config["config_groups"].values()}
    assert set(rounded[True]) == set(activations.scales or {}) and len(rounded[False]) == 5
    check_read_back(tmp_path / "m", tensors)
    with pytest.raises(ModelError, match="k_proj has no input scale, which activations int8_static need"):
        load(tmp_path / "m", activations="int8_static")


@pytest.mark.parametrize(
    ("name", "stored", "text"),
    [
        ("input_scale", ("F32", np.zeros(1, np.float32)), "input_scale is 0.0, needs a positive number"),
        ("input_scale", ("F32", np.full(1, np.nan, np.float32)), "input_scale is nan, needs a positive number"),
        ("input_scale", ("F32", np.ones(2, np.float32)), "needs one float"),
        ("input_scale", ("I8", np.ones(1, np.int8)), "needs one float"),
        ("input_zero_point", ("I8", np.ones(1, np.int8)), "input_zero_point is not 0, but the config says symmetric"),
    ],
)
def test_bad_input_scales(name: str, stored: tuple[str, np.ndarray], text: str, tmp_path: Path) -> None:
    module = "model.layers.0.mlp.up_proj"
    quantized(tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), linears("int8_cs"), scales_of(*LINEARS))
    tensor_edit(lambda t: t.update({f"{module}.{name}": stored}))(tmp_path / "m")
    with pytest.raises(ContainerError) as caught:
        open_checkpoint(tmp_path / "m")
    assert text in str(caught.value) and "up_proj" in str(caught.value)


def test_converting_keeps_the_scheme(tmp_path: Path) -> None:
    quantized(tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), linears("int8_cs"), scales_of(*LINEARS))
    convert(tmp_path / "m", tmp_path / "other", to="compressed-tensors")
    assert open_checkpoint(tmp_path / "other").description.activations == open_checkpoint(tmp_path / "m").description.activations


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("scale", [1e-9, 1e6, 1 / 3, 0.25])
@pytest.mark.parametrize("name", ["int4_g32", "int4_g32s", "int4_g32so", "int4_cs", "int4_t", "int8_cs"])
def test_scales_become_float32_where_float16_does_not_hold_them(name: str, scale: float, dtype: str, tmp_path: Path) -> None:
    """The package's decoding, from scales of any type, is ours."""
    quantized(tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), lambda n: name if "q_proj" in n else None)
    stored = np.linspace(scale, 1.5 * scale, 128, dtype=np.float32)
    bits = (stored.view(np.uint32) >> 16).astype(np.uint16)
    tensor_edit(lambda t: t.update({f"{Q}.weight_scale": (dtype, _like(t[f"{Q}.weight_scale"][1], bits if dtype == "BF16" else stored))}))(
        tmp_path / "m"
    )
    with open_checkpoint(tmp_path / "m") as found:
        tensor = found.read(f"{Q}.weight")
        held = (scale in (1 / 3, 0.25) and dtype == "BF16") or (scale == 0.25 and name in ("int4_t",))
        assert found.tensors[f"{Q}.weight"].format == tensor.format == wider(name, not held)
        assert found.tensors[f"{Q}.weight"].nbytes == tensor.nbytes
        want = dict(READERS["compressed-tensors"].weights(tmp_path / "m"))[f"{Q}.weight"]
        np.testing.assert_array_equal(get_format(tensor.format).dequantize(tensor), want)
        if get_format(name).row_independent:
            np.testing.assert_array_equal(found.read(f"{Q}.weight", slice(3, 9)).fields["scale"], tensor.fields["scale"][3:9])


def _like(stored: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values[: stored.size].reshape(stored.shape))


def wider(name: str, wide: bool) -> str:
    return f"{name.removesuffix('o')}{'f' * wide}{'o' * name.endswith('o')}"


@pytest.mark.parametrize(
    ("choose", "text"),
    [
        (
            lambda n: "int4_g32m" if "q_proj" in n else None,
            "compressed-tensors cannot hold int4_g32m (model.layers.0.self_attn.q_proj.weight)",
        ),
        (lambda n: "q4_0" if "k_proj" in n else None, "compressed-tensors cannot hold q4_0"),
        (lambda n: "int8_g32" if "embed" in n else None, "is also the head (tie_word_embeddings)"),
    ],
)
def test_what_cannot_be_written(choose: Callable[[str], str | None], text: str, tmp_path: Path) -> None:
    with pytest.raises(ContainerError) as caught:
        quantized(tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), choose)
    assert text in str(caught.value) and [f.name for f in tmp_path.iterdir()] == ["hf"]


def test_float_models_have_no_quantization_config(tmp_path: Path) -> None:
    quantized(tmp_path / "m", tiny_model(tmp_path / "hf", layers=1), lambda n: None)
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    assert open_checkpoint(tmp_path / "m").container == "huggingface"


def test_config_of_one_format_targets_by_class_and_ignores_the_rest() -> None:
    plan = [
        TensorInfo("model.embed_tokens.weight", "f16", (10, 64), 0),
        TensorInfo("model.layers.0.mlp.up_proj.weight", "int4_g32", (8, 64), 0),
        TensorInfo("model.layers.0.mlp.down_proj.weight", "f16", (64, 8), 0),
        TensorInfo("model.norm.weight", "f32", (64,), 0),
    ]
    config = write_quantization(plan, tied=True)
    assert config is not None and config["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"] and config["format"] == "pack-quantized"
    assert [s.our_format for s in read_schemes("x", config)] == ["int4_g32"]
