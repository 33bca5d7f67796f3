"""tersor convert: move a model between containers without quantizing again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options


def command(
    source: Annotated[str, typer.Argument(metavar="IN", help="Hugging Face directory, .gguf file or hub id.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="name.gguf, or a directory.", show_default=False)],
    to: options.To = None,
    dequantize: Annotated[
        str | None, typer.Option("--dequantize", metavar="FLOAT", help="Write quantized tensors as f32, f16 or bf16 instead.")
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Move a model to another container.

    Writes the model IN to OUT; codes are moved, never rounded again.
    Refuses when OUT's container has no place for a format of IN; --dequantize or `tersor quantize` are for that.
    """
    from tersor.cli.printing import print_json
    from tersor.containers.convert import convert
    from tersor.inspection import inspect

    convert(source, out, to=to, force=force, dequantize=dequantize)
    found = inspect(out)
    if json:
        print_json(found.to_dict())
        return
    from tersor.report import format_bytes

    formats = ", ".join(f"{count} {name}" for name, (count, _, _) in found.formats.items())
    print(f"{found.path}: {format_bytes(found.file_bytes)}, {found.container}; tensors: {formats}")
