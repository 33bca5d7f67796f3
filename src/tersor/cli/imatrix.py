"""tersor imatrix: measure how much the columns of every matrix matter, as a file that llama-quantize reads too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options


def command(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Output: name.gguf.", show_default=False)],
    calib: Annotated[
        str,
        typer.Option(
            "--calib", metavar="SOURCE", help="Measure on a text, .jsonl or .npy file, pydoc, self, or hub:NAME.", show_default=False
        ),
    ],
    samples: options.Samples = 128,
    seqlen: options.Seqlen = 512,
    seed: options.Seed = 0,
    head: Annotated[
        bool, typer.Option("--process-output", help="Measure the head's input too, which llama-imatrix leaves out without this option.")
    ] = False,
    max_ram: Annotated[
        str | None, typer.Option("--max-ram", metavar="SIZE", help="Keep within this memory, like 3GiB.", show_default=False)
    ] = None,
    force: options.Force = False,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Write an importance matrix.

    Runs MODEL, unrounded, on calibration text, and writes the mean squares of every matrix's inputs as llama.cpp's imatrix GGUF. It serves
    `tersor quantize --calib FILE` and llama-quantize --imatrix FILE, as often as wanted, without running the model again.

    `quantize --calib TEXT` does more: it measures every block behind the blocks that are rounded already.
    """
    from tersor.cli.printing import print_json, progress
    from tersor.importance import imatrix
    from tersor.planning.sizes import parse_bytes

    with progress() as report:
        result = imatrix(
            model,
            out,
            calib,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            head=head,
            max_ram=None if max_ram is None else parse_bytes(max_ram),
            force=force,
            threads=threads,
            progress=report,
        )
    if json:
        print_json(result.to_dict())
        return
    from tersor.report import format_bytes

    print(f"{result.path}: {format_bytes(result.file_bytes)}, {result.entries} matrices, {result.seconds:.1f} s")
    print(f"measured on {result.tokens} tokens of {result.calibration['source']}")
