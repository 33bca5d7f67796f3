"""tersor compare: several recipes of one model, quantized, judged and timed side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options


def command(
    context: typer.Context,
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Directory for models, results and page.", show_default=False)],
    recipes: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe",
            "--recipes",
            "-r",
            metavar="RECIPE",
            help='A recipe; give it several times, or several in one, separated by ";" (recipes themselves contain commas). '
            'By default "q8_0; q5_1; q4_k|q5_0; q4_0; clip:int4_g128|int4_g64; q3_k|iq4_nl".',
        ),
    ] = None,
    also: Annotated[list[str] | None, typer.Option("--also", metavar="PATH", help="A model that exists already; may be repeated.")] = None,
    calib: options.Calib = None,
    samples: options.Samples = 128,
    seqlen: options.Seqlen = 512,
    seed: options.Seed = 0,
    text: options.Text = None,
    window: options.Window = 512,
    windows: Annotated[int, typer.Option("--windows", "-n", metavar="N", help="Windows to judge; 0 = the whole text.")] = 8,
    prefill: Annotated[int, typer.Option("--prefill", metavar="N", help="Tokens of the timed prompt.")] = 512,
    decode: Annotated[int, typer.Option("--decode", metavar="N", help="Tokens decoded after it.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="Runs of which the median counts, all models in turns.")] = 3,
    force: options.Force = False,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Compare recipes: size, quality, speed.

    Quantizes MODEL by several recipes into DIR, judges each against the original and times it. Prints a table and writes
    results.json, and index.html and plot.svg with KL divergence over file size.
    """
    from tersor.cli.printing import print_json, progress
    from tersor.comparison import DEFAULT_RECIPES, compare

    split = [part.strip() for text in recipes or [] for part in text.split(";") if part.strip()]
    options.refuse_sampling(context, calib, "is for calibrated recipes (--calib)")
    with progress() as report:
        result = compare(
            model,
            out,
            split or DEFAULT_RECIPES,
            also=also or (),
            calib=calib,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            text=text,
            window=window,
            windows=windows or None,
            prefill=prefill,
            decode=decode,
            repeats=repeats,
            threads=threads,
            force=force,
            progress=report,
        )
    if json:
        print_json(result.to_dict())
        return
    print(result.table() + "\n")
    for note in result.notes():
        print(note)
    print(f"\n{out / 'index.html'} shows it; {out / 'results.json'} holds every number")
