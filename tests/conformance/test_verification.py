"""Faults planted in files of every container: verify finds each, and says where.

Twice: beside the verification.json that the file was written with, and without it, as with a file from elsewhere, where the original
(`--against`), the lint and the checks at opening have to do. The files are damaged without tersor (model_files.py).

What only verification.json can tell is pinned by test_only_the_digests_tell: a flipped bit that changes less than a method may, of a
code, of a scale's or zero's low bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from directories import config_edit
from model_files import Part, load_parts, save_parts, weights_file
from tersor.containers import CONTAINERS
from tersor.errors import ContainerError, ModelError
from tersor.pipeline import quantize
from tersor.verification.verify import verify
from tiny import tiny_model

UP, GATE, NORM = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.input_layernorm"
GGUF_NAMES = {UP: "blk.0.ffn_up", GATE: "blk.0.ffn_gate", NORM: "blk.0.attn_norm"}

Parts = dict[str, Part]


@dataclass(frozen=True)
class Field:
    """Where a layer keeps something: bytes first to last of every `block` bytes of the part with this suffix."""

    suffix: str
    block: int = 1
    first: int = 0
    last: int | None = None

    def bytes(self, file: File, parts: Parts, module: str = UP) -> np.ndarray:
        """Returns a view of these bytes, uint8 (blocks, n), of a module."""
        part = parts[f"{file.stored(module)}{self.suffix}"]
        return np.frombuffer(part.data, np.uint8).reshape(-1, self.block)[:, self.first : self.last]


@dataclass(frozen=True)
class File:
    """A kind of file to damage. scales: of float16 when their block has 2 bytes, float32 with 4. nibbles: of packed codes."""

    container: str
    recipe: str
    codes: Field
    scales: Field | None = None
    zeros: Field | None = None
    nibbles: bool = True

    def __str__(self) -> str:
        return f"{self.container}-{self.recipe.partition(':')[2] or self.recipe}"

    def stored(self, module: str) -> str:
        """Returns what the file calls a module."""
        return GGUF_NAMES[module] if self.container == "gguf" else module


F16 = partial(Field, block=2)
FILES = (
    File("huggingface", "f16", F16(".weight"), nibbles=False),
    File("gptq", "rtn:int4_g32", Field(".qweight"), F16(".scales"), Field(".qzeros")),
    File("gptq", "rtn:int4_g32s", Field(".qweight"), F16(".scales"), Field(".qzeros")),
    File("gptq", "rtn:int8_g32o", Field(".qweight"), F16(".scales"), Field(".qzeros"), nibbles=False),
    File("awq", "rtn:int4_g32", Field(".qweight"), F16(".scales"), Field(".qzeros")),
    File("compressed-tensors", "rtn:int4_g32", Field(".weight_packed"), F16(".weight_scale"), Field(".weight_zero_point")),
    File("compressed-tensors", "rtn:int4_g32so", Field(".weight_packed"), F16(".weight_scale")),
    File("compressed-tensors", "rtn:int8_cs", Field(".weight"), F16(".weight_scale"), nibbles=False),
    File("compressed-tensors", "rtn:nvfp4_gs", Field(".weight_packed"), Field(".weight_scale")),
    File("bnb", "rtn:nf4", Field(".weight"), Field(".weight.absmax", block=4)),
    File("bnb", "rtn:nf4_dq", Field(".weight"), Field(".weight.nested_absmax", block=4)),
    File("bnb", "rtn:int8_row", Field(".weight"), Field(".SCB", block=4), nibbles=False),
    File("hqq", "rtn:int4_g32z", Field(".W_q"), F16(".scale"), F16(".zero")),
    File("mlx", "rtn:int4_g32m", Field(".weight"), F16(".scales"), F16(".biases")),
    File("onnx", "rtn:int4_g32", Field(".qweight"), Field(".scales", block=4), Field(".qzeros")),
    File("gguf", "rtn:q4_0", Field(".weight", 18, 2), Field(".weight", 18, 0, 2)),
    File("gguf", "rtn:q4_1", Field(".weight", 20, 4), Field(".weight", 20, 0, 2), Field(".weight", 20, 2, 4)),
    File("gguf", "rtn:q8_0", Field(".weight", 34, 2), Field(".weight", 34, 0, 2), nibbles=False),
)
Damage = Callable[[File, Path], None]


def parts_damage(change: Callable[[File, Parts], None]) -> Damage:
    """Returns the damage that a change of the stored tensors does."""

    def apply(file: File, path: Path) -> None:
        parts = load_parts(path)
        change(file, parts)
        save_parts(path, parts)

    return apply


def flip(field: Field, byte: int, bit: int) -> Callable[[File, Parts], None]:
    def change(file: File, parts: Parts) -> None:
        values = field.bytes(file, parts)
        values[7 % len(values), byte] ^= np.uint8(1 << bit)

    return change


def swap_nibbles(file: File, parts: Parts) -> None:
    """The two codes of every byte change places."""
    codes = file.codes.bytes(file, parts)
    codes[:] = codes << 4 | codes >> 4


def awq_in_plain_order(file: File, parts: Parts) -> None:
    """The eight codes of a word in the order of their outputs, as gemv_fast has them, not 0 2 4 6 1 3 5 7."""
    part = parts[f"{UP}.qweight"]
    words = np.frombuffer(part.data, "<u4")
    nibbles = [words >> 4 * place & 15 for place in range(8)]
    outputs = [nibbles[place] for place in (0, 4, 1, 5, 2, 6, 3, 7)]
    words[:] = sum(value << 4 * place for place, value in enumerate(outputs))


def swap_bytes(file: File, parts: Parts) -> None:
    """Float16 values with their bytes in big-endian order."""
    values = np.frombuffer(parts[f"{UP}.weight"].data, np.uint16)
    values[:] = values.byteswap()


def transpose_scales(file: File, parts: Parts) -> None:
    """Scales (rows, groups) laid down as (groups, rows) or the other way, under the shape they had."""
    assert file.scales is not None
    scales = file.scales.bytes(file, parts)
    shape = parts[f"{file.stored(UP)}{file.scales.suffix}"].shape
    first = shape[0] if shape[1] > 1 else 128  # hqq has (rows * groups, 1)
    scales[:] = scales.reshape(first, -1, scales.shape[1]).swapaxes(0, 1).reshape(scales.shape).copy()


def turn_shape_of_scales(file: File, parts: Parts) -> None:
    assert file.scales is not None
    part = parts[f"{file.stored(UP)}{file.scales.suffix}"]
    part.shape = part.shape[::-1]


def relabel_scales(file: File, parts: Parts) -> None:
    """The same bytes under another dtype of the same width."""
    assert file.scales is not None
    part = parts[f"{file.stored(UP)}{file.scales.suffix}"]
    if file.container == "gguf":
        from gguf import GGMLQuantizationType as Type

        same_size = {Type.Q4_0: Type.IQ4_NL}
        part.dtype = same_size[part.dtype]
    elif file.container == "onnx":
        part.dtype = 6  # INT32
    else:
        part.dtype = {"F16": "BF16", "F32": "I32", "F8_E4M3": "U8", "U8": "I8"}[part.dtype]


def of_module(file: File, parts: Parts, module: str) -> list[str]:
    return [name for name in parts if name.startswith(f"{file.stored(module)}.")]


def swap_gate_and_up(file: File, parts: Parts) -> None:
    for name in of_module(file, parts, UP):
        other = name.replace(file.stored(UP), file.stored(GATE))
        parts[name], parts[other] = parts[other], parts[name]


def misspell(file: File, parts: Parts) -> None:
    for name in of_module(file, parts, UP):
        parts[name.replace("up", "pu")] = parts.pop(name)


def remove_layer(file: File, parts: Parts) -> None:
    for name in of_module(file, parts, UP):
        del parts[name]


def remove_norm(file: File, parts: Parts) -> None:
    del parts[f"{file.stored(NORM)}.weight"]


def remove_scales(file: File, parts: Parts) -> None:
    assert file.scales is not None
    del parts[f"{file.stored(UP)}{file.scales.suffix}"]


def truncate(file: File, path: Path) -> None:
    weights = weights_file(path)
    weights.write_bytes(weights.read_bytes()[:-100])


def exponent_bit(field: Field) -> tuple[int, int]:
    """Returns (byte, bit) of a high bit of a value's exponent, in float16, float32, and of what has one byte."""
    width = (field.last or field.block) - field.first
    return {1: (0, 6), 2: (1, 4), 4: (3, 5)}[width]


def damages(file: File) -> dict[str, Damage]:
    """Returns what can be done to a file of this kind that is to be found with or without verification.json."""
    found = {
        "truncated": truncate,
        "gate and up swapped": parts_damage(swap_gate_and_up),
        "misspelt": parts_damage(misspell),
        "layer removed": parts_damage(remove_layer),
        "norm removed": parts_damage(remove_norm),
    }
    if file.nibbles:
        found["nibbles swapped"] = parts_damage(swap_nibbles)
    if file.container == "awq":
        found["plain order"] = parts_damage(awq_in_plain_order)
    if file.container == "huggingface":
        found["bytes swapped"] = parts_damage(swap_bytes)
    if file.scales is not None:
        found["bit of a scale"] = parts_damage(flip(file.scales, *exponent_bit(file.scales)))
        if file.container != "gguf":
            found["scales removed"] = parts_damage(remove_scales)
        if file.container not in ("gguf", "bnb"):
            found["shape of scales"] = parts_damage(turn_shape_of_scales)
        if file.container != "bnb" and file.recipe != "rtn:int8_cs":  # whose rows have one scale each here
            found["scales transposed"] = parts_damage(transpose_scales)
        if file.recipe not in ("rtn:q4_1", "rtn:q8_0"):
            found["dtype of scales"] = parts_damage(relabel_scales)
    if file.zeros is not None:
        byte, bit = (0, 7) if file.zeros.block == 1 else exponent_bit(file.zeros)
        found["bit of a zero"] = parts_damage(flip(file.zeros, byte, bit))
    if file.recipe.endswith("o"):
        found["g_idx dropped"] = parts_damage(drop_order)
        found["g_idx plain"] = parts_damage(plain_order)
    return found


def drop_order(file: File, parts: Parts) -> None:
    del parts[next(name for name in parts if name.startswith(UP) and name.endswith("g_idx"))]


def plain_order(file: File, parts: Parts) -> None:
    for name in [name for name in parts if name.endswith("g_idx")]:
        g_idx = np.frombuffer(parts[name].data, np.int32)
        g_idx[:] = np.sort(g_idx)


@pytest.fixture(autouse=True, scope="module")
def no_gptqmodel() -> Iterator[None]:
    """Another Python takes ten seconds to start, and there is nothing that it sees and the digests do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TERSOR_PYTHON_GPTQMODEL", raising=False)
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose inputs' columns differ in size, as those of trained ones do."""
    path = tmp_path_factory.mktemp("original") / "m"
    rng = np.random.default_rng(1)
    change = {
        f"{module}.weight": (rng.standard_normal((128, 64)) / 8 * np.exp(0.5 * rng.standard_normal(64))).astype(np.float32)
        for module in (UP, GATE)
    }
    return tiny_model(path, layers=1, tie=False, change=change)


@pytest.fixture(scope="module")
def written(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[File], Path]:
    """Returns the model as a file of this kind, with its verification.json."""
    done: dict[File, Path] = {}

    def write(file: File) -> Path:
        if file not in done:
            out = tmp_path_factory.mktemp("file") / ("m.gguf" if file.container == "gguf" else "m")
            result = quantize(original, out, file.recipe, to=file.container).verification
            assert result is not None and not result.faults and not result.findings
            assert result.verdict == ("not proven" if file.container == "gptq" else "verified")  # gptqmodel is not in every environment
            done[file] = out
        return done[file]

    return write


def copied(model: Path, folder: Path, proof: bool) -> Path:
    """Copies a model, with verification.json or without."""
    out = folder / model.name
    if model.is_file():
        shutil.copy(model, out)
        if proof:
            shutil.copy(model.with_name("m.gguf.verification.json"), folder)
    else:
        shutil.copytree(model, out)
        if not proof:
            (out / "verification.json").unlink()
    return out


def found(path: Path, against: Path | None = None) -> list[str]:
    """Returns all that verify says, one line each: faults, suspicions, or why the file does not open."""
    try:
        result = verify(path, against, logits=False, keep=False)
    except ContainerError as error:
        return [str(error)]
    return [str(fault) for fault in (*result.faults, *result.findings)]


def no_predictions(*arguments: object, **options: object) -> None:
    """In place of a slow comparison."""
    raise ModelError("not here")


CASES = [pytest.param(file, name, id=f"{file}-{name.replace(' ', '_')}") for file in FILES for name in damages(file)]


@pytest.mark.parametrize(("file", "name"), CASES)
def test_a_planted_fault_is_found(file: File, name: str, original: Path, written: Callable[[File], Path], tmp_path: Path) -> None:
    for proof in (True, False):
        folder = tmp_path / str(proof)
        folder.mkdir()
        path = copied(written(file), folder, proof)
        damages(file)[name](file, path)
        lines = found(path, None if proof else original)
        assert lines, f"{'with' if proof else 'without'} verification.json nothing is found"
        where = (UP, GATE, NORM, "blk.0.", "mlp.pu_proj") if name != "truncated" else (weights_file(path).name,)
        assert any(place in line for line in lines for place in where), lines


@pytest.mark.parametrize("file", FILES, ids=str)
def test_only_the_digests_tell(
    file: File, original: Path, written: Callable[[File], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit of a code, and low bits of scales and zeros: smaller than what methods do to weights."""
    monkeypatch.setattr("tersor.verification.original.evaluate", no_predictions)
    flips = [flip(file.codes, 0, 2)]
    for field in (file.scales, file.zeros if file.recipe != "rtn:int4_g32s" else None):  # whose zeros are all the same
        if field is not None:
            flips.append(flip(field, *((1, 5) if field.block == 4 else (0, 0))))  # float32: a bit that float16 has too
    for number, change in enumerate(flips):
        for proof in (True, False):
            folder = tmp_path / f"{number}{proof}"
            folder.mkdir()
            path = copied(written(file), folder, proof)
            parts_damage(change)(file, path)
            lines = found(path, None if proof else original)
            assert lines == [] if not proof else any(line.startswith(f"{UP}.weight: its values are not") for line in lines), lines


@pytest.mark.parametrize("recipe", ["int2_g32", "int3_g32s", "int4_g32", "int4_g32s", "int4_g32so", "int8_g32", "int8_g32s"])
def test_gptq_versions_mixed_up(recipe: str, original: Path, tmp_path: Path) -> None:
    """The config names the other version than the zeros are stored in. Of symmetric files the lint alone knows it."""
    path = tmp_path / "m"
    quantize(original, path, f"rtn:{recipe}", to="gptq")

    def other(config: dict[str, Any]) -> None:
        assert config["quantization_config"]["checkpoint_format"] == ("gptq" if "s" in recipe else "gptq_v2")
        config["quantization_config"]["checkpoint_format"] = "gptq_v2" if "s" in recipe else "gptq"

    config_edit(other)(path)
    lines = found(path)
    assert "config.json: its bytes are not those that were verified" in lines
    assert f"{UP}.weight: its values are not those that were meant" in lines
    (path / "verification.json").unlink()
    assert any("GPTQ v1 and v2 mixed up" in line or "it is not what was meant" in line for line in found(path, original))
    if "s" in recipe:
        assert any("one beside the middle: GPTQ v1 and v2 mixed up" in line for line in found(path))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("container", [name for name in CONTAINERS if name not in ("gguf", "onnx")])  # which have no such flag
def test_wrong_tie(container: str, tied: bool, tmp_path: Path) -> None:
    """config.json says the other thing about the head than the weights."""
    source = tiny_model(tmp_path / "hf", layers=1, tie=tied)
    recipe = next(file.recipe for file in FILES if file.container == container)
    path = tmp_path / "m"
    quantize(source, path, recipe, to=container)
    config_edit(lambda config: config.update(tie_word_embeddings=not tied))(path)
    assert any(line.startswith(("lm_head.weight", "config.json")) for line in found(path))
    (path / "verification.json").unlink()
    assert any(line.startswith("lm_head.weight: is") for line in found(path, source))


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_lost_head(container: str, original: Path, written: Callable[[File], Path], tmp_path: Path) -> None:
    """GGUF and ONNX say by what they store whether the head is the embedding."""
    file = next(file for file in FILES if file.container == container)
    for proof in (True, False):
        folder = tmp_path / str(proof)
        folder.mkdir()
        path = copied(written(file), folder, proof)
        parts = load_parts(path)
        for name in [name for name in parts if name.startswith(("output.", "lm_head."))]:
            del parts[name]
        save_parts(path, parts)
        assert any("lm_head" in line for line in found(path, None if proof else original))
