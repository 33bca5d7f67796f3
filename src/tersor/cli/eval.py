"""tersor eval: perplexity, and divergence from the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tersor.cli import options

if TYPE_CHECKING:
    from tersor.evaluation import Divergence, Perplexity


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
    json: options.Json = False,
) -> None:
    """Judge a model on a text.

    Prints its perplexity with standard error and, with --against, its KL divergence from BASE. BASE is run on its dequantized
    weights with float activations. No logits are stored. The first token of a window never counts.
    """
    from tersor.cli.printing import print_json, progress
    from tersor.evaluation import Divergence, evaluate

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
            progress=lambda done, total: report("judge", done, total),
        )
    if json:
        print_json(result.to_dict())
    elif isinstance(result, Divergence):
        _print_divergence(result)
    else:
        _print_perplexity(result)


def _print_perplexity(result: Perplexity) -> None:
    from tersor.report.table import format_error

    print(f"perplexity  {format_error(result.perplexity, result.error)}")
    print(f"protocol    {result.protocol}")


def _print_divergence(d: Divergence) -> None:
    from tersor.report.table import format_error, format_number

    print(f"perplexity            {format_error(d.perplexity.perplexity, d.perplexity.error)}")
    print(f"perplexity of base    {format_error(d.base.perplexity, d.base.error)}")
    print(f"perplexity ratio      {format_error(d.ratio, d.ratio_error)}")
    print(f"KL divergence, mean   {format_error(d.kl_mean, d.kl_error)} nats")
    print(f"  median, 99 %, max   {format_number(d.kl_median)}, {format_number(d.kl_p99)}, {format_number(d.kl_max)}")
    print(f"same top-1            {format_error(100 * d.top1, 100 * d.top1_error)} %")
    print(f"RMS change of the true token's probability  {format_error(100 * d.rms_change, 100 * d.rms_change_error)} %")
    print(f"protocol              {d.protocol}")
