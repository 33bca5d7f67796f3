"""The weights of a model through a reader that is not ours: in this Python, or in the one that the environment names (remote.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tersor.tensor import Array
from tersor.verification.readers import READERS
from tersor.verification.remote import python_for, python_variable, remote_version, remote_weights


@dataclass(frozen=True)
class Independent:
    """A reader that can be used. label: package and version; python: of another environment, None = this one."""

    container: str
    label: str
    python: str | None

    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        """Yields (Hugging Face name, float32 values) of every tensor. Whatever the package raises goes through."""
        if self.python is None:
            return READERS[self.container].weights(path)
        return remote_weights(self.python, self.container, path)


def independent_reader(container: str) -> Independent | str:
    """Returns the reader of a container, or why there is none here."""
    reader = READERS.get(container)
    if reader is None:
        return f"there is no independent reader of {container}"
    python = python_for(reader.package)
    if python is None:
        missing = reader.missing()
        if missing is not None:
            return f"{missing}, or set {python_variable(reader.package)} to a Python that has it"
        return Independent(container, f"{reader.package} {reader.version()}", None)
    version = remote_version(python, reader.package)
    return Independent(container, f"{reader.package} {version}", python) if version else f"{python} has no {reader.package}"
