"""What a model file stores, taken apart and put together again without tersor, so that tests can plant faults.

parts = load_parts(path)               # directory of safetensors or ONNX, or a GGUF file: {stored name: Part}
parts["lm_head.weight"].data[7] ^= 1
save_parts(path, parts)                # names, dtypes, shapes and bytes as they are now; what is left out is gone
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Part:
    """A stored tensor. dtype: as the file names it (safetensors: "F16"; GGUF and ONNX: a number)."""

    dtype: Any
    shape: tuple[int, ...]
    data: bytearray


def weights_file(path: Path) -> Path:
    """Returns the file that most bytes of a model are in."""
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.name in ("model.safetensors", "model.onnx.data")]
    return files[0]


def load_parts(path: Path) -> dict[str, Part]:
    if path.is_file():
        return _load_gguf(path)
    return _load_onnx(path) if (path / "model.onnx").is_file() else _load_safetensors(path / "model.safetensors")


def save_parts(path: Path, parts: dict[str, Part]) -> None:
    if path.is_file():
        _save_gguf(path, parts)
    elif (path / "model.onnx").is_file():
        _save_onnx(path, parts)
    else:
        _save_safetensors(path / "model.safetensors", parts)


def _load_safetensors(file: Path) -> dict[str, Part]:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {
        name: Part(entry["dtype"], tuple(entry["shape"]), bytearray(data[start:][slice(*entry["data_offsets"])]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _save_safetensors(file: Path, parts: dict[str, Part]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, part in parts.items():
        header[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [end, end + len(part.data)]}
        end += len(part.data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(part.data for part in parts.values()))


def _load_gguf(file: Path) -> dict[str, Part]:
    from gguf import GGUFReader

    return {
        str(t.name): Part(t.tensor_type, tuple(int(n) for n in reversed(t.shape)), bytearray(t.data.tobytes()))
        for t in GGUFReader(file).tensors
    }


def _save_gguf(file: Path, parts: dict[str, Part]) -> None:
    import numpy as np
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, quant_shape_to_byte_shape

    reader: Any = GGUFReader(file)
    fields = {f.name: f for f in reader.fields.values() if not f.name.startswith("GGUF.")}
    writer: Any = GGUFWriter(file.with_suffix(".new"), fields.pop("general.architecture").contents())
    for field in fields.values():
        sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for name, part in parts.items():
        rows = np.frombuffer(bytes(part.data), np.uint8).reshape(quant_shape_to_byte_shape(part.shape, part.dtype))
        writer.add_tensor(name, rows, raw_dtype=part.dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").replace(file)


def _load_onnx(path: Path) -> dict[str, Part]:
    import onnx

    data = (path / "model.onnx.data").read_bytes()
    parts = {}
    for tensor in onnx.load(path / "model.onnx", load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            begin = int(where["offset"])
            parts[tensor.name] = Part(tensor.data_type, tuple(tensor.dims), bytearray(data[begin : begin + int(where["length"])]))
    return parts


def _save_onnx(path: Path, parts: dict[str, Part]) -> None:
    """New bytes lie where the old ones did; a tensor that is left out stays in the data file alone."""
    import onnx

    model: Any = onnx.load(path / "model.onnx", load_external_data=False)
    data = bytearray((path / "model.onnx.data").read_bytes())
    kept = []
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where and tensor.name not in parts:
            continue
        kept.append(tensor)
        if where:
            part = parts[tensor.name]
            begin = int(where["offset"])
            assert len(part.data) == int(where["length"])
            data[begin : begin + len(part.data)] = part.data
            tensor.data_type = part.dtype
            tensor.dims[:] = part.shape
    copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(copies)
    (path / "model.onnx").write_bytes(model.SerializeToString())
    (path / "model.onnx.data").write_bytes(data)
