"""Bad input through the command line: exit code 2, one line that names the culprit, no traceback, no output file."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tersor.cli import execute
from tiny import tiny_config, tiny_model, tiny_tensors

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good model, as a directory and as a GGUF file."""
    folder = tmp_path_factory.mktemp("whole")
    model = tiny_model(folder / "model")
    assert execute(["quantize", str(model), "-o", str(folder / "model.gguf"), "-r", "q8_0"]) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: object) -> str:
    """Runs a command that must fail; returns its one line after checking what holds for all of them."""
    before = sorted(p.name for p in tmp_path.iterdir())
    capsys.readouterr()
    assert execute([str(a) for a in arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("tersor: ")]
    assert len(lines) == 1
    assert err.endswith(lines[0] + "\n")
    assert "Traceback" not in err
    assert out == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # not even a temporary file
    return lines[0]


def with_header(file: Path, change: Callable[[dict], None]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def overlap(header: dict) -> None:
    header[Q_PROJ]["data_offsets"] = header["model.embed_tokens.weight"]["data_offsets"][:1] * 2
    header[Q_PROJ]["data_offsets"][1] += 4 * 64 * 64


SAFETENSORS = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "model.safetensors"),
    "truncated in the header": (lambda f: f.write_bytes(f.read_bytes()[:100]), "model.safetensors"),
    "empty": (lambda f: f.write_bytes(b""), "model.safetensors"),
    "header length beyond the file": (lambda f: f.write_bytes(b"\xff" * 7 + b"\x00" + f.read_bytes()[8:]), "model.safetensors"),
    "header that is no JSON": (lambda f: f.write_bytes(f.read_bytes()[:8] + b"x" + f.read_bytes()[9:]), "model.safetensors"),
    "overlapping tensors": (lambda f: with_header(f, overlap), "overlap"),
    "sizes that lie": (lambda f: with_header(f, lambda h: h[Q_PROJ].update(shape=[64, 6400])), Q_PROJ),
    "huge shape": (lambda f: with_header(f, lambda h: h[Q_PROJ].update(shape=[1 << 40, 1 << 40])), Q_PROJ),
    "negative shape": (lambda f: with_header(f, lambda h: h[Q_PROJ].update(shape=[-64, 64])), Q_PROJ),
    "offsets beyond the file": (lambda f: with_header(f, lambda h: h[Q_PROJ].update(data_offsets=[1 << 40, (1 << 40) + 16384])), Q_PROJ),
    "unknown dtype": (lambda f: with_header(f, lambda h: h[Q_PROJ].update(dtype="Q9")), "Q9"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
@pytest.mark.parametrize("command", ["inspect", "quantize"])
def test_broken_safetensors(tmp_path, capsys, case, command):
    damage, names = SAFETENSORS[case]
    damage(tiny_model(tmp_path / "m") / "model.safetensors")
    more = ["-o", tmp_path / "a.gguf", "-r", "q4_0"] if command == "quantize" else []
    assert names in refused(capsys, tmp_path, command, tmp_path / "m", *more)


def test_missing_safetensors_and_shards(tmp_path, capsys):
    (tiny_model(tmp_path / "m") / "model.safetensors").unlink()
    assert str(tmp_path / "m") in refused(capsys, tmp_path, "inspect", tmp_path / "m")
    shards = tiny_model(tmp_path / "s", shards=3)
    (shards / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refused(capsys, tmp_path, "inspect", shards)


GGUF = {
    "wrong magic": (lambda b: b"GGML" + b[4:], "starts with b'GGML'"),
    "version 1": (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "version"),
    "version of the other byte order": (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], ""),
    "tensor count": (lambda b: b[:8] + struct.pack("<Q", 1 << 60) + b[16:], "tensor"),
    "key count": (lambda b: b[:16] + struct.pack("<Q", 1 << 60) + b[24:], ""),
    "string longer than the file": (lambda b: b[:24] + struct.pack("<Q", 1 << 62) + b[32:], ""),
    "truncated data": (lambda b: b[:-1000], ""),
    "truncated header": (lambda b: b[:200], ""),
    "nothing but a magic": (lambda b: b[:4], ""),
}


@pytest.mark.parametrize("case", GGUF)
@pytest.mark.parametrize("command", ["inspect", "quantize", "run"])
def test_broken_gguf(whole, tmp_path, capsys, case, command):
    damage, names = GGUF[case]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damage((whole / "model.gguf").read_bytes()))
    more = {"quantize": ["-o", tmp_path / "a.gguf"], "run": ["-p", "x"]}.get(command, [])
    line = refused(capsys, tmp_path, command, bad, *more)
    assert "bad.gguf" in line
    assert names in line


def test_gguf_offset_beyond_the_file(whole, tmp_path, capsys):
    data = bytearray((whole / "model.gguf").read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8 + 4  # name, axes, shape, type
    data[at : at + 8] = struct.pack("<Q", 1 << 50)
    (tmp_path / "bad.gguf").write_bytes(data)
    assert "attn_q" in refused(capsys, tmp_path, "inspect", tmp_path / "bad.gguf")


def test_unknown_architecture(tmp_path, capsys):
    model = tiny_model(tmp_path / "m", config={"model_type": "mamba"})
    assert "unknown architecture 'mamba'; known: gemma2" in refused(capsys, tmp_path, "run", model, "-p", "x")


def test_unknown_and_missing_tensors(tmp_path, capsys):
    weights = tiny_tensors(tiny_config("llama", 64, 128, 2, 4, 2, True))
    extra = tiny_model(tmp_path / "extra", change={"model.layers.0.mlp.router.weight": weights[Q_PROJ]})
    assert "mlp.router.weight" in refused(capsys, tmp_path, "run", extra, "-p", "x")
    short = tiny_model(tmp_path / "short")
    (short / "config.json").write_text(json.dumps(tiny_config("llama", 64, 128, 3, 4, 2, True)))
    assert "model.layers.2" in refused(capsys, tmp_path, "run", short, "-p", "x")


def test_unknown_format_method_pattern_and_container(whole, tmp_path, capsys):
    quantize = ("quantize", whole / "model", "-o", tmp_path / "a.gguf")
    assert "unknown format 'q4_9'; perhaps q4_" in refused(capsys, tmp_path, *quantize, "-r", "q4_9")
    assert "unknown format 'zzz'; known: " in refused(capsys, tmp_path, *quantize, "-r", "zzz")
    assert "unknown method 'rnt'; known: " in refused(capsys, tmp_path, *quantize, "-r", "rnt:q4_0")
    assert "nearest: " in refused(capsys, tmp_path, *quantize, "-r", "q4_0, q_prj=q8_0")
    assert "unknown container or engine 'zip'; known: " in refused(capsys, tmp_path, *quantize, "--to", "zip")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_weights(tmp_path, capsys, value):
    w = tiny_tensors(tiny_config("llama", 64, 128, 2, 4, 2, True))[Q_PROJ]
    w[5, 6] = value
    model = tiny_model(tmp_path / "m", change={Q_PROJ: w})
    line = refused(capsys, tmp_path, "quantize", model, "-o", tmp_path / "a.gguf", "-r", "q4_0")
    assert f"{Q_PROJ} holds {value} at row 5, column 6" in line


def test_group_that_does_not_divide(whole, tmp_path, capsys):
    line = refused(capsys, tmp_path, "quantize", whole / "model", "-o", tmp_path / "a", "-r", "int4_g128")
    assert "has 64 columns, not a multiple of 128" in line
    assert "int4_g64" in line  # the alternative


def test_output_that_exists(whole, tmp_path, capsys):
    (tmp_path / "a.gguf").write_text("mine")
    for command in (["quantize", whole / "model", "-o", tmp_path / "a.gguf"], ["convert", whole / "model", tmp_path / "a.gguf"]):
        assert "--force" in refused(capsys, tmp_path, *command)
        assert (tmp_path / "a.gguf").read_text() == "mine"


def test_output_where_none_can_be(whole, tmp_path, capsys):
    assert "does not exist" in refused(capsys, tmp_path, "quantize", whole / "model", "-o", tmp_path / "no" / "a.gguf", "-r", "q4_0")


@pytest.mark.parametrize(("out", "recipe"), [("a.gguf", "q8_0"), ("a", "int4_g64")])
def test_full_disk(whole, tmp_path, out, recipe):
    """The kernel refuses to let a file grow, as a full disk does, in the middle of the writing."""
    done = subprocess.run(
        [sys.executable, "-m", "tersor", "quantize", str(whole / "model"), "-o", str(tmp_path / out), "-r", recipe],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"tersor: {tmp_path / out}")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "nowhere.gguf"], "nowhere.gguf"),
        (["quantize", "MODEL"], "Missing option"),
        (["quantize", "MODEL", "-o", "a.gguf", "--bits", "4"], "--bits"),
        (["quantise"], "quantise"),
        (["eval", "MODEL", "--window", "x"], "--window"),
        (["eval", "MODEL", "--windows", "-1"], "windows -1"),
        (["eval", "MODEL", "--text", "nowhere.txt"], "nowhere.txt"),
        (["eval", "MODEL", "--window", "4096"], "4096"),
        (["bench"], "needs a PATH"),
        (["bench", "MODEL", "-a", "MODEL"], "given twice"),
        (["bench", "MODEL", "-a", "nowhere.gguf"], "nowhere.gguf"),
        (["bench", "MODEL", "-t", "0"], "threads"),
        (["bench", "MODEL", "--kv", "f8"], "unknown kv type 'f8'; known: f16, f32, int4, int8"),
        (["eval", "MODEL", "-t", "0"], "threads"),
        (["compare", "MODEL", "-o", "out", "-t", "-1"], "threads"),
        (["quantize", "MODEL", "-o", "a.gguf", "-t", "0"], "threads"),
        (["run", "MODEL", "-p", "x", "--lookup", "16"], "lookup is 16; need an integer from 0 to 15"),
        (["bench", "MODEL", "--decode", "0"], "decode 0"),
        (["plan", "MODEL", "--ram", "lots"], "lots"),
        (["run", "MODEL", "--raw"], "needs a prompt"),
        (["run", "MODEL", "--raw", "-p", "x", "--system", "y"], "--system"),
        (["run", "MODEL", "-p", "x", "--temperature", "-1"], "temperature"),
        (["run", "MODEL", "-p", "x", "--temperature", "1", "--top-p", "0"], "top_p"),
        (["run", "MODEL", "-p", "x", "-n", "0"], "max_tokens"),
        (["run", "MODEL", "-p", "x", "-t", "0"], "threads"),
        (["run", "MODEL", "-p", "x", "--kv", "q8"], "unknown kv type 'q8'; known: f16, f32, int4, int8"),
        (["compare", "MODEL", "-o", "out", "-r", "q4_0;rtn:q4_0"], "given twice"),
        (["convert", "MODEL", "a.gguf", "--dequantize", "q4_0"], "q4_0"),
    ],
)
def test_bad_arguments(whole, tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, tmp_path, *(str(whole / "model") if a == "MODEL" else a for a in arguments))


def test_a_model_without_a_chat_template_cannot_chat(tmp_path, capsys):
    model = tiny_model(tmp_path / "m")
    (model / "tokenizer_config.json").write_text("{}")
    assert "no chat template" in refused(capsys, tmp_path, "run", model)
    assert execute(["run", str(model), "-p", "the", "-n", "2"]) == 0


def test_a_fault_of_ours_asks_for_a_report(whole, monkeypatch, capsys):
    def fail(path: str, lint: bool) -> None:
        raise ZeroDivisionError("no\nluck")

    monkeypatch.setattr("tersor.inspection.inspect", fail)
    monkeypatch.delenv("TERSOR_DEBUG", raising=False)
    assert execute(["inspect", str(whole / "model")]) == 1
    err = capsys.readouterr().err
    assert err == "tersor: internal error: ZeroDivisionError: no; run again with TERSOR_DEBUG=1 and report the traceback\n"
    monkeypatch.setenv("TERSOR_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        execute(["inspect", str(whole / "model")])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("quantize", "-r", "q4_0", "--samples", 7), "--samples is for calibrated runs (--calib)"),
        (("compare", "-r", "q4_0", "--seqlen", 7), "--seqlen is for calibrated recipes (--calib)"),
        (("quantize", "-r", "q4_0", "--device", "cuda"), "--device cuda is for calibrated runs (--calib)"),
        (("quantize", "-r", ""), "recipe '' is empty"),
        (("quantize", "-r", "gptq"), "names a method and no format; write method:format, like gptq:int4_g64"),
        (("quantize", "-r", "int4"), "unknown format 'int4'; perhaps int4_g32, "),
        (("quantize", "-b", "4.25", "--calib", "pydoc"), "for bits per weight write 4.25bpw"),
        (("quantize", "-b", "-5bpw", "--calib", "pydoc"), "write it like 3.5GiB, 90MB or, in bits per weight, 4.25bpw"),
        (("run", "-p", "a", "--top-k", 5), "--top-k chooses among tokens to draw from; give --temperature above 0"),
        (("eval", "-n", -1), "need window >= 3, 1 <= stride <= window, windows >= 1 (0: the whole text)"),
    ],
)
def test_what_an_option_lacks_is_said(whole, tmp_path, capsys, arguments, says):
    command, *rest = arguments
    out = ("-o", tmp_path / "a.gguf") if command in ("quantize", "compare") else ()
    assert says in refused(capsys, tmp_path, command, whole / "model", *out, *rest)
