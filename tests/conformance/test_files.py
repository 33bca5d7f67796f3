"""Every container with every format that it holds, of every architecture: written by the pipeline, opened again by a reader that is
not ours, which finds every value that was meant.

Fast: on llama all formats (of affine groups g32 and those of FORMATS), one per container on the other architectures. Slow (make
test-all): the whole product, and the logits. gptqmodel, which reads GPTQ, takes ten seconds to start in its own environment, so the
loops of oracles/qweight_loops.py decode these files, and gptqmodel one of each architecture (all formats: test_gptq_container.py).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from model_files import load_parts
from oracles.qweight_loops import gptq_weights
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.formats import FORMATS, get_format
from tersor.pipeline import QuantizeResult, quantize
from tersor.verification.verify import verify
from tiny import ARCHITECTURES, tiny_model

BITS = (1, 2, 3, 4, 5, 6, 8)
SHAPE = (256, 256)  # of most matrices here: one super-block of ggml's k-quants a row
AFFINE = [
    f"int{bits}_{axis}{kind}{order}"
    for bits in BITS
    for axis in ("g32", "g128", "c")
    for kind in ("", "s", "m", "z")
    for order in ("", "o")
    if not (bits == 1 and kind == "s") and not (order and (kind in ("m", "z") or axis == "c"))
]
WIDE = [f"int{bits}_g32{kind}f" for bits in (3, 8) for kind in ("", "s", "m", "z")]
NAMES = list(dict.fromkeys([*FORMATS, *AFFINE, *WIDE]))
EXAMPLES = {
    "gguf": "q4_k",
    "huggingface": "bf16",
    "compressed-tensors": "int4_g128",
    "gptq": "int4_g128so",
    "awq": "int4_g128",
    "bnb": "nf4_dq",
    "hqq": "int4_g32z",
    "mlx": "int4_g32m",
    "onnx": "int4_g32",
}
HELD = [
    (container, format)
    for container in CONTAINERS
    for format in NAMES
    if CONTAINERS[container].holds(format) and get_format(format).can_encode and get_format(format).fits(SHAPE)
    if container == "huggingface" or format not in ("f32", "f16", "bf16")  # floats alone are no other directory
]
QUICK = [("llama", *case) for case in HELD if "g128" not in case[1]] + [
    (name, *case) for name in ARCHITECTURES if name != "llama" for case in EXAMPLES.items()
]
WHOLE = [(name, *case) for name in ARCHITECTURES for case in HELD if (name, *case) not in QUICK]
DTYPES = {"I32": "<i4", "F16": "<f2"}
GPTQMODEL = "TERSOR_PYTHON_GPTQMODEL"


@pytest.fixture
def no_gptqmodel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves GPTQ files to the loops."""
    monkeypatch.delenv(GPTQMODEL, raising=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each architecture; those whose users tie the head have it tied."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: tiny_model(folder / name, name, hidden=256, intermediate=256, layers=1, tie=name.startswith("gemma"), dtype="bf16")
        for name in ARCHITECTURES
    }


def written(model: Path, folder: Path, container: str, format: str, *, verified: bool = True) -> tuple[Path, QuantizeResult]:
    """Writes a model with all matrices of its blocks in the format."""
    path = folder / f"m{CONTAINERS[container].suffix}"
    result = quantize(model, path, f"rtn:{format}" if format not in ("f32", "f16", "bf16") else format, to=container, verify=verified)
    assert {t.format for t in result.tensors if "_proj" in t.name and len(t.shape) == 2} == {format}
    return path, result


def check(model: Path, folder: Path, container: str, format: str) -> None:
    """All is proven: by the reader, or where it is not installed here, by the loops."""
    path, result = written(model, folder, container, format)
    verification = result.verification
    assert verification is not None and verification.faults == () and verification.findings == ()
    if container == "gptq" and not verification.reader:
        check_with_loops(path)
        return
    assert verification.verdict == "verified" and verification.compared == len(verification.tensors) > 0, verification.notes


def check_with_loops(path: Path) -> None:
    stored = load_parts(path)
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    layers = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    assert len(layers) == 7
    with open_checkpoint(path) as checkpoint:
        for layer in layers[::3]:  # q, o, down
            kept = {part: stored[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
            parts = {name: np.frombuffer(part.data, DTYPES[part.dtype]).reshape(part.shape) for name, part in kept.items()}
            tensor = checkpoint.read(f"{layer}.weight")
            expected = gptq_weights(parts, config["bits"], int(config["checkpoint_format"] == "gptq"))
            np.testing.assert_array_equal(get_format(tensor.format).dequantize(tensor), expected, err_msg=layer)


@pytest.mark.usefixtures("no_gptqmodel")
@pytest.mark.parametrize(("model_type", "container", "format"), QUICK)
def test_every_value_comes_back(model_type: str, container: str, format: str, models: dict[str, Path], tmp_path: Path) -> None:
    check(models[model_type], tmp_path, container, format)


@pytest.mark.slow
@pytest.mark.usefixtures("no_gptqmodel")
@pytest.mark.parametrize(("model_type", "container", "format"), WHOLE)
def test_every_value_comes_back_of_all(model_type: str, container: str, format: str, models: dict[str, Path], tmp_path: Path) -> None:
    check(models[model_type], tmp_path, container, format)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("container", CONTAINERS)
def test_logits_are_those_of_another_runtime(container: str, model_type: str, models: dict[str, Path], tmp_path: Path) -> None:
    if container == "gptq":
        assert GPTQMODEL in os.environ, f"{GPTQMODEL} names no Python with gptqmodel; `make test-all` does"
    path, _ = written(models[model_type], tmp_path, container, EXAMPLES[container], verified=False)
    result = verify(path, logits=True)
    assert result.verdict == "verified", (result.faults, result.notes)
    assert result.logits is not None and result.logits.kl < 1e-6


def test_the_matrix_holds_all() -> None:
    """What is claimed: all bits, both kinds of zeros, with act-order and without, in every container that has them."""
    held = {container: {format for name, format in HELD if name == container} for container in CONTAINERS}
    for bits in (2, 3, 4, 8):
        assert {f"int{bits}_g128{kind}{order}" for kind in ("", "s") for order in ("", "o")} <= held["gptq"]
    for bits in BITS:
        assert {f"int{bits}_g32{order}" for order in ("", "o")} <= held["compressed-tensors"]
    assert {"int4_g32", "int4_g32s", "int4_c", "int4_cs"} <= held["awq"]
    assert {"nf4", "fp4", "nf4_dq", "fp4_dq", "int8_row"} <= held["bnb"]
    assert {f"int{bits}_g32{kind}" for bits in (1, 2, 3, 4, 8) for kind in ("z", "")} <= held["hqq"]
    assert {f"int{bits}_g32m" for bits in (2, 3, 4, 5, 6, 8)} <= held["mlx"]
    assert {"int8_g32mf"} <= held["mlx"] and {"int8_g32f", "int8_g32sf"} <= held["onnx"] & held["compressed-tensors"] & held["hqq"]
    assert {f"int{bits}_g32{kind}" for bits in (2, 4, 8) for kind in ("", "s")} <= held["onnx"]
    assert {"q4_0", "q5_1", "q8_0", "q2_k", "q6_k", "iq4_xs", "tq2_0", "mxfp4"} <= held["gguf"]
