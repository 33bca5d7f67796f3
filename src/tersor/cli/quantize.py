"""tersor quantize: store a model in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options


def command(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Output: name.gguf, or a directory.", show_default=False)],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE",
            help='"method:format, pattern=format, ..." or a .toml file; by default 4 bits: rtn:q4_k|q5_0 for GGUF, '
            "clip:int4_g128|int4_g64|int4_g32 for a directory.",
        ),
    ] = None,
    to: options.To = None,
    calib: Annotated[
        str | None,
        typer.Option(
            "--calib", metavar="SOURCE", help="Calibrate on: a text, .jsonl or .npy file, pydoc, self, or hub:NAME.", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", metavar="N", help="Sequences of the calibration.")] = 128,
    seqlen: Annotated[int, typer.Option("--seqlen", metavar="N", help="Tokens of a sequence.")] = 512,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Draws the sequences.")] = 0,
    max_ram: Annotated[
        str | None,
        typer.Option("--max-ram", metavar="SIZE", help="Keep a calibrated run within this memory, like 3GiB.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted calibrated run, to the same bytes.")] = False,
    force: options.Force = False,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Store a model in fewer bits.

    Writes MODEL to OUT with its weights in the formats of a recipe.

    A recipe is a method and a format for the matrices of the blocks, then rules for others, the last that matches counts:
    "clip:int4_g64, lm_head=int8_c, layers.0-1=rtn:int8_c, *.down_proj=keep". Methods: rtn (round to nearest), clip (range searched for the
    least squared error). Formats: docs/formats.md. q4_k|q5_0 takes q5_0 where the columns do not divide by 256.
    """
    from tersor.cli.printing import print_json, progress, say
    from tersor.pipeline import quantize
    from tersor.planning.sizes import parse_bytes

    with progress() as report:
        result = quantize(
            model,
            out,
            recipe,
            to=to,
            calib=calib,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            max_ram=None if max_ram is None else parse_bytes(max_ram),
            resume=resume,
            force=force,
            threads=threads,
            progress=lambda done, total, _: report("quantize", done, total),
            report=say,
        )
    if json:
        print_json(result.to_dict())
        return
    from tersor.report import format_bytes

    print(f"{result.path}: {format_bytes(result.file_bytes)}, {result.container}, {result.seconds:.1f} s")
    print(f"bits per weight: {result.block_bits_per_weight:.3f} in the blocks, {result.bits_per_weight:.3f} of the whole file")
    print(f"relative RMS error of the blocks' weights: {100 * result.error:.2f} %")
    if result.output_error is not None:
        print(f"relative RMS error of their outputs on the calibration tokens: {100 * result.output_error:.2f} %")
    formats = [t.format for t in result.tensors]
    print("tensors: " + ", ".join(f"{formats.count(name)} {name}" for name in dict.fromkeys(formats)))
    if result.note:
        print(f"note: {result.note}")
