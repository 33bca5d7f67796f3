"""Quality per bit beside the peers, by one judge.

    python -m benchmarks quality calib MODEL OUT --text valid.txt                  OUT/calib.npy: token windows, the same for everybody
    python -m benchmarks quality peer MODEL OUT TOOL FORMAT... [--samples 128]     llmcompressor, gptqmodel, auto-round, bitsandbytes
    python -m benchmarks quality recipe MODEL OUT RECIPE... [--samples 128]        ours
    python -m benchmarks quality imatrix MODEL OUT ORIGINAL.gguf                   llama.cpp's files with importance, from ORIGINAL
    python -m benchmarks quality budget MODEL OUT FILE.gguf... --recipe STEPS      ours in the bytes of each FILE
    python -m benchmarks quality gguf ORIGINAL.gguf OUT FILE.gguf...               GGUF files, judged by llama.cpp itself
    python -m benchmarks quality speed MODEL OUT [--rounds 3]                      GPTQ, int4_g64s, 32 samples: ours and the peers' in turns
    python -m benchmarks quality report                                            the tables, into benchmarks/README.md

MODEL: a Hugging Face directory in float32, the original. OUT: a folder for what is made (a result in float32 takes 650 MB; with --keep
they stay). FORMAT: int4_g64 (asymmetric), int4_g64s (symmetric), or a tool's own name (int8, nf4). --windows N judges on the first N
windows of 2,048 tokens of --judge test.txt. Every result is appended to results/quality-peers.json, -tersor.json or
-gguf.json as soon as it is there; what is there already is judged only on windows that it was not judged on.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from benchmarks.quality_gguf import LLAMA_TYPES, LlamaJudge, block_bits, importance, llama_quantize
from benchmarks.quality_judge import Judge
from benchmarks.quality_report import write
from benchmarks.runtimes import ROOT, NotHere, python_of

RESULTS = Path(__file__).parent / "results"
LENGTH = 512  # tokens of a calibration sample
TOOLS = {  # environment, worker, what it takes besides
    "llmcompressor": ("llmcompressor", "llmcompressor_quantize_worker", ()),
    "gptqmodel": ("gptqmodel", "gptqmodel_quantize_worker", ()),
    "auto-round": ("auto-round", "auto_round_quantize_worker", ()),
    "auto-round, 50 iterations": ("auto-round", "auto_round_quantize_worker", ("--iters", "50")),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes_quantize_worker", ()),
}


def calibration(model: Path, text: Path, out: Path) -> Path:
    """Writes OUT/calib.npy, (n, LENGTH) int32: the text cut from its beginning without overlap or BOS, the rest dropped."""
    from tersor.containers import open_checkpoint
    from tersor.engine.tokenizer import Tokenizer

    with open_checkpoint(model) as checkpoint:
        ids = Tokenizer(checkpoint.description).encode(text.read_text(encoding="utf-8"), bos=False)
    out.mkdir(parents=True, exist_ok=True)
    n = len(ids) // LENGTH
    np.save(out / "calib.npy", np.array(ids[: n * LENGTH], np.int32).reshape(n, LENGTH))
    return out / "calib.npy"


def append(name: str, key: str, **values: Any) -> dict[str, Any]:
    """Adds to one row of results/quality-NAME.json and returns it. Safe beside other processes that append."""
    path = RESULTS / f"quality-{name}.json"
    with (Path(tempfile.gettempdir()) / "tersor-quality.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = json.loads(path.read_text()) if path.exists() else {}
        row = rows.setdefault(key, {})
        for field, value in values.items():
            row[field] = {**row[field], **value} if isinstance(value, dict) and isinstance(row.get(field), dict) else value
        part = path.with_suffix(".part")
        part.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        part.rename(path)
    return row


def run_peer(tool: str, format: str, model: Path, out: Path, samples: int, threads: int, extra: list[str]) -> dict[str, Any]:
    """Runs a tool's worker and returns its answer and what the process cost. Raises NotHere with the tool's last line."""
    environment, module, more = TOOLS[tool]
    match = re.fullmatch(r"int(\d)_g(\d+)(s?)", format)
    shape = ["--bits", match[1], "--group", match[2], *(["--sym"] if match[3] else [])] if match else ["--scheme", format]
    command = [python_of(environment), "-m", f"benchmarks.peers.{module}", str(model), str(out), *shape]
    command += ["--calib", str(out.parent / "calib.npy"), "--samples", str(samples), "--threads", str(threads), *more, *extra]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables |= {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")}
    with out.with_suffix(".log").open("w") as log:
        answer, cost = measure(command, log, env=variables, cwd=out.parent)
    if not answer:
        raise NotHere(f"{tool} {format}: see {out.with_suffix('.log')}")
    return json.loads(answer.splitlines()[-1]) | cost


def measure(command: list[str], errors: Any = None, **where: Any) -> tuple[str, dict[str, float]]:
    """Runs a command and returns what it printed, empty when it failed, and what its process cost from beginning to end.

    The peak is read from /proc while it runs: getrusage's would be the memory of this process where that is larger.
    """
    peak, start = 0.0, time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=errors, text=True, **where)
        while (ended := os.wait4(process.pid, os.WNOHANG))[0] == 0:
            with suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = max([peak, *(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))])
            time.sleep(0.1)
        wall = time.perf_counter() - start
        output.seek(0)
        _, status, usage = ended
        process.returncode = os.waitstatus_to_exitcode(status)
        told = output.read() if process.returncode == 0 else ""
    return told, {"process_seconds": wall, "process_cpu_seconds": usage.ru_utime + usage.ru_stime, "process_peak_mib": peak}


def needs_text(recipe: str) -> bool:
    """Returns whether a step of the recipe wants calibration samples."""
    from tersor.methods import METHODS

    names = re.findall(r"[a-z_]\w*", re.sub(r"\(.*?\)", "", recipe))
    return any(getattr(METHODS[name], "needs", "nothing") != "nothing" for name in names if name in METHODS)


def run_recipe(recipe: str, model: Path, out: Path, samples: int, verify: bool = True) -> dict[str, Any]:
    """Runs `tersor quantize` in a process of its own and returns its cost and true bits per weight."""
    command = [sys.executable, "-m", "tersor", "quantize", str(model), "-o", str(out), "--recipe", recipe, "--force", "--json"]
    command += [] if verify else ["--no-verify"]
    if needs_text(recipe):
        tokens = out.parent / f"calib-{samples}.npy"  # of a longer file it would draw samples; the peers take the first
        np.save(tokens, np.load(out.parent / "calib.npy")[:samples])
        command += ["--calib", str(tokens), "--samples", str(samples), "--seqlen", str(LENGTH)]
    answer, cost = measure(command)
    if not answer:
        raise NotHere(f"{recipe}: tersor quantize failed")
    told = json.loads(answer)
    return {"seconds": told["seconds"], "bits_per_weight": told["block_bits_per_weight"], "file_bytes": told["file_bytes"], **cost}


def judge(name: str, key: str, candidate: Path, judged: Judge, columns: Path, activations: str) -> None:
    """Judges a directory, appends the figures to its row and prints them."""
    start = time.process_time()
    told = judged.judge(candidate, columns, activations)
    row = append(name, key, judged=told, activations=activations, judge_cpu_seconds=time.process_time() - start)
    for n, d in sorted(row["judged"].items(), key=lambda item: int(item[0])):
        print(f"{key}: {n} windows: {short(d)}", flush=True)


def short(d: dict[str, Any]) -> str:
    """Returns a line of a judgement."""
    return f"KLD {d['kl_mean']:.4f} ± {d['kl_error']:.4f}, perplexity {d['perplexity']:.2f}, top-1 {100 * d['top1']:.2f} %"


def results_of(name: str) -> dict[str, Any]:
    """Returns the rows of results/quality-NAME.json by key."""
    path = RESULTS / f"quality-{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run_budget(a: argparse.Namespace) -> int:
    """Makes a GGUF file in the bytes of each of these and appends what it cost: by `tersor quantize --budget`, or, for several, by the
    recipes that it would choose, the formats being judged once for all."""
    tokens = a.out / f"calib-{a.samples}.npy"
    np.save(tokens, np.load(a.out / "calib.npy")[: a.samples])
    files = [Path(file) for file in a.what]
    outs = [a.out / file.name.replace("-imatrix", "").replace("-", f"-ours-{a.recipe}-", 1) for file in files]
    budgets = [file.stat().st_size for file in files]
    chosen = recipes_within(a.model, tokens, a.recipe, dict(zip(outs, budgets)), a.sensitivity) if len(files) > 1 else {}
    for file, out, budget in zip(files, outs, budgets):
        told = ["-r", chosen[out]] if out in chosen else ["-r", a.recipe, "--budget", str(budget)]
        command = [sys.executable, "-m", "tersor", "quantize", str(a.model), "-o", str(out), *told]
        command += ["--calib", str(tokens), "--samples", str(a.samples), "--seqlen", str(LENGTH), "--threads", str(a.threads)]
        command += ["--no-verify", "--force", "--json"]
        answer, cost = measure(command)
        if not answer:
            raise NotHere(f"{out}: tersor quantize failed")
        recipe = json.loads(answer)["recipe"]
        append("gguf", out.stem, recipe=recipe, of=file.stem, samples=a.samples, threads=a.threads, file_bytes=out.stat().st_size, **cost)
        print(f"{out}: {out.stat().st_size} of {budget} bytes, {cost['process_cpu_seconds']:.0f} CPU s: {recipe[:200]}", flush=True)
    return 0


def recipes_within(model: Path, tokens: Path, steps: str, budgets: dict[Path, int], n: int) -> dict[Path, str]:
    """Returns the recipe of each output, a GGUF file, that `--budget` chooses for its bytes. n: sequences for the sensitivities."""
    from tersor.containers import CONTAINERS, open_checkpoint
    from tersor.fitting import frame_of, options, output_bytes
    from tersor.pipeline import draw
    from tersor.planning.budget import recipe_within

    container, frame = CONTAINERS["gguf"], frame_of(steps, "gguf")
    with open_checkpoint(model) as checkpoint:
        rows = np.load(tokens)
        samples = draw(checkpoint, tokens, len(rows), rows.shape[1], 0)
        few = replace(samples, tokens=samples.tokens[:n])
        judged = options(checkpoint, container, frame.default.formats, few, None)

        def within(out: Path, budget: int) -> str:
            return str(recipe_within(budget, judged, frame, lambda it: output_bytes(checkpoint, container, out, it, samples)).recipe)

        return {out: within(out, budget) for out, budget in budgets.items()}


def run_gguf(a: argparse.Namespace) -> int:
    """Judges GGUF files by llama.cpp and appends their figures, again with every few windows more."""
    judged = LlamaJudge(a.model, a.judge, a.windows, a.out, a.threads)
    for file, told in judged.judge([Path(file) for file in a.what]):
        told |= {"bits_per_weight": block_bits(file), "file_bytes": file.stat().st_size, "original": a.model.name}
        if a.of:
            told["of"] = a.of
        append("gguf", file.stem, **told, machine=describe())
        print(f"{file.name}: {told['protocol']}: {told['file_bytes'] / 1e6:.1f} MB, {short(told)}", flush=True)
    return 0


def run_speed(a: argparse.Namespace) -> int:
    """Times GPTQ at int4_g64s on the same 32 samples, ours and the peers' in turns, everything written to disk. Appends every round.

    Ours without opening its file again by another's reader, which the peers do not do either."""
    name, samples = f"{a.model.name.removesuffix('-hf')}/{describe()['isa']}", 32  # other CPUs have rows of their own
    for i in range(a.rounds):
        for tool in a.tools.split(","):
            out = a.out / f"speed-{tool}"
            if tool == "tersor":
                told = run_recipe("gptq:int4_g64s", a.model, out, samples, verify=False)
            else:
                told = run_peer(tool, "int4_g64s", a.model, out, samples, a.threads, [])
            shutil.rmtree(out)
            append("speed", f"{name} {tool}", **{f"round {time.strftime('%Y-%m-%d %H:%M:%S')}": told}, machine=describe())
            cost = f"{told['seconds']:.1f} s of {told['process_seconds']:.1f} s, {told['process_cpu_seconds']:.0f} CPU s"
            print(f"round {i + 1}, {tool}: {cost}, {told['process_peak_mib']:.0f} MiB", flush=True)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    for mode in ("calib", "imatrix", "budget", "peer", "recipe", "gguf"):
        one = modes.add_parser(mode)
        one.add_argument("model", type=Path)
        one.add_argument("out", type=Path)
        if mode == "calib":
            one.add_argument("--text", type=Path, required=True)
            continue
        if mode == "imatrix":
            one.add_argument("original", type=Path)
            one.add_argument("--types", default=",".join(LLAMA_TYPES))
            one.add_argument("--samples", type=int, default=128)
            one.add_argument("--threads", type=int, default=2)
            continue
        if mode == "budget":
            one.add_argument("what", nargs="+")
            one.add_argument("--recipe", default="clip", help="the steps")
            one.add_argument("--sensitivity", type=int, default=16, help="sequences that formats are judged on, for several files")
            one.add_argument("--samples", type=int, default=128)
            one.add_argument("--threads", type=int, default=2)
            continue
        if mode == "peer":
            one.add_argument("tool", choices=TOOLS)
        if mode == "recipe":
            one.add_argument("--activations", help="how inputs are rounded when it is judged (default: float; llm_int8 for that method)")
        one.add_argument("what", nargs="+")
        one.add_argument("--windows", type=int, default=40)
        one.add_argument("--judge", type=Path, required=True, help="the text to judge on")
        one.add_argument("--threads", type=int, default=2)
        if mode == "gguf":
            one.add_argument("--of", metavar="NAME", help="the file, without .gguf, that these must beat at no more bytes")
            continue
        one.add_argument("--samples", type=int, default=128)
        one.add_argument("--keep", action="store_true", help="do not remove what was made")
        one.add_argument("--only", choices=("make", "judge"), help="make: do not judge; judge: what was kept")
    modes.add_parser("report")
    speed = modes.add_parser("speed")
    speed.add_argument("model", type=Path)
    speed.add_argument("out", type=Path)
    speed.add_argument("--rounds", type=int, default=3)
    speed.add_argument("--tools", default="tersor,gptqmodel,llmcompressor")
    speed.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    if a.mode == "calib":
        print(calibration(a.model, a.text, a.out))
        return 0
    if a.mode == "report":
        return write()
    if a.mode == "imatrix":
        name = a.model.name.removesuffix("-hf")
        matrix = importance(a.model, np.load(a.out / "calib.npy")[: a.samples], a.out / f"{name}-{a.samples}.imatrix.gguf")
        for kind in a.types.split(","):
            print(llama_quantize(a.original, a.out / f"{name}-{kind}-imatrix.gguf", kind, matrix, a.threads), flush=True)
        return 0
    if a.mode in ("speed", "budget"):
        return run_speed(a) if a.mode == "speed" else run_budget(a)
    return run_gguf(a) if a.mode == "gguf" else run(a)


def run(a: argparse.Namespace) -> int:
    """Makes and judges every candidate of the command line. Returns 1 when one could not be made."""
    name = a.model.name.removesuffix("-hf")
    table, tool = ("peers", a.tool) if a.mode == "peer" else ("tersor", "tersor")
    judged, failed = None, 0
    for what in a.what:
        samples = a.samples if (a.mode == "peer" and tool != "bitsandbytes") or (a.mode == "recipe" and needs_text(what)) else 0
        asked = a.activations if a.mode == "recipe" else None
        inputs = asked or ("llm_int8" if a.mode == "recipe" and "llm_int8" in what else "float")
        key = f"{name} {tool} {what}" + (f" n={samples}" if samples else "") + (f", inputs {asked}" if asked else "")
        out = a.out / re.sub(r"[^\w.+=-]+", "_", key)
        if not out.exists() and a.only != "judge":
            print(f"== {key}, {time.strftime('%H:%M:%S')}", flush=True)
            try:
                if a.mode == "peer":
                    extra = (
                        ["--windows", str(Judge(a.model, a.judge, a.windows, a.out, a.threads).write_windows())] if what == "int8" else []
                    )
                    told = run_peer(tool, what, a.model, out, samples, a.threads, extra)
                else:
                    told = run_recipe(what, a.model, out, samples)
            except NotHere as error:
                print(error, file=sys.stderr)
                failed = 1
                shutil.rmtree(out, ignore_errors=True)
                continue
            told |= {"model": name, "tool": tool, "recipe": what, "samples": samples, "machine": describe()}
            print(json.dumps(append(table, key, **told)), flush=True)
        if a.only != "make":
            judged = judged or Judge(a.model, a.judge, a.windows, a.out, a.threads)
            judge(table, key, out, judged, a.out / "columns" / out.name, inputs)
            if not a.keep:
                shutil.rmtree(out)
    return failed


if __name__ == "__main__":
    sys.exit(main())
