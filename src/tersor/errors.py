"""TersorError and its few kinds: what went wrong, where, what was got, what is needed, how to mend it, in one line."""

from __future__ import annotations


class TersorError(Exception):
    """Bad input, told in one line. The command line prints it and exits with code 2."""


class FormatError(TersorError):
    """A number format that is unknown, does not fit the tensor, or cannot do what was asked."""


class ContainerError(TersorError):
    """A model file or directory that is missing, malformed, truncated, or cannot hold what is to be written."""


class ModelError(TersorError):
    """An architecture, configuration, tokenizer or weight that the engine cannot use."""


class RecipeError(TersorError):
    """A recipe or option that is unknown, contradictory, or matches nothing."""


class OutputError(TersorError):
    """An output that exists already or cannot be written."""


def unknown(kind: str, name: str, known: object) -> str:
    """Returns the text for an unknown name: it lists the known ones."""
    names = ", ".join(sorted(str(k) for k in known))  # type: ignore[attr-defined]
    return f"unknown {kind} {name!r}; known: {names}"
