"""tersor eval: perplexity, and divergence from the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tersor.cli import options

if TYPE_CHECKING:
    pass


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Hugging Face directory, .gguf file or hub id.", show_default=False)],
    against: Annotated[str | None, typer.Option("--against", "-a", metavar="BASE", help="The original: adds the KL divergence.")] = None,
    text: options.Text = None,
    window: options.Window = 512,
    stride: Annotated[
        int | None, typer.Option("--stride", metavar="N", help="Tokens between the starts of two windows; by default no overlap.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", "-n", metavar="N", help="Windows to judge; 0 = the whole text.")] = 16,
    bos: Annotated[bool | None, typer.Option("--bos/--no-bos", help="Begin windows with BOS; by default as the tokenizer does.")] = None,
    threads: options.Threads = None,
    activations: options.Activations = "int8",
    kv: options.Kv = "f16",
    json: options.Json = False,
) -> None:
    """Judge a model on a text.

    Prints its perplexity with standard error and, with --against, its KL divergence from BASE. BASE is run on its dequantized
    weights with float activations and a float16 cache. No logits are stored. The first token of a window never counts.
    """
    from tersor.cli.printing import print_json, progress
    from tersor.evaluation import evaluate

    with progress() as report:
        result = evaluate(
            path,
            against=against,
            text=text,
            window=window,
            stride=stride,
            windows=windows or None,
            bos=bos,
            threads=threads,
            activations=activations,
            kv=kv,
            progress=lambda done, total: report("judge", done, total),
        )
    if json:
        print_json(result.to_dict())
    else:
        print(result)
