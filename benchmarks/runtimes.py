"""The runtimes that are measured side by side, each a process of its own (benchmarks/peers) that is asked over a pipe.

Peers whose dependencies clash with the others' live in environments of their own: `.peers/NAME` beside this folder, as
`make peers` makes them, or wherever the environment variable BENCH_PYTHON_NAME points (a Python that has the peer's packages).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Runtime:
    """A module of benchmarks/peers and how it is started. environment: name of the Python it needs, "" = this one."""

    module: str
    arguments: tuple[str, ...] = ()
    environment: str = ""
    variables: dict[str, str] = field(default_factory=dict)


RUNTIMES = {
    "tersor": Runtime("tersor_worker"),
    "tersor, float activations": Runtime("tersor_worker", ("--activations", "float")),
    "tersor, int8 cache": Runtime("tersor_worker", ("--kv", "int8")),
    "tersor on AVX2": Runtime("tersor_worker", variables={"TERSOR_ISA": "avx2"}),
    "llama.cpp": Runtime("llama_cpp_worker"),
    "llama.cpp, not repacked": Runtime("llama_cpp_worker", ("--no-repack",)),
    "llama.cpp for AVX2 only": Runtime("llama_cpp_worker", environment="llama-avx2"),
    "OpenVINO": Runtime("openvino_worker", environment="openvino"),
    "onnxruntime-genai": Runtime("onnxruntime_worker", environment="onnxruntime"),
    "transformers bf16": Runtime("transformers_worker", ("bfloat16",)),
    "transformers fp32": Runtime("transformers_worker", ("float32",)),
    "limits": Runtime("limits_worker"),
}


class NotHere(RuntimeError):
    """A runtime or a file that this machine lacks; the text says what to do."""


def python_of(environment: str) -> str:
    """Returns the Python of an environment. Raises NotHere when there is none."""
    if not environment:
        return sys.executable
    variable = "BENCH_PYTHON_" + environment.upper().replace("-", "_")
    python = Path(os.environ.get(variable) or ROOT / ".peers" / environment / "bin" / "python")
    if not python.exists():
        raise NotHere(f"its Python is not there; run `make peers`, or set {variable} to a Python with its packages")
    return str(python)


class Worker:
    """A runtime in a process of its own, loaded and waiting.

    seconds: from the start of the process (interpreter, imports) until the model was ready. about: what it says of itself.
    Raises NotHere when it cannot be started or cannot load the model.
    """

    def __init__(self, name: str, model: str | Path, threads: int, context: int = 1024) -> None:
        runtime, self.name, self.threads = RUNTIMES[name], name, threads
        command = [python_of(runtime.environment), "-m", f"benchmarks.peers.{runtime.module}", str(model), str(threads)]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | runtime.variables
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process; a pipe would fill up and stop it)
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, *runtime.arguments, "--context", str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self.about = self._answer()
        self.seconds = time.perf_counter() - start

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise NotHere("; ".join(self._errors.read().strip().splitlines()[-1:]) or f"exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Returns the answer to one request: its seconds and the memory of the process, see benchmarks/peers."""
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()
