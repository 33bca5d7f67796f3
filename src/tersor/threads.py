"""How many CPUs the native loops use, and work that is shared out among as many Python threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, lru_cache
from threading import local
from typing import TypeVar

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
    threads and no two pools wait for each other's CPUs. For work that spends its time outside the interpreter. The first exception
    of any item is raised when the others have ended.
    """
    from tersor import _native

    parts = list(items)
    with blas_alone():
        if min(_native.threads(), len(parts)) <= 1 or getattr(_inside, "pool", False):
            return [function(part) for part in parts]
        futures = [_pool(_native.threads()).submit(function, part) for part in parts]
        wait(futures)
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of these threads


@contextmanager
def blas_alone() -> Iterator[None]:
    """Lets BLAS use one thread: its own threads poll for work long after a product and take the CPUs from ours."""
    with _libraries().limit(limits=1, user_api="blas"):
        yield


@cache
def _libraries() -> ThreadpoolController:
    import scipy.linalg  # noqa: F401  its BLAS must be there to be found

    return ThreadpoolController()  # type: ignore[no-untyped-call]
