"""A quantized model beside its original: is any tensor farther away than its format explains?

Rounding to nearest in the same format says how far it would be; the methods of the field (GPTQ, AWQ's clipping, tuning) go up to about
twice as far in the weights themselves, a wrong nibble order, zero point or scale many times as far. Where norms were changed too, a
method has moved scale between layers (AWQ, SmoothQuant, rotations) and weights say nothing: then only predictions are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers import open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.errors import ModelError
from tersor.evaluation import evaluate
from tersor.evaluation.kl import Divergence
from tersor.formats import get_format
from tersor.slabs import dequantize
from tersor.tensor import Array, TensorInfo
from tersor.verification.record import Fault

ROWS = 256  # of a tensor that are compared
MOST_TIMES = 4.0  # as far from the original as rounding to nearest
SLACK = 2.0**-10  # relative error of float16 arithmetic in whatever wrote the file
WINDOWS, WINDOW = 4, 256


def compare_with_original(
    checkpoint: Checkpoint, against: str | Path, progress: Callable[[str, int, int], None] | None = None
) -> tuple[list[Fault], list[str], dict[str, Any]]:
    """Returns (faults, notes, figures) of a model beside its original: weight by weight where they can be compared, then predictions."""
    faults: list[Fault] = []
    notes: list[str] = []
    found: dict[str, Any] = {"original": str(against)}
    with open_checkpoint(against) as original:
        _check_shapes(checkpoint, original)
        if _norms_moved(checkpoint, original):
            notes.append("norms differ from the original's: scale was moved between layers, so weights cannot be compared one by one")
        else:
            for done, info in enumerate(checkpoint.tensors.values()):
                fault = _too_far(checkpoint, original, info)
                faults += [] if fault is None else [fault]
                if progress is not None:
                    progress("compare with the original", done + 1, len(checkpoint.tensors))
    if not faults:
        result = evaluate(checkpoint.path, against=against, windows=WINDOWS, window=WINDOW, activations="float")
        assert isinstance(result, Divergence)
        found |= {"kl": result.kl_mean, "kl_error": result.kl_error, "top1": result.top1, "protocol": str(result.protocol)}
    return faults, notes, found


def _check_shapes(checkpoint: Checkpoint, original: Checkpoint) -> None:
    for name, info in checkpoint.tensors.items():
        other = original.tensors.get(name)
        if other is not None and other.shape != info.shape:
            raise ModelError(f"{original.path}: {name} is {list(other.shape)}, the model's {list(info.shape)}; it is not its original")


def _norms_moved(checkpoint: Checkpoint, original: Checkpoint) -> bool:
    """Returns whether a norm before linear layers differs by more than bfloat16's rounding."""
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 1 and "norm" in name and name in original.tensors:
            ours, theirs = _rows(checkpoint, name), _rows(original, name)
            if np.abs(ours - theirs).max() > 2.0**-7 * np.abs(theirs).max():
                return True
    return False


def _rows(checkpoint: Checkpoint, name: str) -> Array:
    """Returns the first ROWS rows of a tensor, float32."""
    info = checkpoint.tensors[name]
    mixed = not get_format(info.format).row_independent
    tensor = checkpoint.read(name) if mixed or len(info.shape) != 2 else checkpoint.read(name, slice(0, ROWS))
    values = dequantize(tensor).reshape(-1, info.shape[-1])[:ROWS]
    checkpoint.release()
    return values


def _too_far(checkpoint: Checkpoint, original: Checkpoint, info: TensorInfo) -> Fault | None:
    if info.name not in original.tensors:
        return None  # an untied head, say
    ours, w = _rows(checkpoint, info.name), np.ascontiguousarray(_rows(original, info.name), dtype=np.float32)
    norm = float(np.linalg.norm(w))
    if not norm:
        return None if not ours.any() else Fault(info.name, "the original's is 0, this one is not")
    error = float(np.linalg.norm(ours - w)) / norm
    format = get_format(info.format)
    if format.can_encode and format.fits(w.shape):
        rounded = float(np.linalg.norm(format.dequantize(format.quantize(w)) - w)) / norm
    else:
        rounded = min(1.0, 2.0 ** (1 - format.bits))
    if not error <= MOST_TIMES * rounded + SLACK:
        times = f"{error / rounded:.0f} times what rounding to {info.format} costs" if rounded else f"more than {info.format} needs to lose"
        return Fault(info.name, f"is {error:.3g} of its size away from the original, {times}; it is not what was meant")
    return None
