"""Results on stdout, progress on stderr: a bar with the time left on a terminal, a plain line now and then in a pipe."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Report = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)
LINE_SECONDS = 5.0  # between two plain lines about the same thing
WARM_SECONDS = 2.0  # after which the first steps tell how long the others will take


def print_json(value: Any) -> None:
    """Prints one JSON document. Infinities and NaN, which JSON lacks, become null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(what: object) -> None:
    """Prints a line on stderr, above the progress bar if there is one."""
    if _bars:
        _bars[-1](str(what))
    else:
        print(what, file=sys.stderr, flush=True)
        _Lines.last = time.monotonic()


_bars: list[Callable[[str], None]] = []  # of the bars on the screen, each a way to print above it


@contextmanager
def progress() -> Iterator[Report]:
    """Gives a function to call with (what, done, total); shows it on stderr until the block ends."""
    if not sys.stderr.isatty():
        yield _Lines().report
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("left"), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}
        _bars.append(lambda line: bar.console.print(line, markup=False, highlight=False))

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what.replace("[", "\\["), total=total, completed=done)
            bar.update(tasks[what], completed=done, total=total)
            if done >= total:
                bar.remove_task(tasks.pop(what))

        try:
            yield report
        finally:
            _bars.pop()


class _Lines:
    """Plain lines: `judge q4_0: 37 %, 12 s left`, when nothing was said for LINE_SECONDS, and one at the end of each thing.

    The clock of a thing, and what it has done, begin with the first report of it.
    """

    last = 0.0  # when a line was printed

    def __init__(self) -> None:
        self._begun: dict[str, tuple[float, int]] = {}

    def report(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        begun, before = self._begun.setdefault(what, (now, done))
        if done >= total:
            del self._begun[what]
            print(f"{what}: done in {now - begun:.1f} s", file=sys.stderr, flush=True)
        elif now - _Lines.last >= LINE_SECONDS and done > before and now > begun:
            left = (now - begun) * (total - done) / (done - before)
            known = f", {left:.0f} s left" if now - begun >= WARM_SECONDS else ""
            print(f"{what}: {100 * done // total} %{known}", file=sys.stderr, flush=True)
        else:
            return
        _Lines.last = now
