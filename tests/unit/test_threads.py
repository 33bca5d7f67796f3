"""Work shared out among threads: order, exceptions, one BLAS thread, and the native loops of such a thread."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from tersor import _native
from tersor.threads import blas_alone, each


@pytest.fixture(autouse=True)
def three_threads():
    before = _native.threads()
    _native.set_threads(3)
    yield
    _native.set_threads(before)


def blas_threads() -> set[int]:
    np.ones((2, 2)) @ np.ones((2, 2))
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_results_come_in_order_and_from_several_threads():
    meet = threading.Barrier(3, timeout=20)  # passed only by three at the same time

    def square(x: int) -> int:
        meet.wait()
        return x * x

    assert each(square, range(6)) == [0, 1, 4, 9, 16, 25]


def test_the_first_exception_is_raised_when_all_have_ended():
    ended = []

    def work(x: int) -> None:
        if x in (1, 3):
            raise ValueError(f"item {x}")
        ended.append(x)

    with pytest.raises(ValueError, match="item 1"):
        each(work, range(5))
    assert sorted(ended) == [0, 2, 4]


def test_a_call_inside_a_call_does_not_wait_for_the_pool():
    assert each(lambda x: sum(each(lambda y: x * y, range(4))), range(6)) == [6 * x for x in range(6)]


def test_blas_has_one_thread_meanwhile_and_what_it_had_afterwards():
    before = blas_threads()
    assert each(lambda _: blas_threads(), range(3)) == [{1}] * 3
    assert blas_threads() == before
    with blas_alone():
        assert blas_threads() == {1}


def test_blas_has_one_thread_until_the_last_who_wants_it_leaves():
    before, inside, leave = blas_threads(), threading.Event(), threading.Event()
    seen: list[set[int]] = []

    def first() -> None:
        with blas_alone():
            inside.set()
            assert leave.wait(20)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(20)
    with blas_alone():
        leave.set()
        thread.join()
        seen.append(blas_threads())
    assert seen == [{1}] and blas_threads() == before


def test_an_interrupted_call_begins_nothing_more():
    begun, started = [], threading.Event()

    def work(x: int) -> None:
        begun.append(x)
        started.set()
        time.sleep(0.2)

    def interrupt() -> None:
        started.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    each(abs, range(3))  # the pool's threads are there
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            each(work, range(30))
    finally:
        signal.signal(signal.SIGINT, before)
    n = len(begun)
    assert n < 20
    time.sleep(0.3)
    assert len(begun) == n


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_child_has_blas_as_it_was_though_another_thread_wanted_one():
    before, inside, leave = blas_threads(), threading.Event(), threading.Event()

    def other() -> None:
        with blas_alone():
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(20)
    child = os.fork()
    if child == 0:
        with blas_alone():
            alone = blas_threads()
        os._exit(7 if alone == {1} and blas_threads() == before else 1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_child_makes_its_own_threads():
    assert each(abs, [-1, -2, -3]) == [1, 2, 3]
    child = os.fork()
    if child == 0:
        os._exit(7 if each(abs, [-1, -2, -3]) == [1, 2, 3] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_loops_of_a_thread_that_runs_alone_do_not_wait_for_others():
    """read_words by this thread alone costs no other thread's time; the sum is the same."""
    words = np.arange(1 << 16, dtype=np.uint64)
    sums = each(lambda _: _native.read_words(words), range(4))
    assert sums == [int(words.sum())] * 4
    _native.run_alone(True)
    try:
        assert _native.read_words(words) == int(words.sum())
    finally:
        _native.run_alone(False)
