"""Speed: prefill and decode in tokens per second, load time and memory, beside the limits of this machine.

Several models are measured in turns, one repetition each per round, so that a disturbance of the machine meets all of them.
The limits are measured in every round too.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Protocol

import numpy as np

from tersor.errors import RecipeError
from tersor.evaluation.energy import EnergyMeter
from tersor.evaluation.limits import Limits, LimitsMeter
from tersor.evaluation.model import LanguageModel
from tersor.memory import resident_bytes


@dataclass(frozen=True)
class Speed:
    """Medians over `repeats`. prefill, decode: tokens per second. decode starts behind a prompt of prefill_tokens.

    load_seconds: from path to ready, file warm or cold as it was; first_token_seconds: that, and a prompt of 16 tokens with the token
    after it. resident_bytes: growth of the process's resident memory by loading and the first run.
    weight_bytes: the packed weights in memory. token_bytes: weights, keys and values that a decoded token reads, in the middle of
    the decoding; decode_gbps = token_bytes * decode / 1e9 is to be held against bandwidth_gbps, what a loop that only reads gets
    here. prefill_gops: 1e9 operations per second of the prefill's products, against int8_gops, what a loop of nothing but
    products of bytes gets here. Either limit is the best of all rounds, 0 when it was not measured.
    joules: energy that the processors use per decoded token; None where the machine does not tell. None elsewhere: unknown,
    for another runtime. rounds: (prefill, decode) of each repetition.
    """

    prefill: float
    decode: float
    prefill_tokens: int
    decode_tokens: int
    repeats: int
    load_seconds: float
    first_token_seconds: float
    resident_bytes: int
    weight_bytes: int | None
    token_bytes: int | None
    decode_gbps: float | None
    bandwidth_gbps: float
    prefill_gops: float | None
    int8_gops: float
    joules: float | None
    threads: int
    isa: str
    rounds: tuple[tuple[float, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        return asdict(self)


class TimedModel(LanguageModel, Protocol):
    """A model that also says what a token costs. Means what tersor.engine.Model says."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as the kernels read them."""
        ...

    def token_bytes(self, position: int) -> int:
        """Bytes read to decode the token at this position."""
        ...

    def product_operations(self, n: int) -> int:
        """Operations of the products for a prompt of n tokens and the logits of its last."""
        ...

    def steps(self) -> Any:
        """The fast way to decode."""
        ...


class Contestant(ABC):
    """What is measured: something loaded that runs. The attributes mean what Speed says."""

    load_seconds: float
    first_token_seconds: float
    resident_bytes: int

    @abstractmethod
    def run(self, prefill: int, decode: int) -> tuple[float, float]:
        """Returns the seconds of one prefill (with the logits of its last token) and of the greedy decoding that follows."""

    def cost(self, prefill: int, decode: int) -> tuple[int, int, int] | None:
        """Returns weight_bytes, token_bytes and the prefill's operations; None when they are unknown."""
        return None

    def close(self) -> None:
        """Frees what the contestant holds; it runs no more."""
        return


class OwnModel(Contestant):
    """A model in this process."""

    def __init__(self, load: Callable[[], TimedModel], prefill: int = 16) -> None:
        before, start = resident_bytes(), time.perf_counter()
        self._model = load()
        self.load_seconds = time.perf_counter() - start
        self.run(min(16, prefill), 1)  # touches every weight: memory settles, threads start
        self.first_token_seconds = time.perf_counter() - start
        self.resident_bytes = max(0, resident_bytes() - before)

    def run(self, prefill: int, decode: int) -> tuple[float, float]:
        """Times one run."""
        model, tokens = self._model, prompt(prefill, self._model.vocab_size)
        cache, steps = model.new_cache(prefill + decode), model.steps()
        start = time.perf_counter()
        logits = model.head(model.forward(np.array(tokens, np.int32), cache, last=True))
        middle = time.perf_counter()
        token = int(logits[0].argmax())
        for _ in range(decode):
            _, (token,) = steps.run(np.array([token], np.int32), [cache])
        return middle - start, time.perf_counter() - middle

    def cost(self, prefill: int, decode: int) -> tuple[int, int, int]:
        """Asks the model."""
        return self._model.weight_bytes, self._model.token_bytes(prefill + decode // 2), self._model.product_operations(prefill)


def measure(
    models: Mapping[str, Callable[[], TimedModel]],
    *,
    peers: Mapping[str, Callable[[], Contestant]] | None = None,
    prefill: int = 512,
    decode: int = 128,
    repeats: int = 5,
    limits: bool = True,
    energy: EnergyMeter | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Speed]:
    """Returns the speed of every model by name, in turns with the peers. models, peers: functions that load.

    limits: whether to measure the machine's. energy: None = the machine's counters. progress: called with (runs done, runs in all).
    Raises RecipeError for counts below 1, and what loading raises.
    """
    from tersor import _native

    if min(prefill, decode, repeats) < 1:
        raise RecipeError(f"prefill {prefill}, decode {decode}, repeats {repeats}: each must be at least 1")
    energy = EnergyMeter() if energy is None else energy
    loaded: dict[str, Contestant] = {}
    rounds: dict[str, list[tuple[float, float]]] = {}
    joules: dict[str, list[float]] = {}
    best, meter = Limits(0.0, 0.0), LimitsMeter() if limits else None
    try:
        for name, load in models.items():
            loaded[name] = OwnModel(load, prefill)
        for name, start in (peers or {}).items():
            loaded[name] = start()
        for contestant in loaded.values():
            contestant.run(prefill, 2)  # what grows with the prompt grows now
        if progress is not None:
            progress(0, repeats * len(loaded))
        for i in range(repeats):
            if meter is not None:
                best = best.best(meter.measure())
            for j, (name, contestant) in enumerate(loaded.items()):
                seconds, used = _timed(contestant, prefill, decode, energy)
                rounds.setdefault(name, []).append((prefill / seconds[0], decode / seconds[1]))
                joules.setdefault(name, []).append(used)
                if progress is not None:
                    progress(i * len(loaded) + j + 1, repeats * len(loaded))
        costs = {name: contestant.cost(prefill, decode) for name, contestant in loaded.items()}
    finally:
        for contestant in loaded.values():
            contestant.close()
    records = {}
    for name, contestant in loaded.items():
        per_prefill, per_decode = (median(r[i] for r in rounds[name]) for i in (0, 1))
        cost = costs[name]
        records[name] = Speed(
            prefill=per_prefill,
            decode=per_decode,
            prefill_tokens=prefill,
            decode_tokens=decode,
            repeats=repeats,
            load_seconds=contestant.load_seconds,
            first_token_seconds=contestant.first_token_seconds,
            resident_bytes=contestant.resident_bytes,
            weight_bytes=None if cost is None else cost[0],
            token_bytes=None if cost is None else cost[1],
            decode_gbps=None if cost is None else cost[1] * per_decode / 1e9,
            bandwidth_gbps=best.bandwidth_gbps,
            prefill_gops=None if cost is None else cost[2] * per_prefill / prefill / 1e9,
            int8_gops=best.int8_gops,
            joules=median(joules[name]) / decode if energy.readable else None,
            threads=_native.threads(),
            isa=_native.isa(),
            rounds=tuple(rounds[name]),
        )
    return records


def _timed(contestant: Contestant, prefill: int, decode: int, energy: EnergyMeter) -> tuple[tuple[float, float], float]:
    """Returns the seconds of a run and the joules of its decoding.

    The counters are read outside of the run, of which decoding is only a part; its share is that of its time.
    """
    before = energy.read()
    seconds = contestant.run(prefill, decode)
    return seconds, energy.joules_since(before) * seconds[1] / sum(seconds)


def ratios(ours: Speed, theirs: Speed) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns ours / theirs of each round, for prefill and for decode, ascending."""
    pairs = list(zip(ours.rounds, theirs.rounds))
    prefill, decode = (tuple(sorted(a[i] / b[i] for a, b in pairs)) for i in (0, 1))
    return prefill, decode


def prompt(n: int, vocab_size: int) -> list[int]:
    """Returns n tokens; any text costs the same. 7919 is a prime."""
    return [(i * 7919 + 1000) % vocab_size for i in range(n)]
