"""tersor convert: move a model between containers without quantizing again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tersor.cli import options

if TYPE_CHECKING:
    from tersor.conversion import Change


def command(
    source: Annotated[str, typer.Argument(metavar="IN", help="Hugging Face directory, .gguf file or hub id.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="name.gguf, or a directory.", show_default=False)],
    to: options.To = None,
    dequantize: Annotated[
        str | None, typer.Option("--dequantize", metavar="FLOAT", help="Write quantized tensors as f32, f16 or bf16 instead.")
    ] = None,
    requantize: Annotated[
        str | None, typer.Option("--requantize", metavar="RECIPE", help="Round what OUT's container cannot hold again, like rtn:q4_k|q5_0.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split-size", metavar="SIZE", help="Write GGUF in files of at most this size, like 4GB.", show_default=False),
    ] = None,
    force: options.Force = False,
    verify: options.Verify = True,
    json: options.Json = False,
) -> None:
    """Move a model to another container.

    Writes the model IN to OUT; codes are moved, never rounded again: where the grids of two formats agree, one becomes the other.
    Refuses when OUT's container has no place for the numbers of a tensor, unless --requantize or --dequantize say what to do with them.
    """
    from tersor.cli.printing import print_json
    from tersor.cli.verify import fail_if_wrong, print_outcome
    from tersor.conversion import convert
    from tersor.inspection import inspect
    from tersor.planning.sizes import parse_bytes

    split_bytes = None if split is None else parse_bytes(split)
    done = convert(source, out, to=to, force=force, dequantize=dequantize, requantize=requantize, split_bytes=split_bytes, verify=verify)
    found = inspect(done.path, lint=False)
    if json:
        checked = {} if done.verification is None else {"verification": done.verification.to_dict()}
        print_json(found.to_dict() | {"changes": [asdict(change) for change in done.changes]} | checked)
        fail_if_wrong(done.verification)
        return
    from tersor.report import format_bytes

    formats = ", ".join(f"{count} {name}" for name, (count, _, _) in found.formats.items())
    print(f"{found.path}: {format_bytes(found.file_bytes)}, {found.container}; tensors: {formats}")
    for (old, new), errors in _grouped(done.changes).items():
        rounded, how = [error for error in errors if error > 0], "the same values"
        if rounded:
            how = f"rounded, relative RMS error {sum(rounded) / len(rounded):.4f} on average, {max(rounded):.4f} at most"
        print(f"  {len(errors)} tensors from {old} to {new}: {how}")
    if done.verification is not None:
        print_outcome(done.verification)
    fail_if_wrong(done.verification)


def _grouped(changes: Sequence[Change]) -> dict[tuple[str, str], list[float]]:
    groups: dict[tuple[str, str], list[float]] = {}
    for change in changes:
        groups.setdefault((change.source, change.format), []).append(change.error)
    return groups
