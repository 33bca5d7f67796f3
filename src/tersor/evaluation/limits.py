"""What this machine can do at all: bytes read from memory and products of bytes per second, by the kernels' threads.

Decoding one sequence reads every weight once a token, so that memory is its limit; a long prompt is limited by products.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

BANDWIDTH_BYTES = 256 << 20  # read at once: far more than any cache holds
PEAK_ROUNDS = 1 << 20  # some tens of milliseconds


@dataclass(frozen=True)
class Limits:
    """bandwidth_gbps: 1e9 bytes read per second; int8_gops: 1e9 operations per second, a multiplication and an addition being
    two, of the instructions that the integer kernels of the instruction set in use are made of."""

    bandwidth_gbps: float
    int8_gops: float

    def best(self, other: Limits) -> Limits:
        """Returns the larger of each: a disturbance can only lower them."""
        return Limits(max(self.bandwidth_gbps, other.bandwidth_gbps), max(self.int8_gops, other.int8_gops))


class LimitsMeter:
    """Measures the limits, as often as it is asked."""

    def __init__(self) -> None:
        self._words = np.ones(BANDWIDTH_BYTES // 8, dtype=np.uint64)

    def measure(self) -> Limits:
        """Returns the limits, of one pass each."""
        from tersor import _native

        start = time.perf_counter()
        _native.read_words(self._words)
        middle = time.perf_counter()
        operations = _native.multiply_bytes(PEAK_ROUNDS)
        return Limits(self._words.nbytes / (middle - start) / 1e9, operations / (time.perf_counter() - middle) / 1e9)
