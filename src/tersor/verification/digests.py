"""Digests of what is stored: of files, byte for byte, and of tensors, value for value whatever their format and container."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tersor.containers.container import Checkpoint
from tersor.formats import get_format
from tersor.tensor import Array, QuantizedTensor

SLAB_VALUES = 1 << 22  # values decoded at once, 16 MiB
_READ_BYTES = 1 << 20


def slabs_of(tensor: QuantizedTensor) -> Iterator[tuple[int, Array]]:
    """Yields (first row, values float32 (rows, in)) of a tensor; a format that mixes rows comes in one piece."""
    format = get_format(tensor.format)
    step = max(1, SLAB_VALUES // tensor.columns) if format.row_independent else tensor.rows
    for first in range(0, tensor.rows, step):
        if step >= tensor.rows:
            part = tensor
        else:
            fields = {name: array[first : first + step] for name, array in tensor.fields.items()}
            part = QuantizedTensor(tensor.format, (len(next(iter(fields.values()))), tensor.columns), fields)
        yield first, format.dequantize(part).reshape(-1, tensor.columns)


def values_digest(tensor: QuantizedTensor) -> str:
    """Returns the SHA-256 of a tensor's shape and its decoded values, little-endian float32 in row order, -0 as 0."""
    digest = hashlib.sha256(repr(tuple(int(n) for n in tensor.shape)).encode())
    for _, values in slabs_of(tensor):
        with np.errstate(invalid="ignore"):  # a signaling nan is one too
            digest.update(np.ascontiguousarray(values + np.float32(0), dtype="<f4").data)
    return digest.hexdigest()


def model_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Returns values_digest of every tensor by name; whole tensors are in memory as stored, a slab of each as float32."""
    digests = {}
    for name in checkpoint.tensors:
        digests[name] = values_digest(checkpoint.read(name))
        checkpoint.release()
    return digests


def file_digests(files: list[Path], root: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file's bytes by its name relative to root."""
    return {file.relative_to(root).as_posix(): _file_digest(file) for file in files}


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
