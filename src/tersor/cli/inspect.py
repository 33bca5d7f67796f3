"""tersor inspect: what a model file holds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from tersor.cli import options

if TYPE_CHECKING:
    from tersor.inspection import Inspection


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Hugging Face directory, .gguf file or hub id.", show_default=False)],
    every: Annotated[bool, typer.Option("--all", help="List every tensor instead of one line for all equal ones.")] = False,
    lint: Annotated[bool, typer.Option("--lint/--no-lint", help="Look for what is known to go wrong.")] = True,
    json: options.Json = False,
) -> None:
    """Show what a model file holds.

    Tensors, formats, true bits per weight, sizes and metadata of PATH, and what is suspicious: zero points off by one, layers that were
    forgotten or that vLLM joins though their formats differ, a missing head, chat template or end of text.
    """
    from tersor.cli.printing import print_json
    from tersor.inspection import inspect

    found = inspect(path, lint)
    if json:
        print_json(found.to_dict())
    else:
        _print(found, every)


def _print(found: Inspection, every: bool) -> None:
    from tersor.report import format_bytes, text_table

    print(f"{found.path}: {found.container}, {format_bytes(found.file_bytes)}, {found.parameters:,} weights")
    print(f"{found.config.get('model_type')}, {found.bits_per_weight:.3f} bits per weight\n")
    rows = [
        [name, str(count), f"{weights:,}", format_bytes(nbytes), f"{8 * nbytes / max(1, weights):.4f}"]
        for name, (count, weights, nbytes) in found.formats.items()
    ]
    print(text_table(["format", "tensors", "weights", "size", "bits/weight"], rows) + "\n")
    groups: dict[tuple[str, str, str], tuple[int, int]] = {}
    for t in found.tensors:
        shown = t.name if every else re.sub(r"(?<=\.)\d+(?=\.)", "*", t.name)
        key = shown, t.format, " x ".join(map(str, t.shape))
        count, nbytes = groups.get(key, (0, 0))
        groups[key] = count + 1, nbytes + t.nbytes
    rows = [[name, format, shape, str(n), format_bytes(nbytes)] for (name, format, shape), (n, nbytes) in groups.items()]
    print(text_table(["tensor", "format", "shape", "count", "size"], rows))
    keys = [(key, value) for key, value in found.metadata.items() if len(str(value)) <= 200]
    if keys:
        print("\nmetadata")
        for label, value in keys:
            print(f"  {label} = {value}")
    if found.files:
        print("\nfiles")
        for file, size in found.files.items():
            print(f"  {file}, {format_bytes(size)}")
    if found.findings:
        print("\nsuspicious")
        for finding in found.findings:
            print(f"  {finding}")
