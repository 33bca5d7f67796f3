"""The containers. CONTAINERS maps each name to its file format; `open_checkpoint` finds out which one a path is."""

from __future__ import annotations

import re
from pathlib import Path

from tersor.containers.awq import AWQ
from tersor.containers.bitsandbytes import BitsAndBytes
from tersor.containers.compressed_tensors import CompressedTensors
from tersor.containers.container import Checkpoint, Container, Writer
from tersor.containers.gguf import GGUF
from tersor.containers.gptq import GPTQ
from tersor.containers.hqq import HQQ
from tersor.containers.huggingface import HuggingFace
from tersor.containers.mlx import MLX
from tersor.containers.onnx import Onnx
from tersor.errors import ContainerError, unknown

_ALL: tuple[Container, ...] = (
    GGUF(),
    HuggingFace(),
    CompressedTensors(),
    GPTQ(),
    AWQ(),
    BitsAndBytes(),
    HQQ(),
    MLX(),
    Onnx(),
)
CONTAINERS: dict[str, Container] = {container.name: container for container in _ALL}

# What of a hub repository a container reads; never pickles.
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "merges.txt"]


def get_container(name: str) -> Container:
    """Returns the container of this name. Raises ContainerError, listing the known ones."""
    if name not in CONTAINERS:
        raise ContainerError(unknown("container", name, CONTAINERS))
    return CONTAINERS[name]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a model: a directory, a .gguf file, or a hub id `org/name` (downloaded to the hub's cache) when no such path exists.

    Raises ContainerError when nothing is there, no container recognizes it, or it is malformed.
    """
    found = Path(path)
    if not found.exists():
        if not isinstance(path, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
            raise ContainerError(f"{path}: no such file or directory; give a .gguf file, a model directory or a hub id (org/name)")
        found = download(path)
    for container in CONTAINERS.values():
        if container.recognizes(found):
            return container.open(found)
    if found.is_dir():
        files = sorted(f.name for f in found.glob("*.gguf"))
        hint = f"open {files[0]} itself" if files else "a model directory holds config.json and safetensors files"
        raise ContainerError(f"{found}: no config.json; {hint}")
    raise ContainerError(f"{found}: not a GGUF file; give a .gguf file, a model directory or a hub id (org/name)")


def download(repository: str) -> Path:
    """Returns the directory of a hub repository in the hub's cache, downloaded if need be. Raises ContainerError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ContainerError(f"{repository}: no such file or directory here, and not to be had from the hub: {reason}") from error


__all__ = ["CONTAINERS", "Checkpoint", "Container", "Writer", "get_container", "open_checkpoint"]
