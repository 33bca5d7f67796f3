"""Options that several commands share: one spelling, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tersor.errors import RecipeError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face directory, .gguf file or hub id.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an output that exists.")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", metavar="N", help="CPU threads; by default all CPUs this process may use.")]
Kv = Annotated[
    str, typer.Option("--kv", metavar="TYPE", help="Cached keys and values: f16, f32, int8 (0.55 of f16's memory) or int4 (0.32).")
]
Activations = Annotated[
    str,
    typer.Option(
        "--activations",
        metavar="HOW",
        help="Inputs of quantized layers: int8 (fast, finest), int8_token or int8_static (as W8A8 files ask), llm_int8, float.",
    ),
]
To = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="WHAT",
        help="A container (gguf, compressed-tensors, gptq, awq, bnb, hqq, mlx, onnx, huggingface), or an engine whose demands are checked "
        "(vllm, sglang, llama.cpp, ollama, lm-studio, transformers, bitsandbytes, mlx-lm, onnxruntime).",
        show_default=False,
    ),
]
Calib = Annotated[
    str | None,
    typer.Option(
        "--calib",
        metavar="SOURCE",
        help="Calibrate on a text, .jsonl or .npy file, pydoc, self, or hub:NAME; clip also by an importance matrix (.gguf, .dat).",
        show_default=False,
    ),
]
Samples = Annotated[int, typer.Option("--samples", metavar="N", help="Sequences to calibrate on.")]
Seqlen = Annotated[int, typer.Option("--seqlen", metavar="N", help="Tokens of a sequence.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Draws the sequences.")]
Text = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="UTF-8 text to judge on; by default pydoc_data.topics, which every Python has."),
]
Window = Annotated[int, typer.Option("--window", metavar="N", help="Tokens that the model sees at once.")]
Verify = Annotated[
    bool,
    typer.Option("--verify/--no-verify", help="Open OUT again with a reader that is not tersor's and compare all values with those meant."),
]


def refuse_given(context: typer.Context, names: tuple[str, ...], why: str) -> None:
    """Raises RecipeError when one of these options of the running command was written down. why: what it would need."""
    for name in names:
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE":
            raise RecipeError(f"--{name.replace('_', '-')} {why}")


def refuse_sampling(context: typer.Context, calib: str | None, why: str) -> None:
    """Raises RecipeError when an option that draws samples was written down and calib is no text. why: of a run without calib."""
    from tersor.weighing import names_imatrix

    if calib is None or names_imatrix(calib):
        why = why if calib is None else f"draws from a text; {calib} is an importance matrix, which was measured before"
        refuse_given(context, ("samples", "seqlen", "seed"), why)
