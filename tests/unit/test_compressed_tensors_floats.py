"""FP8, NVFP4 and MXFP4 in compressed-tensors directories: the package and transformers see what we wrote, we read what they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from safetensors.torch import load_file, save_file

from compressed import check_read_back, decompressed, group_edit, linears, quantized, tensor_edit, values, weights_edit
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.conversion import convert
from tersor.engine import load
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.tensor import ActivationScheme, QuantizedTensor
from tiny import tiny_model

PRESETS = {"fp8_c": "FP8_DYNAMIC", "fp8_t": "FP8", "fp8_b128": "FP8_BLOCK", "nvfp4_gs": "NVFP4", "mxfp4": "MXFP4"}
LAYOUT = {"nvfp4_gs": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 128 and 256 values; k_proj and v_proj have 64 rows, a short block."""
    path = tmp_path_factory.mktemp("m") / "m"
    return tiny_model(path, hidden=128, intermediate=256, heads=4, kv_heads=2, layers=1, tie=False)


def bf16(w: np.ndarray) -> np.ndarray:
    return torch.from_numpy(w).to(torch.bfloat16).float().numpy()


@pytest.mark.parametrize("format", PRESETS)
def test_the_package_decompresses_our_weights(format: str, model: Path, tmp_path: Path) -> None:
    tensors = quantized(tmp_path / "m", model, linears(format))
    found = decompressed(tmp_path / "m", wide=False)
    assert len(found) == 7
    for name, weight in found.items():
        expected = values(tensors[name])
        # From FP8's float32 scales it computes in float32; 4-bit floats it decodes to bfloat16, MXFP4's exactly.
        np.testing.assert_array_equal(weight, bf16(expected) if format == "nvfp4_gs" else expected)
    check = open_checkpoint(tmp_path / "m")
    assert check.note == "" and check.description.activations is None
    for name, tensor in tensors.items():
        read = check.read(name)
        assert read.format == tensor.format and all(np.array_equal(read.fields[k], v) for k, v in tensor.fields.items())


@pytest.mark.parametrize("format", PRESETS)
def test_transformers_loads_it(format: str, model: Path, tmp_path: Path) -> None:
    import transformers

    tensors = quantized(tmp_path / "m", model, linears(format))
    transformers.logging.set_verbosity_error()
    config = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, quantization_config=config).state_dict()
    for name, tensor in tensors.items():
        expected = values(tensor).reshape(loaded[name].shape)
        np.testing.assert_array_equal(loaded[name].numpy(), bf16(expected) if tensor.format == "nvfp4_gs" else expected)


@pytest.mark.parametrize("format", PRESETS)
def test_the_engine_runs_it(format: str, model: Path, tmp_path: Path) -> None:
    """What transformers computes with the decompressed model, within what rounding to float16 and the inputs' rounding make of it."""
    import transformers

    quantized(tmp_path / "m", model, linears(format))
    transformers.logging.set_verbosity_error()
    config = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32, quantization_config=config)
    tokens = np.random.default_rng(0).integers(3, 300, 12, dtype=np.int32)
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    for how, bound in (("int8", 1e-2), ("float", 1e-2 if format == "nvfp4_gs" else 2e-5)):  # theirs has NVFP4 in bfloat16
        ours = load(tmp_path / "m", kv="f32", activations=how)
        got = ours.head(ours.forward(tokens, ours.new_cache(16)))
        assert np.abs(got - want).max() <= bound * np.abs(want).max(), how


@pytest.mark.parametrize("preset", ["FP8_DYNAMIC", "FP8", "FP8_BLOCK", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4"])
@pytest.mark.parametrize("scale_type", ["bfloat16", "float32"])
def test_reads_what_the_package_compresses(preset: str, scale_type: str, model: Path, tmp_path: Path) -> None:
    """A directory with the config that the package itself writes for its preset, and a layer that it compressed."""
    path = tiny_model(tmp_path / "m", hidden=128, intermediate=256, heads=4, kv_heads=2, layers=1)
    scheme = QuantizationScheme(targets=["re:.*q_proj"], **PRESET_SCHEMES[preset])
    four_bits = scheme.weights.num_bits == 4
    layout = ("nvfp4" if scheme.weights.group_size == 16 else "mxfp4") + "-pack-quantized" if four_bits else "float-quantized"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 128, generator=generator)
    shape = {"channel": (128, 1), "tensor": (1,), "block": (1, 1), "tensor_group": (128, 8), "group": (128, 4)}[scheme.weights.strategy]
    scale = (torch.rand(shape, generator=generator) * 0.1 + 0.01).to(getattr(torch, scale_type))
    state = {"weight": weight, "weight_scale": scale}
    if preset.startswith("NVFP4"):
        state |= {"weight_scale": (scale.float() * 1000).to(torch.float8_e4m3fn).float(), "weight_global_scale": torch.tensor([777.0])}
    compressor = BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(state, scheme)
    if preset == "NVFP4":
        packed["input_global_scale"] = torch.tensor([3.0])
    if preset == "FP8":
        packed["input_scale"] = torch.tensor([0.02], dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    del tensors[f"{Q}.weight"]
    save_file(tensors | {f"{Q}.{k}": v for k, v in packed.items()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    own = QuantizationConfig(config_groups={"group_0": scheme}, format=layout, quantization_status="compressed")
    config["quantization_config"] = json.loads(own.model_dump_json()) | {"quant_method": "compressed-tensors"}
    (path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(path)
    found = checkpoint.read(f"{Q}.weight")
    assert found.format == {**{v: k for k, v in PRESETS.items()}, "NVFP4A16": "nvfp4_gs", "MXFP4A16": "mxfp4"}[preset]
    # In float32 where the scales are that; with bfloat16 scales the package rounds its products to bfloat16.
    expected = compressor.decompress(packed | ({} if four_bits else {"weight_scale": packed["weight_scale"].float()}), scheme)["weight"]
    ours = torch.from_numpy(values(found))
    torch.testing.assert_close(ours.to(expected.dtype), expected, rtol=0, atol=0)
    rounds = not preset.endswith("A16")
    assert checkpoint.description.activations is None and (f"the inputs of 1 layers ({Q}, ...)" in checkpoint.note) == rounds


def test_naive_quantized_is_read_too(model: Path, tmp_path: Path) -> None:
    """How the package names weights without rounded inputs."""
    for format in ("fp8_c", "int8_cs"):
        tensors = quantized(tmp_path / format, model, linears(format))
        group_edit(format="naive-quantized")(tmp_path / format)
        check_read_back(tmp_path / format, tensors)


def test_mixed_formats(model: Path, tmp_path: Path) -> None:
    choice = {
        "q_proj": "fp8_c",
        "k_proj": "nvfp4_gs",
        "v_proj": "mxfp4",
        "o_proj": "int4_g32",
        "up_proj": "fp8_b128",
        "down_proj": "int8_cs",
    }
    tensors = quantized(tmp_path / "m", model, lambda n: next((f for key, f in choice.items() if key in n), None))
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    layouts = sorted(group["format"] for group in config["config_groups"].values())
    assert config["format"] == "mixed-precision" and layouts == sorted(
        [*LAYOUT.values(), "float-quantized", "float-quantized", "int-quantized", "pack-quantized"]
    )
    QuantizationConfig.model_validate(config)
    found = decompressed(tmp_path / "m", wide=True)
    assert len(found) == 6
    for name, weight in found.items():
        expected = values(tensors[name])
        np.testing.assert_array_equal(weight, bf16(expected) if tensors[name].format == "nvfp4_gs" else expected)


def test_mxfp4_moves_between_containers(model: Path, tmp_path: Path) -> None:
    """The same numbers in ggml's blocks and in compressed-tensors' two tensors; nothing is rounded."""
    quantized(tmp_path / "m", model, linears("mxfp4"))
    convert(tmp_path / "m", tmp_path / "m.gguf", verify=False)
    convert(tmp_path / "m.gguf", tmp_path / "back", to="compressed-tensors", verify=False)
    one, two = open_checkpoint(tmp_path / "m"), open_checkpoint(tmp_path / "back")
    assert open_checkpoint(tmp_path / "m.gguf").tensors[f"{Q}.weight"].format == "mxfp4"
    for name in one.tensors:
        for field, expected in one.read(name).fields.items():
            np.testing.assert_array_equal(two.read(name).fields[field], expected)


def test_rows_of_blocks_start_with_a_block(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "hf", hidden=384, intermediate=384, heads=4, kv_heads=4, layers=1)
    tensors = quantized(tmp_path / "m", model, lambda n: "fp8_b128" if "q_proj" in n else None)
    checkpoint, whole = open_checkpoint(tmp_path / "m"), values(tensors[f"{Q}.weight"])
    for rows in (slice(128, 200), slice(0, 384), slice(256, 900)):
        np.testing.assert_array_equal(values(checkpoint.read(f"{Q}.weight", rows)), whole[rows])
    with pytest.raises(ContainerError, match=r"q_proj: rows from 100 on; those of fp8_b128 can be read from multiples of 128"):
        checkpoint.read(f"{Q}.weight", slice(100, 200))


def test_int8_inputs_before_float_weights_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match=r"q_proj\.weight is fp8_c, but its inputs are to be rounded to int8; choose int8_cs or leave"):
        quantized(tmp_path / "m", model, linears("fp8_c"), ActivationScheme())


def set_part(part: str, dtype: str, array: np.ndarray) -> Any:
    return tensor_edit(lambda t: t.update({f"{Q}.{part}": (dtype, array)}))


REFUSED = {
    "five bits": ("fp8_c", weights_edit(num_bits=5), "float weights are {'dynamic': False"),
    "other groups": ("nvfp4_gs", weights_edit(group_size=32), "4 bits by tensor_group of 16, 4 bits by group of 32"),
    "other blocks": ("fp8_b128", weights_edit(block_structure=[64, 128]), "8 bits by block of (128, 128)"),
    "block of text": ("fp8_b128", weights_edit(block_structure="128x128"), "8 bits by block of (128, 128)"),
    "asymmetric": ("fp8_c", weights_edit(symmetric=False), "known, all symmetric: 8 bits by channel"),
    "config of integers": (
        "fp8_c",
        group_edit(format=None, weights={"type": "int", "num_bits": 8, "strategy": "channel"}),
        "cannot hold int8_cs",
    ),
    "scale of a tensor": ("fp8_c", set_part("weight_scale", "F32", np.ones(1, np.float32)), "fp8_c of 128 x 128 needs F32 (128, 1)"),
    "global scale missing": ("nvfp4_gs", tensor_edit(lambda t: t.pop(f"{Q}.weight_global_scale")), "weight_global_scale is missing"),
    "scale of floats": ("nvfp4_gs", set_part("weight_scale", "F32", np.ones((128, 8), np.float32)), "needs F8_E4M3 (128, 8)"),
    "packed vector": ("mxfp4", set_part("weight_packed", "U8", np.zeros(64, np.uint8)), "has shape [128], needs (rows, columns)"),
    "packed scalar": ("mxfp4", set_part("weight_packed", "U8", np.zeros((), np.uint8)), "has shape [], needs (rows, columns)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    format, change, text = REFUSED[case]
    quantized(tmp_path / "m", model, lambda n: format if "q_proj" in n else None)
    change(tmp_path / "m")
    with pytest.raises(ContainerError) as caught:
        open_checkpoint(tmp_path / "m")
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_layout_and_scheme_must_agree(model: Path, tmp_path: Path) -> None:
    quantized(tmp_path / "m", model, lambda n: "nvfp4_gs" if "q_proj" in n else None)
    weights_edit(strategy="group", group_size=32)(tmp_path / "m")
    with pytest.raises(ContainerError, match=r"weight_scale is \('F8_E4M3', \(128, 8\)\), mxfp4 of 128 x 128 needs U8 \(128, 4\)"):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_bad_global_scales(bad: float, model: Path, tmp_path: Path) -> None:
    quantized(tmp_path / "m", model, lambda n: "nvfp4_gs" if "q_proj" in n else None)
    set_part("weight_global_scale", "F32", np.array([bad], np.float32))(tmp_path / "m")
    with pytest.raises(ContainerError, match=r"q_proj\.weight_global_scale is .*, needs a positive number"):
        open_checkpoint(tmp_path / "m").read(f"{Q}.weight")


def test_an_exponent_of_255_is_no_number(model: Path, tmp_path: Path) -> None:
    quantized(tmp_path / "m", model, lambda n: "mxfp4" if "q_proj" in n else None)
    set_part("weight_scale", "U8", np.full((128, 4), 255, np.uint8))(tmp_path / "m")
    with pytest.raises(ContainerError, match="a scale's exponent is 255, which stands for no number"):
        open_checkpoint(tmp_path / "m").read(f"{Q}.weight")
    tensor = get_format("mxfp4").quantize(np.ones((2, 32), np.float32))
    blocks = tensor.fields["blocks"].copy()
    blocks[:, 0] = 255
    from tersor.containers.compressed_tensors_layouts import LAYOUTS

    with pytest.raises(ContainerError, match="mxfp4: a scale's exponent is 255"):
        LAYOUTS["mxfp4-pack-quantized"].arrays(QuantizedTensor("mxfp4", (2, 32), {"blocks": blocks}), get_format("mxfp4"))


def test_order_of_columns_of_floats_is_refused(model: Path, tmp_path: Path) -> None:
    quantized(tmp_path / "m", model, lambda n: "mxfp4" if "q_proj" in n else None)
    set_part("weight_g_idx", "I32", np.arange(128, dtype=np.int32)[::-1] // 32)(tmp_path / "m")
    with pytest.raises(ContainerError, match="weight_g_idx reorders the columns of mxfp4; only integers can have that"):
        open_checkpoint(tmp_path / "m")


def test_what_is_held() -> None:
    held = CONTAINERS["compressed-tensors"].holds
    assert all(held(name) for name in (*PRESETS, "int4_g128o")) and not any(held(name) for name in ("nvfp4", "nf4", "int4_g64z", "q8_0"))
