"""Affine integers one number at a time, from the formulas in docs/numerics.md; bit streams from the drawing in docs/formats.md.

Arithmetic is numpy float32 scalars where the definition says float32. Imports nothing of tersor.
"""

from __future__ import annotations

import itertools

import numpy as np

F = np.float32


def pack_bits(codes: list[int], bits: int) -> bytes:
    """Value i is bits [i*B, i*B+B) of the stream; stream bit k is bit k % 8 of byte k // 8."""
    packed = bytearray((len(codes) * bits + 7) // 8)
    for i, code in enumerate(codes):
        for b in range(bits):
            k = i * bits + b
            packed[k // 8] |= (code >> b & 1) << (k % 8)
    return bytes(packed)


def unpack_bits(packed: bytes, bits: int, count: int) -> list[int]:
    stream = [packed[k // 8] >> (k % 8) & 1 for k in range(count * bits)]
    return [sum(stream[i * bits + b] << b for b in range(bits)) for i in range(count)]


def half_up_if_subnormal(x: float) -> np.float16:
    """The nearest float16; below 2^-14 the next one above when the nearest is below x."""
    h = np.float16(x)
    if x < 2.0**-14 and float(h) < x:
        h = np.nextafter(h, np.float16(np.inf))
    return h


def minmax_grid(group: list[float], bits: int, kind: str, single: bool = False) -> tuple[float, float]:
    """(scale, offset): offset is the zero for '' and 's', the minimum for 'm'. single: floats are float32, else float16."""
    top = 2**bits - 1
    stored_scale, stored_minimum = (F, F) if single else (half_up_if_subnormal, np.float16)
    lo, hi = F(min(group)), F(max(group))
    if kind == "s":
        return float(stored_scale(float(F(F(2) * max(-lo, hi)) / F(top)))), float(2 ** (bits - 1))
    if kind == "m":
        minimum = stored_minimum(lo)
        return float(stored_scale(float(max(F(0), F(hi - F(minimum))) / F(top)))), float(minimum)
    lo, hi = min(lo, F(0)), max(hi, F(0))
    scale = stored_scale(float(F(hi - lo) / F(top)))
    if scale == 0:
        return 0.0, 0.0
    return float(scale), float(min(top, max(0, round_half_even(float(-lo / F(scale))))))


def round_half_even(x: float) -> int:
    return round(x)  # Python's round is half to even


def encode(w: float, scale: float, offset: float, bits: int, kind: str) -> int:
    top = 2**bits - 1
    scale = scale or 1.0
    if kind == "m":
        q = round_half_even(float(F(F(w) - F(offset)) / F(scale)))
    else:
        q = round_half_even(float(F(w) / F(scale))) + int(offset)
    return min(top, max(0, q))


def decode(q: int, scale: float, offset: float, kind: str) -> np.float32:
    if kind == "m":
        return F(F(F(q) * F(scale)) + F(offset))
    return F(F(q - offset) * F(scale))


def squared_error(group: list[float], h: list[float], scale: float, offset: float, bits: int, kind: str) -> float:
    total = 0.0
    for w, weight in zip(group, h):
        total += weight * (w - float(decode(encode(w, scale, offset, bits, kind), scale, offset, kind))) ** 2
    return total


def best_clipped_error(group: list[float], h: list[float], bits: int, kind: str, ratios: list[float]) -> float:
    """The least error over all pairs of ratios of the two ends (of both together when symmetric), by trying them all."""
    lo, hi = min(group), max(group)
    least = float("inf")
    for a, b in itertools.product(ratios, ratios):
        if kind == "s" and a != b:
            continue
        scale, offset = minmax_grid([a * lo, b * hi], bits, kind)
        least = min(least, squared_error(group, h, scale, offset, bits, kind))
    return least
