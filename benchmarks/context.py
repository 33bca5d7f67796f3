"""How the time per token grows with the context: decode behind 1 and behind 4,096 tokens.

    python -m benchmarks context FILE [--threads 2] [--rounds 5] [--length 4096] [--decode 64]

Ours with the float16 and the int8 cache, and llama.cpp, in turns; the prefix is filled by a prefill before every measurement.
Writes benchmarks/results/ISA/context.json; the exit code is 1 when a demand that it decides is not held.
"""

from __future__ import annotations

import argparse
import sys
import time

from benchmarks import report
from benchmarks.machine import describe
from benchmarks.runtimes import NotHere, Worker
from benchmarks.speed import REST_SECONDS

CACHES = {"tersor": "f16", "tersor, int8 cache": "int8", "llama.cpp": "f16"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    for option, number in (("--threads", 2), ("--rounds", 5), ("--length", 4096), ("--decode", 64)):
        parser.add_argument(option, type=int, default=number, help="default: %(default)s")
    a = parser.parse_args()
    workers = {}
    for name in CACHES:
        try:
            workers[name] = Worker(name, a.file, a.threads, a.length + a.decode)
        except NotHere as error:
            print(f"{name}: not measured: {error}", file=sys.stderr)
    prefix = [1000 + 7 * i % 20000 for i in range(a.length)]
    steps = [2000 + 11 * i % 20000 for i in range(a.decode)]
    seconds = {name: {"short_seconds": [], "long_seconds": []} for name in workers}
    for round_ in range(a.rounds + 1):  # the first warms up and does not count
        for name, worker in workers.items():
            for what, length in (("short_seconds", 1), ("long_seconds", a.length)):
                time.sleep(REST_SECONDS)
                worker.ask("prefill", tokens=prefix[:length])
                answer = worker.ask("decode", tokens=steps)
                if round_:
                    seconds[name][what].append(answer["seconds"] / a.decode)
    rows = [
        {"runtime": name, "kv": CACHES[name], "threads": a.threads, "about": workers[name].about, **times}
        for name, times in seconds.items()
    ]
    for worker in workers.values():
        worker.close()
    report.save("context", describe() | {"rounds": a.rounds, "length": a.length, "decode": a.decode, "rows": rows})
    print(report.table("context"))
    return report.judge(["context"])


if __name__ == "__main__":
    sys.exit(main())
