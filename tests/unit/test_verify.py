"""verify's own parts: digests, the proof file, the lint's findings one by one, the original, the logits, the reader in another Python."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from directories import config_edit
from model_files import load_parts, save_parts
from tersor.cli import execute
from tersor.containers import open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.conversion import convert
from tersor.errors import ContainerError, ModelError
from tersor.formats import get_format
from tersor.formats.exact import exactly
from tersor.pipeline import quantize
from tersor.tensor import Array
from tersor.verification.digests import file_digests, values_digest
from tersor.verification.independent import independent_reader
from tersor.verification.lint import lint
from tersor.verification.logits import compare_logits
from tersor.verification.original import compare_with_original
from tersor.verification.record import Fault, Verification, drop_proof, proof_path, read_proof, write_proof
from tersor.verification.remote import remote_version, remote_weights
from tersor.verification.runtimes.runtime import Runtime
from tersor.verification.verify import verify
from tiny import tiny_model

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(autouse=True)
def no_gptqmodel() -> Iterator[None]:
    """Another Python takes ten seconds to start, and there is nothing that it sees and the digests do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TERSOR_PYTHON_GPTQMODEL", raising=False)
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "hf", layers=1, tie=False)


def quantized(source: Path, out: Path, recipe: str = "rtn:int4_g32", to: str = "compressed-tensors", **options: Any) -> Path:
    quantize(source, out, recipe, to=to, **options)
    return out


def damage(path: Path, name: str, at: int = 3, bit: int = 2) -> None:
    parts = load_parts(path)
    parts[name].data[at] ^= 1 << bit
    save_parts(path, parts)


def without(path: Path, *names: str) -> Path:
    parts = load_parts(path)
    for name in names:
        del parts[name]
    save_parts(path, parts)
    return path


# --- digests --------------------------------------------------------------------------------------------------------------


def test_a_digest_is_of_values_not_of_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    q4_0 = get_format("q4_0").quantize(w)
    other = exactly(q4_0, "int4_g32s")
    assert other is not None and values_digest(other) == values_digest(q4_0)
    values = np.ascontiguousarray(get_format("q4_0").dequantize(q4_0)) + np.float32(0)
    assert values_digest(q4_0) == hashlib.sha256(b"(96, 64)" + values.astype("<f4").tobytes()).hexdigest()
    whole = values_digest(q4_0)
    monkeypatch.setattr("tersor.verification.digests.SLAB_VALUES", 64 * 7)  # slabs of 7 rows, the last one short
    assert values_digest(q4_0) == whole
    assert values_digest(get_format("f32").quantize(w)) != whole


def test_zero_has_no_sign_but_a_shape() -> None:
    f32 = get_format("f32")
    zeros, negative = (values_digest(f32.quantize(np.full((2, 4), z, np.float32))) for z in (0.0, -0.0))
    assert zeros == negative != values_digest(f32.quantize(np.zeros((4, 2), np.float32)))


def test_file_digests(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.bin").write_bytes(bytes(3 << 20))
    assert file_digests([tmp_path / "a" / "b.bin"], tmp_path) == {"a/b.bin": hashlib.sha256(bytes(3 << 20)).hexdigest()}


# --- the proof ------------------------------------------------------------------------------------------------------------


def record(**changes: Any) -> Verification:
    given: dict[str, Any] = {"path": "m", "container": "gguf", "tersor": "0", "reader": "gguf 1", "compared": 1, "faults": ()}
    given |= {"findings": (), "notes": (), "files": {"m.gguf": "f"}, "tensors": {UP: "d"}} | changes
    return Verification(**given)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "verified"),
        ({"findings": (Fault("a", "b"),)}, "verified"),
        ({"reader": "", "compared": 0}, "not proven"),
        ({"compared": 0}, "not proven"),
        ({"faults": (Fault("a", "b"),)}, "failed"),
    ],
)
def test_verdict(changes: dict[str, Any], verdict: str) -> None:
    assert record(**changes).verdict == verdict == record(**changes).to_dict()["verdict"]


def test_where_the_proof_is(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    assert proof_path(tmp_path) == tmp_path / "verification.json"
    assert proof_path(file) == tmp_path / "m.gguf.verification.json"
    assert read_proof(file) is None
    write_proof(file, record(seconds=3.0))
    proof = read_proof(file)
    assert proof is not None and proof["tensors"] == {UP: "d"} and not {"path", "seconds"} & set(proof)
    drop_proof(file)
    drop_proof(file)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.gguf"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "holds no digests of files and tensors"),
        (b'{"files": {}}', "holds no digests of files and tensors"),
        (b'{"files": {"a": 1}, "tensors": {}}', "holds no digests of files and tensors"),
    ],
)
def test_a_damaged_proof_is_refused(text: bytes, why: str, source: Path) -> None:
    (source / "verification.json").write_bytes(text)
    with pytest.raises(ContainerError, match=f"verification.json: {why}.*delete it to verify the model without it"):
        verify(source, logits=False)


@pytest.mark.parametrize("name", ["m", "m.gguf"])
def test_a_moved_model_still_verifies(name: str, source: Path, tmp_path: Path) -> None:
    path = quantized(
        source, tmp_path / name, "rtn:q4_0" if "." in name else "rtn:int4_g32", "gguf" if "." in name else "compressed-tensors"
    )
    (tmp_path / "else").mkdir()
    moved = tmp_path / "else" / name
    shutil.move(path, moved)
    if moved.is_file():
        shutil.move(f"{path}.verification.json", moved.parent)
    result = verify(moved, logits=False)
    assert result.verdict == "verified" and result.notes == ()


def test_a_good_proof_is_kept_when_the_file_is_damaged(source: Path, tmp_path: Path) -> None:
    path = quantized(source, tmp_path / "m")
    proof = (path / "verification.json").read_bytes()
    damage(path, UP.replace("weight", "weight_packed"))
    for _ in range(2):
        result = verify(path, logits=False)
        assert [str(f) for f in result.faults] == [
            "model.safetensors: its bytes are not those that were verified",
            f"{UP}: its values are not those that were meant",
        ]
        assert (path / "verification.json").read_bytes() == proof


def test_files_and_tensors_that_went_missing(source: Path, tmp_path: Path) -> None:
    path = without(quantized(source, tmp_path / "m"), NORM)
    (path / "generation_config.json").unlink()
    (path / "notes.txt").write_text("mine")  # more files do not matter
    lines = [str(f) for f in verify(path, logits=False).faults]
    assert "generation_config.json: was verified and is missing" in lines and f"{NORM}: was to be written and is missing" in lines
    assert not any("notes.txt" in line for line in lines)


def test_a_tensor_that_nobody_meant(source: Path, tmp_path: Path) -> None:
    path = quantized(source, tmp_path / "m")
    parts = load_parts(path)
    parts["model.extra.weight"] = parts[NORM]
    save_parts(path, parts)
    assert "model.extra.weight: was never to be written" in [str(f) for f in verify(path, logits=False).faults]


def test_without_a_proof_nothing_is_known_of_what_was_meant(source: Path) -> None:
    first = verify(source, logits=False)
    assert first.verdict == "verified" and first.notes == (
        "nothing is known of what was meant: no verification.json; give --against ORIGINAL",
    )
    assert verify(source, logits=False).notes == ()  # now there is one


def test_nothing_is_left_behind_on_demand(source: Path) -> None:
    verify(source, logits=False, keep=False)
    assert not (source / "verification.json").exists()


@pytest.mark.parametrize("again", [quantize, convert])
@pytest.mark.parametrize("to", ["huggingface", "gguf"])
def test_writing_anew_without_verification_drops_the_old_one(again: Callable[..., Any], to: str, source: Path, tmp_path: Path) -> None:
    path = quantized(source, tmp_path / ("m.gguf" if to == "gguf" else "m"), "f16", to)
    assert proof_path(path).is_file()
    again(source, path, to=to, force=True, verify=False, **({"recipe": "f32"} if again is quantize else {}))
    assert not proof_path(path).exists()


def test_a_reader_that_would_need_too_much_memory_is_not_asked(source: Path) -> None:
    result = verify(source, logits=False, max_ram=1 << 20)
    assert result.verdict == "not proven" and "no independent reader: it would take" in result.notes[-1]


def test_a_reader_that_disagrees(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.verification.readers import READERS

    def weights(self: object, path: Path) -> Any:
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint.tensors:
                values = get_format("f32").dequantize(checkpoint.read(name)).copy()
                if name == UP:
                    values[3, 5] += 2
                if name == NORM:
                    continue
                yield name, values[:-1] if name == "model.norm.weight" else values
        yield "more", values

    monkeypatch.setattr(type(READERS["huggingface"]), "weights", weights)
    result = verify(source, logits=False)
    assert sorted(str(f).replace(result.reader, "READER") for f in result.faults) == [
        f"{NORM}: we find it, READER does not",
        f"{UP}: READER reads other values than we do: 1 of 8192, by up to 2",
        "model.norm.weight: READER reads the shape [63], we read [64]",
        "more: READER finds it, we do not",
    ]


# --- the lint -------------------------------------------------------------------------------------------------------------


def findings(path: Path) -> list[str]:
    with open_checkpoint(path) as checkpoint:
        return [str(fault) for fault in lint(checkpoint)]


def test_nothing_is_wrong_with_a_good_model(source: Path, tmp_path: Path) -> None:
    assert findings(source) == [] == findings(quantized(source, tmp_path / "m"))


def test_head_missing(source: Path) -> None:
    without(source, "lm_head.weight")
    assert findings(source)[0].startswith("lm_head.weight: is missing and config.json does not tie it to the embedding")


def test_head_stored_though_tied(source: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        config = {**checkpoint.description.config, "tie_word_embeddings": True}
        checkpoint.description = replace(checkpoint.description, config=config)
        assert [str(f) for f in lint(checkpoint)] == [
            "lm_head.weight: is stored though config.json ties it to the embedding: loaders ignore one of the two"
        ]


def test_tensors_of_the_architecture_missing(source: Path) -> None:
    without(source, NORM, "model.norm.weight")
    assert findings(source) == [f"{NORM}: and 1 more tensors of the architecture are missing: loaders make random ones"]


def test_matrices_left_in_float(source: Path, tmp_path: Path) -> None:
    path = quantized(source, tmp_path / "m", "rtn:int4_g32m, down_proj=f16", "mlx")
    assert findings(path) == ["model.layers.0.mlp.down_proj.weight: 1 matrices of the blocks are not quantized, 11 % of all weights"]


def moved(w: Array) -> Array:
    return w + np.float32(0.5) * w.std()


def test_zero_points_off(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "hf", layers=1, tie=False)
    tensors = {n: np.frombuffer(p.data, np.float32).reshape(p.shape) for n, p in load_parts(source).items() if "_proj" in n}
    shifted = tiny_model(tmp_path / "shifted", layers=1, tie=False, change={n: moved(w) for n, w in tensors.items()})
    path = quantized(shifted, tmp_path / "m")
    assert len(findings(path)) == 1 and "the mean of 7 matrices is far from 0: zero points off by one" in findings(path)[0]
    one = tiny_model(tmp_path / "one", layers=1, tie=False, change={UP: moved(tensors[UP])})
    assert findings(quantized(one, tmp_path / "m1")) == []  # one alone may be so


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("order", ["", "o"])
def test_zeros_beside_the_middle(bits: int, order: str, source: Path, tmp_path: Path) -> None:
    path = quantized(source, tmp_path / "m", f"rtn:int{bits}_g32s{order}", "gptq")
    config_edit(lambda config: config["quantization_config"].update(checkpoint_format="gptq_v2"))(path)
    lines = findings(path)
    assert len(lines) == 1 and "all zero points of 7 matrices are one beside the middle: GPTQ v1 and v2 mixed up" in lines[0]


def test_values_that_are_no_numbers_or_all_the_same(source: Path, tmp_path: Path) -> None:
    path = quantized(source, tmp_path / "m")
    parts = load_parts(path)
    parts[UP.replace("weight", "weight_scale")].data[:] = b"\xff\x7f" * 256
    gate = "model.layers.0.mlp.gate_proj.weight_scale"
    parts[gate].data[:] = bytes(len(parts[gate].data))
    save_parts(path, parts)
    lines = findings(path)
    assert f"{UP}: holds values that are not finite" in lines
    assert "model.layers.0.mlp.gate_proj.weight: all its weights are equal" in lines


def test_layers_that_engines_join(source: Path, tmp_path: Path) -> None:
    path = quantized(source, tmp_path / "m", "rtn:int4_g32, up_proj=rtn:int8_g32")
    (line,) = findings(path)
    assert line.startswith("model.layers.0.mlp.[gate_proj|up_proj]: int4_g32, int8_g32 (1 such): vLLM and SGLang join these layers")
    assert findings(quantized(source, tmp_path / "mlx", "rtn:int4_g32m, up_proj=rtn:int8_g32m", "mlx")) == []


def test_tokenizer_missing(source: Path) -> None:
    (source / "tokenizer.json").unlink()
    assert findings(source) == ["tokenizer.json: is missing: no program can turn text into tokens"]


def test_chat_template_missing(source: Path) -> None:
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert findings(source) == [
        "chat_template.jinja: is missing: chat programs guess how to ask, and a model that was trained otherwise answers badly"
    ]


def test_end_of_text_missing(source: Path) -> None:
    config_edit(lambda config: config.pop("eos_token_id"))(source)
    (source / "generation_config.json").write_text("[")  # damaged is as good as none
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    assert findings(source) == ["generation_config.json: no eos_token_id anywhere: generation does not stop"]


# --- the original ---------------------------------------------------------------------------------------------------------


def against(path: Path, original: Path) -> tuple[list[str], list[str], dict[str, Any]]:
    with open_checkpoint(path) as checkpoint:
        faults, notes, found = compare_with_original(checkpoint, original)
        return [str(f) for f in faults], notes, found


@pytest.mark.parametrize("recipe", ["rtn:int2_g32", "hqq:int4_g32z", "rtn:nf4_dq", "clip:int3_g32", "f16", "bf16"])
def test_what_methods_lose_is_no_fault(recipe: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.verification.original._predictions", lambda *given: {"kl": 0.0})
    to = {"z": "hqq", "q": "bnb", "6": "huggingface"}.get(recipe[-1], "compressed-tensors")
    assert against(quantized(source, tmp_path / "m", recipe, to), source) == ([], [], {"original": str(source), "kl": 0.0})


def test_figures_of_the_predictions(source: Path, tmp_path: Path) -> None:
    result = verify(quantized(source, tmp_path / "m"), source, logits=False)
    assert result.verdict == "verified" and 0 < result.against["kl"] < 1 and 0 < result.against["top1"] <= 1


def test_another_models_original(source: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", layers=1, tie=False, intermediate=64)
    with pytest.raises(ModelError, match=r"other: model.layers.0.mlp.gate_proj.weight is \[64, 64\].*it is not its original"):
        against(source, other)
    stranger = tiny_model(tmp_path / "stranger", layers=1, tie=False, seed=1)
    with open_checkpoint(source) as ours:
        norms = {n: np.array(ours.read(n).fields["values"][0]) for n in ours.tensors if "norm" in n}
    stranger = tiny_model(tmp_path / "stranger", layers=1, tie=False, seed=1, change=norms)
    faults, _, _ = against(source, stranger)
    assert f"{UP}: is 1.41 of its size away from the original, but f32 loses nothing; it is not what was meant" in faults


def test_where_norms_moved_weights_say_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.verification.original._predictions", lambda *given: {})
    other = tiny_model(tmp_path / "other", layers=1, tie=False, seed=1)
    faults, notes, _ = against(source, other)
    assert faults == [] and notes[0].startswith("norms differ from the original's: scale was moved between layers")


def test_zero_stays_zero(tmp_path: Path) -> None:
    zero = tiny_model(tmp_path / "zero", layers=1, change={UP: np.zeros((128, 64), np.float32)})
    assert against(zero, zero)[0] == []
    assert f"{UP}: the original's is 0, this one is not" in against(tiny_model(tmp_path / "m", layers=1), zero)[0]


def test_a_head_that_is_the_embedding_may_be_stored_or_not(tmp_path: Path) -> None:
    tied = tiny_model(tmp_path / "tied", layers=1)
    parts = load_parts(tied)
    embedding = np.frombuffer(parts["model.embed_tokens.weight"].data, np.float32).reshape(-1, 64)
    stored = tiny_model(tmp_path / "stored", layers=1, tie=False, change={"lm_head.weight": embedding})
    assert against(stored, tied)[0] == [] == against(tied, stored)[0]
    own = tiny_model(tmp_path / "own", layers=1, tie=False)
    assert against(tied, own)[0] == ["lm_head.weight: is missing; the original has it"]
    assert against(own, tied)[0][0].startswith("lm_head.weight: is 1.4")


def test_predictions_that_cannot_be_made_are_a_note(source: Path, tmp_path: Path) -> None:
    path = quantized(source, tmp_path / "m")
    (path / "tokenizer.json").unlink()
    faults, notes, _ = against(path, source)
    assert faults == [] and len(notes) == 1 and notes[0].startswith("predictions were not compared: ")


def test_predictions_of_an_unknown_architecture(source: Path, tmp_path: Path) -> None:
    for path in (source, quantized(source, tmp_path / "m")):
        config_edit(lambda config: config.update(model_type="falcon"))(path)
    assert against(tmp_path / "m", source)[1] == ["predictions were not compared: the engine does not run falcon"]


# --- the logits -----------------------------------------------------------------------------------------------------------


class Faked(Runtime):
    """Gives the engine's logits, changed."""

    name = "faked"

    def __init__(self, change: Callable[[Array], Array], why: str | None = None) -> None:
        self.change, self.why = change, why

    def missing(self, container: str) -> str | None:
        return self.why

    def logits(self, checkpoint: Checkpoint, tokens: Array) -> Array:
        from tersor.engine import load

        model = load(checkpoint, activations="float", kv="f32")
        return self.change(model.head(model.forward(tokens, model.new_cache(len(tokens)))))


def faked(monkeypatch: pytest.MonkeyPatch, path: Path, change: Callable[[Array], Array], why: str | None = None) -> Any:
    monkeypatch.setattr("tersor.verification.logits.runtime_of", lambda container: Faked(change, why))
    with open_checkpoint(path) as checkpoint:
        return compare_logits(checkpoint)


def test_same_logits(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, faults, notes = faked(monkeypatch, source, lambda logits: logits + np.float32(3))  # the same distribution
    assert (faults, notes) == ([], []) and measured.runtime == "faked" and measured.tokens == 96
    assert 0 <= measured.kl < 1e-9 and measured.largest < 1e-4


def test_other_logits(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, faults, _ = faked(monkeypatch, source, lambda logits: logits[:, ::-1])
    assert measured.kl > 1e-3 and str(faults[0]).startswith(f"{source}: its logits in faked differ from ours: KL ")


def test_logits_of_another_shape(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, faults, _ = faked(monkeypatch, source, lambda logits: logits[:, :-1])
    assert [f.text for f in faults] == ["faked gives [96, 319] logits, the engine [96, 320]"]


def broken(logits: Array) -> Array:
    raise RuntimeError("out of order")


def test_a_runtime_that_breaks(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [f.text for f in faked(monkeypatch, source, broken)[1]] == ["faked cannot run it: RuntimeError: out of order"]


def test_a_runtime_that_is_not_there(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert faked(monkeypatch, source, broken, "it is not installed") == (None, [], ["logits were not compared: it is not installed"])


def test_a_model_that_the_engine_cannot_run(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(source, NORM)
    (fault,) = faked(monkeypatch, source, broken)[1]
    assert fault.text.startswith("our engine cannot run it: ") and NORM in fault.text


def test_an_architecture_without_engine(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_edit(lambda config: config.update(model_type="falcon"))(source)
    assert faked(monkeypatch, source, broken)[2] == ["logits were not compared: the engine does not run falcon"]


def test_a_model_too_large_to_run_in_float(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tersor.verification.logits.MAX_FLOAT_BYTES", 1 << 10)
    assert "of float32 weights, more than" in faked(monkeypatch, source, broken)[2][0]


def test_without_tokenizer_any_tokens_do(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "tokenizer.json").unlink()
    measured, faults, _ = faked(monkeypatch, source, lambda logits: logits)
    assert faults == [] and measured.tokens == 96


# --- a reader in another Python -------------------------------------------------------------------------------------------


def test_a_reader_in_another_python(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = quantized(source, tmp_path / "m.gguf", "rtn:q4_0", "gguf")
    own = verify(path, logits=False)
    monkeypatch.setenv("TERSOR_PYTHON_GGUF", sys.executable)
    found = independent_reader("gguf")
    assert not isinstance(found, str) and found.python == sys.executable
    result = verify(path, logits=False)
    assert (result.verdict, result.reader, result.compared) == ("verified", own.reader, own.compared)


def test_what_the_other_reader_raises(source: Path) -> None:
    (source / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ContainerError, match=f"{sys.executable}: SafetensorError: "):
        list(remote_weights(sys.executable, "huggingface", source))


def test_another_python_without_the_package(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remote_version(sys.executable, "no-such-package") is None
    monkeypatch.setenv("TERSOR_PYTHON_SAFETENSORS", "/no/such/python")
    result = verify(source, logits=False)
    assert result.verdict == "not proven" and "no independent reader: /no/such/python has no safetensors" in result.notes


@pytest.mark.parametrize("output", [b"", b'{"name": "a", "shape": [2]}\\n1234'])
def test_another_python_that_ends_early(output: bytes, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '{output.decode()}'\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(ContainerError, match="the reader ended before its last tensor"):
        list(remote_weights(str(python), "gguf", tmp_path))


# --- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Returns (exit code, standard output) of the program."""

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        return execute([str(argument) for argument in arguments]), capsys.readouterr().out

    return call


Run = Callable[..., tuple[int, str]]


def test_command(source: Path, tmp_path: Path, run: Run) -> None:
    path = quantized(source, tmp_path / "m")
    code, text = run("verify", path, "--no-logits")
    assert code == 0 and f"{path}: verified" in text and "tensors read by compressed-tensors" in text
    damage(path, UP.replace("weight", "weight_packed"))
    code, text = run("verify", path, "--no-logits")
    assert code == 1 and "wrong:" in text and f"{UP}: its values are not those that were meant" in text
    (path / "model.safetensors").write_bytes(b"")
    assert run("verify", path, "--no-logits")[0] == 2  # as every error that ends a command


def test_command_as_json(source: Path, tmp_path: Path, run: Run) -> None:
    path = quantized(source, tmp_path / "m")
    code, text = run("verify", path, "--json", "--against", source)
    found = json.loads(text)
    assert code == 0 and found["verdict"] == "verified" and found["faults"] == [] and found["logits"]["kl"] < 1e-6
    assert found["tensors"][UP] and found["files"]["model.safetensors"] and found["against"]["kl"] > 0
    damage(path, UP.replace("weight", "weight_packed"))
    code, text = run("verify", path, "--json", "--no-logits")
    assert code == 1 and {"where": UP, "text": "its values are not those that were meant"} in json.loads(text)["faults"]


def test_suspicions_are_no_failure(source: Path, run: Run) -> None:
    (source / "tokenizer.json").unlink()
    code, text = run("verify", source, "--no-logits")
    assert code == 0 and "suspicious:" in text and "tokenizer.json: is missing" in text


def test_a_failure_is_no_measure_of_what_follows(tmp_path: Path) -> None:
    """A file that fails and is fetched again is compared with what was meant, not with its broken self."""
    source = tiny_model(tmp_path / "hf")
    path = tmp_path / "m.gguf"
    quantize(source, path, "q4_0", verify=False)
    good, other = path.read_bytes(), tmp_path / "other"
    tiny_model(other, change={"model.layers.0.mlp.up_proj.weight": np.random.default_rng(9).standard_normal((128, 64)).astype(np.float32)})
    failed = verify(path, against=other, logits=False)
    assert failed.verdict == "failed" and not failed.tensors
    assert verify(path, against=source, logits=False).verdict == "verified"
    path.write_bytes(good)
    assert verify(path, logits=False).verdict == "verified"
