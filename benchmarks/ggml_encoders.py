"""The error and the time of our ggml encoders beside ggml's own `ggml_quantize_chunk`, on a model's real tensors.

    python -m benchmarks.ggml_encoders MODEL [--types q4_k,q6_k] [--tensors 8] [--rows 64] [--library libggml-base.so]
    python -m benchmarks.ggml_encoders F16.gguf --whole [--types q3_k] [--rounds 3]

MODEL is anything tersor opens; its matrices are dequantized. ggml comes from the installed llama_cpp package (extra
tersor[bench]) or from --library, as a plain C library: nothing else of it is loaded. Rows whose length no 256 divides are
joined two by two until it does, so that k-quants of narrow models can be judged.

Columns: ours / ggml's sum of weight * (w - decoded)^2 over all tensors, and the worst tensor, for these weights:
    plain          1; both encoders without importance
    by ggml        what ggml minimizes without importance: rms of 32 + |x| (Q4_K, Q5_K), |x| (Q2_K), x^2 (other searched types)
    plain          the importance; both encoders with it. It is log-normal noise (sigma 1), one value per column, fixed seed
    by ggml        what ggml minimizes with it: importance * sqrt(c * mean square + x^2); c = 2, 1 for Q2_K and blocks of 32
and the CPU nanoseconds that a weight takes.
Below 1 is better than ggml. Types that ggml's rule for the extremes defines (Q4_0 ... MXFP4) give 1 without importance.
Exit code 1 when a searched type has a total above 1 without importance, by either weight.

--whole: a file from beginning to end by one thread each, `tersor quantize` beside llama.cpp's llama_model_quantize, the same type for
every tensor (llama.cpp's choice for the smallest mix of that type, which ours is told). CPU seconds, the least of the rounds, taken in
turns: ours of the process with its imports, llama.cpp's of the call alone.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from tersor import _native
from tersor.containers import open_checkpoint
from tersor.formats import get_format, ggml_blocks
from tersor.tensor import Array

SEARCHED = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")

FTYPES = {"q2_k": 10, "q3_k": 11, "q4_k": 14, "q5_k": 16, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30}  # llama_ftype of the smallest mix

LLAMA_QUANTIZE = """
import ctypes, sys, time
from llama_cpp import llama_cpp as c
options = c.llama_model_quantize_default_params()
options.ftype, options.nthread = int(sys.argv[3]), 1
start = time.process_time()
code = c.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(options))
print(time.process_time() - start)
sys.exit(code)
"""

Encoder = Callable[[str, Array, "Array | None"], Array]


def main() -> int:
    """Prints the table; returns 1 when a searched type lost to ggml."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--types", default=",".join(ggml_blocks.BLOCKS))
    parser.add_argument("--tensors", type=int, default=8, help="matrices, evenly spaced over the model")
    parser.add_argument("--rows", type=int, default=64, help="rows of each, after joining")
    parser.add_argument("--whole", action="store_true", help="whole files instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--library", type=Path, help="path of libggml-base.so")
    options = parser.parse_args()
    if options.whole:
        return whole_files(options.model, [name for name in options.types.split(",") if name in FTYPES], options.rounds)
    theirs = ggml_encoder(options.library or find_library())
    tensors = list(matrices(options.model, options.tensors, options.rows))
    _native.set_threads(1)
    print(
        f"{options.model}: {len(tensors)} matrices, {sum(w.size for w in tensors) / 1e6:.1f} million weights, one thread, {_native.isa()}"
    )
    print(f"{'':8}{'without importance':^31}{'with importance':^31}{'ns without importance':^23}{'ns with importance':^23}")
    ratios = f"{'plain (worst)':>15}" + f"{'by ggml (worst)':>16}"
    times = f"{'ours':>8}{'ggml':>8}{'ratio':>7}"
    print(f"{'type':8}{ratios * 2}{times * 2}")
    lost = [name for name in options.types.split(",") if compare(name, tensors, theirs)]
    print(f"above ggml without importance: {', '.join(lost) or 'none'}")
    return 1 if lost else 0


def compare(name: str, tensors: list[Array], theirs: Encoder) -> bool:
    """Prints the row of one type; returns whether a searched type has a total above ggml's without importance."""
    rng = np.random.default_rng(1)
    errors = np.zeros((len(tensors), 2, 2, 2))  # tensor, without or with importance, weight, ours or theirs
    seconds = np.zeros((2, 2))  # without or with importance, ours or theirs
    for i, w in enumerate(tensors):
        importance = np.exp(rng.standard_normal(w.shape[1])).astype(np.float32)
        for j, given in enumerate((None, importance)):
            flat = np.ones(w.shape[1]) if given is None else given.astype(np.float64)
            ggmls = flat * (ggml_weight(name, w) if given is None else ggml_importance_weight(name, w))
            for k, encode in enumerate((_native.ggml_encode, theirs)):
                start = time.thread_time()
                blocks = encode(name, w, given)
                seconds[j, k] += time.thread_time() - start
                square = (_native.ggml_decode(name, blocks, w.shape[1]).astype(np.float64) - w) ** 2
                errors[i, j, :, k] = (flat * square).sum(), (ggmls * square).sum()
    total = errors.sum(axis=0)
    ratio, worst = total[..., 0] / total[..., 1], (errors[..., 0] / errors[..., 1]).max(axis=0)
    cells = "".join(f"{r:>7.4f} ({x:.4f})" for r, x in zip(ratio.ravel(), worst.ravel(), strict=True))
    times = "".join(f"{ours:>8.1f}{ggmls:>8.1f}{ours / ggmls:>7.2f}" for ours, ggmls in seconds / sum(w.size for w in tensors) * 1e9)
    print(f"{name:8}{cells}{times}", flush=True)
    return name in SEARCHED and bool((ratio[0] > 1).any())


def whole_files(model: str, names: list[str], rounds: int) -> int:
    """Prints CPU seconds of whole files; returns 1 when ours took more than half of llama.cpp's for a type."""
    print(f"{model}, one thread, {_native.isa()}\n{'type':8}{'MB':>8}{'tersor':>9}{'llama.cpp':>11}{'ratio':>7}  types")
    slow = []
    with tempfile.TemporaryDirectory(dir=Path(model).parent) as folder:
        theirs, ours = Path(folder) / "theirs.gguf", Path(folder) / "ours.gguf"
        for name in names:
            seconds: tuple[list[float], list[float]] = [], []
            for _ in range(rounds):
                command = [sys.executable, "-c", LLAMA_QUANTIZE, model, str(theirs), str(FTYPES[name])]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                seconds[1].append(float(done.stdout.split()[-1]))
                with open_checkpoint(theirs) as checkpoint:
                    types = {n: t.format for n, t in checkpoint.tensors.items() if len(t.shape) == 2}
                recipe = ", ".join([f"rtn:{name}", *(f"{n}=rtn:{t}" for n, t in types.items())])
                command = [sys.executable, "-m", "tersor", "quantize", model, "-o", str(ours), "--recipe", recipe]
                before = cpu_of_children()
                subprocess.run([*command, "--no-verify", "--threads", "1", "--force"], check=True, capture_output=True)
                seconds[0].append(cpu_of_children() - before)
            ratio = min(seconds[0]) / min(seconds[1])
            counts = ", ".join(f"{list(types.values()).count(t)} {t}" for t in dict.fromkeys(types.values()))
            cells = f"{ours.stat().st_size / 1e6:>8.1f}{min(seconds[0]):>9.2f}{min(seconds[1]):>11.2f}{ratio:>7.2f}"
            print(f"{name:8}{cells}  {counts}", flush=True)
            if ratio > 0.5:
                slow.append(name)
    print(f"above half of llama.cpp's: {', '.join(slow) or 'none'}")
    return 1 if slow else 0


def cpu_of_children() -> float:
    """Returns the CPU seconds of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ggml_weight(name: str, w: Array) -> Array:
    """Returns what ggml weighs the squared error by without importance (ggml-quants.c, quantize_row_*_ref)."""
    x = w.astype(np.float64)
    if name in ("q4_k", "q5_k"):
        parts = x.reshape(len(x), -1, 32)
        rms = np.sqrt(np.square(parts).mean(axis=-1, keepdims=True))
        return (rms + np.abs(parts)).reshape(x.shape)
    if name == "q2_k":
        return np.abs(x)
    return np.square(x) if name in SEARCHED else np.ones_like(x)


def ggml_importance_weight(name: str, w: Array) -> Array:
    """Returns what ggml multiplies the importance by (ggml-quants.c, quantize_row_*_impl)."""
    x = w.astype(np.float64)
    parts = x.reshape(len(x), -1, x.shape[1] if name in ("q4_0", "q4_1", "q5_0", "q5_1") else get_format(name).group_size)
    mean = np.square(parts).mean(axis=-1, keepdims=True)
    factor = 2 if name in SEARCHED and name != "q2_k" else 1
    if name in ("q8_0", "tq1_0", "tq2_0", "mxfp4"):  # ggml ignores the importance here
        return np.ones_like(x)
    return np.sqrt(factor * mean + np.square(parts)).reshape(x.shape)


def matrices(model: str, count: int, rows: int) -> Iterator[Array]:
    """Yields `count` matrices of the model as float32, (rows, a multiple of 256)."""
    with open_checkpoint(model) as checkpoint:
        names = [n for n, t in checkpoint.tensors.items() if len(t.shape) == 2 and "embed" not in n and "lm_head" not in n]
        for name in (names[i] for i in np.linspace(0, len(names) - 1, min(count, len(names))).astype(int)):
            columns, joined = checkpoint.tensors[name].shape[1], 1
            while columns * joined % 256:
                joined *= 2
            stored = checkpoint.read(name, slice(0, min(rows * joined, checkpoint.tensors[name].shape[0] // joined * joined)))
            w = get_format(stored.format).dequantize(stored)
            yield np.ascontiguousarray(w.reshape(-1, columns * joined), dtype=np.float32)


def find_library() -> Path:
    """Returns the path of ggml's base library in the installed llama_cpp package, without importing it."""
    spec = importlib.util.find_spec("llama_cpp")
    folders = [] if spec is None else [Path(p) / "lib" for p in spec.submodule_search_locations or ()]
    for folder in folders:
        for path in sorted(folder.glob("*ggml-base.*")):
            return path
    sys.exit("ggml_encoders: no ggml library found; pip install 'tersor[bench]', or give --library PATH of libggml-base.so")


def ggml_encoder(library: Path) -> Encoder:
    """Returns a function with the signature of _native.ggml_encode that calls ggml."""
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]

    def encode(name: str, w: Array, importance: Array | None) -> Array:
        out = np.empty((len(w), get_format(name).nbytes((1, w.shape[1]))), np.uint8)
        address = None if importance is None else importance.ctypes.data
        written = ggml.ggml_quantize_chunk(
            GGMLQuantizationType[name.upper()], w.ctypes.data, out.ctypes.data, 0, len(w), w.shape[1], address
        )
        assert written == out.size, (name, written, out.size)
        return out

    return encode


if __name__ == "__main__":
    sys.exit(main())
