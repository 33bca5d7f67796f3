"""What is measured, and where: the lines that every table and every result file carries."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path


def describe() -> dict[str, str | int]:
    """Returns the processor, its logical CPUs, memory in GiB, our instruction set, commit, Python and date."""
    from tersor import _native

    return {
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "isa": _native.isa(),
        "commit": commit(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def commit() -> str:
    """Returns the commit that is measured, with + when the sources differ from it; results and documents do not count."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=here.parent).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "native", "CMakeLists.txt")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
