"""A reader in a Python of its own, for packages that cannot live beside ours (gptqmodel pins another numpy).

    TERSOR_PYTHON_GPTQMODEL=/path/to/python tersor verify MODEL

The other Python needs numpy and the package, not tersor: it runs this file's `main` with our source on its path. Over its standard output
comes, tensor by tensor: one line of JSON {"name", "shape"}, then the values as little-endian float32; a last line {"end": true}, or
{"error": "..."}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from tersor.errors import ContainerError
from tersor.tensor import Array


def python_variable(package: str) -> str:
    """Returns the name of the variable that names a Python for a package."""
    return f"TERSOR_PYTHON_{package.upper().replace('-', '_')}"


def python_for(package: str) -> str | None:
    """Returns the Python that the environment names for a package, None when it names none."""
    return os.environ.get(python_variable(package))


def remote_version(python: str, package: str) -> str | None:
    """Returns the version of a package in another Python, None when it is not there."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def remote_weights(python: str, container: str, path: Path) -> Iterator[tuple[str, Array]]:
    """Yields what the container's reader yields, from another Python. Raises ContainerError with that Python's last words."""
    source = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    command = [python, "-m", "tersor.verification.remote", container, str(path)]
    environment = {**os.environ, "PYTHONPATH": search}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout is not None
        yield from _received(process.stdout, python)


def _received(stream: IO[bytes], python: str) -> Iterator[tuple[str, Array]]:
    while line := stream.readline():
        head = json.loads(line)
        if "error" in head:
            raise ContainerError(f"{python}: {head['error']}")
        if "end" in head:
            return
        count = 4 * prod(head["shape"])
        data = stream.read(count)
        if len(data) < count:
            break
        yield head["name"], np.frombuffer(data, "<f4").reshape(head["shape"])
    raise ContainerError(f"{python}: the reader ended before its last tensor")


def main(arguments: list[str]) -> int:
    """Sends the weights of the model `arguments` name: container, path."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what packages print is not ours to parse
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)

    def send(head: dict[str, object], data: bytes = b"") -> None:
        out.write(json.dumps(head).encode() + b"\n" + data)
        out.flush()

    from tersor.verification.readers import READERS

    try:
        for name, values in READERS[arguments[0]].weights(Path(arguments[1])):
            send({"name": name, "shape": [int(n) for n in values.shape]}, np.ascontiguousarray(values, "<f4").tobytes())
    except Exception as error:  # whatever the package raises is passed on
        send({"error": f"{type(error).__name__}: {error}"})
        return 1
    send({"end": True})
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
