"""Every op that a model may call, in plain numpy: slow, obvious, and the oracle of the native ones.

Same names and signatures as `tersor.ops`. All arrays are C-contiguous float32 unless said otherwise. Sums are taken in
float64 and rounded to float32 once, so a native op may differ by the rounding of its own sums, not more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi, sqrt

import numpy as np

from tersor.formats import get_format
from tersor.formats.outliers import OutlierFormat
from tersor.tensor import Array, QuantizedTensor

ACTIVATION_GROUP = 32  # values that share one scale when activations are emulated in integers
FINE_ROWS = 16  # up to so many rows they have 15 bits, more rows 8
OUTLIER = 8  # a group whose absmax^2 is above so many times the row's mean has 15 bits among any number of rows
OUTLIER_THRESHOLD = 6.0  # LLM.int8(): from this magnitude on inputs keep 15 bits
KEY_GROUP, VALUE_GROUP = 32, 64  # values that share a scale in an int8 cache
NIBBLE_GROUP = 32  # the same of keys and values in an int4 cache
ANCHOR_KEYS = 64  # keys of an int4 cache that are rounded as differences from the first of them


@dataclass(frozen=True)
class Weight:
    """A matrix ready to be multiplied by. values: (rows, columns) float64; bias: (rows,) float32 or None; apart: columns whose inputs
    are not rounded, nor seen by the others' scales, or None."""

    values: Array
    bias: Array | None
    activations: str
    scale: float | None = None
    apart: Array | None = None

    @property
    def rows(self) -> int:
        """Outputs of `linear`."""
        return int(self.values.shape[0])

    @property
    def columns(self) -> int:
        """Inputs of `linear`."""
        return int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def kernel(self) -> str:
        """Name of what multiplies."""
        return f"reference_{self.activations}"


def pack(tensors: Sequence[QuantizedTensor], bias: Array | None = None, activations: str = "int8", scale: float | None = None) -> Weight:
    """Returns the tensors, dequantized and joined along rows. bias: (rows of all,) or None; activations, scale: as of ops.pack."""
    values = np.concatenate([dequantize(t) for t in tensors]).astype(np.float64)
    same = {tuple(t.fields["outliers"].tolist()) if isinstance(get_format(t.format), OutlierFormat) else () for t in tensors}
    apart = np.array(same.pop(), np.int64) if len(same) == 1 else np.empty(0, np.int64)
    return Weight(values, bias, activations, scale, apart if len(apart) else None)


def linear(x: Array, weight: Weight, residual: Array | None = None) -> Array:
    """Returns x @ W^T (+ bias) (+ residual). x: (n, columns) -> (n, rows).

    With integer activations x is first rounded per row and group of ACTIVATION_GROUP values (a short last group included):
    scale = max|x| / 16256 for up to FINE_ROWS rows, max|x| / 127 for more but in outliers, q = round-half-even(x / scale),
    x ~ q * scale. int8_token, int8_static and llm_int8: as ops.pack says. Here that holds for every format; native kernels round
    no input of float formats, and treat few rows like many where codes have 1 or 2 bits.
    """
    if weight.apart is None:
        inputs = _rounded_inputs(x, weight)
    else:
        rest = np.setdiff1d(np.arange(x.shape[1]), weight.apart)
        inputs = np.array(x)
        inputs[:, rest] = _rounded_inputs(x[:, rest], weight)
    out = inputs.astype(np.float64) @ weight.values.T
    if weight.bias is not None:
        out += weight.bias
    if residual is not None:
        out += residual
    return np.asarray(out, np.float32)


def _rounded_inputs(x: Array, weight: Weight) -> Array:
    """Returns x, (n, columns) float32, as `linear` rounds it."""
    if weight.activations == "float":
        return x
    if weight.activations == "int8":
        return _integer_activations(x)
    if weight.activations == "int8_static":
        scale = np.float32(weight.scale)
        return np.asarray(np.clip(np.rint(x / scale), -127, 127) * scale)
    apart = np.abs(x) >= (OUTLIER_THRESHOLD if weight.activations == "llm_int8" else np.inf)
    regular = round_activations(np.where(apart, np.float32(0), x), group=x.shape[1])
    return regular + round_activations(np.where(apart, x, np.float32(0)), steps=127 * 128)


def _integer_activations(x: Array) -> Array:
    """Returns x, (n, columns) float32, as `linear` rounds it."""
    fine = round_activations(x, steps=127 * 128)
    if len(x) <= FINE_ROWS:
        return fine
    starts = range(0, x.shape[1], ACTIVATION_GROUP)
    squares = np.stack([np.square(np.abs(x[:, i : i + ACTIVATION_GROUP]).max(axis=1)) for i in starts], axis=1)
    outlier = squares > OUTLIER * squares.mean(axis=1, keepdims=True)
    return np.where(outlier.repeat(ACTIVATION_GROUP, axis=1)[:, : x.shape[1]], fine, round_activations(x))


def round_activations(x: Array, group: int = ACTIVATION_GROUP, steps: int = 127) -> Array:
    """Returns x, (n, columns) float32, rounded to integers in [-steps, steps] times one scale per row and group."""
    out = np.empty_like(x)
    for start in range(0, x.shape[1], group):
        part = x[:, start : start + group]
        scale = np.abs(part).max(axis=1, keepdims=True) / np.float32(steps)
        codes = np.rint(part / np.where(scale == 0, np.float32(1), scale))
        out[:, start : start + group] = codes * scale
    return out


def embed(tensor: QuantizedTensor, tokens: Array, scale: float = 1.0) -> Array:
    """Returns the tokens' rows of the tensor, times scale. tokens: (n,) int32 in [0, rows) -> (n, columns)."""
    if not get_format(tensor.format).row_independent:
        return np.asarray(dequantize(tensor)[tokens] * np.float32(scale))
    fields = {name: np.ascontiguousarray(array[tokens]) for name, array in tensor.fields.items()}
    rows = QuantizedTensor(tensor.format, (len(tokens), tensor.columns), fields)
    return np.asarray(dequantize(rows) * np.float32(scale))


def dequantize(tensor: QuantizedTensor) -> Array:
    """Returns the tensor's values, (rows, columns) float32."""
    return get_format(tensor.format).dequantize(tensor).reshape(tensor.rows, tensor.columns)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Returns x / sqrt(mean(x^2) + eps) * weight over the last axis. x: (..., d); weight: (d,)."""
    wide = x.astype(np.float64)
    mean = np.mean(wide * wide, axis=-1, keepdims=True)
    return np.asarray(wide / np.sqrt(mean + eps) * weight, np.float32)


def gated(x: Array, activation: str) -> Array:
    """Returns act(first half) * second half. x: (n, 2f) -> (n, f).

    silu(a) = a / (1 + exp(-a)); gelu_tanh(a) = a/2 (1 + tanh(sqrt(2/pi) (a + 0.044715 a^3))) (Hendrycks & Gimpel, 2016).
    """
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    if activation == "silu":
        with np.errstate(over="ignore"):
            act = gate / (1 + np.exp(-gate))
    else:
        assert activation == "gelu_tanh", activation
        act = gate / 2 * (1 + np.tanh(sqrt(2 / pi) * (gate + 0.044715 * gate**3)))
    return np.asarray(act * up, dtype=np.float32)


def gated_linear(x: Array, weight: Weight, activation: str) -> Array:
    """Returns gated(linear(x, weight), activation)."""
    return gated(linear(x, weight), activation)


def add(x: Array, y: Array) -> None:
    """Adds y to x in place."""
    x += y


def softcap(x: Array, cap: float) -> None:
    """Replaces x by cap * tanh(x / cap), in place."""
    x[...] = cap * np.tanh(x.astype(np.float64) / cap)


def rope(x: Array, start: int, inv_freq: Array, scale: float = 1.0) -> None:
    """Rotates pairs (i, i + head_dim/2) of x in place by position * inv_freq[i] radians; row n is at position start + n.

    x: (n, heads, head_dim); inv_freq: (head_dim/2,) float32; cos and sin are multiplied by scale (YaRN's attention factor).
    The angle is the float32 product, as in Hugging Face's rotary embedding (Su et al., 2021, section 3.4.2).
    """
    half = x.shape[-1] // 2
    positions = np.arange(start, start + x.shape[0], dtype=np.float32)
    angles = (positions[:, None] * inv_freq.astype(np.float32)).astype(np.float64)[:, None, :]
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    low, high = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
    x[..., :half] = low * cos - high * sin
    x[..., half:] = high * cos + low * sin


def rope_batch(x: Array, positions: Array, inv_freq: Array, scale: float = 1.0) -> None:
    """Does rope with row i at positions[i]; positions: (n,) int32."""
    for i, position in enumerate(positions.tolist()):
        rope(x[i : i + 1], position, inv_freq, scale)


class KVCache:
    """Keys and values of every layer for positions [0, length). `append` writes at length; `advance` moves it."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, capacity: int, dtype: str = "f16") -> None:
        """capacity: positions; dtype: f16 | f32 | int8 | int4, the type that keys and values are rounded to.

        int8: integers times one float32 scale per position and KEY_GROUP or VALUE_GROUP values. int4: codes in [0, 15] times a
        float16 scale, plus a float16 minimum, per position and NIBBLE_GROUP values; keys less the first of their ANCHOR_KEYS, which is
        kept in float16. Both are held dequantized here.
        """
        stored = {"f16": np.float16, "f32": np.float32, "int8": np.float32, "int4": np.float32}[dtype]
        self.keys = np.zeros((layers, capacity, kv_heads, head_dim), stored)
        self.values = np.zeros((layers, capacity, kv_heads, head_dim), stored)
        self.anchors = np.zeros((layers, -(-capacity // ANCHOR_KEYS), kv_heads, -(-head_dim // 16) * 16), np.float16)
        self.dtype = dtype
        self.capacity = capacity
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, at full capacity; of integers the codes with their scales and minima."""
        if self.dtype in ("f16", "f32"):
            return self.keys.nbytes + self.values.nbytes
        head_dim = self.keys.shape[-1]
        if self.dtype == "int4":
            return self.keys.size // head_dim * (head_dim + 2 * 4 * -(-head_dim // NIBBLE_GROUP)) + self.anchors.nbytes
        scales = -(-head_dim // KEY_GROUP) - (-head_dim // VALUE_GROUP)
        return self.keys.size // head_dim * (2 * head_dim + 4 * scales)

    def append(self, layer: int, k: Array, v: Array) -> None:
        """Writes k and v, (n, kv_heads, head_dim), at positions length .. length + n."""
        assert self.length + len(k) <= self.capacity
        if self.dtype == "int8":
            k, v = _rounded_keys(k), _rounded_heads(v, VALUE_GROUP)
        if self.dtype == "int4":
            k, v = self._nibble_keys(layer, k), round_to_nibbles(_padded(v))[..., : v.shape[-1]]
        self.keys[layer, self.length : self.length + len(k)] = k
        self.values[layer, self.length : self.length + len(v)] = v

    def _nibble_keys(self, layer: int, k: Array) -> Array:
        """Returns k, (n, heads, head_dim) at positions length and on, rounded to 4 bits while rotated: what differs from the anchor.

        Rotated keys are divided by a power of two near the root of the gain, so that they are about as large as keys.
        """
        padded = _padded(k)
        gain = padded.shape[-1] & -padded.shape[-1]
        root = max(r for r in (4, 8, 16, 32) if r == 4 or r * r <= gain)
        rotated = _rotated(padded) / np.float32(root)
        positions = np.arange(self.length, self.length + len(k))
        for i in np.flatnonzero(positions % ANCHOR_KEYS == 0):
            self.anchors[layer, positions[i] // ANCHOR_KEYS] = rotated[i]
        anchors = self.anchors[layer, positions // ANCHOR_KEYS].astype(np.float32)
        rounded = anchors + round_to_nibbles(rotated - anchors)
        return np.asarray(_rotated(rounded)[..., : k.shape[-1]] * np.float32(root / gain))

    def advance(self, n: int) -> None:
        """Moves length forward by the n positions that every layer has appended."""
        self.length += n

    def truncate(self, n: int) -> None:
        """Forgets everything from position n on."""
        assert 0 <= n <= self.length
        self.length = n


def _rounded_keys(k: Array) -> Array:
    """Returns k, (n, heads, head_dim), rounded as _rounded_heads does while rotated (Ashkboos et al. 2024, arXiv 2404.00456)."""
    padded = _padded(k)
    rounded = _rounded_heads(_rotated(padded), KEY_GROUP)
    return np.asarray(
        _rotated(rounded)[..., : k.shape[-1]] / np.float32(padded.shape[-1] & -padded.shape[-1])
    )  # the matrix is its own inverse but for this


def _padded(x: Array) -> Array:
    """Returns x, (..., d), with zeros up to a multiple of 16."""
    padded = np.zeros((*x.shape[:-1], -(-x.shape[-1] // 16) * 16), np.float32)
    padded[..., : x.shape[-1]] = x
    return padded


def round_to_nibbles(x: Array) -> Array:
    """Returns x, (..., d) float32, as codes in [0, 15] times a scale plus a minimum, both float16, per NIBBLE_GROUP values."""
    out = np.empty_like(x)
    for start in range(0, x.shape[-1], NIBBLE_GROUP):
        part = x[..., start : start + NIBBLE_GROUP]
        minimum = part.min(axis=-1, keepdims=True).astype(np.float16).astype(np.float32)
        scale = ((part.max(axis=-1, keepdims=True) - minimum) * np.float32(1 / 15)).astype(np.float16).astype(np.float32)
        codes = np.clip(np.rint((part - minimum) / np.where(scale > 0, scale, np.float32(1))), 0, 15)
        out[..., start : start + NIBBLE_GROUP] = codes * scale + minimum
    return out


def _rotated(x: Array) -> Array:
    """Returns x, (..., width), times the Hadamard matrix of the largest power of two that divides width, in float32, 16 columns a step."""
    signs = np.array([[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)], np.float32)
    y = np.zeros_like(x)
    blocks, sums = x.reshape(*x.shape[:-1], -1, 16), y.reshape(*x.shape[:-1], -1, 16)
    for i in range(16):
        sums += blocks[..., i : i + 1] * signs[i]
    half = 16
    while x.shape[-1] % (2 * half) == 0:
        low, high = np.split(y.reshape(*x.shape[:-1], -1, 2 * half), 2, axis=-1)
        y = np.concatenate([low + high, low - high], axis=-1).reshape(x.shape)
        half *= 2
    return y


def _rounded_heads(x: Array, group: int) -> Array:
    """Returns x, (n, heads, head_dim), rounded to 8-bit integers times one scale per row, head and group."""
    return np.asarray(round_activations(x.reshape(-1, x.shape[-1]), group).reshape(x.shape))


def append(cache: KVCache, layer: int, k: Array, v: Array) -> None:
    """Writes k and v, (n, kv_heads, head_dim), into the cache at positions cache.length and on."""
    cache.append(layer, k, v)


def attention(q: Array, cache: KVCache, layer: int, scale: float, softcap: float = 0.0, window: int = 0) -> Array:
    """Returns softmax(scale q k^T) v, (n, heads * head_dim). q: (n, heads, head_dim).

    Causal: query i is at position cache.length + i and sees keys 0 .. its position, only the last `window` of them when
    window > 0. Heads share keys in groups of heads / kv_heads (Ainslie et al., 2023). softcap > 0: scores become
    softcap * tanh(score / softcap) before the softmax.
    """
    n, heads, head_dim = q.shape
    share = heads // cache.keys.shape[2]
    out = np.zeros((n, heads, head_dim), np.float32)
    for i in range(n):
        end = cache.length + i + 1
        first = max(0, end - window) if window > 0 else 0
        for head in range(heads):
            keys = cache.keys[layer, first:end, head // share].astype(np.float64)
            values = cache.values[layer, first:end, head // share].astype(np.float64)
            scores = keys @ q[i, head].astype(np.float64) * scale
            if softcap > 0:
                scores = softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ values / weights.sum()
    return out.reshape(n, heads * head_dim)


def append_batch(caches: Sequence[KVCache], layer: int, k: Array, v: Array) -> None:
    """Writes row i of k and v, (n, kv_heads, head_dim), into caches[i] at its length; n different caches."""
    for i, cache in enumerate(caches):
        cache.append(layer, k[i : i + 1], v[i : i + 1])


def attention_batch(q: Array, caches: Sequence[KVCache], layer: int, scale: float, softcap: float = 0.0, window: int = 0) -> Array:
    """Returns what attention does for each row of q, (n, heads, head_dim), with its own cache."""
    return np.concatenate([attention(q[i : i + 1], cache, layer, scale, softcap, window) for i, cache in enumerate(caches)])


def log_softmax(logits: Array) -> Array:
    """Returns log softmax over the last axis in float64."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def nll(logits: Array, targets: Array) -> Array:
    """Returns -log p(target), in nats, (n,) float64. logits: (n, vocab); targets: (n,) int32."""
    return np.asarray(-log_softmax(logits)[np.arange(len(targets)), targets])


def compare_logits(p: Array, q: Array, targets: Array) -> Array:
    """Returns, (n, 5) float64: nll of p, nll of q, KL(p || q) in nats, 1 if the argmax is the same else 0, and the
    difference q - p of the target's probability. p, q: (n, vocab) logits; targets: (n,) int32."""
    log_p, log_q = log_softmax(p), log_softmax(q)
    rows = np.arange(len(targets))
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    same = (p.argmax(axis=-1) == q.argmax(axis=-1)).astype(np.float64)
    change = np.exp(log_q[rows, targets]) - np.exp(log_p[rows, targets])
    return np.stack([-log_p[rows, targets], -log_q[rows, targets], divergence, same, change], axis=1)
