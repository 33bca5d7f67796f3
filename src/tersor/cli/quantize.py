"""tersor quantize: store a model in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.cli import options


def command(
    context: typer.Context,
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Output: name.gguf, or a directory.", show_default=False)],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="RECIPE",
            help='"method:format, pattern=format, ..." or a .toml file; by default 4 bits: rtn:q4_k|q5_0 for GGUF, '
            "clip:int4_g128s|int4_g64s|int4_g32s for most directories.",
        ),
    ] = None,
    to: options.To = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            metavar="SIZE",
            help="What the whole output may take, like 3.5GiB or 4.25bpw: formats are chosen tensor by tensor (needs --calib); --recipe "
            "names the steps alone: clip, gptq, rotate+gptq.",
            show_default=False,
        ),
    ] = None,
    calib: options.Calib = None,
    samples: options.Samples = 128,
    seqlen: options.Seqlen = 512,
    seed: options.Seed = 0,
    activations: Annotated[
        str | None,
        typer.Option(
            "--activations",
            metavar="SCHEME",
            help="What the file says about rounding inputs to 8 bits: token, or static by minmax, percentile, mse or entropy.",
            show_default=False,
        ),
    ] = None,
    max_ram: Annotated[
        str | None,
        typer.Option("--max-ram", metavar="SIZE", help="Keep a calibrated run within this memory, like 3GiB.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted calibrated run, to the same bytes.")] = False,
    device: Annotated[str, typer.Option("--device", metavar="cpu|cuda", help="Where a calibrated run computes; cuda needs torch.")] = "cpu",
    force: options.Force = False,
    threads: options.Threads = None,
    verify: options.Verify = True,
    json: options.Json = False,
) -> None:
    """Store a model in fewer bits.

    Writes MODEL to OUT with its weights in the formats of a recipe.

    A recipe is a method and a format for the matrices of the blocks, then rules for others, the last that matches counts:
    "clip:int4_g64, lm_head=int8_c, layers.0-1=rtn:int8_c, *.down_proj=keep". Formats: docs/formats.md. q4_k|q5_0 takes q5_0 where the
    columns do not divide by 256.

    Methods that need no data: rtn (round to nearest), clip (range searched for the least squared error), hqq, llm_int8. With --calib: clip
    weighs errors by importance; gptq lets later columns make up for the errors of earlier ones, and gptq(fisher) weighs them by what they
    do to the whole model's predictions (torch); autoround trains the roundings of a block (torch). Before rounding, joined by "+":
    rotate, awq, smoothquant. After it: tune (a block's scales and norms against the float block) and distill (all of them against the
    float model; both torch). "rotate+awq+gptq:int3_g64" is one recipe; options go in parentheses: "gptq(act_order; refine=1):int4_g64".

    A calibrated run keeps what it has done in OUT.work, and --resume goes on from there.

    --calib also takes llama.cpp's importance matrix (tersor imatrix and llama-imatrix write them): clip, and rtn in ggml's types, weigh
    errors by it tensor by tensor, and nothing is run. Matrices that it lacks are rounded without it and counted in the note; steps that
    need more than mean squares are refused.
    """
    from tersor.cli.printing import print_json, progress, say
    from tersor.cli.verify import fail_if_wrong, print_outcome
    from tersor.pipeline import quantize
    from tersor.planning.sizes import parse_bytes

    options.refuse_sampling(context, calib, "is for calibrated runs (--calib)")
    with progress() as report:
        result = quantize(
            model,
            out,
            recipe,
            to=to,
            budget=budget,
            calib=calib,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            activations=activations,
            max_ram=None if max_ram is None else parse_bytes(max_ram),
            resume=resume,
            device=device,
            force=force,
            threads=threads,
            verify=verify,
            progress=report,
            report=say,
        )
    if json:
        print_json(result.to_dict())
        fail_if_wrong(result.verification)
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
    if result.verification is not None:
        print_outcome(result.verification)
    fail_if_wrong(result.verification)
