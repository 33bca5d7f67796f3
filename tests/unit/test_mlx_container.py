"""MLX directories: mlx decodes what we meant, we read what mlx.quantize makes, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from directories import Edit, check_reader, config_edit, linears, quantized, tensor_edit, values
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.conversion import convert
from tersor.engine import load
from tersor.engine.continuation import Request
from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.pipeline import quantize
from tersor.tensor import TensorInfo
from tersor.verification.readers import READERS
from tiny import tiny_model

BITS, GROUPS = (1, 2, 3, 4, 5, 6, 8), (32, 64, 128)
M = "model.layers.0.self_attn.q_proj"
Q = f"{M}.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("m") / "m", hidden=128, intermediate=384, layers=1, tie=False)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_decodes_our_weights(bits: int, group: int, model: Path, tmp_path: Path) -> None:
    check_reader("mlx", tmp_path / "m", quantized("mlx", tmp_path / "m", model, linears(f"int{bits}_g{group}m")))


def test_mixed_formats_and_embedding(model: Path, tmp_path: Path) -> None:
    other = {"mlp.down_proj": "int6_g32m", "lm_head": "int8_g128m", "embed_tokens": "int5_g64m", "q_proj": None}
    choose = lambda name: next((format for part, format in other.items() if part in name), "int3_g64m")  # noqa: E731
    tensors = quantized("mlx", tmp_path / "m", model, choose)
    check_reader("mlx", tmp_path / "m", tensors)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (
        config["quantization"]
        == config["quantization_config"]
        == {
            "group_size": 64,
            "bits": 3,
            "mode": "affine",
            "model.embed_tokens": {"group_size": 64, "bits": 5, "mode": "affine"},
            "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 6, "mode": "affine"},
            "lm_head": {"group_size": 128, "bits": 8, "mode": "affine"},
        }
    )
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.container == "mlx" and not {"quantization", "quantization_config"} & set(checkpoint.description.config)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].format == tensor.format
        np.testing.assert_array_equal(values(checkpoint.read(name)), values(tensor))


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text"])
def test_other_architectures(model_type: str, tmp_path: Path) -> None:
    """Biases of a quantized layer, and norms; a tied embedding that is quantized."""
    choose = lambda name: "int4_g64m"  # noqa: E731
    check_reader("mlx", tmp_path / "m", quantized("mlx", tmp_path / "m", tiny_model(tmp_path / "hf", model_type), choose))
    quantize(tmp_path / "hf", tmp_path / "q", "rtn:int4_g64m, embed_tokens=int8_g64m", to="mlx")
    assert load(tmp_path / "q").session().generate("The quick", Request(max_tokens=4)).tokens


def mlx_directory(path: Path, source: Path, dtype: str, bits: int, group: int, **config: Any) -> dict[str, np.ndarray]:
    """Writes the model as mlx-lm does: mx.quantize on every matrix of this dtype, mx.save_safetensors. Returns mlx's float32 values."""
    path.mkdir()
    arrays: dict[str, mx.array] = {}
    decoded = {}
    for name, array in mx.load(str(source / "model.safetensors")).items():
        array = array.astype(getattr(mx, dtype))
        if array.ndim == 2:
            packed, scales, biases = mx.quantize(array, group_size=group, bits=bits)
            arrays |= {name: packed, name.replace("weight", "scales"): scales, name.replace("weight", "biases"): biases}
            wide = [scales.astype(mx.float32), biases.astype(mx.float32)]
            decoded[name] = np.array(mx.dequantize(packed, *wide, group_size=group, bits=bits))
        else:
            arrays[name] = array
            decoded[name] = np.array(array.astype(mx.float32))
    mx.save_safetensors(str(path / "model.safetensors"), arrays, metadata={"format": "mlx"})
    settings = json.loads((source / "config.json").read_text()) | {"quantization": {"group_size": group, "bits": bits} | config}
    (path / "config.json").write_text(json.dumps(settings))
    return decoded


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("bits", BITS)
def test_reads_what_mlx_quantizes(bits: int, dtype: str, model: Path, tmp_path: Path) -> None:
    expected = mlx_directory(tmp_path / "m", model, dtype, bits, 64)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert set(checkpoint.tensors) == set(expected)
    for name, wanted in expected.items():
        found = checkpoint.read(name)
        assert found.format == (f"int{bits}_g64m" if len(found.shape) == 2 else {"float16": "f16", "bfloat16": "bf16"}[dtype])
        np.testing.assert_array_equal(values(found), wanted)


def test_the_engine_multiplies_as_mlx_does(model: Path, tmp_path: Path) -> None:
    """mlx's scales may be negative, with the group's maximum as bias. A row of logits by mlx's own products."""
    expected = mlx_directory(tmp_path / "m", model, "float16", 4, 32)
    assert (open_checkpoint(tmp_path / "m").read(Q).fields["scale"] < 0).any()
    float_model = tmp_path / "f"
    tiny_model(float_model, hidden=128, intermediate=384, layers=1, tie=False, change=expected)
    tokens = np.random.default_rng(0).integers(3, 300, 20, dtype=np.int32)

    def logits(path: Path) -> np.ndarray:
        ours = load(path, activations="float", kv="f32")
        return ours.head(ours.forward(tokens, ours.new_cache(64)))

    wanted = logits(float_model)
    np.testing.assert_allclose(logits(tmp_path / "m"), wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("override", [False, True, {"group_size": 32, "bits": 8}])
def test_overrides(override: Any, model: Path, tmp_path: Path) -> None:
    """false: in float; true: as the default; an object: as it says."""
    format = {False: None, True: "int4_g64m"}.get(override if isinstance(override, bool) else 0, "int8_g32m")
    format = "int8_g32m" if isinstance(override, dict) else format
    tensors = quantized("mlx", tmp_path / "m", model, lambda n: format if n == Q else "int4_g64m" if "_proj" in n else None)
    config_edit(lambda c: c["quantization"].update({M: override}))(tmp_path / "m")
    np.testing.assert_array_equal(values(open_checkpoint(tmp_path / "m").read(Q)), values(tensors[Q]))


def test_end_to_end(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "m", "clip:int4_g64m, lm_head=int6_g64m", to="mlx")
    assert load(tmp_path / "m").session().generate("The quick", Request(max_tokens=4)).tokens


def test_without_a_recipe(model: Path, tmp_path: Path) -> None:
    result = quantize(model, tmp_path / "m", to="mlx")
    assert {r.format for r in result.tensors if "_proj" in r.name} == {"int4_g64m"}


def test_symmetric_integers_are_converted_exactly(model: Path, tmp_path: Path) -> None:
    """-2^(B-1) * scale is a float16 number; the minimum of an integer zero seldom is, but a float32 one."""
    quantize(model, tmp_path / "s", "rtn:int4_g32s", to="compressed-tensors")
    convert(tmp_path / "s", tmp_path / "m", "mlx")
    found, source = open_checkpoint(tmp_path / "m").read(Q), open_checkpoint(tmp_path / "s").read(Q)
    assert found.format == "int4_g32m"
    np.testing.assert_array_equal(values(found), values(source))
    np.testing.assert_array_equal(dict(READERS["mlx"].weights(tmp_path / "m"))[Q], values(source))
    quantize(model, tmp_path / "a", "rtn:int4_g32", to="compressed-tensors")
    convert(tmp_path / "a", tmp_path / "n", "mlx")
    found, source = open_checkpoint(tmp_path / "n").read(Q), open_checkpoint(tmp_path / "a").read(Q)
    assert found.format == "int4_g32mf"
    np.testing.assert_array_equal(values(found), values(source))
    np.testing.assert_array_equal(dict(READERS["mlx"].weights(tmp_path / "n"))[Q], values(source))


# --- refusals ---------------------------------------------------------------------------------------------------------------


def settings_edit(**changes: Any) -> Edit:
    return config_edit(lambda c: c["quantization"].update(changes))


REFUSED: dict[str, tuple[Edit, str]] = {
    "mxfp4": (settings_edit(mode="mxfp4"), "unknown mode 'mxfp4'; known: affine; open the float original"),
    "nvfp4 of one layer": (settings_edit(**{M: {"mode": "nvfp4", "bits": 4, "group_size": 16}}), "unknown mode 'nvfp4'"),
    "seven bits": (settings_edit(bits=7), "7 bits in groups of 64; MLX has 1..6 and 8 bits"),
    "bits as text": (settings_edit(bits="4"), "4 bits in groups of 64; MLX has"),
    "bits true": (settings_edit(bits=True), "True bits in groups of 64; MLX has"),
    "bits a float": (settings_edit(bits=4.0), "4.0 bits in groups of 64; MLX has"),
    "another group": (settings_edit(group_size=16), "4 bits in groups of 16; MLX has 1..6 and 8 bits, groups (32, 64, 128)"),
    "no object": (settings_edit(**{M: 4}), "quantization is 4, needs an object"),
    "said to be float": (settings_edit(**{M: False}), "quantization says false, but the weight is packed"),
    "other bits": (settings_edit(bits=8), "scales is ('F16', (128, 2)), int8_g64m of 128 x 64 needs F16 (128, 1)"),
    "bits that do not divide": (settings_edit(bits=3), "rows of 16 words are no whole groups of int3_g64m"),
    "other groups": (settings_edit(group_size=32), "scales is ('F16', (128, 2)), int4_g32m of 128 x 128 needs F16 (128, 4)"),
    "no scales": (tensor_edit(lambda t: t.pop(f"{M}.scales")), "scales is missing, int4_g64m of 128 x 128 needs"),
    "no biases": (tensor_edit(lambda t: t.pop(f"{M}.biases")), "biases is missing"),
    "integer scales": (tensor_edit(lambda t: t.update({f"{M}.scales": t[f"{M}.scales"].to(torch.uint8)})), "scales is ('U8', (128, 2))"),
    "three axes": (tensor_edit(lambda t: t.update({Q: t[Q][None]})), "has shape [1, 128, 16], needs (rows, words)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_malformed_is_refused(case: str, model: Path, tmp_path: Path) -> None:
    change, text = REFUSED[case]
    quantized("mlx", tmp_path / "m", model, lambda n: "int4_g64m" if n == Q else None)
    change(tmp_path / "m")
    with pytest.raises(ContainerError) as caught:
        open_checkpoint(tmp_path / "m")
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_no_quantization_at_all(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m", config={"quantization": 4})
    with pytest.raises(ContainerError, match="quantization is 4, needs an object"):
        CONTAINERS["mlx"].open(path)


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_scales_and_biases_that_are_no_float16_are_float32(part: str, model: Path, tmp_path: Path) -> None:
    quantized("mlx", tmp_path / "m", model, lambda n: "int4_g64m" if n == Q else None)
    tensor_edit(lambda t: t.update({f"{M}.{part}": t[f"{M}.{part}"].float() / 3}))(tmp_path / "m")
    found = open_checkpoint(tmp_path / "m").read(Q)
    assert found.format == "int4_g64mf" and {a.dtype for n, a in found.fields.items() if n != "codes"} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(values(found), dict(READERS["mlx"].weights(tmp_path / "m"))[Q])


@pytest.mark.parametrize(("name", "shape"), [("a.weight", (2, 64, 64)), ("a.experts", (64, 64))])
def test_what_is_no_matrix_is_not_written(name: str, shape: tuple[int, ...], model: Path, tmp_path: Path) -> None:
    info = TensorInfo(name, "int4_g64m", shape, get_format("int4_g64m").nbytes(shape))
    with pytest.raises(ContainerError, match=f"{name} is no matrix of a layer, which is all that mlx quantizes"):
        CONTAINERS["mlx"].create(tmp_path / "m", open_checkpoint(model).description, [info])
