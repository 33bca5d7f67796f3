"""The decoder of a DecoderSpec as an ONNX graph, operation by operation as models/decoder.py runs it.

    input_ids       (batch, sequence) int64        past_key_values.L.key, .value   (batch, kv_heads, past, head_dim)
    attention_mask  (batch, total) int64, ones     present.L.key, .value           (batch, kv_heads, total, head_dim)
    logits          (batch, sequence, vocab)       L: number of the layer; total = past + sequence

    embedding      Gather, or GatherBlockQuantized; Mul by embedding_scale
    norms          RMSNormalization; with the residual's sum before it SkipSimplifiedLayerNormalization
    products       MatMulNBits of integers; FusedMatMul (transposed) of floats, which keeps (rows, in) and shares a tied embedding;
                   of int8_row_xN the sum of two: gathered inputs by DequantizeLinear's rows, and by the float16 columns
    attention      GroupQueryAttention, which rotates (cos_cache, sin_cache), appends to the cache, caps and windows
    MLP            Sigmoid or Gelu, Mul

Everything is float32; float16 and bfloat16 weights are cast, which a session does once, when it is made. Interface, and the names of
the nodes, are those of microsoft/onnxruntime-genai src/python/py/models/builders/base.py, so that its runtime and tools know them.
Operators: microsoft/onnxruntime docs/ContribOperators.md (domain com.microsoft) and onnx's own, opset 23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tersor.containers.onnx_parts import has_outliers, is_blocks, width_and_group
from tersor.containers.safetensors_file import Entry
from tersor.models.rope import Rope
from tersor.models.spec import DecoderSpec, expected_tensors
from tersor.tensor import Array

if TYPE_CHECKING:
    import onnx

MICROSOFT = "com.microsoft"
OPSET, IR_VERSION = 23, 11  # the first with RMSNormalization, and the file version that goes with it
DATA = "model.onnx.data"
PRODUCER = "tersor"


def rope_names(spec: DecoderSpec) -> tuple[dict[str, Rope], list[str]]:
    """Returns ({suffix: rotation} of the different rotations, the suffix of every layer's). Suffixes: "", "_1", ..."""
    kinds: dict[tuple[bytes, float], str] = {}
    ropes: dict[str, Rope] = {}
    suffixes = []
    for layer in spec.layers:
        key = (layer.rope.inv_freq.tobytes(), layer.rope.scale)
        if key not in kinds:
            kinds[key] = f"_{len(kinds)}" if kinds else ""
            ropes[kinds[key]] = layer.rope
        suffixes.append(kinds[key])
    return ropes, suffixes


def rotation(rope: Rope, start: int, stop: int) -> tuple[Array, Array]:
    """Returns (cos, sin) of positions [start, stop), (positions, head_dim/2) float32; the angle is the float32 product, as in ops.rope."""
    angles = (np.arange(start, stop, dtype=np.float32)[:, None] * rope.inv_freq.astype(np.float32)).astype(np.float64)
    return (np.cos(angles) * rope.scale).astype(np.float32), (np.sin(angles) * rope.scale).astype(np.float32)


def build_model(spec: DecoderSpec, formats: Mapping[str, str], entries: Sequence[Entry], accuracy_level: int) -> onnx.ModelProto:
    """Returns the model without weights: its initializers point into DATA.

    formats: of every tensor by Hugging Face name; entries: where every initializer lies; accuracy_level: of MatMulNBits, 0 = float32
    inputs, 4 = rounded to 8 bits.
    """
    import onnx

    graph = _Decoder(spec, formats, accuracy_level)
    graph.build()
    initializers = [_external(entry, entry.name, entry.shape) for entry in entries]
    embedding = next((e for e in entries if e.name == "model.embed_tokens.qweight"), None)
    if embedding is not None:  # the same bytes, as the operator that looks rows up wants them
        rows, groups, nbytes = embedding.shape
        initializers.append(_external(embedding, "model.embed_tokens.qrows", (rows, groups * nbytes)))
    proto = onnx.helper.make_graph(graph.nodes, "decoder", *_interface(spec), initializers + list(graph.constants.values()))
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(MICROSOFT, 1)]
    return onnx.helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name=PRODUCER)


def _external(entry: Entry, name: str, shape: Sequence[int]) -> onnx.TensorProto:
    import onnx

    kind = onnx.TensorProto
    types = {"F32": kind.FLOAT, "F16": kind.FLOAT16, "BF16": kind.BFLOAT16, "U8": kind.UINT8, "I8": kind.INT8, "I32": kind.INT32}
    tensor = kind(name=name, data_type=types[entry.dtype], dims=shape, data_location=kind.EXTERNAL)
    for key, value in (("location", DATA), ("offset", str(entry.begin)), ("length", str(entry.end - entry.begin))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _interface(spec: DecoderSpec) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Returns the graph's inputs and outputs."""
    import onnx

    info, float32, int64 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    inputs = [
        info("input_ids", int64, ["batch_size", "sequence_length"]),
        info("attention_mask", int64, ["batch_size", "total_length"]),
    ]
    outputs = [info("logits", float32, ["batch_size", "sequence_length", spec.vocab_size])]
    for i in range(len(spec.layers)):
        for part in ("key", "value"):
            inputs.append(info(f"past_key_values.{i}.{part}", float32, ["batch_size", spec.kv_heads, "past_length", spec.head_dim]))
            outputs.append(info(f"present.{i}.{part}", float32, ["batch_size", spec.kv_heads, "total_length", spec.head_dim]))
    return inputs, outputs


class _Decoder:
    """The nodes of a decoder, in the order they run. A value is named after the node that makes it: /path/Op/output_0."""

    def __init__(self, spec: DecoderSpec, formats: Mapping[str, str], accuracy_level: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._spec = spec
        self._shapes = expected_tensors(spec)
        self._formats = formats
        self._accuracy_level = accuracy_level

    def build(self) -> None:
        """Appends all nodes."""
        s = self._spec
        self._lengths()
        _, ropes = rope_names(s)
        x, branch = self._embed(), ""
        for i in range(len(s.layers)):
            x, normed = self._norm(f"model.layers.{i}.input_layernorm", x, branch)
            branch = self._attention(i, normed, ropes[i])
            before_mlp = "pre_feedforward_layernorm" if s.sandwich else "post_attention_layernorm"
            x, normed = self._norm(f"model.layers.{i}.{before_mlp}", x, branch)
            branch = self._mlp(i, normed)
        self._head(self._norm("model.norm", x, branch)[1])

    def _add(self, op: str, path: str, inputs: Sequence[str], *, outputs: Sequence[str] = (), domain: str = "", **attributes: Any) -> str:
        """Appends a node and returns its first output."""
        import onnx

        name = f"{path}/{op}"
        names = outputs or (f"{name}/output_0",)
        self.nodes.append(onnx.helper.make_node(op, inputs, names, name=name, domain=domain, **attributes))
        return names[0]

    def _constant(self, value: Array) -> str:
        """Returns the name of a small constant, stored in the graph itself."""
        import onnx

        name = f"/constants/{value.dtype}/{value.tolist()}"
        self.constants[name] = onnx.numpy_helper.from_array(value, name)
        return name

    def _integers(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def _float(self, value: float) -> str:
        return self._constant(np.array(value, np.float32))

    def _widened(self, name: str, rows: str = "") -> str:
        """Returns a float tensor, or the rows that were looked up in it, as float32."""
        import onnx

        if self._formats[name] == "f32":
            return rows or name
        path = f"/{name.replace('.', '/')}" + ("/rows" if rows else "")
        return self._add("Cast", path, [rows or name], to=onnx.TensorProto.FLOAT)

    def _lengths(self) -> None:
        """Appends what attention asks for: seqlens_k = sum of the mask - 1, (batch,) int32; total_positions = its width, int32."""
        import onnx

        path, int32 = "/model/attn_mask_reformat", onnx.TensorProto.INT32
        tokens = self._add("ReduceSum", path, ["attention_mask", self._integers(1)], keepdims=0)
        last = self._add("Sub", path, [tokens, self._integers(1)])
        self._add("Cast", path + "/seqlens_k", [last], outputs=["seqlens_k"], to=int32)
        width = self._add("Gather", path, [self._add("Shape", path, ["attention_mask"]), self._constant(np.array(1, np.int64))], axis=0)
        self._add("Cast", path + "/total_length", [width], outputs=["total_positions"], to=int32)

    def _embed(self) -> str:
        name, module = "model.embed_tokens.weight", "model.embed_tokens"
        if is_blocks(self._formats[name]):
            bits, group, symmetric = width_and_group(self._formats[name])
            inputs = [f"{module}.qrows", "input_ids", f"{module}.scales", *([] if symmetric else [f"{module}.qzeros"])]
            attributes: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "bits": bits, "block_size": group}
            x = self._add("GatherBlockQuantized", "/model/embed_tokens", inputs, domain=MICROSOFT, **attributes)
        else:
            x = self._widened(name, self._add("Gather", "/model/embed_tokens", [name, "input_ids"]))
        scale = self._spec.embedding_scale
        return x if scale == 1 else self._add("Mul", "/model/embed_tokens", [x, self._float(scale)])

    def _weight(self, module: str) -> str:
        """Returns a norm's weight as it multiplies."""
        weight = self._widened(f"{module}.weight")
        if self._spec.norm_offset == 0:
            return weight
        return self._add("Add", f"/{module.replace('.', '/')}/offset", [weight, self._float(self._spec.norm_offset)])

    def _norm(self, module: str, x: str, branch: str = "") -> tuple[str, str]:
        """Returns (x + branch, its norm); without a branch (x, its norm)."""
        path, weight, epsilon = _path(module), self._weight(module), self._spec.norm_eps
        if not branch:
            return x, self._add("RMSNormalization", path, [x, weight], axis=-1, epsilon=epsilon)
        op = "SkipSimplifiedLayerNormalization"
        outputs = [f"{path}/{op}/output_0", "", "", f"{path}/{op}/output_3"]
        normed = self._add(op, path, [x, branch, weight], outputs=outputs, domain=MICROSOFT, epsilon=epsilon)
        return outputs[3], normed

    def _product(self, module: str, x: str, name: str = "", output: str = "") -> str:
        """Returns x W^T, plus the bias where the model has one. name: of the weight, when it is not the module's own."""
        weight, path = name or f"{module}.weight", _path(module)
        source, outputs = weight.removesuffix(".weight"), [output] if output else ()
        if is_blocks(self._formats[weight]):
            bits, group, symmetric = width_and_group(self._formats[weight])
            rows, columns = self._shapes[weight]
            inputs = [x, f"{source}.qweight", f"{source}.scales", *([] if symmetric else [f"{source}.qzeros"])]
            attributes: dict[str, Any] = {
                "K": columns,
                "N": rows,
                "bits": bits,
                "block_size": group,
                "accuracy_level": self._accuracy_level,
            }
            out = self._add("MatMulNBits", path, inputs, outputs=outputs, domain=MICROSOFT, **attributes)
        elif has_outliers(self._formats[weight]):
            out = self._sum_of_products(source, path, x, outputs)
        else:
            out = self._add("FusedMatMul", path, [x, self._widened(weight)], outputs=outputs, domain=MICROSOFT, transB=1)
        bias = f"{module}.bias"
        return self._add("Add", path, [out, self._widened(bias)]) if bias in self._formats else out

    def _sum_of_products(self, source: str, path: str, x: str, outputs: Sequence[str]) -> str:
        """Returns the product of the columns apart plus that of the rest, whose weights are code * scb * (1/127) in this order."""
        import onnx

        rest, beside = (self._add("Gather", f"{path}/{part}", [x, f"{source}.{part}"], axis=-1) for part in ("rest", "outliers"))
        scaled = self._add("DequantizeLinear", path, [f"{source}.qweight", f"{source}.scb"], axis=0)
        weight = self._add("Mul", f"{path}/rest", [scaled, self._float(1 / 127)])
        wide = self._add("Cast", f"{path}/outliers", [f"{source}.outlier"], to=onnx.TensorProto.FLOAT)
        products = [
            self._add("FusedMatMul", f"{path}/{part}", [inputs, w], domain=MICROSOFT, transB=1)
            for part, inputs, w in (("rest", rest, weight), ("outliers", beside, wide))
        ]
        return self._add("Add", f"{path}/sum", products, outputs=outputs)

    def _attention(self, index: int, x: str, suffix: str) -> str:
        """Returns the product of attention's output, normed in a sandwich."""
        s, prefix = self._spec, f"model.layers.{index}.self_attn"
        layer, path = s.layers[index], _path(prefix)
        q, k, v = (self._product(f"{prefix}.{name}", x) for name in ("q_proj", "k_proj", "v_proj"))
        if s.qk_norm:
            q = self._norm_heads(f"{prefix}.q_norm", q, s.heads)
            k = self._norm_heads(f"{prefix}.k_norm", k, s.kv_heads)
        inputs = [q, k, v, f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        inputs += ["seqlens_k", "total_positions", f"cos_cache{suffix}", f"sin_cache{suffix}"]
        attributes: dict[str, Any] = {"num_heads": s.heads, "kv_num_heads": s.kv_heads, "do_rotary": 1, "scale": float(s.attention_scale)}
        if layer.window:
            attributes["local_window_size"] = layer.window
        if s.attention_softcap:
            attributes["softcap"] = float(s.attention_softcap)
        outputs = [f"{path}/GroupQueryAttention/output_0", f"present.{index}.key", f"present.{index}.value"]
        mixed = self._add("GroupQueryAttention", path, inputs, outputs=outputs, domain=MICROSOFT, **attributes)
        out = self._product(f"{prefix}.o_proj", mixed)
        return self._norm(f"model.layers.{index}.post_attention_layernorm", out)[1] if s.sandwich else out

    def _norm_heads(self, module: str, x: str, heads: int) -> str:
        """Returns the norm of every head of x, (batch, sequence, heads * head_dim)."""
        path, dim = _path(module), self._spec.head_dim
        apart = self._add("Reshape", path + "/apart", [x, self._integers(0, -1, dim)])
        return self._add("Reshape", path, [self._norm(module, apart)[1], self._integers(0, -1, heads * dim)])

    def _mlp(self, index: int, x: str) -> str:
        """Returns the product of the MLP, normed in a sandwich."""
        s, prefix = self._spec, f"model.layers.{index}.mlp"
        path = _path(prefix)
        gate, up = self._product(f"{prefix}.gate_proj", x), self._product(f"{prefix}.up_proj", x)
        if s.activation == "silu":
            gate = self._add("Mul", path + "/act_fn", [gate, self._add("Sigmoid", path + "/act_fn", [gate])])
        else:
            assert s.activation == "gelu_tanh", s.activation
            gate = self._add("Gelu", path + "/act_fn", [gate], approximate="tanh")
        out = self._product(f"{prefix}.down_proj", self._add("Mul", path, [gate, up]))
        return self._norm(f"model.layers.{index}.post_feedforward_layernorm", out)[1] if s.sandwich else out

    def _head(self, x: str) -> None:
        weight, cap = "model.embed_tokens.weight" if self._spec.tied else "lm_head.weight", self._spec.final_softcap
        logits = self._product("lm_head", x, weight, output="" if cap else "logits")
        if cap:
            path = "/lm_head/softcap"
            squashed = self._add("Tanh", path, [self._add("Div", path, [logits, self._float(cap)])])
            self._add("Mul", path, [squashed, self._float(cap)], outputs=["logits"])


def _path(module: str) -> str:
    """Returns the path of a module's nodes: model.layers.0.self_attn.q_proj -> /model/layers.0/attn/q_proj."""
    return "/" + module.replace("self_attn", "attn").replace(".", "/").replace("layers/", "layers.")
