"""What the peers that quantize share: command line in, a directory of dequantized weights and one JSON line out.

    python -m benchmarks.peers.TOOL_quantize_worker SOURCE OUT --bits 4 --group 64 [--sym] --calib FILE.npy --samples 128 --threads 2

SOURCE: a Hugging Face directory in float32. FILE.npy: (n, length) int32 token ids, the same for every tool. OUT becomes SOURCE with the
weights that the tool's own code decodes from what it stored, in float32, so that one judge can run every tool's result; the tool's own
directory is written to OUT/stored, where its bits are counted. The line: seconds and cpu_seconds from loading SOURCE until OUT/stored is
written (imports are not in it), peak_mib of the process until then, bits_per_weight of the quantized matrices with all that the tool
stores for them, the number of them, and the tool's version.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from benchmarks.peers import memory


def arguments(*options: str) -> argparse.Namespace:
    """Returns the command line, see the head of this file. options: what a tool takes besides, each with a value."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--sym", action="store_true")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    for option in options:
        parser.add_argument(f"--{option}")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    shutil.rmtree(a.out, ignore_errors=True)
    a.out.mkdir(parents=True)
    return a


class Run:
    """One run of a tool: the clock, and the answer on the real standard output; what the tool prints goes to standard error."""

    def __init__(self, a: argparse.Namespace) -> None:
        self.a = a
        self._answer = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._start, self._cpu = time.perf_counter(), time.process_time()
        self._spent: dict[str, float] = {}

    @property
    def windows(self) -> np.ndarray:
        """The calibration tokens, (samples, length) int64. Raises ValueError when the file has fewer."""
        tokens = np.load(self.a.calib)
        if len(tokens) < self.a.samples:
            raise ValueError(f"{self.a.calib}: {len(tokens)} windows, need {self.a.samples}")
        return tokens[: self.a.samples].astype(np.int64)

    def stop(self) -> None:
        """The tool has written its result: what follows is our own work."""
        spent = {"seconds": time.perf_counter() - self._start, "cpu_seconds": time.process_time() - self._cpu}
        self._spent = spent | {"peak_mib": memory()["peak_mib"]}

    def finish(self, version: str, weights: Mapping[str, torch.Tensor], stored: Path | None, **more: Any) -> None:
        """Writes OUT and the answer.

        weights: decoded float matrices by their name in SOURCE (`model.layers.0.mlp.up_proj.weight`). stored: the tool's own directory,
        whose bits are counted; None: `more` says bits_per_weight.
        """
        write(self.a.source, self.a.out, weights)
        if stored is not None:
            more["bits_per_weight"] = stored_bits(stored, {name: w.numel() for name, w in weights.items()})
        answer = {"version": version, "matrices": len(weights), **self._spent, **more}
        print(json.dumps(answer), file=self._answer, flush=True)


def write(source: Path, out: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Writes out as source with these weights in place of its own, as float32. Raises ValueError for a name or shape that source lacks."""
    tensors = {name: w for file in sorted(source.glob("*.safetensors")) for name, w in load_file(file).items()}
    for name, w in weights.items():
        if name not in tensors or tensors[name].shape != w.shape:
            raise ValueError(f"{name} {tuple(w.shape)} is no matrix of {source}")
        tensors[name] = w.detach().to(torch.float32).contiguous()
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy(file, out / file.name)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def stored_bits(directory: Path, weights: Mapping[str, int]) -> float:
    """Returns the bits per weight of matrices in a directory of safetensors: all tensors under a matrix's name but its bias.

    weights: name as `X.weight` -> number of weights; its tensors are X.weight, X.weight.absmax, X.qweight, X.scales and so on.
    """
    modules = {name.removesuffix(".weight") for name in weights}
    nbytes = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118 (no mapping)
                parts = name.split(".")
                if parts[-1] != "bias" and any(".".join(parts[:n]) in modules for n in range(1, len(parts))):
                    nbytes += f.get_tensor(name).nbytes
    return 8 * nbytes / sum(weights.values())


def quiet_exit(code: int = 0) -> None:
    """Ends the process at once: some tools leave threads behind that never end."""
    sys.stderr.flush()
    os._exit(code)
