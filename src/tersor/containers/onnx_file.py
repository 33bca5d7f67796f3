"""model.onnx as plain records, and its initializers as views of the files that hold them.

    ModelProto.graph.node         what reads which initializer
    ModelProto.graph.initializer  name, dims, data_type; raw_data, or external_data {location, offset, length}: bytes of a file beside it

Source: onnx/onnx onnx/onnx.proto and docs/ExternalData.md. The protobuf is parsed by the `onnx` package; offsets, lengths and names of
files are checked here, before anything is mapped.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tersor.containers.mapped import MappedFile
from tersor.containers.safetensors_file import MAX_RANK, shorten
from tersor.errors import ContainerError
from tersor.tensor import Array

if TYPE_CHECKING:
    import onnx

MODEL = "model.onnx"
MAX_GRAPH_BYTES = 256 << 20  # the weights lie outside
MAX_SIZE = 2**63 - 1

FLOAT, UINT8, INT8, INT32, FLOAT16, BFLOAT16 = 1, 2, 3, 6, 10, 16  # of TensorProto.DataType
_DTYPES: dict[int, np.dtype[Any]] = {
    FLOAT: np.dtype("<f4"),
    UINT8: np.dtype("u1"),
    INT8: np.dtype("i1"),
    INT32: np.dtype("<i4"),
    FLOAT16: np.dtype("<f2"),
    BFLOAT16: np.dtype("<u2"),  # numpy has none: raw bits
}


def import_onnx(doing: str) -> None:
    """Raises ContainerError when the onnx package is not installed. doing: what it is needed for."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ContainerError(f"{doing} needs the onnx package ({error}); install it with: pip install 'tersor[onnx]'") from None


def has_graph(path: Path) -> bool:
    """Returns whether path is a directory with a model.onnx and no safetensors of its own, which would be the weights."""
    return (path / MODEL).is_file() and not any(path.glob("*.safetensors"))


@dataclass(frozen=True)
class Node:
    """An operation. attributes: its integers by name."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, int]


@dataclass(frozen=True)
class Initializer:
    """A stored tensor. data_type: of TensorProto.DataType; location: name of the file, "" for the graph itself; offset: bytes in it."""

    name: str
    data_type: int
    shape: tuple[int, ...]
    location: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return prod(self.shape) * _DTYPES[self.data_type].itemsize


class OnnxFile:
    """An opened graph: `nodes` in order, `initializers` by name; arrays are read-only views."""

    def __init__(self, directory: Path) -> None:
        """Parses the graph and maps the files that it names. Raises ContainerError for anything malformed."""
        self.path = directory / MODEL
        import_onnx(f"{self.path}: reading it")
        self._files: dict[str, MappedFile] = {}
        self._inline: dict[str, bytes] = {}
        self.initializers: dict[str, Initializer] = {}
        try:
            self._read(_parse(self.path))
        except BaseException:
            self.close()
            raise

    def _read(self, model: onnx.ModelProto) -> None:
        self.producer = shorten(model.producer_name)
        self.nodes = [self._node(node) for node in model.graph.node]
        for tensor in model.graph.initializer:
            if self._text(tensor.name) in self.initializers:
                raise ContainerError(f"{self.path}: initializer {shorten(tensor.name)!r} appears twice; the file is damaged")
            stored = tensor.data_location == 1 or tensor.raw_data  # EXTERNAL, or inside as bytes; others are small constants
            if stored and tensor.data_type in _DTYPES:
                self.initializers[tensor.name] = self._initializer(tensor)

    def _node(self, node: onnx.NodeProto) -> Node:
        integers = {self._text(attribute.name): attribute.i for attribute in node.attribute if attribute.type == 2}  # INT
        inputs, outputs = (tuple(self._text(name) for name in names) for names in (node.input, node.output))
        return Node(self._text(node.op_type), self._text(node.name), inputs, outputs, integers)

    def _text(self, value: object) -> str:
        """Returns a string of the protobuf, which gives bytes for what is no UTF-8."""
        if not isinstance(value, str):
            raise ContainerError(f"{self.path}: a name is no text: {shorten(value)}; the file is damaged")
        return value

    def _initializer(self, tensor: onnx.TensorProto) -> Initializer:
        """Returns the record, its numbers proven consistent with each other and with the file that holds it."""
        where, shape = f"{self.path}: initializer {shorten(tensor.name)!r}", tuple(tensor.dims)
        need = prod(shape) * _DTYPES[tensor.data_type].itemsize
        if len(shape) > MAX_RANK or any(n < 0 for n in shape) or need > MAX_SIZE:
            raise ContainerError(f"{where} has shape {shorten(list(shape))}; the file is damaged")
        if tensor.data_location != 1:
            self._inline[tensor.name] = tensor.raw_data
            if len(tensor.raw_data) != need:
                raise ContainerError(f"{where}: holds {len(tensor.raw_data)} bytes, its shape needs {need}; the file is damaged")
            return Initializer(tensor.name, tensor.data_type, shape, "", 0)
        location, offset, length = self._place(
            where, {self._text(entry.key): self._text(entry.value) for entry in tensor.external_data}, need
        )
        file = self._file(where, location)
        if length != need or not 0 <= offset <= file.size - need:
            raise ContainerError(
                f"{where}: {length} bytes at {offset} of {location}, which has {file.size}; its shape needs {need};"
                " the file is truncated or damaged"
            )
        return Initializer(tensor.name, tensor.data_type, shape, location, offset)

    def _place(self, where: str, given: dict[str, str], need: int) -> tuple[str, int, int]:
        """Returns (location, offset, length) of external data."""
        location, numbers = given.get("location", ""), (given.get("offset", "0"), given.get("length", str(need)))
        if not location or Path(location).name != location or location in (".", ".."):
            raise ContainerError(f"{where}: {shorten(location)!r} is no name of a file in this directory")
        if not all(n.isascii() and n.isdigit() and len(n) < 20 for n in numbers):
            raise ContainerError(f"{where}: offset and length are {shorten(numbers)}, need bytes; the file is damaged")
        return location, int(numbers[0]), int(numbers[1])

    def _file(self, where: str, location: str) -> MappedFile:
        if location not in self._files:
            if "\0" in location or not (self.path.parent / location).is_file():
                raise ContainerError(f"{where}: its file {shorten(location)!r} is missing; copy or download it too")
            self._files[location] = MappedFile(self.path.parent / location)
        return self._files[location]

    def array(self, name: str) -> Array:
        """Returns the initializer in its shape. A read-only view."""
        entry = self.initializers[name]
        dtype = _DTYPES[entry.data_type]
        if not entry.location:
            return np.frombuffer(self._inline[name], dtype).reshape(entry.shape)
        return self._files[entry.location].view(entry.offset, dtype, prod(entry.shape)).reshape(entry.shape)

    def release(self) -> None:
        """Gives the pages read so far back to the system."""
        for file in self._files.values():
            file.release()

    def close(self) -> None:
        """Closes the files; arrays handed out stay valid."""
        for file in self._files.values():
            file.close()


def _parse(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        size = path.stat().st_size
        if size > MAX_GRAPH_BYTES:
            raise ContainerError(
                f"{path}: {size} bytes, above the limit of {MAX_GRAPH_BYTES} for a graph; save it with its weights as external data"
            )
        return onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise ContainerError(f"{path}: cannot read: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise ContainerError(f"{path}: is no ONNX model: {shorten(error)}; the file is damaged") from None
