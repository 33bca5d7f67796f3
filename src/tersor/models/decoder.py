"""The one decoder that every architecture shares, written once as a short sequence of fused ops.

    x = embedding[tokens] * embedding_scale
    each layer:  a = attention(rope(norm(q)), rope(norm(k)), v)      with q, k, v = one product of norm(x)
                 x = x + [norm](a Wo)
                 x = x + [norm](act(gate) * up  Wdown)               with gate, up = one product of norm(x)
    hidden = norm(x);  logits = [softcap](hidden Whead)

What is in brackets, and which norms, biases and scales there are, is the DecoderSpec's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tersor import _native, ops
from tersor.errors import ModelError
from tersor.formats import get_format
from tersor.models.layer import LayerVectors, add_product, has_bias, mix, read_vectors
from tersor.models.spec import GROUPS, DecoderSpec
from tersor.ops.program import LayerOps, Recorder
from tersor.tensor import Array, QuantizedTensor

Read = Callable[[str], QuantizedTensor]

STEP_ROWS = 16  # tokens up to which a product treats each row as if it were alone (ops.linear)
# Tokens of one call: enough for full speed, and the activations stay in the outer cache. Matrix tiles are fed faster than weights are
# decoded for them, so that more rows pay.
MOST_ROWS = 512 if _native.isa() == "amx" else 256


@dataclass(frozen=True)
class _LayerWeights:
    """One layer, ready to run: its norms, and its matrices packed."""

    vectors: LayerVectors
    qkv: ops.Weight
    output: ops.Weight
    gate_up: ops.Weight
    down: ops.Weight


class Decoder:
    """A decoder's weights, packed for this CPU, and its two functions: forward and head."""

    def __init__(self, spec: DecoderSpec, read: Read, activations: str = "int8", scales: Mapping[str, float] | None = None) -> None:
        """Reads and packs every tensor once: first the head, the largest, which memory holds twice meanwhile; then the others in
        model order. read: name -> tensor; activations: as of ops.pack; scales: of int8_static, module name -> scale of its
        input. Raises ModelError when a quantized matrix has no scale."""
        self.spec = spec
        self._read = read
        self._activations = activations
        self._scales = scales or {}
        self._embedding = _rows_apart(read("model.embed_tokens.weight"))
        self._head = self._pack(["lm_head"], [self._embedding if spec.tied else read("lm_head.weight")], None)
        self._layers = tuple(self._layer(i) for i in range(len(spec.layers)))
        self._norm = self._vector("model.norm.weight") + np.float32(spec.norm_offset)
        self._idle: dict[int, list[_Recording]] = {STEP_ROWS: [], MOST_ROWS: []}  # by rows; one caller at a time uses one

    def _layer(self, index: int) -> _LayerWeights:
        """Returns layer `index`, read and packed."""
        packed = [self._join(f"model.layers.{index}.", names, has_bias(self.spec, group)) for group, names in enumerate(GROUPS)]
        return _LayerWeights(read_vectors(self.spec, index, self._vector), *packed)

    def _join(self, prefix: str, names: tuple[str, ...], bias: bool) -> ops.Weight:
        """Returns the named projections as one matrix, their rows one after the other."""
        biases = np.concatenate([self._vector(f"{prefix}{name}.bias") for name in names]) if bias else None
        modules = [f"{prefix}{name}" for name in names]
        return self._pack(modules, [self._read(f"{module}.weight") for module in modules], biases)

    def _pack(self, modules: Sequence[str], tensors: Sequence[QuantizedTensor], bias: Array | None) -> ops.Weight:
        """Returns matrices that share an input, joined; of their static scales the largest counts (nothing more is cut off)."""
        if self._activations != "int8_static":
            return ops.pack(tensors, bias, self._activations)
        quantized = [m for m, t in zip(modules, tensors) if t.format not in ("f32", "f16", "bf16")]
        if not quantized:
            return ops.pack(tensors, bias, "float")
        missing = [m for m in quantized if m not in self._scales]
        if missing:
            raise ModelError(f"{missing[0]} has no input scale, which activations int8_static need; use int8_token or int8")
        return ops.pack(tensors, bias, "int8_static", max(self._scales[m] for m in quantized))

    def _vector(self, name: str) -> Array:
        """Returns a norm's weight or a bias as float32."""
        tensor = self._read(name)
        return get_format(tensor.format).dequantize(tensor).reshape(-1)

    def forward(self, tokens: Array, cache: ops.KVCache, last: bool = False) -> Array:
        """Returns the hidden states after the final norm, (n, hidden) float32, and appends n positions to the cache.

        tokens: (n,) int32 in [0, vocab_size), 1 <= n <= MOST_ROWS, at positions cache.length and on; the cache has room. last:
        returns the last token's alone, (1, hidden).
        """
        rows = STEP_ROWS if len(tokens) <= STEP_ROWS else MOST_ROWS
        idle = self._idle[rows]
        recording = idle.pop() if idle else _Recording(self, rows, head=False)
        hidden = recording.run(tokens, [cache])
        hidden = ops.copied([hidden[-1:] if last else hidden])  # the next caller's overwrites it
        idle.append(recording)
        return hidden

    def steps(self) -> Steps:
        """Returns a recording of what forward and head do to a few tokens."""
        return Steps(self)

    def _run(self, o: LayerOps, x: Array, cache: ops.KVCache) -> Array:
        """Returns the hidden states of embedded tokens x, (n, hidden), through all layers and the final norm."""
        for index, layer in enumerate(self._layers):
            x = self._attend(o, x, index, layer, cache)
            x = self._feed_forward(o, x, layer)
        return o.rms_norm(x, self._norm, self.spec.norm_eps)

    def head(self, hidden: Array) -> Array:
        """Returns logits, (n, vocab_size) float32. hidden: (n, hidden) as forward gives it."""
        return self._run_head(ops, hidden)

    def _run_head(self, o: LayerOps, hidden: Array) -> Array:
        """Returns the logits of hidden states."""
        logits = o.linear(hidden, self._head)
        if self.spec.final_softcap > 0:
            o.softcap(logits, self.spec.final_softcap)
        return logits

    def _attend(self, o: LayerOps, x: Array, index: int, layer: _LayerWeights, cache: ops.KVCache) -> Array:
        """Returns x + attention."""
        s, v = self.spec, layer.vectors
        mixed = mix(o, s, v, o.linear(o.rms_norm(x, v.norm, s.norm_eps), layer.qkv), index, cache)
        return add_product(o, s, x, mixed, layer.output, v.after_attention)

    def _feed_forward(self, o: LayerOps, x: Array, layer: _LayerWeights) -> Array:
        """Returns x + MLP."""
        s, v = self.spec, layer.vectors
        gated = o.gated_linear(o.rms_norm(x, v.mlp_norm, s.norm_eps), layer.gate_up, s.activation)
        return add_product(o, s, x, gated, layer.down, v.after_mlp)

    def _packed(self) -> list[ops.Weight]:
        """Returns every matrix that tokens are multiplied by, the head first."""
        return [self._head] + [w for layer in self._layers for w in (layer.qkv, layer.output, layer.gate_up, layer.down)]

    @property
    def product_bytes(self) -> int:
        """Bytes of the matrices that every token is multiplied by, the head among them."""
        return sum(w.nbytes for w in self._packed())

    @property
    def layer_values(self) -> int:
        """Values of the layers' matrices."""
        return sum(w.rows * w.columns for w in self._packed()[1:])

    @property
    def head_values(self) -> int:
        """Values of the head."""
        return self._head.rows * self._head.columns

    def read_weights(self) -> int:
        """Reads every matrix once, by all threads, and does nothing else; returns the bytes: what a decoded token cannot do without."""
        for weight in self._packed():
            weight.read_words()
        return sum(weight.nbytes for weight in self._packed())

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices as repacked for this CPU, and of the embedding where it is not the head too."""
        return self.product_bytes + (0 if self.spec.tied else self._embedding.nbytes)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that multiply, sorted."""
        return tuple(sorted({w.kernel for w in self._packed()}))


class _Recording:
    """What a decoder does to at most `rows` tokens, from embedding to hidden states or logits. One caller at a time."""

    def __init__(self, decoder: Decoder, rows: int, head: bool) -> None:
        s, self._decoder = decoder.spec, decoder
        recorder = Recorder(len(s.layers), s.kv_heads, s.head_dim, rows)
        self._x = recorder.input(decoder._embedding.columns)
        self._embeds = recorder.embed(decoder._embedding, s.embedding_scale, self._x)
        self._out = decoder._run(recorder, self._x, ops.KVCache(len(s.layers), s.kv_heads, s.head_dim, 1))
        if head:
            self._out = decoder._run_head(recorder, self._out)
            self.tops = recorder.top(self._out)
        self._program = recorder.program

    def run(self, tokens: Array, caches: list[ops.KVCache]) -> Array:
        """Returns hidden states, or logits, (n, width); the next call overwrites them."""
        n = len(tokens)
        if not self._embeds:
            self._x[:n] = ops.embed(self._decoder._embedding, tokens, self._decoder.spec.embedding_scale)
        self._program.run(caches, tokens)
        for cache in caches:
            cache.advance(n // len(caches))
        return self._out[:n]


class Steps:
    """A few tokens at a time through a decoder, recorded once: for decoding, where the calls of every op would show.

    One caller at a time.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._recording = _Recording(decoder, STEP_ROWS, head=True)

    def run(self, tokens: Array, caches: list[ops.KVCache]) -> tuple[Array, list[int]]:
        """Returns the logits after each token, (n, vocab_size) float32, and the likeliest next tokens; appends to the caches.

        tokens: (n,) int32 in [0, vocab_size), 1 <= n <= STEP_ROWS; caches: one, which all of them follow each other in, or n
        different ones, which get a token each. There is room for them. A row has the same bits whatever n is. The next
        call overwrites the logits.
        """
        logits = self._recording.run(tokens, caches)
        return logits, self._recording.tops[: len(tokens)].tolist()


def _rows_apart(tensor: QuantizedTensor) -> QuantizedTensor:
    """Returns a tensor whose rows can be decoded one by one: itself, or its float32 values if its format mixes rows."""
    fmt = get_format(tensor.format)
    if fmt.row_independent:
        return tensor
    return QuantizedTensor("f32", tensor.shape, {"values": fmt.dequantize(tensor)})
