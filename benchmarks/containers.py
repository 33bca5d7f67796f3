"""One model in every container, run by programs that are not ours; and what other programs wrote, run by our engine.

    python -m benchmarks containers ours MODEL OUT [NAME...]             MODEL in every container (or those named)
    python -m benchmarks containers foreign MODEL OUT --text valid.txt   MODEL as gptqmodel, auto-round, llmcompressor, bitsandbytes make it
    python -m benchmarks containers report                               the tables, into benchmarks/README.md

MODEL: a Hugging Face directory in float32. ours: `tersor quantize --to NAME`, then `verify`: every weight through the package that
reads such files, then the logits of 96 tokens in onnxruntime, or in transformers on the weights as that package decodes them; GGUF in
llama.cpp besides (built with BLAS, whose products are float32: `make peers`). KL is of our engine, float activations, from that.
foreign: 8 samples of 512 tokens (2 iterations of auto-round, none for llmcompressor) are enough, since quality is not judged here; our
reading of the tool's own directory is compared with the weights that the tool's own code decodes, and the logits with transformers on
those.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.quality import calibration, run_peer
from benchmarks.runtimes import ROOT, NotHere, python_of
from tersor.containers import open_checkpoint
from tersor.engine import load
from tersor.formats import get_format
from tersor.pipeline import file_bytes, quantize
from tersor.tensor import Array
from tersor.verification.logits import log_softmax, probe_tokens
from tersor.verification.verify import verify

RESULTS = Path(__file__).parent / "results" / "containers.json"
README = Path(__file__).parent / "README.md"
RECIPES = {
    "gguf": ("q4_0", "q8_0", "rtn:q4_k|q5_0"),
    "gptq": ("clip:int4_g64s", "clip:int4_g64o", "clip:int3_g64", "clip:int8_g64s"),
    "awq": ("clip:int4_g64",),
    "compressed-tensors": ("clip:int4_g64s", "clip:int4_g64", "int8_cs", "fp8_c", "nvfp4_gs"),
    "bnb": ("nf4_dq", "fp4", "int8_row"),
    "hqq": ("hqq:int4_g64z",),
    "mlx": ("clip:int4_g64m", "clip:int3_g64m"),
    "onnx": ("clip:int4_g64", "clip:int8_g64s"),
    "huggingface": ("bf16",),
}
FOREIGN = (
    ("gptqmodel", "int4_g64s"),
    ("gptqmodel", "int3_g64"),
    ("auto-round", "int4_g64s"),
    ("llmcompressor", "int4_g64"),
    ("llmcompressor", "int4_g64s"),
    ("llmcompressor", "w8a8"),
    ("bitsandbytes", "nf4_dq"),
    ("bitsandbytes", "int8"),
)
SAMPLES = 8
QUICK = {"auto-round": ["--iters", "2"], "llmcompressor": ["--method", "rtn"]}  # options of workers


def keep(kind: str, key: str, row: dict[str, Any]) -> None:
    """Adds a row to the results."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows.setdefault("machine", {})[kind] = describe()
    rows.setdefault(kind, {})[key] = row
    RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    print(key, row, flush=True)


def ours(model: Path, out: Path, names: list[str]) -> None:
    """Writes the model to every container in every recipe and verifies it."""
    with suppress(NotHere):
        os.environ.setdefault("TERSOR_PYTHON_GPTQMODEL", python_of("gptqmodel"))
    for container in names or RECIPES:
        for recipe in RECIPES[container]:
            name = recipe.replace(":", "-").replace("|", "-")
            target = out / (f"{name}.gguf" if container == "gguf" else f"{container}-{name}")
            quantize(model, target, recipe, to=container, force=True, verify=False)
            found = verify(target)
            row = {
                "bytes": file_bytes(target),
                "reader": found.reader,
                "tensors": len(found.tensors),
                "equal": found.compared,
                "verdict": found.verdict,
                "faults": [str(fault) for fault in found.faults],
                "runtime": None if found.logits is None else found.logits.runtime,
                "kl": None if found.logits is None else found.logits.kl,
            }
            if container == "gguf":
                row["kl_llama"] = llama_divergence(target, out)
            keep("ours", f"{container} {recipe}", row)


def llama_divergence(file: Path, out: Path) -> float | None:
    """Returns the KL divergence of our engine from llama.cpp on a file, None when llama.cpp is not here."""
    with open_checkpoint(file) as checkpoint:
        model = load(checkpoint, activations="float", kv="f32")
        tokens = probe_tokens(checkpoint, model.vocab_size, model.context)
    try:
        python = python_of("llama-blas")
    except NotHere as absent:
        print(f"llama.cpp: {absent}", file=sys.stderr)
        return None
    np.save(out / "tokens.npy", tokens)
    worker = str(ROOT / "benchmarks" / "peers" / "llama_logits_worker.py")
    subprocess.run([python, worker, str(file), str(out / "tokens.npy"), str(out / "logits.npy")], check=True)
    return divergence(np.load(out / "logits.npy"), model.head(model.forward(tokens, model.new_cache(len(tokens)))))


def divergence(theirs: Array, ours: Array) -> float:
    """Returns the mean KL divergence of our predictions from theirs, in nats. (n, vocab) logits each."""
    p, q = log_softmax(theirs), log_softmax(ours)
    return float(max(0.0, (np.exp(p) * (p - q)).sum(-1).mean()))


def foreign(model: Path, out: Path, text: Path, tools: list[str]) -> None:
    """Has the tools quantize the model, and compares our reading of what they stored with theirs."""
    calibration(model, text, out)
    for tool, format in (made for made in FOREIGN if made[0] in tools):
        key = f"{tool} {format}"
        target = out / key.replace(" ", "-")
        try:
            answer = run_peer(tool, format, model, target, SAMPLES, os.cpu_count() or 1, QUICK.get(tool, []))
        except NotHere as absent:
            print(f"{key}: {absent}", file=sys.stderr)
            continue
        keep("foreign", key, {"version": answer["version"], **compared(target)})


def compared(target: Path) -> dict[str, Any]:
    """Returns how target/stored, a tool's own directory, reads here beside target, the weights that the tool decodes from it."""
    equal = differing = 0
    largest = 0.0
    with open_checkpoint(target / "stored") as stored, open_checkpoint(target) as decoded:
        for name, info in stored.tensors.items():
            if name not in decoded.tensors or info.format in ("f32", "f16", "bf16"):
                continue
            mine = get_format(info.format).dequantize(stored.read(name))
            theirs = get_format(decoded.tensors[name].format).dequantize(decoded.read(name)).reshape(mine.shape)
            difference = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
            largest = max(largest, difference)
            equal, differing = equal + (difference == 0), differing + (difference != 0)
        container = stored.container
        formats = sorted({info.format for info in stored.tensors.values()})
        model = load(stored, activations="float", kv="f32")
        tokens = probe_tokens(stored, model.vocab_size, model.context)
    ours = model.head(model.forward(tokens, model.new_cache(len(tokens))))
    return {
        "container": container,
        "formats": formats,
        "equal": equal,
        "differing": differing,
        "largest": largest,
        "kl": divergence(transformers_logits(target, tokens), ours),
    }


def transformers_logits(directory: Path, tokens: Array) -> Array:
    """Returns transformers' logits of a float directory, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: Array = model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
    return logits


def report() -> None:
    """Writes the tables into benchmarks/README.md, between its markers."""
    rows = json.loads(RESULTS.read_text())
    lines = ["| container | recipe | MB | read by | tensors equal to the bit | logits in | KL, nats |", "|---|---|---|---|---|---|---|"]
    for key, row in rows.get("ours", {}).items():
        container, recipe = key.split(" ", 1)
        runtimes = [(row["runtime"], row["kl"])] + ([("llama.cpp", row["kl_llama"])] if row.get("kl_llama") is not None else [])
        names, values = ", ".join(str(r) for r, _ in runtimes), ", ".join("-" if kl is None else f"{kl:.1e}" for _, kl in runtimes)
        recipe = recipe.replace("|", "\\|")
        equal = f"{row['equal']} of {row['tensors']}"
        lines.append(f"| {container} | `{recipe}` | {row['bytes'] / 1e6:.1f} | {row['reader']} | {equal} | {names} | {values} |")
    lines += ["", "| made by | format | container here | matrices equal to the bit | largest difference | KL, nats |"]
    lines.append("|---|---|---|---|---|---|")
    for key, row in rows.get("foreign", {}).items():
        equal, format = f"{row['equal']} of {row['equal'] + row['differing']}", key.rpartition(" ")[2]
        lines.append(f"| {row['version']} | {format} | {row['container']} | {equal} | {row['largest']:.1e} | {row['kl']:.1e} |")
    text = README.read_text()
    begin, end = "<!-- containers: begin -->", "<!-- containers: end -->"
    head, rest = text.split(begin)[0], text.split(end)[1]
    README.write_text(f"{head}{begin}\n" + "\n".join(lines) + f"\n{end}{rest}")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("ours", "foreign"):
        command = commands.add_parser(name)
        command.add_argument("model", type=Path)
        command.add_argument("out", type=Path)
        if name == "ours":
            command.add_argument("names", nargs="*", choices=[*RECIPES, []])
        else:
            command.add_argument("--text", type=Path, required=True)
            command.add_argument("--tools", nargs="*", default=sorted({tool for tool, _ in FOREIGN}), help="by default all")
    commands.add_parser("report")
    a = parser.parse_args()
    if a.command == "report":
        report()
        return
    a.out.mkdir(parents=True, exist_ok=True)
    if a.command == "ours":
        ours(a.model, a.out, a.names)
    else:
        foreign(a.model, a.out, a.text, a.tools)


if __name__ == "__main__":
    main()
