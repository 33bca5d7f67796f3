"""_native.pyi names what the extension has: the same functions, classes and parameters."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import tersor
from tersor import _native

STUB = Path(tersor.__file__).parent / "_native.pyi"


def parameters(signature: str) -> list[str]:
    """Returns the parameter names of a signature as nanobind writes it, with arrays that are no Python."""
    function = ast.parse(re.sub(r"ndarray\[[^\]]*\]|\\\d", "array", signature) + ": ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return [a.arg for a in function.args.args]


def native(owner: object) -> dict[str, list[str] | None]:
    """Returns the public members of the module or one of its classes: a function's parameters, None for a property or class."""
    found: dict[str, list[str] | None] = {}
    for name in vars(owner):
        if not name.startswith("_"):
            signature = getattr(getattr(owner, name), "__nb_signature__", None)
            found[name] = parameters(signature[0][0]) if isinstance(signature, tuple) else None
    return found


def stubbed(body: list[ast.stmt]) -> dict[str, list[str] | None]:
    """Returns the same of a stub's body."""
    found: dict[str, list[str] | None] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[node.name] = None if node.decorator_list else [a.arg for a in node.args.args]
        elif isinstance(node, ast.ClassDef):
            found[node.name] = None
    return found


def test_the_stub_is_true() -> None:
    tree = ast.parse(STUB.read_text())
    assert stubbed(tree.body) == native(_native)
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            assert stubbed(node.body) == native(getattr(_native, node.name)), node.name
