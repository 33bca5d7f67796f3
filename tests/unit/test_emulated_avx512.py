"""The AVX-512 kernels on a CPU without AVX-512: compiled with SIMDe's emulated intrinsics, compared with the scalar ones."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"
SIMDE = [
    p for p in (Path("/usr/include"), Path("/usr/local/include"), Path("/opt/homebrew/include")) if (p / "simde/x86/avx512.h").exists()
]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or not SIMDE, reason="needs g++ and SIMDe (apt-get install libsimde-dev)")
def test_emulated_kernels_agree_with_the_scalar_ones(tmp_path: Path) -> None:
    ops = ("linear", "elementwise", "attention", "logits")
    sources = [NATIVE / "kernels/avx512vnni_test.cc"]
    sources += [NATIVE / "kernels" / op / f"{isa}.cc" for op in ops for isa in ("scalar", "x86_avx512vnni")]
    # Unoptimized: SIMDe's loops take a compiler minutes otherwise.
    command = ["g++", "-std=c++20", "-O0", "-Wno-psabi", "-DTERSOR_EMULATE_AVX512", f"-I{NATIVE}", f"-I{SIMDE[0]}"]
    build = subprocess.run([*command, *map(str, sources), "-o", str(tmp_path / "check")], capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(tmp_path / "check")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert " 0 failures" in run.stdout and not run.stdout.startswith("0 checks")
