"""What a model file holds: tensors, formats, true bits per weight, sizes, metadata, and what of it is known to go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from tersor.containers import open_checkpoint
from tersor.pipeline import file_bytes
from tersor.tensor import TensorInfo
from tersor.verification.lint import lint as lint_of
from tersor.verification.record import Fault


@dataclass(frozen=True)
class Inspection:
    """A model as stored. formats: format -> (tensors, weights, bytes), largest first. findings: by verification/lint.py."""

    path: str
    container: str
    config: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    formats: Mapping[str, tuple[int, int, int]]
    metadata: Mapping[str, Any]
    files: Mapping[str, int]
    file_bytes: int
    findings: tuple[Fault, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of weights of all tensors."""
        return sum(prod(t.shape) for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of all tensors, scales included, other metadata not."""
        return 8.0 * sum(t.nbytes for t in self.tensors) / max(1, self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        tensors = [asdict(t) | {"bits_per_weight": 8.0 * t.nbytes / max(1, prod(t.shape))} for t in self.tensors]
        return asdict(self) | {"tensors": tensors, "parameters": self.parameters, "bits_per_weight": self.bits_per_weight}


def inspect(path: str | Path, lint: bool = True) -> Inspection:
    """Returns what the model at path holds: a model directory, a .gguf file or a hub id. Raises ContainerError.

    lint: look for what is known to go wrong, for which a few rows of every quantized matrix are read; else headers alone.
    """
    with open_checkpoint(path) as checkpoint:
        tensors = tuple(checkpoint.tensors.values())
        totals: dict[str, tuple[int, int, int]] = {}
        for t in tensors:
            count, weights, nbytes = totals.get(t.format, (0, 0, 0))
            totals[t.format] = count + 1, weights + prod(t.shape), nbytes + t.nbytes
        description = checkpoint.description
        return Inspection(
            path=str(checkpoint.path),
            container=checkpoint.container,
            config=dict(description.config),
            tensors=tensors,
            formats=dict(sorted(totals.items(), key=lambda item: -item[1][2])),
            metadata={key: _plain(value) for key, value in description.metadata.items()},
            files={name: len(data) for name, data in description.files.items()},
            file_bytes=file_bytes(checkpoint.path),
            findings=tuple(lint_of(checkpoint)) if lint else (),
        )


def _plain(value: Any) -> Any:
    """Returns a metadata value fit for JSON: long lists by their length, bytes as text, tuples of (type, value) as the value."""
    if isinstance(value, tuple) and len(value) == 2:
        value = value[1]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)) and len(value) > 16:
        return f"[{len(value)} values]"
    return value if isinstance(value, (bool, int, float, str, list, type(None))) else str(value)
