"""A quantized model beside its original: is any tensor farther away than its format explains?

Rounding to nearest in the same format says how far it would be. Three questions are asked of every tensor:

    all of it         its distance; GPTQ, AWQ's clipping and tuning go up to about twice as far as rounding, a wrong nibble order or
                      shuffled scales many times
    its mean          rounding errors cancel out; a zero point off by one moves every weight by a step, 3.5 times the RMS of rounding
    every 16 columns  in a row: a scale with another sign or exponent puts its few weights farther from the original than 0 is

Flipped bits of codes, and of a scale's or zero's low bits, change less than a method may: only the digests of verification.json tell.
Where norms were changed too, a method has moved scale between layers (AWQ, SmoothQuant, rotations) and weights say nothing: then only
predictions are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from tersor.containers import open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.errors import ModelError, TersorError
from tersor.evaluation import evaluate
from tersor.evaluation.kl import Divergence
from tersor.formats import Format, get_format
from tersor.models import ARCHITECTURES
from tersor.slabs import dequantize
from tersor.tensor import Array, TensorInfo
from tersor.verification.record import Fault

ROWS = 256  # of a tensor that are compared at once
COLUMNS = 16  # of a row that are looked at by themselves: the smallest group of any format
MOST_TIMES = 4.0  # as far from the original as rounding to nearest
# A piece of a row as far from the original as all zeros would be, nearly: what a scale gives whose sign or exponent is wrong (halving
# aside, which costs half of it). Methods exceed this in pieces of outlier rows, but then rounding to nearest does too.
AS_FAR_AS_ZERO = 0.9
SLACK = 2.0**-10  # relative error of float16 arithmetic in whatever wrote the file
WINDOWS, WINDOW = 4, 256
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def compare_with_original(
    checkpoint: Checkpoint, against: str | Path, progress: Callable[[str, int, int], None] | None = None
) -> tuple[list[Fault], list[str], dict[str, Any]]:
    """Returns (faults, notes, figures) of a model beside its original: weight by weight where they can be compared, then predictions.

    Raises ContainerError when the original cannot be opened, ModelError when it is another model's.
    """
    notes: list[str] = []
    found: dict[str, Any] = {"original": str(against)}
    with open_checkpoint(against) as original:
        _check_shapes(checkpoint, original)
        faults = _missing(checkpoint, original)
        if _norms_moved(checkpoint, original):
            notes.append("norms differ from the original's: scale was moved between layers, so weights cannot be compared one by one")
        else:
            for done, info in enumerate(checkpoint.tensors.values()):
                fault = _too_far(checkpoint, original, info)
                faults += [] if fault is None else [fault]
                if progress is not None:
                    progress("compare with the original", done + 1, len(checkpoint.tensors))
    if not faults:
        try:
            found |= _predictions(checkpoint, against)
        except TersorError as error:  # no tokenizer, say
            notes.append(f"predictions were not compared: {error}")
    return faults, notes, found


def _predictions(checkpoint: Checkpoint, against: str | Path) -> dict[str, Any]:
    kind = checkpoint.description.config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(f"the engine does not run {kind}")
    result = evaluate(checkpoint.path, against=against, windows=WINDOWS, window=WINDOW, activations="float")
    assert isinstance(result, Divergence)
    return {"kl": result.kl_mean, "kl_error": result.kl_error, "top1": result.top1, "protocol": str(result.protocol)}


def _check_shapes(checkpoint: Checkpoint, original: Checkpoint) -> None:
    for name, info in checkpoint.tensors.items():
        other = original.tensors.get(name)
        if other is not None and other.shape != info.shape:
            raise ModelError(f"{original.path}: {name} is {list(other.shape)}, the model's {list(info.shape)}; it is not its original")


def _missing(checkpoint: Checkpoint, original: Checkpoint) -> list[Fault]:
    """Returns the tensors that only one of the two has. A head that is the embedding may be stored or not."""
    only_ours = [name for name in checkpoint.tensors if _counterpart(original, name) is None]
    faults = [Fault(name, "is no tensor of the original; a name is wrong") for name in only_ours]
    for name in original.tensors:
        if name not in checkpoint.tensors and not (name == HEAD and _is_embedding(original)):
            faults.append(Fault(name, "is missing; the original has it"))
    return faults


def _counterpart(original: Checkpoint, name: str) -> str | None:
    """Returns the original's name of a tensor: its own, or the embedding's for a head of an original without one."""
    if name in original.tensors:
        return name
    return EMBEDDING if name == HEAD and EMBEDDING in original.tensors else None


def _is_embedding(original: Checkpoint) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(_slabs(original, HEAD), _slabs(original, EMBEDDING), strict=True))


def _norms_moved(checkpoint: Checkpoint, original: Checkpoint) -> bool:
    """Returns whether a norm before linear layers differs by more than bfloat16's rounding."""
    for name, info in checkpoint.tensors.items():
        if len(info.shape) == 1 and "norm" in name and name in original.tensors:
            ours, theirs = next(_slabs(checkpoint, name)), next(_slabs(original, name))
            if np.abs(ours - theirs).max() > 2.0**-7 * np.abs(theirs).max():
                return True
    return False


def _slabs(checkpoint: Checkpoint, name: str) -> Iterator[Array]:
    """Yields a tensor's values, float32 (rows, in): ROWS rows at a time, a format that mixes rows decoded as a whole."""
    info = checkpoint.tensors[name]
    cut = len(info.shape) == 2 and get_format(info.format).row_independent
    whole = None if cut else dequantize(checkpoint.read(name)).reshape(-1, info.shape[-1])
    for first in range(0, info.shape[0] if whole is None else len(whole), ROWS):
        rows = slice(first, first + ROWS)
        values = dequantize(checkpoint.read(name, rows)) if whole is None else whole[rows]
        yield np.ascontiguousarray(values, dtype=np.float32)
        checkpoint.release()


@dataclass
class _Distance:
    """Sums over a tensor. worst: the piece of a row that is farther away than zero is, as (row, first column), if any."""

    error: float = 0.0  # squares
    rounded: float = 0.0
    weights: float = 0.0
    moved: float = 0.0  # sum of the differences
    values: int = 0
    worst: tuple[int, int] | None = None

    def add(self, ours: Array, w: Array, rounded: Array) -> None:
        """Takes in some rows: the model's, the original's, and the original's as rounding to nearest changes them."""
        first = self.values // w.shape[1]
        error, limit, size = (np.sqrt(_by_piece(values)) for values in (ours - w, rounded - w, w))
        bound = MOST_TIMES * limit.max(axis=1, keepdims=True) + SLACK * size.max(axis=1, keepdims=True)
        far = ~(error <= np.maximum(bound, AS_FAR_AS_ZERO * size))  # nan is far
        if self.worst is None and far.any():
            row, piece = np.argwhere(far)[0]
            self.worst = first + int(row), COLUMNS * int(piece)
        self.error += float(np.square(error).sum())
        self.rounded += float(np.square(limit).sum())
        self.weights += float(np.square(size).sum())
        self.moved += float((ours - w).sum(dtype=np.float64))
        self.values += w.size


def _by_piece(values: Array) -> Array:
    """Returns the sum of squares of every COLUMNS columns of a row, float64 (rows, pieces)."""
    pieces = ceil(values.shape[1] / COLUMNS)
    padded = np.zeros((len(values), pieces * COLUMNS))
    padded[:, : values.shape[1]] = values
    sums: Array = np.square(padded).reshape(len(values), pieces, COLUMNS).sum(axis=2)
    return sums


def _too_far(checkpoint: Checkpoint, original: Checkpoint, info: TensorInfo) -> Fault | None:
    """Returns what is wrong with a tensor, by the three questions above."""
    other = _counterpart(original, info.name)
    if other is None:
        return None
    format, found = get_format(info.format), _Distance()
    parts = zip(_slabs(checkpoint, info.name), _rounded(original, other, format), strict=True)
    with np.errstate(over="ignore", invalid="ignore"):
        for ours, (w, rounded) in parts:
            found.add(ours, w, rounded)
    size = sqrt(found.weights)
    if not size:
        return None if not found.error else Fault(info.name, "the original's is 0, this one is not")
    error, cost = sqrt(found.error) / size, sqrt(found.rounded) / size
    if not error <= MOST_TIMES * cost + SLACK:
        times = f"{error / cost:.0f} times what rounding to {info.format} costs" if cost else f"but {info.format} loses nothing"
        return Fault(info.name, f"is {error:.3g} of its size away from the original, {times}; it is not what was meant")
    shift = found.moved / sqrt(found.values) / size  # mean difference in units of the weights' RMS
    if not abs(shift) <= cost + SLACK:
        text = f"its weights are all moved by {shift:+.3g} of their RMS, rounding to {info.format} moves each by {cost:.3g} either way"
        return Fault(info.name, f"{text}: zero points off by one (GPTQ v1 and v2 mixed up)?")
    if found.worst is not None:
        row, column = found.worst
        last = min(column + COLUMNS, info.shape[-1]) - 1
        return Fault(info.name, f"columns {column} to {last} of row {row} are farther from the original than 0 is: a scale is damaged")
    return None


def _rounded(original: Checkpoint, name: str, format: Format) -> Iterator[tuple[Array, Array]]:
    """Yields (the original's rows, what rounding them to nearest in the format gives, or as if, where it cannot)."""
    shape = original.tensors[name].shape
    can = format.can_encode and format.fits(shape)
    if can and not format.row_independent:
        w = np.concatenate(list(_slabs(original, name)))
        rounded = format.dequantize(format.quantize(w)).reshape(w.shape)
        yield from ((w[first : first + ROWS], rounded[first : first + ROWS]) for first in range(0, len(w), ROWS))
        return
    for w in _slabs(original, name):
        scale = 1 + min(1.0, 2.0 ** (1 - format.bits))
        yield w, format.dequantize(format.quantize(w)).reshape(w.shape) if can else np.float32(scale) * w
