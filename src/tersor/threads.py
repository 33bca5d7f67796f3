"""How many CPUs the native loops use, and work that is shared out among as many Python threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, lru_cache
from threading import Lock, get_ident, local
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

from tersor.errors import RecipeError

T = TypeVar("T")
R = TypeVar("R")


def set_threads(n: int | None) -> None:
    """Sets the threads of all native loops of this process; None = as they are. Raises RecipeError for a count out of range."""
    from tersor import _native

    if n is None:
        return
    try:
        _native.set_threads(n)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Returns [function(item) for item in items], computed by as many threads as native loops use.

    Meanwhile BLAS and the native loops of these threads run on one thread each, so that results do not depend on the number of
    threads and no two pools wait for each other's CPUs. For work that spends its time outside the interpreter (numpy's products do,
    scipy's BLAS calls do not). The first exception of any item is raised when the others have ended; when the caller is
    interrupted, what has not begun never does.
    """
    from tersor import _native

    parts = list(items)
    with blas_alone():
        if min(_native.threads(), len(parts)) <= 1 or getattr(_inside, "pool", False):
            return [function(part) for part in parts]
        futures: list[Future[R]] = []
        try:
            for part in parts:
                futures.append(_pool(_native.threads()).submit(function, part))
            while wait(futures, timeout=0.5).not_done:  # a signal that comes just before the waiting is seen after it
                pass
        except BaseException:
            for future in futures:
                future.cancel()
            wait(futures)
            raise
        return [future.result() for future in futures]


_inside = local()  # .pool: this thread is one of the pool


def _enter() -> None:
    from tersor import _native

    _inside.pool = True
    _native.run_alone(True)


@lru_cache(1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Returns threads that stay, and keep the memory that they have been given."""
    return ThreadPoolExecutor(threads, initializer=_enter)


@contextmanager
def blas_alone() -> Iterator[None]:
    """Lets BLAS use one thread, in all threads of this process, until the last of those who want it leaves.

    Its own threads poll for work long after a product and take the CPUs from ours, and its results depend on their number.
    """
    _alone.enter()
    try:
        yield
    finally:
        _alone.leave()


class _Alone:
    """Who wants BLAS on one thread: the limit is one of the process, so the first who comes sets it and the last lifts it.

    A thread of its own does, because threadpoolctl lets no other thread lift what one has set.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside: list[int] = []  # the threads, once for each time they came
        self._keeper = ThreadPoolExecutor(1)
        self._limit: Any = None

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._limit = self._keeper.submit(_limited, _libraries()).result()
            self._inside.append(get_ident())

    def leave(self) -> None:
        with self._lock:
            self._inside.remove(get_ident())
            if not self._inside:
                self._keeper.submit(self._limit.__exit__, None, None, None).result()

    def after_fork(self) -> None:
        """Forgets the threads that a child does not have."""
        self._lock, self._keeper = Lock(), ThreadPoolExecutor(1)
        others = len(self._inside)
        self._inside = [thread for thread in self._inside if thread == get_ident()]
        if others and not self._inside:
            self._keeper.submit(self._limit.__exit__, None, None, None).result()


_alone = _Alone()


def _after_fork() -> None:
    _pool.cache_clear()  # a child has none of these threads
    _alone.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _limited(libraries: ThreadpoolController) -> Any:
    return libraries.limit(limits=1, user_api="blas").__enter__()


@cache
def _libraries() -> ThreadpoolController:
    import scipy.linalg  # noqa: F401  its BLAS must be there to be found

    return ThreadpoolController()  # type: ignore[no-untyped-call]
