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
    from tersor.cli.printing import print_json, progress
    from tersor.pipeline import quantize

    with progress() as report:
        result = quantize(
            model, out, recipe, to=to, force=force, threads=threads, progress=lambda done, total, _: report("quantize", done, total)
        )
    if json:
        print_json(result.to_dict())
        return
    from tersor.report import format_bytes

    print(f"{result.path}: {format_bytes(result.file_bytes)}, {result.container}, {result.seconds:.1f} s")
    print(f"bits per weight: {result.block_bits_per_weight:.3f} in the blocks, {result.bits_per_weight:.3f} of the whole file")
    print(f"relative RMS error of the blocks' weights: {100 * result.error:.2f} %")
    formats = [t.format for t in result.tensors]
    print("tensors: " + ", ".join(f"{formats.count(name)} {name}" for name in dict.fromkeys(formats)))
    if result.note:
        print(f"note: {result.note}")
