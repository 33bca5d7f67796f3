"""The native runtime by itself (native/kernels/kernel_test.cc): on this CPU, on emulated ones, and under the sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tersor import _native

ROOT = Path(__file__).parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # An outer make (`make test`) leaves its level and flags behind, which make the inner one talk.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=ROOT, env={**outside, **environment}, capture_output=True, text=True)


def output_of(*command: str, **environment: str) -> str:
    result = run(*command, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def instruction_sets(output: str) -> list[str]:
    """The instruction sets of each run of kernel_test in the output."""
    runs = re.findall(r"^instruction sets: (.*)$", output, re.MULTILINE)
    assert len(re.findall(r"^\d{6,} checks, 0 failures$", output, re.MULTILINE)) == len(runs)
    return runs


@pytest.mark.slow
def test_kernels_on_this_cpu_and_on_arm() -> None:
    here, arm = output_of("make", "test-native"), output_of("make", "test-arm")
    assert instruction_sets(here) == [" ".join(_native.isas())]
    assert instruction_sets(arm) == ["scalar neondot neoni8mm", "scalar"]  # all that we know; a Cortex-A53 has none
    # Encoded weights are the same bytes on every machine.
    assert len(set(re.findall(r"^bytes of the encoders: (\w{16})$", here + arm, re.MULTILINE))) == 1


@pytest.mark.slow
def test_kernels_under_the_sanitizers() -> None:
    assert instruction_sets(output_of("make", "test-sanitize")) == [" ".join(_native.isas())] * 2


SIMDE = any((Path(folder) / "simde/x86/avx512.h").exists() for folder in ("/usr/include", "/usr/local/include"))


@pytest.mark.slow
@pytest.mark.skipif(not SIMDE or "avx2" not in _native.isas(), reason="needs an AVX2 CPU and SIMDe (apt-get install libsimde-dev)")
def test_kernels_on_emulated_amx_avx512_and_avx_vnni() -> None:
    build = ("cmake", "-S", ".", "-B", "build/emulated", "-DTERSOR_PYTHON=OFF", "-DTERSOR_EMULATE=ON")
    output_of(*build)
    output_of("cmake", "--build", "build/emulated", "--target", "kernel_test", "--parallel", str(os.cpu_count()))
    for isa in ("amx", "avx512vnni", "avxvnni"):
        assert instruction_sets(output_of("build/emulated/kernel_test", TERSOR_ISA=isa)) == [isa]


@pytest.mark.parametrize("target", ["test-native", "test-arm", "test-sanitize"])
def test_missing_tools_are_named_with_the_command_that_installs_them(target: str, tmp_path: Path) -> None:
    tools = {"cmake": "cmake"}
    if target == "test-arm":
        tools |= {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}
    else:
        tools |= {"g++": "g++"}
    for name in ("make", "find", "mkdir"):
        (tmp_path / name).symlink_to(shutil.which(name) or pytest.fail(f"no {name}"))
    for tool, package in tools.items():
        result = run("make", target, "CXX=g++", PATH=str(tmp_path))
        assert result.returncode == 2
        assert result.stdout.splitlines()[-1].endswith(f"is missing: sudo apt-get install {package}")
        stand_in = tmp_path / tool  # from here on it is there
        stand_in.write_text("#!/bin/sh\nexit 1\n")
        stand_in.chmod(0o755)
    assert "is missing" not in run("make", target, "CXX=g++", PATH=str(tmp_path)).stdout
