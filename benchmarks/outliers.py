"""LLM.int8() where a few columns of the inputs are far larger than the others, planted so that the function stays the same.

    python -m benchmarks outliers MODEL --calib FILE [--columns 6] [--factor 32] [--formats int8_row,int8_row_x6] [--text FILE]
                                  [--window 2048] [--windows 2] [--samples 128] [--seqlen 512]

Norm weights of COLUMNS columns are multiplied by FACTOR (a power of two: exact), those columns of the linear layers that read the
norm divided by it. Every format is written by `quantize` with the method llm_int8, calibrated on CALIB where it stores outlier columns,
and judged against the planted model in float on TEXT: KL divergence and perplexity ratio of every way to round inputs. The row `float`
is what the weights alone cost. Then the memory of the blocks' matrices: by the format's formula, in the file, and in the engine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from tersor.containers import CONTAINERS, open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.engine import Model, load
from tersor.evaluation.kl import Base, divergence
from tersor.evaluation.text import cut, read_text
from tersor.formats import get_format
from tersor.formats.outliers import OutlierFormat
from tersor.pipeline import quantize
from tersor.tensor import QuantizedTensor, TensorInfo

READERS = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
}
WAYS = ("float", "int8", "llm_int8", "int8_token")


class Planted(Checkpoint):
    """A float checkpoint of a llama or qwen2 decoder with planted outliers, its projections in a format (None: float32)."""

    def __init__(self, checkpoint: Checkpoint, columns: Sequence[int], factor: float, format: str | None = None) -> None:
        self._of, self._columns, self._factor = checkpoint, list(columns), np.float32(factor)
        self._format = None if format is None else get_format(format)
        self.path, self.container = checkpoint.path, checkpoint.container
        self.description = checkpoint.description
        self.tensors: Mapping[str, TensorInfo] = {name: self._info(info) for name, info in checkpoint.tensors.items()}

    def _info(self, info: TensorInfo) -> TensorInfo:
        if not _is_changed(info.name):
            return info
        format = self._format if len(info.shape) == 2 and self._format else get_format("f32")
        return replace(info, format=format.name, nbytes=format.nbytes(info.shape))

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the tensor as planted."""
        tensor = self._of.read(name, rows)
        if not _is_changed(name):
            return tensor
        w = np.array(get_format(tensor.format).dequantize(tensor), np.float32)
        module = name.removesuffix(".weight").rpartition(".")[2]
        if module in READERS:
            w[..., self._columns] *= self._factor
        elif any(module in readers for readers in READERS.values()):
            w[:, self._columns] /= self._factor
        return get_format(self.tensors[name].format).quantize(w)

    def release(self) -> None:
        """Gives pages back."""
        self._of.release()

    def close(self) -> None:
        """Closes the original."""
        self._of.close()


def _is_changed(name: str) -> bool:
    return name.endswith("_proj.weight") or name.removesuffix(".weight").rpartition(".")[2] in READERS


def container_of(format: str) -> str:
    """Returns the first quantized container that holds the format, bitsandbytes' before others."""
    return next(name for name in ("bnb", *CONTAINERS) if CONTAINERS[name].holds(format))


def file_bytes(path: Path) -> int:
    """Returns the bytes that the file's own index gives to the parts of the blocks' matrices."""
    if (path / "model.onnx").is_file():
        import onnx

        graph = onnx.load(path / "model.onnx", load_external_data=False).graph
        parts = {t.name: {entry.key: entry.value for entry in t.external_data} for t in graph.initializer}
        return sum(int(part["length"]) for name, part in parts.items() if "_proj." in name)
    from safetensors import safe_open

    total = 0
    for shard in path.glob("*.safetensors"):
        with safe_open(str(shard), "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                total += prod(part.get_shape()) * int(part.get_dtype().lstrip("BFIU")) // 8 if "_proj." in name else 0
    return total


def engine_bytes(model: Model) -> int:
    """Returns the bytes of the blocks' matrices as packed for this CPU."""
    return sum(weight.nbytes for weight in model._decoder._packed()[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--formats", default="int8_row,int8_row_x6")
    parser.add_argument("--calib", required=True, help="text to calibrate on, not the one that is judged")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--factor", type=float, default=32)
    parser.add_argument("--text", help="a UTF-8 file (default: the technical English of Python's pydoc_data.topics)")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    a = parser.parse_args()
    name, text = read_text(a.text)
    with open_checkpoint(a.model) as checkpoint, tempfile.TemporaryDirectory() as folder:
        hidden = int(checkpoint.description.config["hidden_size"])
        columns = np.random.default_rng(0).choice(hidden, a.columns, replace=False).tolist()
        planted = Planted(checkpoint, columns, a.factor)
        truth = load(planted, activations="float")
        base = Base(truth, cut(truth.tokenizer, name, text, a.window, None, a.windows, False), keep=True)
        print(f"{a.model.name}, {a.columns} columns times {a.factor:g}; {name}, {a.windows} windows of {a.window}; calibrated on {a.calib}")
        matrices = [info.shape for info in checkpoint.tensors.values() if info.name.endswith("_proj.weight")]
        quantize(checkpoint, Path(folder) / "bf16", "bf16", verify=False)
        sixteen = Path(folder) / "bf16"
        memory = [("bf16", sum(2 * prod(shape) for shape in matrices), file_bytes(sixteen), engine_bytes(load(sixteen)))]
        print("| weights | inputs | KL divergence | perplexity / float |\n|---|---|---|---|", flush=True)
        for format in a.formats.split(","):
            out = Path(folder) / format
            apart = isinstance(get_format(format), OutlierFormat)
            calibration = {"calib": a.calib, "samples": a.samples, "seqlen": a.seqlen} if apart else {}
            quantize(planted, out, f"llm_int8:{format}", to=container_of(format), verify=False, **calibration)
            for way in WAYS:
                model = load(out, activations=way)
                d = divergence(model, base)
                ratio = f"{d.ratio:.5f} ± {d.ratio_error:.5f}"
                print(f"| {format} | {way} | {d.kl_mean:.5f} ± {d.kl_error:.5f} | {ratio} |", flush=True)
            memory.append((format, sum(get_format(format).nbytes(shape) for shape in matrices), file_bytes(out), engine_bytes(model)))
        print("| weights of the blocks | computed | in the file | in the engine | of bf16 |\n|---|---|---|---|---|")
        for format, computed, stored, packed in memory:
            print(f"| {format} | {computed} | {stored} | {packed} | {computed / memory[0][1]:.4f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
