"""Float directories, read by the safetensors library and torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tersor.tensor import Array
from tersor.verification.reader import Reader


def stored_tensors(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields (name, torch tensor) of every safetensors tensor of a model directory, those of one file after another."""
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    for name in files:
        with safe_open(path / name, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open has no iterator
                yield key, file.get_tensor(key)


class HuggingFaceReader(Reader):
    """The safetensors library."""

    package = "safetensors"
    modules = ("safetensors", "torch")

    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        for name, tensor in stored_tensors(path):
            yield name, tensor.float().numpy()
