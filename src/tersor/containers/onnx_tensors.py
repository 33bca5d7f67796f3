"""Which weights a graph holds, by Hugging Face name: tersor's own graphs, and those of onnxruntime-genai's model builder.

    node /model/layers.0/attn/q_proj/MatMulNBits | MatMul_Q4     codes, scales and zeros are its inputs 1, 2 and 3
    node DequantizeLinear                                        int8_row_xN, in our graphs only: its parts as onnx_parts.py has them
    node .../GatherBlockQuantized                                the embedding: inputs 0, 2 and 3; the first may come through Reshape
    initializer model.layers.0.attn.q_proj.MatMul.weight         a float matrix, transposed: (in, rows)
    initializer model.layers.0.self_attn.q_proj.weight           ours: (rows, in); norms, biases and embedding alike in both
    attn.qkv_proj                                                q, k and v, their rows one after the other

Source of the foreign names: microsoft/onnxruntime-genai src/python/py/models/builders/base.py. Scales are read as float16 where all
are such numbers, else as float32, which is what onnxruntime's own quantizer makes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from tersor.containers.onnx_file import BFLOAT16, FLOAT, FLOAT16, INT8, INT32, UINT8, Initializer, Node, OnnxFile
from tersor.containers.onnx_parts import is_blocks
from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError, FormatError
from tersor.formats import get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.floats import f32_from_bf16, is_half
from tersor.formats.outliers import OutlierFormat
from tersor.formats.packing import packed_bytes
from tersor.models import spec_of
from tersor.tensor import Array, QuantizedTensor, TensorInfo

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

_FLOATS = {FLOAT: "f32", FLOAT16: "f16", BFLOAT16: "bf16"}
_PATH = re.compile(r"/(?:model/layers\.(\d+)/(attn|mlp)/(\w+_proj)|lm_head)/MatMul\w*")
_OWN = re.compile(r"(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj|lm_head|model\.embed_tokens)\.qweight")
_TENSOR = re.compile(r"(?:model|lm_head)(?:\.\w+)*\.(?:weight|bias)")
_FOREIGN = (  # names of initializers -> Hugging Face's
    (re.compile(r"^(model\.layers\.\d+)\.attn\.([qk]_norm)\.layernorm\.weight$"), r"\1.self_attn.\2.weight"),
    (re.compile(r"^model\.layers\.\d+\.final_norm_layernorm\.weight$"), "model.norm.weight"),
    (re.compile(r"^(model\.layers\.\d+)\.attn\."), r"\1.self_attn."),
    (re.compile(r"\.(?:MatMul|Add)\.(weight|bias)$"), r".\1"),
)


@dataclass(frozen=True)
class Blocks:
    """Where the parts of a quantized matrix lie. zeros: "" in the symmetric form."""

    codes: str
    scales: str
    zeros: str
    bits: int
    group: int


@dataclass(frozen=True)
class Apart:
    """Where the parts of a matrix with outlier columns lie."""

    codes: str
    scb: str
    outliers: str
    outlier: str


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from: rows [first, first + rows) of a stored matrix of `stored_rows`."""

    info: TensorInfo
    first: int
    stored_rows: int
    stored: str | Blocks | Apart  # of floats the initializer's name
    transposed: bool = False


def find_sources(file: OnnxFile, config: Mapping[str, Any]) -> dict[str, Source]:
    """Returns every weight of the graph by its Hugging Face name, in the order of the initializers; a tied head is not among them.

    Raises ContainerError for a quantized product that has no format here (which layer and why), or parts that do not fit each other.
    """
    producers = {output: node for node in file.nodes for output in node.outputs}
    found: list[Source] = []
    for node in file.nodes:
        own = _OWN.fullmatch(node.inputs[0]) if node.op == "DequantizeLinear" and node.inputs else None
        if own is not None:
            found.append(_outliers(file, own[1]))
        module = _module(node)
        if module is not None:
            found += _split(_quantized(file, node, module, producers), config, file)
    for name, entry in file.initializers.items():
        floating = _float_name(name, entry)
        if floating is not None:
            found += _split(_float(file, entry, *floating), config, file)
    order = {name: position for position, name in enumerate(file.initializers)}
    found.sort(key=lambda source: (order[_first_part(source)], source.first))
    return _without_tied_head({source.info.name: source for source in found})


def _first_part(source: Source) -> str:
    return source.stored if isinstance(source.stored, str) else source.stored.codes


def _without_tied_head(sources: dict[str, Source]) -> dict[str, Source]:
    """Returns the sources without a head that is the embedding, under the embedding's name."""
    embedding, head = sources.get(f"{EMBEDDING}.weight"), sources.get(f"{HEAD}.weight")
    if head is None or (embedding is not None and _first_part(embedding) != _first_part(head)):
        return sources
    del sources[head.info.name]
    if embedding is None:  # looked up in the head, transposed
        sources[f"{EMBEDDING}.weight"] = replace(head, info=replace(head.info, name=f"{EMBEDDING}.weight"))
    return sources


def _module(node: Node) -> str | None:
    """Returns the module whose weight a node multiplies by, None when it holds no quantized weight."""
    if node.op == "GatherBlockQuantized":
        return EMBEDDING
    if node.op != "MatMulNBits" or len(node.inputs) < 3:
        return None
    own, path = _OWN.fullmatch(node.inputs[1]), _PATH.fullmatch(node.name.split("_Q")[0])
    if own is not None:
        return own[1]
    if path is None:
        return None
    return HEAD if path[1] is None else f"model.layers.{path[1]}.{'self_attn' if path[2] == 'attn' else 'mlp'}.{path[3]}"


def _quantized(file: OnnxFile, node: Node, module: str, producers: Mapping[str, Node]) -> Source:
    """Returns the source of a quantized matrix after checking that all its parts fit each other."""
    where = f"{file.path}: {shorten(module)} ({node.op})"
    lookup = node.op == "GatherBlockQuantized"
    inputs = (*node.inputs, "", "", "", "")
    codes, scales, zeros = (inputs[0], inputs[2], inputs[3]) if lookup else inputs[1:4]
    if codes in producers and producers[codes].op == "Reshape" and producers[codes].inputs:
        codes = producers[codes].inputs[0]
    bits, group = node.attributes.get("bits", 4), node.attributes.get("block_size", 128)
    format = f"int{bits}_g{group}{'' if zeros else 's'}"
    if not is_blocks(format):
        raise ContainerError(f"{where} has {bits} bits in blocks of {group}; need 2, 4 or 8 bits in blocks of 16, 32, 64, 128 or 256")
    if not lookup and (inputs[4] or inputs[5]):
        raise ContainerError(f"{where} has {'g_idx' if inputs[4] else 'a fused bias'}, which is not read yet; export without it")
    stored = file.initializers.get(codes)
    if stored is None or stored.data_type != UINT8 or not stored.shape:
        raise ContainerError(f"{where}: its codes {shorten(codes)!r} are no uint8 initializer; the graph is not one that is read here")
    rows = stored.shape[0] if lookup else node.attributes.get("N", 0)
    columns = prod(stored.shape[1:]) * 8 // bits if lookup else node.attributes.get("K", 0)
    if not (0 < rows < 2**31 and 0 < columns < 2**31) or columns % group:
        raise ContainerError(f"{where} is {rows} x {columns} in blocks of {group}; need whole blocks; the file is damaged")
    groups = columns // group
    _check_part(file, where, codes, (UINT8,), rows * columns * bits // 8)
    _check_part(file, where, scales, (FLOAT, FLOAT16, BFLOAT16), rows * groups)
    if zeros:
        _check_part(file, where, zeros, (UINT8,), rows * packed_bytes(groups, bits))
    if not is_half(file.array(scales), file.initializers[scales].data_type == BFLOAT16):
        format += "f"
    info = TensorInfo(f"{module}.weight", format, (rows, columns), get_format(format).nbytes((rows, columns)))
    return Source(info, 0, rows, Blocks(codes, scales, zeros, bits, group))


def _outliers(file: OnnxFile, module: str) -> Source:
    """Returns the source of a matrix with outlier columns after checking that all its parts fit each other."""
    where = f"{file.path}: {shorten(module)} (DequantizeLinear)"
    codes, outlier = file.initializers.get(f"{module}.qweight"), file.initializers.get(f"{module}.outlier")
    if codes is None or outlier is None or len(codes.shape) != 2 or len(outlier.shape) != 2 or 0 in codes.shape or 0 in outlier.shape:
        found = [None if part is None else shorten(list(part.shape)) for part in (codes, outlier)]
        raise ContainerError(f"{where}: qweight and outlier are {found}, need (rows, columns) each; the file is damaged")
    (rows, rest), count = codes.shape, outlier.shape[1]
    for part, kind, size in (("qweight", INT8, rows * rest), ("scb", FLOAT, rows), ("rest", INT32, rest), ("outliers", INT32, count)):
        _check_part(file, where, f"{module}.{part}", (kind,), size)
    _check_part(file, where, f"{module}.outlier", (FLOAT16,), rows * count)
    try:
        format = get_format(f"int8_row_x{count}")
        assert isinstance(format, OutlierFormat)
        complement = format.rest_of(file.array(f"{module}.outliers").reshape(-1), rest + count)
    except FormatError as error:
        raise ContainerError(f"{where}: {error}; the file is damaged") from None
    if not np.array_equal(file.array(f"{module}.rest").reshape(-1), complement):
        raise ContainerError(f"{where}: rest and outliers do not name every column once, by rising number; the file is damaged")
    info = TensorInfo(f"{module}.weight", format.name, (rows, rest + count), format.nbytes((rows, rest + count)))
    return Source(info, 0, rows, Apart(*(f"{module}.{part}" for part in ("qweight", "scb", "outliers", "outlier"))))


def _check_part(file: OnnxFile, where: str, name: str, types: tuple[int, ...], count: int) -> None:
    part = file.initializers.get(name)
    if part is None or part.data_type not in types or prod(part.shape) != count:
        got = "no initializer" if part is None else f"type {part.data_type} {shorten(list(part.shape))}"
        raise ContainerError(f"{where}: {shorten(name)!r} is {got}, needs {count} values of type {types[0]}; the file is damaged")


def _float_name(name: str, entry: Initializer) -> tuple[str, bool] | None:
    """Returns (Hugging Face name, transposed) of a float weight, None for everything else."""
    transposed = name.endswith(".MatMul.weight")
    for pattern, replacement in _FOREIGN:
        name = pattern.sub(replacement, name)
    return (name, transposed) if entry.data_type in _FLOATS and _TENSOR.fullmatch(name) else None


def _float(file: OnnxFile, entry: Initializer, name: str, transposed: bool) -> Source:
    shape = entry.shape[::-1] if transposed else entry.shape
    if len(shape) not in (1, 2) or 0 in shape or (transposed and len(shape) != 2):
        raise ContainerError(f"{file.path}: {shorten(entry.name)!r} has shape {list(shape)}, needs one or two axes of at least one value")
    info = TensorInfo(name, _FLOATS[entry.data_type], shape, entry.nbytes)
    return Source(info, 0, prod(shape[:-1]), entry.name, transposed)


def _split(source: Source, config: Mapping[str, Any], file: OnnxFile) -> list[Source]:
    """Returns q, k and v of a joined projection; any other tensor as it is."""
    layer, joined, part = source.info.name.rpartition(".qkv_proj.")
    if not joined:
        return [source]
    spec, vector = spec_of(config), part == "bias"
    rows = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim)
    if sum(rows) != source.info.shape[0]:
        raise ContainerError(
            f"{file.path}: {shorten(source.info.name)} has {source.info.shape[0]} rows, config.json's heads need {sum(rows)}"
        )
    first, parts = 0, []
    for name, count in zip(("q_proj", "k_proj", "v_proj"), rows):
        shape = (count,) if vector else (count, *source.info.shape[1:])
        info = TensorInfo(f"{layer}.{name}.{part}", source.info.format, shape, get_format(source.info.format).nbytes(shape))
        parts.append(replace(source, info=info, first=first))
        first += count
    return parts


def read_source(file: OnnxFile, source: Source, rows: slice | None) -> QuantizedTensor:
    """Returns a tensor or those rows of it. Codes, zeros and floats are views where they lie row by row; scales become float16
    or float32."""
    info, first = source.info, source.first
    if isinstance(source.stored, str):
        values = file.array(source.stored)
        if len(info.shape) == 1:
            values = values[first : first + info.shape[0]].reshape(1, -1)
            return QuantizedTensor(info.format, info.shape, {"values": values}) if rows is None else _sliced(info.format, values[rows])
        matrix = (values.T if source.transposed else values)[first : first + info.shape[0]]
        return _sliced(info.format, matrix if rows is None else matrix[rows])
    if isinstance(source.stored, Apart):
        return _read_outliers(file, source.info, source.stored, rows)
    parts = source.stored
    names = [("codes", parts.codes), ("scale", parts.scales)] + ([("zero", parts.zeros)] if parts.zeros else [])
    fields = {}
    for field, name in names:
        whole = _scales(file, name, info.format) if field == "scale" else file.array(name)
        mine = whole.reshape(source.stored_rows, -1)[first : first + info.shape[0]]
        fields[field] = mine if rows is None else mine[rows]
    return QuantizedTensor(info.format, (len(fields["codes"]), info.shape[1]), fields)


def _read_outliers(file: OnnxFile, info: TensorInfo, parts: Apart, rows: slice | None) -> QuantizedTensor:
    """Returns a matrix with outlier columns. Raises ContainerError for a code of -128."""
    mine = slice(None) if rows is None else rows
    codes = file.array(parts.codes)[mine]
    if codes.size and codes.min() == -128:
        raise ContainerError(f"{file.path}: {shorten(parts.codes)} holds the code -128, int8_row has -127..127; the file is damaged")
    fields = {
        "codes": codes,
        "scb": file.array(parts.scb).reshape(-1, 1)[mine],
        "outliers": file.array(parts.outliers).reshape(-1),
        "outlier": file.array(parts.outlier)[mine],
    }
    return QuantizedTensor(info.format, (len(codes), info.shape[1]), fields)


def _sliced(format: str, values: Array) -> QuantizedTensor:
    values = np.ascontiguousarray(values)
    return QuantizedTensor(format, values.shape, {"values": values})


def _scales(file: OnnxFile, name: str, format: str) -> Array:
    """Returns scales as the format has them."""
    stored, found = file.array(name), get_format(format)
    assert isinstance(found, AffineFormat)
    return (f32_from_bf16(stored) if file.initializers[name].data_type == BFLOAT16 else stored).astype(found.float_type, copy=False)
