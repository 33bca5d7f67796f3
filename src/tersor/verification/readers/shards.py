"""The tensors of a model directory through the safetensors package, whatever file they are in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


@contextmanager
def stored_tensors(path: Path) -> Iterator[tuple[list[str], Callable[[str], torch.Tensor]]]:
    """Gives (names of all stored tensors, function from a name to the tensor) of a directory."""
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path / file, framework="pt")) for file in files]
        home = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        yield list(home), lambda name: home[name].get_tensor(name)
