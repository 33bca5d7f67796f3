"""How many CPUs the native loops use."""

from __future__ import annotations

from tersor.errors import RecipeError


def set_threads(n: int | None) -> None:
    """Sets the threads of all native loops of this process; None = as they are. Raises RecipeError for a count out of range."""
    from tersor import _native

    if n is None:
        return
    try:
        _native.set_threads(n)
    except ValueError as error:
        raise RecipeError(str(error)) from None
