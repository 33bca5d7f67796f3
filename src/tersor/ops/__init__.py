"""The ops that a model may call, native. `reference` has the same in plain numpy.

All arrays are C-contiguous float32 unless said otherwise. The native functions check shapes and raise ValueError, since a
wrong shape is a mistake of the caller, not of the user.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf

import numpy as np

from tersor import _native
from tersor.errors import FormatError, unknown
from tersor.formats import get_format
from tersor.formats.float_zero import FloatZeroFormat
from tersor.formats.fp8 import has_nan
from tersor.formats.lookup import DoubleLookupFormat
from tersor.formats.ordered import OrderedFormat
from tersor.formats.outliers import OutlierFormat
from tersor.tensor import Array, QuantizedTensor

KVCache = _native.KVCache
Weight = _native.Weight

OUTLIER_THRESHOLD = 6.0  # from this magnitude on, LLM.int8() keeps an input in 16 bits
_ROUNDINGS = {"int8": "groups", "int8_token": "token", "int8_static": "tensor", "llm_int8": "outlier"}  # as the native side calls them
_E4M3 = ("fp8_c", "fp8_t")  # multiplied as such; their NaN is not known there
_CHUNK_VALUES = 1 << 24  # values decoded at a time, 64 MiB of float32


def pack(tensors: Sequence[QuantizedTensor], bias: Array | None = None, activations: str = "int8", scale: float | None = None) -> Weight:
    """Returns the tensors joined along rows and repacked for this CPU's kernels. bias: (rows of all,) float32 or None.

    Weights stay integers where the format is integers, or a table of 16, times a scale (all but float formats), in the bits
    that the format has (nf4's and fp4's table in 15 bits, iq1 .. iq3 in 4-bit codes); fp8 stays 8 bits, but in blocks of 128 becomes
    float16. activations says how `linear` rounds its
    input before such a product, a row being a token; float formats take it as it is.

    int8         finer than the others: per 32 values, to 15 bits (absmax / 16256) when there are at most 16 rows; to 8 bits
                 (absmax / 127) when there are more, or the codes have 1 or 2 bits, except that 32 values whose absmax^2 is
                 above 8 times the row's mean keep 15 bits.
    int8_token   8 bits, one scale per row, absmax / 127: dynamic W8A8 and W4A8, vector-wise (arXiv 2208.07339, section 3.1).
    int8_static  8 bits, this scale for all; what is beyond 127 of it is cut off: static W8A8 (arXiv 1806.08342, section 2).
    llm_int8     a row's values of magnitude OUTLIER_THRESHOLD and more in 15 bits, one scale per 32 columns; the others in 8
                 bits, one scale per row: LLM.int8() (arXiv 2208.07339, section 3.2). The paper takes whole columns in which
                 any token of the batch has such a value; here each token decides for itself, so that its result does not
                 depend on the tokens beside it. Fixed-point 15 bits stand for float16, whose 11 they exceed for all values
                 above 1/16 of the largest.
    float        not at all: everything is decoded once to float32, exactly.

    Columns that a format keeps apart in float16 (int8_row_xN) are multiplied by their inputs as these are; what is said above holds
    for the other columns, whose scales never see them. Tensors that keep different columns apart are multiplied as float16.

    scale: of int8_static only. Raises FormatError for another word, and for a scale that is missing, superfluous or not positive.
    """
    if activations not in (*_ROUNDINGS, "float"):
        raise FormatError(unknown("activations", activations, (*_ROUNDINGS, "float")))
    if (activations == "int8_static") != (scale is not None):
        raise FormatError(f"activations {activations}: scale is {scale}; int8_static needs one, the others take none")
    if scale is not None and not 0 < scale < inf:
        raise FormatError(f"activations int8_static: scale {scale}; need a positive number")
    value = OUTLIER_THRESHOLD if activations == "llm_int8" else scale or 0.0
    plain, order = _in_one_order(tensors)
    plain, apart, order = _without_outliers(plain, order)
    packable = [_stored(_packable(t, activations)) for t in plain]
    return _native.pack(packable, bias, _ROUNDINGS.get(activations, "groups"), value, order, [_stored(t) for t in apart])


def empty(*shape: int) -> Array:
    """Returns a float32 array whose values are not set; on large pages, where np.empty would fault in page after page."""
    return _native.empty(shape)


def copied(parts: Sequence[Array]) -> Array:
    """Returns the parts, (n, width) float32 each, one below the other, as an array of their own."""
    out = empty(sum(len(p) for p in parts), parts[0].shape[1])
    np.concatenate(parts, out=out)
    return out


def linear(x: Array, weight: Weight, residual: Array | None = None) -> Array:
    """Returns x W^T + bias + residual. x: (n, columns) -> (n, rows).

    Row i has the same bits for every n up to 16, for every n above, and whatever the threads are.
    """
    y = empty(x.shape[0], weight.rows)
    _native.linear(x, weight, y, residual)
    return y


def embed(tensor: QuantizedTensor, tokens: Array, scale: float = 1.0) -> Array:
    """Returns the tokens' rows of the tensor, decoded, times scale. tokens: (n,) int32 in [0, rows) -> (n, columns)."""
    if embeds_natively(tensor):
        out = empty(tokens.shape[0], tensor.columns)
        _native.embed(*_stored(tensor), tokens, scale, out)
        return out
    fmt = get_format(tensor.format)
    if not fmt.row_independent:
        return np.asarray(fmt.dequantize(tensor).reshape(tensor.rows, tensor.columns)[tokens] * np.float32(scale))
    fields = {name: np.ascontiguousarray(array[tokens]) for name, array in tensor.fields.items()}
    return np.asarray(fmt.dequantize(QuantizedTensor(tensor.format, (len(tokens), tensor.columns), fields)) * np.float32(scale))


def embeds_natively(tensor: QuantizedTensor) -> bool:
    """Returns whether the native reader decodes rows of this format to the last bit: of int8_row and of zeros that are floats it
    computes the same in another order, and fp8 it does not embed."""
    if tensor.format in ("int8_row", *_E4M3) or isinstance(get_format(tensor.format), FloatZeroFormat):
        return False
    return bool(_native.has_scheme(tensor.format, tensor.columns))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Returns x / sqrt(mean(x^2) + eps) * weight over the last axis. x: (..., d), views are fine; weight: (d,)."""
    y = empty(*x.shape)
    _native.rms_norm(np.ascontiguousarray(x), weight, eps, y)
    return y


def gated(x: Array, activation: str) -> Array:
    """Returns act(first half) * second half. x: (n, 2f) -> (n, f); activation: silu | gelu_tanh."""
    y = empty(x.shape[0], x.shape[1] // 2)
    _native.gated(x, activation, y)
    return y


def gated_linear(x: Array, weight: Weight, activation: str) -> Array:
    """Returns gated(linear(x, weight), activation), the same bits, without the wide product where the CPU's kernels need none."""
    y = empty(x.shape[0], weight.rows // 2)
    _native.gated_linear(x, weight, activation, y)
    return y


def add(x: Array, y: Array) -> None:
    """Adds y to x in place."""
    _native.add(x, y)


def softcap(x: Array, cap: float) -> None:
    """Replaces x by cap * tanh(x / cap), in place; relative error below 1e-6."""
    _native.softcap(x, cap)


def rope(x: Array, start: int, inv_freq: Array, scale: float = 1.0) -> None:
    """Rotates pairs (i, i + head_dim/2) of x in place by position * inv_freq[i] radians; row n is at position start + n.

    x: (n, heads, head_dim), rows may be apart (a view of a joined product is fine); inv_freq: (head_dim/2,); cos and sin
    are multiplied by scale. The angle is the float32 product, as in Hugging Face's rotary embedding.
    """
    _native.rope(x, start, inv_freq, scale)


def append(cache: KVCache, layer: int, k: Array, v: Array) -> None:
    """Writes k and v, (n, kv_heads, head_dim), rows may be apart, into the cache at positions cache.length and on."""
    cache.append(layer, k, v)


def attention(q: Array, cache: KVCache, layer: int, scale: float, softcap: float = 0.0, window: int = 0) -> Array:
    """Returns softmax(scale q k^T) v, (n, heads * head_dim). q: (n, heads, head_dim), rows may be apart.

    Causal: query i is at position cache.length + i and sees keys 0 .. its position, only the last `window` of them when
    window > 0. Heads share keys in groups of heads / kv_heads. softcap > 0: scores become softcap * tanh(score / softcap).
    Row i has the same bits whatever the threads are, and whatever n is; where the CPU has matrix tiles and the cache is float16, for
    every n up to 16, and for every n above.
    """
    out = empty(q.shape[0], q.shape[1] * q.shape[2])
    _native.attention(q, cache, layer, scale, softcap, window, out)
    return out


def rope_batch(x: Array, positions: Array, inv_freq: Array, scale: float = 1.0) -> None:
    """Does rope with row i at positions[i]; positions: (n,) int32."""
    _native.rope_batch(x, positions, inv_freq, scale)


def append_batch(caches: Sequence[KVCache], layer: int, k: Array, v: Array) -> None:
    """Writes row i of k and v, (n, kv_heads, head_dim), rows may be apart, into caches[i] at its length; n different caches."""
    _native.append_batch(k, v, list(caches), layer)


def attention_batch(q: Array, caches: Sequence[KVCache], layer: int, scale: float, softcap: float = 0.0, window: int = 0) -> Array:
    """Returns what attention does for each row of q, (n, heads, head_dim), with its own cache; the same bits as alone.

    The caches may differ in length, capacity and type, not in kv_heads and head_dim.
    """
    out = empty(q.shape[0], q.shape[1] * q.shape[2])
    _native.attention_batch(q, list(caches), layer, scale, softcap, window, out)
    return out


def nll(logits: Array, targets: Array) -> Array:
    """Returns -log p(target), in nats, (n,) float64. logits: (n, vocab); targets: (n,) int32. Absolute error below 1e-6."""
    out = np.empty(logits.shape[0], np.float64)
    _native.nll(logits, targets, out)
    return out


def compare_logits(p: Array, q: Array, targets: Array) -> Array:
    """Returns, (n, 5) float64: nll of p, nll of q, KL(p || q) in nats, 1 if the argmax is the same else 0, and the
    difference q - p of the target's probability. p, q: (n, vocab) logits; targets: (n,) int32."""
    out = np.empty((p.shape[0], 5), np.float64)
    _native.compare_logits(p, q, targets, out)
    return out


def _stored(tensor: QuantizedTensor) -> tuple[str, int, int, dict[str, Array]]:
    """Returns what the native side takes: format, rows, columns, and every field as uint8 (rows, bytes of a row)."""
    fields = {name: np.ascontiguousarray(a).reshape(a.shape[0], -1).view(np.uint8) for name, a in tensor.fields.items()}
    return tensor.format, tensor.rows, tensor.columns, fields


def _in_one_order(tensors: Sequence[QuantizedTensor]) -> tuple[Sequence[QuantizedTensor], Array | None]:
    """Returns the tensors without their order of columns, and the order, when they have one and the same; else (tensors, None)."""
    split = [fmt.split(t) for t in tensors if isinstance(fmt := get_format(t.format), OrderedFormat)]
    if not split or len(split) < len(tensors) or any(not np.array_equal(order, split[0][1]) for _, order in split):
        return tensors, None
    return [plain for plain, _ in split], np.ascontiguousarray(split[0][1], dtype=np.int32)


def _without_outliers(
    tensors: Sequence[QuantizedTensor], order: Array | None
) -> tuple[Sequence[QuantizedTensor], Sequence[QuantizedTensor], Array | None]:
    """Returns (the tensors without their columns apart, these, all columns in this order) when they are the same columns of all
    tensors; else (tensors, nothing, order)."""
    split = [fmt.split(t) for t in tensors if isinstance(fmt := get_format(t.format), OutlierFormat)]
    if not split or len(split) < len(tensors) or any(not np.array_equal(places, split[0][2]) for _, _, places in split):
        return tensors, [], order
    return [plain for plain, _, _ in split], [apart for _, apart, _ in split], split[0][2]


def _packable(tensor: QuantizedTensor, activations: str) -> QuantizedTensor:
    """Returns the tensor in a format that the kernels read: itself, nf4 or fp4 without double quantization, or floats."""
    if tensor.format in ("f32", "f16", "bf16"):
        return tensor
    if activations == "float":
        return _decoded(tensor, np.float32)
    fmt = get_format(tensor.format)
    if isinstance(fmt, DoubleLookupFormat):
        tensor = fmt.single(tensor)
    if _native.has_scheme(tensor.format, tensor.columns) and not (tensor.format in _E4M3 and has_nan(tensor.fields["codes"])):
        return tensor
    halves = _decoded(tensor, np.float16)
    return halves if np.isfinite(halves.fields["values"]).all() else _decoded(tensor, np.float32)


def _decoded(tensor: QuantizedTensor, dtype: type[np.float16] | type[np.float32]) -> QuantizedTensor:
    """Returns the tensor's values as float16 or float32, decoded some rows at a time."""
    values = np.empty((tensor.rows, tensor.columns), dtype)
    with np.errstate(over="ignore"):
        for first, part in _row_chunks(tensor):
            rows = get_format(part.format).dequantize(part).reshape(-1, tensor.columns)
            values[first : first + len(rows)] = rows
    return QuantizedTensor("f16" if dtype is np.float16 else "f32", tensor.shape, {"values": values})


def _row_chunks(tensor: QuantizedTensor) -> Iterator[tuple[int, QuantizedTensor]]:
    """Yields (first row, those rows) for all rows; a format that mixes rows comes in one piece."""
    step = max(1, _CHUNK_VALUES // max(1, tensor.columns)) if get_format(tensor.format).row_independent else max(1, tensor.rows)
    for first in range(0, tensor.rows, step):
        count = min(step, tensor.rows - first)
        if count == tensor.rows:
            yield first, tensor
        else:
            fields = {name: a[first : first + count] for name, a in tensor.fields.items()}
            yield first, QuantizedTensor(tensor.format, (count, tensor.columns), fields)


__all__ = [
    "OUTLIER_THRESHOLD",
    "KVCache",
    "Weight",
    "add",
    "append",
    "append_batch",
    "attention",
    "attention_batch",
    "compare_logits",
    "embed",
    "gated",
    "gated_linear",
    "linear",
    "nll",
    "pack",
    "rms_norm",
    "rope",
    "rope_batch",
    "softcap",
]
