"""Speed: prefill and decode in tokens per second, load time and memory, beside the memory bandwidth of this machine.

Several models are measured in turns, one repetition each per round, so that a disturbance of the machine meets all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from tersor.errors import RecipeError
from tersor.evaluation.model import LanguageModel

BANDWIDTH_BYTES = 256 << 20  # read at once when the bandwidth is measured: far more than any cache holds


@dataclass(frozen=True)
class Speed:
    """Medians over `repeats`. prefill, decode: tokens per second. decode starts behind a prompt of prefill_tokens.

    load_seconds: from path to ready, file warm or cold as it was. resident_bytes: growth of the process's resident memory by loading
    and the first run. weight_bytes: the packed weights in memory; nearly all of them are read once per decoded token, so
    decode_gbps = weight_bytes * decode / 1e9 may be held against bandwidth_gbps, what a loop that only reads gets here (0 = not measured).
    """

    prefill: float
    decode: float
    prefill_tokens: int
    decode_tokens: int
    repeats: int
    load_seconds: float
    resident_bytes: int
    weight_bytes: int
    decode_gbps: float
    bandwidth_gbps: float
    threads: int
    isa: str

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        return asdict(self)


class TimedModel(LanguageModel, Protocol):
    """A model that also says how many bytes its packed weights take."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as the kernels read them."""
        ...


def measure(
    models: Mapping[str, Callable[[], TimedModel]],
    *,
    prefill: int = 512,
    decode: int = 128,
    repeats: int = 3,
    bandwidth: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Speed]:
    """Returns the speed of every model by name. models: functions that load it. progress: called with (runs done, runs in all)."""
    from tersor import _native

    if min(prefill, decode, repeats) < 1:
        raise RecipeError(f"prefill {prefill}, decode {decode}, repeats {repeats}: each must be at least 1")
    loaded: dict[str, TimedModel] = {}
    loading: dict[str, tuple[float, int]] = {}
    for name, load in models.items():
        before, start = resident_bytes(), time.perf_counter()
        loaded[name] = load()
        seconds = time.perf_counter() - start
        time_run(loaded[name], min(16, prefill), 2)  # touches every weight: memory settles, threads start
        loading[name] = seconds, max(0, resident_bytes() - before)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for i in range(repeats):
        for j, (name, model) in enumerate(loaded.items()):
            times[name].append(time_run(model, prefill, decode))
            if progress is not None:
                progress(i * len(loaded) + j + 1, repeats * len(loaded))
    limit = read_bandwidth() if bandwidth else 0.0
    records = {}
    for name, model in loaded.items():
        per_prefill = prefill / median(t[0] for t in times[name])
        per_decode = decode / median(t[1] for t in times[name])
        seconds, memory = loading[name]
        records[name] = Speed(
            prefill=per_prefill,
            decode=per_decode,
            prefill_tokens=prefill,
            decode_tokens=decode,
            repeats=repeats,
            load_seconds=seconds,
            resident_bytes=memory,
            weight_bytes=model.weight_bytes,
            decode_gbps=model.weight_bytes * per_decode / 1e9,
            bandwidth_gbps=limit,
            threads=_native.threads(),
            isa=_native.isa(),
        )
    return records


def time_run(model: LanguageModel, prefill: int, decode: int) -> tuple[float, float]:
    """Returns the seconds of one prefill (with the logits of its last token) and of the greedy decoding that follows."""
    tokens = (np.arange(prefill, dtype=np.int32) * 7919 + 1000) % model.vocab_size  # any text costs the same; 7919 is a prime
    cache = model.new_cache(prefill + decode)
    start = time.perf_counter()
    logits = model.head(model.forward(tokens.astype(np.int32), cache)[-1:])
    middle = time.perf_counter()
    for _ in range(decode):
        token = np.array([int(logits[0].argmax())], dtype=np.int32)
        logits = model.head(model.forward(token, cache))
    return middle - start, time.perf_counter() - middle


def read_bandwidth(repeats: int = 5) -> float:
    """Returns GB/s of the best of several reads of a buffer larger than the caches, by as many threads as the kernels use."""
    from tersor import _native

    words = np.ones(BANDWIDTH_BYTES // 8, dtype=np.uint64)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        _native.read_words(words)
        best = min(best, time.perf_counter() - start)
    return words.nbytes / best / 1e9


def resident_bytes() -> int:
    """Returns the resident memory of this process; 0 where the system does not tell (no /proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    import resource

    return pages * resource.getpagesize()
