"""One adapter per runtime: each loads a model and answers `prefill` and `decode` requests over a pipe.

A worker is a process of its own, so that no runtime shares a thread pool or an allocator with another. Protocol: one JSON
object a line on standard input, {"do": "prefill" | "decode", "tokens": [...]}, one {"seconds": s} back on standard output.
`prefill` computes the whole prompt from an empty cache and the logits of its last token; `decode` continues from the
state that `prefill` left, one token a step, with the logits of each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable


def serve(prefill: Callable[[list[int]], object], decode: Callable[[list[int]], object], peak: Callable[[], float]) -> None:
    """Answers requests until standard input ends. The first line out says that the model is loaded."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the runtimes print must not mix with the answers
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        work = prefill if request["do"] == "prefill" else decode
        start = time.perf_counter()
        work(request["tokens"])
        print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": peak()}), file=out, flush=True)


def peak_mib() -> float:
    """Returns this process's peak resident memory in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
