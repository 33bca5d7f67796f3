"""What an independent reader is: another package's view of a model file. readers/ holds one per container."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tersor.tensor import Array


class Reader(ABC):
    """Reads the weights of a container with code that shares nothing with ours."""

    package: str  # the distribution that does the reading, as PyPI calls it
    modules: tuple[str, ...]  # what must be importable

    def missing(self) -> str | None:
        """Returns why the reader cannot be used here, None when it can."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"{self.package} cannot be imported ({error}); install it with: pip install {self.package}"
        return None

    def version(self) -> str:
        """Returns the package's version, "" when it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return ""

    @abstractmethod
    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        """Yields (Hugging Face name, values) of every tensor of the model, as the package decodes it: float32, in the logical shape.

        One tensor at a time in memory. Where the package computes in the scale's type, it is asked for float32 arithmetic.
        Whatever the package raises for a damaged file goes through.
        """
