"""llama.cpp (llama-cpp-python) on the same file, in a process of its own: another runtime to measure beside ours.

A process of its own, so that no runtime shares a thread pool or an allocator with the other. This module is both ends:
LlamaCpp here, and main() there, which answers a line of JSON with a line of JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tersor.errors import RecipeError
from tersor.evaluation.speed import Contestant, prompt
from tersor.memory import resident_bytes

_KV_TYPES = {"f32": 0, "f16": 1, "int8": 8, "int4": 3}  # ggml's F32, F16, Q8_0, Q4_1 (with a minimum, like ours)


class LlamaCpp(Contestant):
    """llama.cpp with a GGUF file loaded, waiting. Raises RecipeError when it cannot be: another file, not installed, refused."""

    def __init__(self, path: str | Path, threads: int, kv: str, capacity: int) -> None:
        """kv: type of cached keys and values, as in tersor.load; capacity: positions of the cache."""
        if Path(path).suffix != ".gguf":
            raise RecipeError(f"llama.cpp reads .gguf files only; {path} is none; convert it first: tersor convert {path} OUT.gguf")
        if importlib.util.find_spec("llama_cpp") is None:
            raise RecipeError("llama-cpp-python is not installed; pip install 'tersor[bench]'")
        command = [sys.executable, "-m", __name__, str(path), str(threads), kv, str(capacity)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        loaded = self._answer()
        self.load_seconds = float(loaded["load_seconds"])
        self.first_token_seconds = float(loaded["first_token_seconds"])
        self.resident_bytes = int(loaded["resident_bytes"])

    def run(self, prefill: int, decode: int) -> tuple[float, float]:
        """Asks the process for one run."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what it died of comes with the answer
            print(json.dumps([prefill, decode]), file=self._process.stdin, flush=True)
        answer = self._answer()
        return float(answer["prefill"]), float(answer["decode"])

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        """Returns what the process says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        _, told = self._process.communicate()
        reason = (told.strip().splitlines() or [f"it ended with {self._process.returncode}"])[-1]
        raise RecipeError(f"llama.cpp could not run the model: {reason}")


def main(path: str, threads: int, kv: str, capacity: int) -> None:
    """Loads the model, says so, and answers [prefill, decode] with the seconds of both until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    import llama_cpp

    load: Any = llama_cpp.Llama  # which has no types
    before, start = resident_bytes(), time.perf_counter()
    kind = _KV_TYPES[kv]
    model = load(
        path,
        n_ctx=capacity,
        n_batch=512,
        n_ubatch=512,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=kind,
        type_v=kind,
        flash_attn=kv.startswith("int"),  # it quantizes values with it only
        verbose=False,
    )
    loaded = time.perf_counter() - start

    def run(prefill: int, decode: int) -> dict[str, float]:
        tokens = prompt(prefill + decode, model.n_vocab())  # the logits of each are computed, whichever comes next
        model.reset()
        begun = time.perf_counter()
        model.eval(tokens[:prefill])
        middle = time.perf_counter()
        for token in tokens[prefill:]:
            model.eval([token])
        return {"prefill": middle - begun, "decode": time.perf_counter() - middle}

    run(16, 1)
    seconds = {"load_seconds": loaded, "first_token_seconds": time.perf_counter() - start}
    print(json.dumps(seconds | {"resident_bytes": resident_bytes() - before}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
