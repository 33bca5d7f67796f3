"""The methods: how codes are chosen. METHODS maps a name to a function; adding one is one file and one line here."""

from __future__ import annotations

from tersor.errors import RecipeError, unknown
from tersor.methods.clip import clip
from tersor.methods.method import Method
from tersor.methods.rtn import rtn

METHODS: dict[str, Method] = {
    "rtn": rtn,
    "clip": clip,
}


def get_method(name: str) -> Method:
    """Returns the method of this name. Raises RecipeError, listing the known ones, for an unknown name."""
    if name not in METHODS:
        raise RecipeError(unknown("method", name, METHODS))
    return METHODS[name]


__all__ = ["METHODS", "Method", "get_method"]
