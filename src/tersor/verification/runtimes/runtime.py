"""What a runtime is: another program that turns a model file and tokens into logits."""

from __future__ import annotations

from abc import ABC, abstractmethod

from tersor.containers.container import Checkpoint
from tersor.tensor import Array


class Runtime(ABC):
    """Runs a model with code that shares nothing with ours."""

    name: str

    @abstractmethod
    def missing(self, container: str) -> str | None:
        """Returns why it cannot run files of this container here, None when it can."""

    @abstractmethod
    def logits(self, checkpoint: Checkpoint, tokens: Array) -> Array:
        """Returns the logits after each token, (n, vocab) float32. tokens: (n,) int32. Whatever the program raises goes through."""
