"""Choosing the instruction set, and the thread pool: forks, concurrent callers, bad values."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tersor import _native, ops
from tersor.tensor import QuantizedTensor


def run_with(isa: str) -> subprocess.CompletedProcess[str]:
    code = "from tersor import _native; print(_native.isa())"
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, "TERSOR_ISA": isa}, capture_output=True, text=True)


def test_the_environment_forces_an_instruction_set() -> None:
    for isa in _native.isas():
        assert run_with(isa).stdout.strip() == isa
    assert run_with("").stdout.strip() == _native.isas()[-1]


def test_a_bad_environment_is_told_with_what_this_cpu_has() -> None:
    result = run_with("sse9")
    assert result.returncode == 1
    known = ", ".join(_native.isas())
    assert f"TERSOR_ISA: unknown instruction set 'sse9'; this CPU has: {known}" in result.stderr


def test_force_isa() -> None:
    assert _native.isas()[0] == "scalar"
    try:
        for isa in _native.isas():
            _native.force_isa(isa)
            assert _native.isa() == isa
        with pytest.raises(ValueError, match="unknown instruction set 'sse9'; this CPU has: scalar"):
            _native.force_isa("sse9")
        missing = {"avx2", "avxvnni", "avx512vnni", "amx", "neondot", "neoni8mm"} - set(_native.isas())
        for isa in missing:
            with pytest.raises(ValueError, match=f"this CPU cannot run instruction set '{isa}'; this CPU has: scalar"):
                _native.force_isa(isa)
        assert _native.isa() == _native.isas()[-1]  # a refused name changes nothing
    finally:
        _native.force_isa("")


@pytest.mark.parametrize("n", [0, -1, 1025])
def test_bad_thread_counts(n: int) -> None:
    with pytest.raises(ValueError, match=f"threads: got {n}, need 1 to 1024"):
        _native.set_threads(n)


def problem() -> tuple[np.ndarray, ops.Weight]:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((512, 256)).astype(np.float32)
    return rng.standard_normal((32, 256)).astype(np.float32), ops.pack([QuantizedTensor("f32", w.shape, {"values": w})])


def test_callers_at_the_same_time_get_the_right_results() -> None:
    x, weight = problem()
    before = _native.threads()
    try:
        _native.set_threads(3)
        want = ops.linear(x, weight)
        with ThreadPoolExecutor(4) as executor:
            for got in executor.map(lambda _: ops.linear(x, weight), range(200)):
                np.testing.assert_array_equal(got, want)
    finally:
        _native.set_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_child_makes_its_own_pool() -> None:
    x, weight = problem()
    before = _native.threads()
    try:
        _native.set_threads(2)
        want = ops.linear(x, weight)  # the pool's threads exist now, and will not in the child
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # a child that waits for threads it does not have dies of this
            os._exit(0 if np.array_equal(ops.linear(x, weight), want) else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        _native.set_threads(before)
