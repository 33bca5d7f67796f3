"""What a container is: the interface that every member of CONTAINERS implements. A container moves bytes; it never sees a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tersor.errors import ContainerError
from tersor.formats import get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.exact import alternatives
from tersor.formats.float_zero import FloatZeroFormat
from tersor.formats.ordered import OrderedFormat
from tersor.tensor import ModelDescription, QuantizedTensor, TensorInfo


class Checkpoint(ABC):
    """An opened model: described at once, tensors read lazily (mmap).

    All names and orders are Hugging Face's: `model.layers.0.self_attn.q_proj.weight`, q and k rows in the
    rotate-half order, norm weights as Hugging Face stores them; a reader of another container translates (row
    permutations act on packed rows). Tied embeddings: `lm_head.weight` is absent and config says `tie_word_embeddings`.
    """

    path: Path
    container: str  # name in CONTAINERS
    description: ModelDescription
    tensors: Mapping[str, TensorInfo]  # in file order
    note: str = ""  # what a user should know of it

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the tensor (or those rows of it) as stored. Views of the mapped file where possible; read-only."""

    @abstractmethod
    def release(self) -> None:
        """Tells the system that the pages read so far are not needed (madvise), so that resident memory stays small."""

    @abstractmethod
    def close(self) -> None:
        """Closes the file; arrays handed out before stay valid."""

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Writer(ABC):
    """A model being written under a temporary name. `with` renames it to its final name, or removes it on any exception.

    path: the final name; of several files the first. nbytes: of the whole output, known from the start.
    """

    path: Path
    nbytes: int

    @abstractmethod
    def write(self, name: str, tensor: QuantizedTensor) -> None:
        """Writes one tensor; names, formats and shapes as announced, in any order for safetensors, in plan order for GGUF."""

    def kept(self, name: str, tensor: QuantizedTensor) -> QuantizedTensor:
        """Returns the tensor as reading it back gives it: the same but where a container stores another number, rounded."""
        return tensor

    @abstractmethod
    def commit(self) -> None:
        """Checks that every announced tensor was written, then renames to the final name."""

    @abstractmethod
    def abort(self) -> None:
        """Removes the temporary output."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.commit()
        except BaseException:
            self.abort()
            raise


class Container(ABC):
    """A file format: how to recognize, open and create it."""

    name: str
    suffix: str  # ".gguf", or "" for a directory

    @abstractmethod
    def recognizes(self, path: Path) -> bool:
        """Returns whether the file or directory at path looks like this container (magic, file names); reads little."""

    @abstractmethod
    def open(self, path: Path) -> Checkpoint:
        """Opens a model. Raises ContainerError for anything malformed, before allocating what a lying header asks for."""

    @abstractmethod
    def holds(self, format: str) -> bool:
        """Returns whether a tensor of this format can be stored in this container."""

    @abstractmethod
    def create(self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool = False) -> Writer:
        """Starts writing. plan: every tensor in order. Raises OutputError when path exists and not force, ContainerError
        when a format cannot be held (names the tensor)."""


def refuse_unheld(container: Container, path: Path, plan: Sequence[TensorInfo]) -> None:
    """Raises ContainerError for the first tensor whose format the container cannot hold."""
    for info in plan:
        if not container.holds(info.format):
            raise ContainerError(
                f"{path}: {container.name} cannot hold {info.format} ({info.name}){what_is_lost(container, info.format)};"
                " choose another recipe or another container (--to)"
            )


def what_is_lost(container: Container, format: str) -> str:
    """Returns, for an error's text, what of a format that the container cannot hold it would have to round; "" when it is all."""
    held = [name for name in alternatives(format) if container.holds(name)]
    if _is_wide(format) and held and not any(map(_is_wide, held)):
        return ": its scales are float32, there they are float16"
    return ""


def _is_wide(format: str) -> bool:
    found = get_format(format)
    plain = found.plain if isinstance(found, OrderedFormat) else found
    return isinstance(plain, AffineFormat | FloatZeroFormat) and plain.wide
