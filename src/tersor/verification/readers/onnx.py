"""onnxruntime's view of an ONNX directory: what its operators make of the stored codes.

Every MatMulNBits is run alone, with float32 inputs, on an identity matrix, and every GatherBlockQuantized on all row numbers, so that
packing, zero points and block order are the operator's reading. With float16 scales the products are exact in float32. Of int8_row_xN
all nodes of a product are run so, as the graph joins them.
Floats are read by onnx.numpy_helper.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tersor.tensor import Array
from tersor.verification.reader import Reader

SLAB_VALUES = 1 << 22  # weights that are decoded at once
BLOCKS = 8  # blocks are cut at multiples of it, where zero points of any width end with a byte
_LAYER = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)/MatMulNBits")


class OnnxReader(Reader):
    """Decodes with onnxruntime's own operators."""

    package = "onnxruntime"
    modules = ("onnx", "onnxruntime")

    def weights(self, path: Path) -> Iterator[tuple[str, Array]]:
        """Yields every tensor; a head that is the embedding comes once, under the embedding's name."""
        import onnx

        graph = onnx.load(path / "model.onnx", load_external_data=False).graph
        stored = {tensor.name: tensor for tensor in graph.initializer}
        used: set[str] = set()
        tied = False

        def array(name: str) -> Array:
            used.add(name)
            return onnx.numpy_helper.to_array(stored[name], str(path))

        for node in graph.node:
            if node.op_type == "GatherBlockQuantized":
                tied = True
                yield "model.embed_tokens.weight", _looked_up(node, [array(name) for name in (node.input[0], *node.input[2:])])
        for node in graph.node:
            if node.op_type == "MatMulNBits":
                parts = [array(name) for name in node.input[1:]]
                name = _name(node.name)
                if name == "lm_head.weight" and tied and node.input[2] == "model.embed_tokens.scales":
                    continue
                yield name, _multiplied(node, parts)
            if node.op_type == "DequantizeLinear":
                module = node.name.removesuffix("DequantizeLinear")
                nodes = [other for other in graph.node if other.name.startswith(module) and other.name != f"{module}Add"]  # its bias
                held = {name: array(name) for other in nodes for name in other.input if name in stored}
                yield _name(f"{module}MatMulNBits"), _summed(nodes, held)
        for name in stored:
            if name not in used and re.fullmatch(r"(model|lm_head)(\.\w+)*\.(weight|bias)", name):
                yield name, array(name).astype(np.float32)


def _name(node: str) -> str:
    """Returns the Hugging Face name of the weight that a node multiplies by."""
    match = _LAYER.fullmatch(node)
    if match is None:
        return "lm_head.weight"
    return f"model.layers.{match[1]}.{'self_attn' if match[2] == 'attn' else 'mlp'}.{match[3]}.weight"


def _looked_up(node: Any, parts: list[Array]) -> Array:
    """Returns all rows of a GatherBlockQuantized, (rows, in) float32."""
    rows, columns = len(parts[0]), _integer(node, "block_size") * parts[1].shape[1]
    attributes = {name: _integer(node, name) for name in ("bits", "block_size", "gather_axis", "quantize_axis")}
    out = np.empty((rows, columns), np.float32)
    step = max(1, SLAB_VALUES // columns)
    for start in range(0, rows, step):
        slab = [part[start : start + step] for part in parts]
        numbers = np.arange(len(slab[0]), dtype=np.int64)
        out[start : start + step] = _run(
            "GatherBlockQuantized", {"codes": slab[0], "numbers": None, "scales": slab[1]}, slab[2:], numbers, attributes
        )
    return out


def _multiplied(node: Any, parts: list[Array]) -> Array:
    """Returns W of a MatMulNBits, (N, K) float32: a few blocks of columns at a time, I W^T."""
    rows, columns, bits, block = (_integer(node, name) for name in ("N", "K", "bits", "block_size"))
    out = np.empty((rows, columns), np.float32)
    step = BLOCKS * max(1, SLAB_VALUES // rows // (BLOCKS * block))
    for first in range(0, columns // block, step):
        last = min(first + step, columns // block)
        width = (last - first) * block
        zeros = [part[:, first * bits // 8 : -(-last * bits // 8)] for part in parts[2:]]
        stored = {"x": None, "codes": parts[0][:, first:last], "scales": parts[1][:, first:last]}
        attributes = {"N": rows, "K": width, "bits": bits, "block_size": block}
        out[:, first * block : last * block] = _run("MatMulNBits", stored, zeros, np.eye(width, dtype=np.float32), attributes).T
    return out


def _summed(nodes: list[Any], parts: Mapping[str, Array]) -> Array:
    """Returns W of a product that several nodes make, (rows, in) float32. parts: their initializers by name."""
    import onnx

    made = {name for node in nodes for name in node.output}
    free = next(name for node in nodes for name in node.input if name not in made and name not in parts)
    end = nodes[-1].output[0]
    columns = sum(array.size for name, array in parts.items() if name.endswith((".rest", ".outliers")))
    take = onnx.helper.make_tensor_value_info(free, onnx.TensorProto.FLOAT, [None, columns])
    give = onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, None)
    initializers = [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in parts.items()]
    session = _session(onnx.helper.make_graph(nodes, "one", [take], [give], initializers))
    step = max(1, SLAB_VALUES // columns)
    slabs = []
    for first in range(0, columns, step):
        unit = np.zeros((min(step, columns - first), columns), np.float32)
        unit[np.arange(len(unit)), np.arange(first, first + len(unit))] = 1
        slabs.append(session.run([end], {free: unit})[0])
    return np.ascontiguousarray(np.concatenate(slabs).T)


def _session(graph: Any) -> Any:
    """Returns a session of a graph."""
    import onnx
    import onnxruntime

    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(op: str, inputs: Mapping[str, Array | None], zeros: list[Array], given: Array, attributes: Mapping[str, Any]) -> Array:
    """Returns what one operator makes of `given`, its input that is not stored (None in inputs)."""
    import onnx

    helper = onnx.helper
    stored = {**inputs, **({"zeros": zeros[0]} if zeros else {})}
    initializers = [onnx.numpy_helper.from_array(np.ascontiguousarray(a), name) for name, a in stored.items() if a is not None]
    free = next(name for name, a in stored.items() if a is None)
    node = helper.make_node(op, list(stored), ["out"], domain="com.microsoft", **attributes)
    take = helper.make_tensor_value_info(free, helper.np_dtype_to_tensor_dtype(given.dtype), given.shape)
    give = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", [take], [give], initializers)
    return np.asarray(_session(graph).run(["out"], {free: given})[0])


def _integer(node: Any, name: str) -> int:
    """Returns an attribute of the node."""
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == name)
