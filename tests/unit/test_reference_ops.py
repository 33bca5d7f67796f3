"""The reference ops against torch's, which share nothing with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tersor.formats import get_format
from tersor.ops import reference
from tersor.tensor import QuantizedTensor

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def close(got: np.ndarray, want: torch.Tensor, atol: float = 2e-6) -> None:
    np.testing.assert_allclose(got, want.numpy(), rtol=2e-6, atol=atol)


def stored(w: np.ndarray) -> QuantizedTensor:
    return QuantizedTensor("f32", w.shape, {"values": w})


@pytest.mark.parametrize("rows", [1, 5])
def test_linear_joins_and_adds(rows: int) -> None:
    a, b, x, bias, residual = normal(6, 40), normal(3, 40), normal(rows, 40), normal(9), normal(rows, 9)
    weight = reference.pack([stored(a), stored(b)], bias, "float")
    assert (weight.rows, weight.columns) == (9, 40)
    want = F.linear(torch.tensor(x), torch.tensor(np.concatenate([a, b])), torch.tensor(bias)) + torch.tensor(residual)
    close(reference.linear(x, weight, residual), want, 1e-5)


def test_int8_activations_by_hand() -> None:
    x = np.array([[127.0, -63.6, 0.4, 0.6] + [0.0] * 28 + [1.0, 2.0, 254.0]], np.float32)  # a group of 32 and a short one
    want = [127.0, -64.0, 0.0, 1.0] + [0.0] * 28 + [0.0, 2.0, 254.0]  # steps 1 and 2; 0.5 and 0 are even
    np.testing.assert_array_equal(reference.round_activations(x), [want])
    np.testing.assert_array_equal(reference.round_activations(np.zeros((2, 33), np.float32)), np.zeros((2, 33)))


@pytest.mark.parametrize(("rows", "steps"), [(3, 16256), (16, 16256), (17, 127)])
def test_integer_activations_round_the_input_only(rows: int, steps: int) -> None:
    w, x = normal(4, 64), normal(rows, 64)
    got = reference.linear(x, reference.pack([stored(w)]))
    exact = x.astype(np.float64) @ w.T
    step = np.abs(x.reshape(rows, 2, 32)).max(axis=2).repeat(32, axis=1) / steps
    bound = step / 2 @ np.abs(w).T
    assert (np.abs(got - exact) <= bound + 1e-5).all()
    assert (np.abs(got - exact) > bound / 100).any()


def test_outliers_among_many_rows_keep_15_bits() -> None:
    x = np.full((17, 512), 0.3, np.float32)
    x[:, 40] = 10.0  # its group's square is 100, the mean of the 16 groups 6.3
    got = reference.linear(x, reference.pack([stored(np.eye(512, dtype=np.float32))]))
    assert 0 < np.abs(got - x)[:, 32:64].max() <= 10 / 16256
    plain = x.copy()
    plain[:, 40] = 0.3
    near = reference.linear(plain, reference.pack([stored(np.eye(512, dtype=np.float32))]))
    assert np.abs(near - plain).max() < 1e-6  # 127 steps of 0.3 / 127


@pytest.mark.parametrize("name", ["f16", "q4_0", "int4_g32", "int8_t", "nf4_dq"])
def test_embed_decodes_the_rows(name: str) -> None:
    tensor = get_format(name).quantize(normal(10, 64))
    tokens = np.array([3, 3, 9, 0], np.int32)
    want = get_format(name).dequantize(tensor)[[3, 3, 9, 0]] * np.float32(2.5)
    np.testing.assert_array_equal(reference.embed(tensor, tokens, 2.5), want)


def test_rms_norm() -> None:
    x, weight = normal(3, 5, 16), normal(16)
    close(reference.rms_norm(x, weight, 1e-5), F.rms_norm(torch.tensor(x), (16,), torch.tensor(weight), 1e-5))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(activation: str) -> None:
    x = np.concatenate([normal(4, 12) * 5, [[-1e4, 1e4] * 6]]).astype(np.float32)
    gate, up = torch.tensor(x).double().chunk(2, dim=-1)
    want = F.silu(gate) * up if activation == "silu" else F.gelu(gate, approximate="tanh") * up
    close(reference.gated(x, activation), want.float())


def test_add_and_softcap_work_in_place() -> None:
    x, y = normal(3, 4), normal(3, 4)
    want = torch.tensor(x) + torch.tensor(y)
    reference.add(x, y)
    close(x, want)
    reference.softcap(x, 0.7)
    close(x, 0.7 * torch.tanh(want / 0.7))


def test_rope_is_a_rotation_of_complex_pairs() -> None:
    x, inv_freq = normal(5, 3, 8), np.array([1.0, 0.3, 0.07, 0.001], np.float32)
    pairs = torch.complex(torch.tensor(x[..., :4]), torch.tensor(x[..., 4:]))
    angles = torch.arange(11, 16)[:, None, None] * torch.tensor(inv_freq)
    turned = pairs * torch.polar(torch.full_like(angles, 1.5), angles)
    reference.rope(x, 11, inv_freq, 1.5)
    close(x, torch.cat([turned.real, turned.imag], dim=-1), 2e-5)


@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (0.0, 3), (2.0, 0), (2.0, 1)])
def test_attention(softcap: float, window: int) -> None:
    heads, kv_heads, dim, past, n = 4, 2, 8, 6, 5
    cache = reference.KVCache(2, kv_heads, dim, 16, "f32")
    k, v, q = normal(past + n, kv_heads, dim), normal(past + n, kv_heads, dim), normal(n, heads, dim)
    cache.append(1, k[:past], v[:past])
    cache.advance(past)
    cache.append(1, k[past:], v[past:])
    got = reference.attention(q, cache, 1, 0.6, softcap, window)
    keys, values = (torch.tensor(a).repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for a in (k, v))
    scores = torch.tensor(q).transpose(0, 1) @ keys.transpose(1, 2) * 0.6
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at, key = torch.arange(past, past + n)[:, None], torch.arange(past + n)[None]
    hidden = (key > at) | ((at - key >= window) if window else torch.zeros_like(key > at))
    want = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    close(got, want.transpose(0, 1).reshape(n, heads * dim), 1e-5)


def test_cache_keeps_its_type_and_forgets() -> None:
    cache = reference.KVCache(1, 1, 2, 4, "f16")
    third = np.full((3, 1, 2), 1 / 3, np.float32)
    cache.append(0, third, third)
    cache.advance(3)
    cache.truncate(1)
    assert cache.length == 1 and cache.nbytes == 2 * 4 * 2 * 2
    out = reference.attention(normal(1, 1, 2), cache, 0, 1.0, window=1)  # sees position 1 only, written before the truncation
    np.testing.assert_array_equal(out, np.float16(1 / 3).astype(np.float32) * np.ones((1, 2)))


def test_logit_measures() -> None:
    p, q = normal(6, 30) * 4, normal(6, 30) * 4
    q[2] = p[2]
    targets = np.array([0, 5, 29, 3, 3, 8], np.int32)
    tp, tq, where = torch.tensor(p).double(), torch.tensor(q).double(), torch.tensor(targets).long()
    got = reference.compare_logits(p, q, targets)
    assert got.shape == (6, 5) and got.dtype == np.float64
    close(got[:, 0], F.cross_entropy(tp, where, reduction="none"), 1e-9)
    close(got[:, 1], F.cross_entropy(tq, where, reduction="none"), 1e-9)
    close(got[:, 2], F.kl_div(tq.log_softmax(-1), tp.log_softmax(-1), reduction="none", log_target=True).sum(-1), 1e-9)
    close(got[:, 3], (tp.argmax(-1) == tq.argmax(-1)).double())
    close(got[:, 4], (tq.softmax(-1) - tp.softmax(-1)).gather(1, where[:, None])[:, 0], 1e-9)
    np.testing.assert_array_equal(reference.nll(p, targets), got[:, 0])
