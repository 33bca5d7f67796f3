"""Importance matrices from end to end: measured as transformers computes, taken by llama.cpp, and what a run by one weighs and refuses."""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import tersor
from tersor.calibration.imatrix import read_imatrix, write_imatrix
from tersor.cli import execute
from tersor.containers import open_checkpoint
from tersor.errors import ContainerError, ModelError, OutputError, RecipeError
from tersor.formats import get_format
from tersor.models import ARCHITECTURES
from tersor.tensor import Array, InputStatistics
from tiny import tiny_model

TOKENS = np.random.default_rng(3).integers(3, 200, (4, 32)).astype(np.int32)  # 128: sums of means are exact in float32
OPTIONS = {"samples": 4, "seqlen": 32}
DOWN, HEAD = "model.layers.1.mlp.down_proj.weight", "lm_head.weight"
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, untied, its tokens.npy and its i.gguf."""
    home = tmp_path_factory.mktemp("importance")
    tiny_model(home / "model", tie=False)
    np.save(home / "tokens.npy", TOKENS)
    result = tersor.imatrix(home / "model", home / "i.gguf", home / "tokens.npy", **OPTIONS)
    assert (result.entries, result.tokens, result.file_bytes) == (14, 128, (home / "i.gguf").stat().st_size)
    assert sorted(p.name for p in home.iterdir()) == ["i.gguf", "model", "tokens.npy"]
    return home


def statistics_file(path: Path, values: Mapping[str, Array]) -> Path:
    """Writes an importance matrix of these means of squares."""
    found = {name: InputStatistics(8, v.astype(np.float32), v, v) for name, v in values.items()}
    write_imatrix(path, found, "llama", {"source": "a.txt", "samples": 1, "seqlen": 8}, force=True)
    return path


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_is_measured_are_the_inputs_that_transformers_computes(model_type: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    path = tiny_model(tmp_path / "model", model_type)
    np.save(tmp_path / "tokens.npy", TOKENS)
    tersor.imatrix(path, tmp_path / "i.gguf", tmp_path / "tokens.npy", **OPTIONS, head=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    inputs: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, given, name=name: inputs.__setitem__(name, given[0].double().numpy().reshape(128, -1))  # type: ignore[misc]
            )
    with torch.no_grad():
        model(torch.from_numpy(TOKENS.astype(np.int64)))
    stems = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    stems |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names = {f"model.layers.{i}.{part}": f"blk.{i}.{stem}" for i in range(2) for part, stem in stems.items()} | {"lm_head": "token_embd"}
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "i.gguf").tensors}
    assert set(stored) == {f"{stem}.weight.{kind}" for stem in names.values() for kind in ("in_sum2", "counts")}
    for name, stem in names.items():
        assert stored[f"{stem}.weight.counts"].tolist() == [[128.0]]
        # float32 products of up to 128 terms, a few of them one after the other
        np.testing.assert_allclose(
            stored[f"{stem}.weight.in_sum2"][0], np.square(inputs[name]).sum(axis=0), rtol=2e-4, atol=1e-6, err_msg=name
        )


@pytest.mark.slow  # `make test-all` installs llama-cpp-python
def test_llama_cpp_quantizes_by_it_what_it_refuses_to_without(tmp_path: Path) -> None:
    """IQ2_XXS needs an importance for every matrix of a block, found by its name and of its length."""
    from llama_cpp import llama_cpp as llama

    model = tiny_model(tmp_path / "model", hidden=256, intermediate=256, layers=1)
    tersor.convert(model, tmp_path / "f16.gguf", verify=False, dequantize="f16")
    tersor.imatrix(model, tmp_path / "i.gguf", "pydoc", samples=2, seqlen=16)
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "i.gguf").tensors}
    names = [name.removesuffix(".counts") for name in stored if name.endswith(".counts")]
    means = [np.ascontiguousarray(stored[f"{name}.in_sum2"][0] / stored[f"{name}.counts"][0], np.float32) for name in names]
    entries = (llama.llama_model_imatrix_data * (len(names) + 1))()  # a nameless one ends them
    for entry, name, mean in zip(entries, names, means, strict=False):
        entry.name, entry.data, entry.size = name.encode(), mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), len(mean)
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.nthread = 19, 1  # LLAMA_FTYPE_MOSTLY_IQ2_XXS

    def quantized() -> int:
        code: int = llama.llama_model_quantize(bytes(tmp_path / "f16.gguf"), bytes(tmp_path / "q.gguf"), ctypes.byref(options))
        return code

    assert quantized() != 0
    options.imatrix = ctypes.cast(entries, type(options.imatrix))
    assert quantized() == 0
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "IQ2_XXS" and names == sorted(f"blk.0.{part}.weight" for part in PARTS)


@pytest.mark.parametrize("format", ["q4_0", "q6_k"])
def test_where_nothing_before_is_rounded_text_and_matrix_give_the_same_bytes(format: str, tmp_path: Path) -> None:
    """Elsewhere they do not: a run on text measures what the rounded layers before make of it."""
    model = tiny_model(tmp_path / "model", hidden=256, intermediate=256)
    np.save(tmp_path / "tokens.npy", TOKENS)
    tersor.imatrix(model, tmp_path / "i.gguf", tmp_path / "tokens.npy", **OPTIONS)
    recipe = f"f32, layers.1.down_proj=clip:{format}"
    by_text = tersor.quantize(model, tmp_path / "text.gguf", recipe, calib=tmp_path / "tokens.npy", **OPTIONS)
    by_matrix = tersor.quantize(model, tmp_path / "matrix.gguf", recipe, calib=tmp_path / "i.gguf")
    tersor.quantize(model, tmp_path / "plain.gguf", recipe)
    stored = [{t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / f"{n}.gguf").tensors} for n in ("text", "matrix", "plain")]
    assert stored[0] == stored[1] != stored[2]
    errors = [{t.name: t.output_error for t in result.tensors} for result in (by_text, by_matrix)]
    assert errors[0][DOWN] == pytest.approx(errors[1][DOWN], rel=1e-5)
    assert by_matrix.note == ""


@pytest.mark.parametrize(
    ("recipe", "to"),
    [
        ("clip:int4_g32", None),
        ("clip:int8_t", None),
        ("clip:nf4_dq", "bnb"),
        ("clip:int4_g32o", "gptq"),
        ("clip:q4_0", "gguf"),
        ("rtn:iq4_nl", "gguf"),
    ],
)  # by rows, by the whole tensor, in another order of columns, blocks
def test_every_tensor_is_weighed_by_its_own_means(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, to: str | None
) -> None:
    """Nothing is drawn or run for it."""
    monkeypatch.setattr("tersor.pipeline.draw", None)
    monkeypatch.setattr("tersor.calibrated.Calibrator", None)
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    result = tersor.quantize(home / "model", out, recipe, to=to, calib=home / "i.gguf", verify=False)
    method, name = recipe.split(":")
    rows = {t.name: t for t in result.tensors}
    matrix = {t.name: t.data for t in gguf.GGUFReader(home / "i.gguf").tensors}
    fmt = get_format(name)
    with open_checkpoint(home / "model") as source, open_checkpoint(out) as made:
        for hugging, stem in ((DOWN, "blk.1.ffn_down"), ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q")):
            h = matrix[f"{stem}.weight.in_sum2"][0] / np.float32(128)
            w = np.array(source.read(hugging).fields["values"], np.float32).reshape(rows[hugging].shape)
            meant = fmt.dequantize(fmt.quantize_clipped(w, h) if method == "clip" else fmt.quantize(w, h))
            stored = made.read(hugging)
            np.testing.assert_array_equal(get_format(stored.format).dequantize(stored), meant)
            error = np.sqrt(((meant - w).astype(np.float64) ** 2 @ h).sum() / (w.astype(np.float64) ** 2 @ h).sum())
            assert rows[hugging].output_error == pytest.approx(error, rel=1e-4) and rows[hugging].method == method


def test_the_output_says_by_which_matrix_it_was_made(home: Path, tmp_path: Path) -> None:
    made = tersor.quantize(home / "model", tmp_path / "out", "clip:int4_g32", calib=home / "i.gguf")
    said = json.loads((tmp_path / "out" / "tersor.json").read_text())["calibration"]
    assert said == made.calibration == read_imatrix(home / "i.gguf", "llama").provenance
    assert (said["file"], said["source"], said["samples"], said["seqlen"], said["entries"]) == ("i.gguf", "tokens.npy", 4, 32, 14)
    tersor.quantize(home / "model", tmp_path / "out.gguf", "clip:q4_0", calib=home / "i.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    keys = {key.removeprefix("quantize.imatrix."): f.contents() for key, f in fields.items() if key.startswith("quantize.imatrix.")}
    assert keys == {"file": "i.gguf", "dataset": "tokens.npy", "entries_count": 14, "chunks_count": 4}
    assert json.loads(fields["tersor.calibration"].contents()) == said


def test_a_dat_serves_and_what_it_does_not_say_is_not_said(home: Path, tmp_path: Path) -> None:
    means = {t.name.removesuffix(".in_sum2"): t.data[0] / 128 for t in gguf.GGUFReader(home / "i.gguf").tensors if t.name.endswith("2")}
    content = struct.pack("<i", len(means))
    for name, mean in means.items():
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 1, len(mean)) + mean.astype("<f4").tobytes()
    (tmp_path / "i.dat").write_bytes(content)
    for name, matrix in (("a", home / "i.gguf"), ("b", tmp_path / "i.dat")):
        tersor.quantize(home / "model", tmp_path / f"{name}.gguf", "clip:q4_0", calib=matrix)
    files = [gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in ("a", "b")]
    assert [t.data.tobytes() for t in files[0].tensors] == [t.data.tobytes() for t in files[1].tensors]
    assert {key for key in files[1].fields if "imatrix" in key} == {"quantize.imatrix.file", "quantize.imatrix.entries_count"}


def test_matrices_that_the_file_lacks_are_rounded_without_and_counted(home: Path, tmp_path: Path) -> None:
    some = statistics_file(tmp_path / "some.gguf", {DOWN: np.arange(128.0)})
    result = tersor.quantize(home / "model", tmp_path / "a", "clip:int4_g32", calib=some)
    assert result.note == "some.gguf says nothing of 13 of 14 matrices, first model.layers.0.self_attn.q_proj.weight: rounded without it"
    assert [t.name for t in result.tensors if t.output_error is not None] == [DOWN]
    plain = tersor.quantize(home / "model", tmp_path / "b", "clip:int4_g32")
    assert {t.name for t, u in zip(result.tensors, plain.tensors, strict=True) if t.error != u.error} == {DOWN}
    # the head, which a matrix has only if asked for, and inputs that never were anything else than zero
    tersor.imatrix(home / "model", tmp_path / "head.gguf", home / "tokens.npy", **OPTIONS, head=True)
    head = tersor.quantize(home / "model", tmp_path / "c", "keep, lm_head=clip:int4_g32", calib=tmp_path / "head.gguf")
    assert head.note == "" and [t.name for t in head.tensors if t.output_error is not None] == [HEAD]
    zero = statistics_file(tmp_path / "zero.gguf", {DOWN: np.zeros(128), HEAD: np.ones(64)})
    with pytest.raises(ModelError, match=f"{DOWN}: its input is zero for all 8 calibration tokens"):
        tersor.quantize(home / "model", tmp_path / "d", "keep, layers.1.down_proj=clip:int4_g32, lm_head=clip:int4_g32", calib=zero)
    forced = tersor.quantize(
        home / "model", tmp_path / "d", "keep, layers.1.down_proj=clip:int4_g32, lm_head=clip:int4_g32", calib=zero, force=True
    )
    assert forced.note == f"zero.gguf says nothing of 1 of 2 matrices, first {DOWN}: rounded without it"


@pytest.mark.parametrize(
    ("recipe", "options", "says"),
    [
        ("gptq:int4_g32", {}, "gptq needs X^T X of the inputs, and an importance matrix has their mean squares only; give --calib a text"),
        ("clip:int4_g32, layers.1=gptq:int4_g32", {}, "gptq needs X^T X of the inputs"),
        ("awq+clip:int4_g32", {}, "awq needs X^T X of the inputs"),
        ("smoothquant+clip:int4_g32", {}, "smoothquant needs the largest |x| of every column, and"),
        ("autoround:int4_g32", {}, "autoround needs the calibration tokens themselves"),
        ("clip+tune:int4_g32", {}, "tune needs the calibration tokens themselves"),
        ("clip+distill:int4_g32", {}, "distill needs the calibration tokens themselves"),
        ("rotate+clip:int4_g32", {}, "rotate turns the inputs, and an importance matrix is of inputs that are not turned"),
        ("llm_int8:int8_row_x4", {}, "llm_int8 needs the largest |x| of every column for int8_row_x4"),
        ("clip:int4_g32", {"activations": "minmax"}, "--activations minmax needs the inputs, and "),
        ("clip", {"budget": "6bpw"}, "--budget judges formats by their cost on text, and "),
        ("clip:int4_g32", {"max_ram": 1 << 30}, "--max-ram is for calibrated runs (--calib); by an importance matrix a run keeps one"),
        ("clip:int4_g32", {"resume": True}, "--resume is for calibrated runs (--calib); by an importance matrix"),
        ("clip:int4_g32", {"device": "cuda"}, "--device cuda is for calibrated runs (--calib); by an importance matrix"),
        ("rtn:int4_g32", {}, "has no use for calibration data"),
        ("hqq:q4_1", {}, "has no use for calibration data"),
        ("keep, lm_head=clip:int4_g32", {}, "i.gguf: of its 14 matrices, keep, lm_head=clip:int4_g32 weighs the errors of none"),
    ],
)  # fmt: skip
def test_what_more_is_needed_is_said_before_any_work(home: Path, tmp_path: Path, recipe: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tersor.quantize(home / "model", tmp_path / "out", recipe, calib=home / "i.gguf", **options)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_matrix_must_be_of_this_model(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="the model's 64; the importance matrix is of another model"):
        tersor.quantize(tiny_model(tmp_path / "m", intermediate=64), tmp_path / "out", "clip:int4_g32", calib=home / "i.gguf")
    tersor.convert(home / "model", tmp_path / "model.gguf", verify=False)
    with pytest.raises(ContainerError, match=r"general.type is '?(missing|model)'?, not imatrix"):
        tersor.quantize(home / "model", tmp_path / "out", "clip:int4_g32", calib=tmp_path / "model.gguf")


def test_comparing_refuses_before_the_first_recipe(home: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="gptq needs X\\^T X"):
        tersor.compare(home / "model", tmp_path / "out", ["clip:int4_g32", "gptq:int4_g32"], calib=home / "i.gguf")
    assert not (tmp_path / "out").exists()
    made = tersor.compare(
        home / "model", tmp_path / "out", ["clip:int4_g32", "rotate+rtn:int4_g32"], calib=home / "i.gguf", windows=1, window=32, prefill=8,
        decode=2, repeats=1,
    )  # fmt: skip
    assert [row.quantized.calibration.get("kind") for row in made.rows if row.quantized] == ["imatrix", None]


def test_measuring_tells_each_weight_once(home: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "measure inputs":
            told.append((done, total))

    tersor.imatrix(home / "model", tmp_path / "i.gguf", home / "tokens.npy", **OPTIONS, progress=progress)
    assert told == sorted(told) and told[0][0] == 0 and told[-1][0] == told[-1][1] > 0


def test_measuring_refuses(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"i\.gguf is an importance matrix already; give --calib a text, pydoc or self"):
        tersor.imatrix(home / "model", tmp_path / "i.gguf", home / "i.gguf")
    with pytest.raises(OutputError, match="exists already"), monkeypatch.context() as early:
        early.setattr("tersor.importance.draw", None)
        tersor.imatrix(home / "model", home / "i.gguf", "pydoc")
    with pytest.raises(RecipeError, match=r"--max-ram 0\.00 GiB is too little"):
        tersor.imatrix(home / "model", tmp_path / "i.gguf", home / "tokens.npy", **OPTIONS, max_ram=1 << 20)
    model = tiny_model(tmp_path / "model", config={"model_type": "mamba"})
    with pytest.raises(ContainerError, match="unknown model_type 'mamba'"):
        tersor.imatrix(model, tmp_path / "i.gguf", "pydoc")
    shapes = {"model.norm.weight": (64,), "model.layers.0.mlp.up_proj.weight": (128, 64)}
    for name, where in zip(shapes, ("lm_head", "model.layers.0.mlp.down_proj"), strict=True):
        model = tiny_model(tmp_path / name, change={name: np.full(shapes[name], np.nan, np.float32)}, tie=False)
        with pytest.raises(ModelError, match=f"^{where}.weight: an input is nan"):
            tersor.imatrix(model, tmp_path / "i.gguf", home / "tokens.npy", **OPTIONS, head=True)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("i.gguf")]


def test_the_command_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure = ["imatrix", str(home / "model"), "--calib", str(home / "tokens.npy"), "--samples", "4", "--seqlen", "32"]
    assert execute([*measure, "-o", str(tmp_path / "a.gguf"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["entries"], told["tokens"], told["calibration"]["seqlen"]) == (14, 128, 32)
    assert (tmp_path / "a.gguf").read_bytes() == (home / "i.gguf").read_bytes()
    assert execute([*measure, "-o", str(tmp_path / "a.gguf"), "--force", "--process-output", "--max-ram", "8GiB"]) == 0
    assert "15 matrices" in capsys.readouterr().out
    for command in ("quantize", "compare"):
        out = ["-o", str(tmp_path / "out"), "-r", "clip:int4_g32", "--calib", str(home / "i.gguf")]
        for option in ("--samples", "--seqlen", "--seed"):
            assert execute([command, str(home / "model"), *out, option, "7"]) == 2
            said = capsys.readouterr().err
            assert f"{option} draws from a text; {home / 'i.gguf'} is an importance matrix, which was measured before" in said
