"""One adapter per runtime: each loads a model and answers requests over a pipe.

A worker is a process of its own, so that no runtime shares a thread pool or an allocator with another. Command line:
PATH THREADS [options] --context N (positions that its cache must hold). Protocol: one JSON object a line on standard input,
{"do": "prefill" | "decode", "tokens": [...]}, one back on standard output, {"seconds": s, "resident_mib": m, "peak_mib": p}.
`prefill` computes the whole prompt from an empty cache and the logits of its last token; `decode` continues from the
state that `prefill` left, one token a step, with the logits of each. The first line out says that the model is loaded, and what
the worker tells of itself.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def arguments(*options: str, flags: tuple[str, ...] = ()) -> argparse.Namespace:
    """Returns path, threads and context, and what a worker takes besides: options with a value, flags without."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("threads", type=int)
    parser.add_argument("--context", type=int, default=1024)
    for option in options:
        parser.add_argument(option)
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()


def serve(about: dict[str, Any], **work: Callable[..., Any]) -> None:
    """Answers requests until standard input ends. work: what can be asked for; its result, if any, is the answer's "value"."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the runtimes print must not mix with the answers
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        do = work[request.pop("do")]
        start = time.perf_counter()
        value = do(**request)
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, **memory(), **({} if value is None else {"value": value})}), file=out, flush=True)


def memory() -> dict[str, float]:
    """Returns this process's resident memory now and at its peak, in MiB; mapped pages of files count."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    status = {words[0]: words[1] for words in lines if len(words) > 1}
    return {"resident_mib": int(status["VmRSS:"]) / 1024, "peak_mib": int(status["VmHWM:"]) / 1024}
