"""One tensor at a time: read, checked, rounded and measured, a slab of rows after the other, so that memory holds no more than that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod, sqrt

import numpy as np

from tersor import _native
from tersor.containers.container import Checkpoint
from tersor.errors import FormatError, ModelError
from tersor.formats import Format, get_format
from tersor.methods import Step
from tersor.recipe import CASTS
from tersor.tensor import Array, QuantizedTensor, TensorInfo

# float32 bytes of the rows that are worked on at once, for each of at most SLAB_THREADS threads: few enough that malloc keeps the memory
# from one slab to the next (on one thread 0.03 page faults a thousand weights; 0.85, 2 to 4 ns a weight, with eight times as much)
SLAB_BYTES = 1 << 20
SLAB_THREADS = 8
FLOAT16_MAX = 65504.0


def keep_tensor(checkpoint: Checkpoint, info: TensorInfo, report: Callable[[int], None]) -> QuantizedTensor:
    """Returns the tensor as stored, checked for NaN and infinities slab by slab when it is float."""
    if info.format in CASTS:
        for rows in _slabs(info.shape):
            w = dequantize(checkpoint.read(info.name, rows))
            check_finite(w, info.name, rows.start)
            checkpoint.release()
            report(w.size)
    else:
        report(prod(info.shape))
    return checkpoint.read(info.name)


def quantize_tensor(
    checkpoint: Checkpoint, source: TensorInfo, format: str, step: Step, report: Callable[[int], None]
) -> tuple[QuantizedTensor, float]:
    """Returns one tensor in the format, and its relative RMS error."""
    fmt = get_format(format)
    fields: dict[str, Array] = {}
    squared_error = squares = 0.0
    for rows in _slabs(source.shape) if fmt.row_independent else [slice(0, prod(source.shape[:-1]))]:
        w = np.ascontiguousarray(dequantize(checkpoint.read(source.name, rows)).reshape(-1, source.shape[-1]), dtype=np.float32)
        largest = check_finite(w, source.name, rows.start)
        part = _encode(w, fmt, step, source.name)
        decoded = fmt.dequantize(part).reshape(w.shape)
        if largest > FLOAT16_MAX:
            _check_range(w, decoded, format, source.name, rows.start)
        sums = _native.square_sums(w.reshape(-1), np.ascontiguousarray(decoded, dtype=np.float32).reshape(-1))
        squares, squared_error = squares + sums[0], squared_error + sums[1]
        for key, values in part.fields.items():
            if not fmt.row_independent:
                fields[key] = values
                continue
            if key not in fields:
                fields[key] = np.empty((prod(source.shape[:-1]), *values.shape[1:]), values.dtype)
            fields[key][rows] = values
        checkpoint.release()
        report(w.size)
    return QuantizedTensor(format, source.shape, fields), sqrt(squared_error / squares) if squares else 0.0


def _encode(w: Array, fmt: Format, step: Step, name: str) -> QuantizedTensor:
    """Returns w in the format by the method; a refusal names the tensor."""
    try:
        return fmt.quantize(w) if fmt.name in CASTS else step.method.run(w, fmt, None, step.options)
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None


def dequantize(tensor: QuantizedTensor) -> Array:
    """Returns the float32 values of a stored tensor, in its shape."""
    return get_format(tensor.format).dequantize(tensor)


def check_finite(w: Array, name: str, first_row: int = 0) -> float:
    """Returns the largest magnitude in w. Raises ModelError naming tensor and position of the first NaN or infinity.

    first_row: row of the tensor that w begins with.
    """
    largest = _native.largest_magnitude(np.ascontiguousarray(w, dtype=np.float32).reshape(-1))
    if not np.isfinite(largest):
        bad = np.argwhere(~np.isfinite(w.reshape(-1, w.shape[-1])))
        row, column = (int(i) for i in bad[0])
        value = w.reshape(-1, w.shape[-1])[row, column]
        what = f"{name} holds {value} at row {first_row + row}, column {column} ({len(bad)} such weights in these rows)"
        raise ModelError(f"{what}; the checkpoint is damaged: fetch or export it again")
    return largest


def _check_range(w: Array, decoded: Array, format: str, name: str, first_row: int) -> None:
    """Raises FormatError when a weight beyond float16's range was lost, because its value or the scale of its group saturated."""
    with np.errstate(over="ignore", invalid="ignore"):
        lost = np.argwhere((np.abs(w) > FLOAT16_MAX) & ~(np.abs(decoded - w) <= 0.5 * np.abs(w)))
    if len(lost):
        row, column = (int(i) for i in lost[0])
        where = f"{name} holds {w[row, column]:g} at row {first_row + row}, column {column}"
        raise FormatError(
            f"{format}: {where}, beyond what a float16 value or scale can hold ({FLOAT16_MAX:g}); use bf16, f32 or keep for it"
        )


def _slabs(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yields row ranges of at most SLAB_BYTES of float32 a thread, at least one row each."""
    rows = prod(shape[:-1])
    step = max(1, SLAB_BYTES * min(_native.threads(), SLAB_THREADS) // (4 * shape[-1]))
    for begin in range(0, rows, step):
        yield slice(begin, min(rows, begin + step))
