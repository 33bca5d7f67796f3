"""tersor plan: what a model will weigh, from its config.json alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tersor.cli import options

if TYPE_CHECKING:
    from tersor.planning import Plan


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="config.json, Hugging Face directory, .gguf file or hub id.", show_default=False)
    ],
    recipes: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", metavar="RECIPE", help='A recipe to add up; repeat it, or separate by ";".')
    ] = None,
    context: Annotated[int, typer.Option("--context", "-c", metavar="N", help="Tokens of KV cache to count.")] = 1024,
    ram: Annotated[
        str | None, typer.Option("--ram", metavar="SIZE", help="Memory to fit in, like 8GiB; by default this machine's.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Predict sizes from config.json alone.

    Shows the size of MODEL at every bit width and under each recipe, its KV cache, and what fits in memory. Needs no weights:
    config.json is enough. Nothing is quantized.
    """
    from tersor.cli.printing import print_json
    from tersor.planning import parse_bytes, plan

    split = tuple(part.strip() for text in recipes or [] for part in text.split(";") if part.strip())
    result = plan(model, recipes=split or None, context=context, ram=parse_bytes(ram) if ram else None)
    if json:
        print_json(result.to_dict())
    else:
        _print(result)


def _print(result: Plan) -> None:
    from tersor.report import format_bytes, text_table

    print(
        f"{result.model}: {result.architecture}, {result.parameters:,} parameters ({result.embedding_parameters:,} in embedding and head)\n"
    )
    header = ["every parameter in", *(f"{bits} bits" for bits in result.widths)]
    print(text_table(header, [["size", *(format_bytes(n) for n in result.widths.values())]]) + "\n")
    rows = [
        [s.recipe, f"{s.bits:.2f}", format_bytes(s.nbytes), format_bytes(s.total_bytes), "yes" if s.fits else "no"] for s in result.sizes
    ]
    print(text_table(["recipe", "bits/weight", "tensors", f"to run, {result.context} tokens", "fits"], rows) + "\n")
    print(f"KV cache in float16: {format_bytes(result.kv_bytes_per_token * 1024)} per 1,024 tokens")
    print(f"fits: weights, KV cache of {result.context} tokens and working memory within {format_bytes(result.ram_bytes)}")
    print("bits/weight: of all tensors, scales included; embedding and norms as each recipe's container keeps them; 1 GB = 1e9 bytes")
