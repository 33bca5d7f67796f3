"""What this machine can do at all: bytes read from memory and products of bytes per second, by the kernels' threads.

Decoding one sequence reads every weight once a token, so that memory is its limit; a long prompt is limited by products.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LEAST_BYTES = 256 << 20  # read at once: far more than the caches of most CPUs hold
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # of Linux
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
        self._words = np.ones(bytes_read() // 8, dtype=np.uint64)

    def measure(self) -> Limits:
        """Returns the limits, of one pass each."""
        from tersor import _native

        start = time.perf_counter()
        _native.read_words(self._words)
        middle = time.perf_counter()
        operations = _native.multiply_bytes(PEAK_ROUNDS)
        return Limits(self._words.nbytes / (middle - start) / 1e9, operations / (time.perf_counter() - middle) / 1e9)


def bytes_read(caches: Path = CACHES) -> int:
    """Returns how much is read for the bandwidth: twice the largest cache, which servers' CPUs share among many, if it fits an
    eighth of the memory; never less than LEAST_BYTES."""
    largest = max((_size(file) for file in caches.glob("index*/size")), default=0)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return max(LEAST_BYTES, min(2 * largest, memory // 8 // 8 * 8))


def _size(file: Path) -> int:
    """Returns the bytes that a file says, "32K" or "480M"; 0 for what it does not say."""
    try:
        text = file.read_text().strip()
        return int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]
    except (OSError, ValueError, KeyError, IndexError):
        return 0
