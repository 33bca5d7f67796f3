"""Faults planted in files of every container: verify finds each, and says where.

Twice: beside the verification.json that the file was written with, and without it, as with a file from elsewhere, where the original
(`--against`), the lint and the checks at opening have to do. The files are damaged without tersor (model_files.py).

What only verification.json can tell is pinned by test_only_the_digests_tell: a flipped bit that changes less than a method may, of a
code, of a scale's or zero's low bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from model_files import Part, load_parts, save_parts, weights_file
from tersor.errors import ContainerError
from tersor.pipeline import quantize
from tersor.verification.verify import verify
from tiny import tiny_model

UP, GATE, NORM = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.input_layernorm"
HEAD = "lm_head.weight"
GGUF_NAMES = {UP: "blk.0.ffn_up", GATE: "blk.0.ffn_gate", NORM: "blk.0.attn_norm", "lm_head": "output"}

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
    File("huggingface", "f16", Field(".weight"), nibbles=False),
    File("gptq", "rtn:int4_g32", Field(".qweight"), F16(".scales"), Field(".qzeros")),
    File("gptq", "rtn:int4_g32s", Field(".qweight"), F16(".scales"), Field(".qzeros")),
    File("gptq", "rtn:int8_g32o", Field(".qweight"), F16(".scales"), Field(".qzeros"), nibbles=False),
    File("awq", "rtn:int4_g32", Field(".qweight"), F16(".scales"), Field(".qzeros")),
    File("compressed-tensors", "rtn:int4_g32", Field(".weight_packed"), F16(".weight_scale"), Field(".weight_zero_point")),
    File("compressed-tensors", "rtn:int4_g32so", Field(".weight_packed"), F16(".weight_scale")),
    File("compressed-tensors", "rtn:int8_cs", Field(".weight"), F16(".weight_scale"), nibbles=False),
    File("compressed-tensors", "rtn:nvfp4_gs", Field(".weight_packed"), Field(".weight_scale")),
    File("bnb", "rtn:nf4", Field(".weight"), Field(".weight.absmax", block=4)),
    File("bnb", "rtn:nf4_dq", Field(".weight"), Field(".weight.absmax")),
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
        field.bytes(file, parts)[7, byte] ^= np.uint8(1 << bit)

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
    rows, columns = parts[f"{file.stored(UP)}{file.codes.suffix}"].shape if file.container == "gguf" else (128, 64)
    shape = parts[f"{file.stored(UP)}{file.scales.suffix}"].shape
    first = shape[0] if len(shape) == 2 and shape[1] > 1 and file.container != "gguf" else rows
    scales[:] = scales.reshape(first, -1, scales.shape[1]).swapaxes(0, 1).reshape(scales.shape).copy()


def turn_shape_of_scales(file: File, parts: Parts) -> None:
    assert file.scales is not None
    part = parts[f"{file.stored(UP)}{file.scales.suffix}"]
    part.shape = (1, *part.shape) if len(part.shape) == 1 else part.shape[::-1]


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
        found["scales transposed"] = parts_damage(transpose_scales)
        if file.container != "gguf":
            found["shape of scales"] = parts_damage(turn_shape_of_scales)
            found["scales removed"] = parts_damage(remove_scales)
        if file.recipe not in ("rtn:q4_1", "rtn:q8_0"):
            found["dtype of scales"] = parts_damage(relabel_scales)
    if file.zeros is not None:
        byte, bit = (0, 7) if file.zeros.block == 1 else exponent_bit(file.zeros)
        found["bit of a zero"] = parts_damage(flip(file.zeros, byte, bit))
    if file.recipe.endswith("o"):
        found["g_idx dropped"] = parts_damage(drop_order)
        found["g_idx plain"] = parts_damage(plain_order)
    if file.recipe == "rtn:int8_cs":  # one scale a row: the same bytes either way
        del found["scales transposed"]
    if file.recipe == "rtn:int8_row":
        del found["scales transposed"]
    return found


def drop_order(file: File, parts: Parts) -> None:
    for name in [name for name in parts if name.endswith("g_idx")]:
        del parts[name]


def plain_order(file: File, parts: Parts) -> None:
    for name in [name for name in parts if name.endswith("g_idx")]:
        g_idx = np.frombuffer(parts[name].data, np.int32)
        g_idx[:] = np.sort(g_idx)


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


CASES = [pytest.param(file, name, id=f"{file}-{name.replace(' ', '_')}") for file in FILES for name in damages(file)]


@pytest.mark.parametrize(("file", "name"), CASES)
def test_a_planted_fault_is_found(
    file: File, name: str, original: Path, written: Callable[[File], Path], tmp_path: Path
) -> None:
    for proof in (True, False):
        folder = tmp_path / str(proof)
        folder.mkdir()
        path = copied(written(file), folder, proof)
        damages(file)[name](file, path)
        lines = found(path, None if proof else original)
        assert lines, f"{'with' if proof else 'without'} verification.json nothing is found"
        where = (weights_file(path).name,) if name == "truncated" else (UP, GATE, NORM, *GGUF_NAMES.values(), "g_idx", "proj")
        assert any(place in line for line in lines for place in where), lines


@pytest.mark.parametrize("file", FILES, ids=str)
def test_only_the_digests_tell(file: File, original: Path, written: Callable[[File], Path], tmp_path: Path) -> None:
    """A flipped bit of a code, and low bits of scales and zeros: smaller than what methods do to weights."""
    flips = [flip(file.codes, 0, 2)]
    flips += [flip(field, 0, 0) for field in (file.scales, file.zeros) if field is not None]
    for number, change in enumerate(flips):
        for proof in (True, False):
            folder = tmp_path / f"{number}{proof}"
            folder.mkdir()
            path = copied(written(file), folder, proof)
            parts_damage(change)(file, path)
            lines = found(path, None if proof else original)
            assert lines == [] if not proof else any(line.startswith(f"{UP}.weight: its values are not") for line in lines), lines
