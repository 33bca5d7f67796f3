"""Other runtimes that a file is run in, to compare logits. RUNTIMES maps a container to its own one; transformers serves the rest."""

from __future__ import annotations

from tersor.verification.runtimes.onnx import OnnxRuntime
from tersor.verification.runtimes.runtime import Runtime
from tersor.verification.runtimes.transformers import TransformersRuntime

RUNTIMES: dict[str, Runtime] = {"onnx": OnnxRuntime()}


def runtime_of(container: str) -> Runtime:
    """Returns the runtime that judges files of this container."""
    return RUNTIMES.get(container) or TransformersRuntime()
