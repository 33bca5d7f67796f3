"""ONNX directories: a whole decoder as a graph that onnxruntime and onnxruntime-genai run.

    model.onnx         the graph (onnx_graph.py) and where every weight lies; small
    model.onnx.data    the weights (onnx_parts.py), each at a multiple of 64 bytes, large ones of 4096 so that they can be mapped
    config.json, tokenizer files, genai_config.json

Quantized linear layers are com.microsoft.MatMulNBits, those of int8_row_xN a sum of two products (onnx_graph.py), with float32 inputs,
so that a session computes with exactly our weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

from tersor.containers.container import Checkpoint, Container, refuse_unheld
from tersor.containers.directory import DTYPE_OF, find, is_tied, read_description, with_tied
from tersor.containers.directory_writer import DirectoryWriter, Part
from tersor.containers.onnx_file import MODEL, OnnxFile, has_graph, import_onnx
from tersor.containers.onnx_genai import genai_config
from tersor.containers.onnx_graph import DATA, PRODUCER, build_model, rope_names, rotation
from tersor.containers.onnx_parts import arrays_of, has_outliers, is_blocks, parts_of
from tersor.containers.onnx_tensors import find_sources, read_source
from tersor.containers.safetensors_file import DTYPES, Entry, ShardWriter
from tersor.errors import ContainerError, ModelError
from tersor.models import check_tensors, spec_of
from tersor.models.spec import DecoderSpec
from tersor.tensor import Array, ModelDescription, QuantizedTensor, TensorInfo

ACCURACY_LEVELS = (0, 1, 4)  # of MatMulNBits on a CPU: 0, 1 = float32 inputs, 4 = inputs rounded to 8 bits, which is faster
MAX_ROTATION_BYTES = 1 << 30
EMBEDDING = "model.embed_tokens.weight"
_ROTATION_STEP = 4096  # positions whose cosines are computed at once
_PAGE, _LARGE, _LINE = 4096, 1 << 16, 64


class OnnxCheckpoint(Checkpoint):
    """An opened directory."""

    container = "onnx"

    def __init__(self, path: Path) -> None:
        """Opens the directory. Raises ContainerError for anything missing, malformed or not supported."""
        self.path = path
        if not (path / "config.json").is_file():
            raise ContainerError(f"{path}: has {MODEL} but no config.json; copy that of the original model into it")
        description, _ = read_description(path)
        self._file = OnnxFile(path)
        try:
            self._sources = find_sources(self._file, description.config)
            if not self._sources:
                raise ContainerError(
                    f"{path / MODEL}: no weight has a name that is known here (made by {self._file.producer!r}); graphs of tersor and of"
                    " onnxruntime-genai's model builder are read"
                )
            if self._file.producer != PRODUCER and str(description.config.get("model_type")).startswith("gemma"):
                raise ContainerError(f"{path / MODEL}: its norms hold weight + 1, as other exporters write gemma; open the original")
        except BaseException:
            self._file.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {name: source.info for name, source in self._sources.items()}
        if is_tied(description.config) and "lm_head.weight" in self.tensors:  # the head was quantized, the embedding was not
            description = replace(description, config={**description.config, "tie_word_embeddings": False})
        self.description = with_tied(description, self.tensors)

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the tensor, or those rows of it."""
        find(self.path, self.tensors, name)
        return read_source(self._file, self._sources[name], rows)

    def release(self) -> None:
        """Gives pages back to the system."""
        self._file.release()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()


class _DataFile(ShardWriter):
    """model.onnx.data: the bytes of the tensors and nothing else."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, nbytes
        self._file = path.open("wb")
        self._data = 0


class OnnxWriter(DirectoryWriter):
    """Writes the graph at once, the weights as they come."""

    def __init__(
        self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], spec: DecoderSpec, accuracy_level: int, *, force: bool
    ) -> None:
        """Creates the temporary directory with everything but the weights. Raises OutputError as `create` says."""
        self._spec = spec
        self._accuracy_level = accuracy_level
        super().__init__(path, description, plan, force=force, max_shard_bytes=2**63)

    def parts(self, info: TensorInfo) -> list[Part]:
        """Returns the initializers that hold one tensor of the plan."""
        return parts_of(info)

    def arrays(self, tensor: QuantizedTensor, info: TensorInfo) -> list[Array]:
        """Returns the arrays of `parts`, in the same order."""
        return arrays_of(tensor)

    def _write_side_files(self, description: ModelDescription) -> None:
        super()._write_side_files(description)
        text = json.dumps(genai_config(self._spec, description), indent=2) + "\n"
        (self._temporary / "genai_config.json").write_text(text, encoding="utf-8")

    def _open_shards(self, shards: Sequence[Sequence[Part]]) -> None:
        ropes, _ = rope_names(self._spec)
        shape = (self._spec.context, self._spec.head_dim // 2)
        caches = [Part(f"{kind}_cache{suffix}", "F32", shape) for suffix in ropes for kind in ("cos", "sin")]
        entries, end = [], 0
        for part in [*(part for shard in shards for part in shard), *caches]:
            begin = -(-end // _alignment(part)) * _alignment(part)
            end = begin + part.nbytes
            entries.append(Entry(part.name, part.dtype, part.shape, begin, end))
        data = _DataFile(self._temporary / DATA, end)
        self._shards.append(data)
        self._home = {entry.name: (data, entry) for entry in entries}
        formats = {name: info.format for name, info in self._plan.items()}
        (self._temporary / MODEL).write_bytes(build_model(self._spec, formats, entries, self._accuracy_level).SerializeToString())
        for suffix, rope in ropes.items():
            for start in range(0, self._spec.context, _ROTATION_STEP):
                stop = min(start + _ROTATION_STEP, self._spec.context)
                for kind, values in zip(("cos", "sin"), rotation(rope, start, stop)):
                    whole = self._home[f"{kind}_cache{suffix}"][1]
                    begin = whole.begin + start * shape[1] * 4
                    data.write(replace(whole, shape=values.shape, begin=begin, end=begin + values.nbytes), values)


def _alignment(part: Part) -> int:
    return _PAGE if prod(part.shape) * DTYPES[part.dtype].itemsize >= _LARGE else _LINE


class Onnx(Container):
    """Directories with a graph for onnxruntime."""

    name = "onnx"
    suffix = ""

    def __init__(self, accuracy_level: int = 0) -> None:
        """accuracy_level: of every MatMulNBits that is written. Raises ContainerError for an unknown one."""
        if accuracy_level not in ACCURACY_LEVELS:
            raise ContainerError(f"onnx: accuracy_level is {accuracy_level}; need one of {ACCURACY_LEVELS}")
        self._accuracy_level = accuracy_level

    def recognizes(self, path: Path) -> bool:
        """Returns whether path is a directory with model.onnx and without safetensors."""
        return has_graph(path)

    def open(self, path: Path) -> OnnxCheckpoint:
        """Opens the directory. Raises ContainerError."""
        return OnnxCheckpoint(path)

    def holds(self, format: str) -> bool:
        """Returns whether the format is a float, an affine integer that MatMulNBits multiplies by, or int8_row_xN."""
        return format in DTYPE_OF or is_blocks(format) or has_outliers(format)

    def create(self, path: Path, description: ModelDescription, plan: Sequence[TensorInfo], *, force: bool = False) -> OnnxWriter:
        """Starts writing. Refuses, with the reason, decoders that the operators cannot express."""
        refuse_unheld(self, path, plan)
        for info in plan:
            if info.format not in DTYPE_OF and len(info.shape) != 2:
                raise ContainerError(f"{path}: {info.name} has {len(info.shape)} axes; onnx holds quantized matrices only")
            if has_outliers(info.format) and info.name == EMBEDDING:
                raise ContainerError(f"{path}: {info.name} is {info.format}, of which onnx looks no rows up; keep it in float")
        import_onnx(f"{path}: writing it")
        try:
            spec = spec_of(description.config)
            check_tensors(spec, {info.name: info for info in plan}, "the plan")
        except ModelError as error:
            raise ContainerError(f"{path}: onnx holds whole decoders only: {error}") from None
        if spec.head_dim % 16:
            raise ContainerError(f"{path}: head_dim is {spec.head_dim}; onnxruntime's GroupQueryAttention rotates multiples of 16 only")
        need = len(rope_names(spec)[0]) * spec.context * spec.head_dim * 4
        if need > MAX_ROTATION_BYTES:
            raise ContainerError(
                f"{path}: the cosines of {spec.context} positions need {need} bytes, above the limit of {MAX_ROTATION_BYTES};"
                " set max_position_embeddings in config.json to what will be used"
            )
        return OnnxWriter(path, description, plan, spec, self._accuracy_level, force=force)
