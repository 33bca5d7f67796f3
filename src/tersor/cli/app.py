"""The list of commands."""

from __future__ import annotations

import typer

from tersor.cli import bench, compare, convert, eval, imatrix, inspect, plan, quantize, run, verify

app = typer.Typer(
    name="tersor",
    help="Makes neural networks small and fast by quantization, and proves what it did.",
    epilog="MODEL and PATH are a Hugging Face directory, a .gguf file or a hub id (org/name).",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize")(quantize.command)
app.command("inspect")(inspect.command)
app.command("eval")(eval.command)
app.command("compare")(compare.command)
app.command("plan")(plan.command)
app.command("bench")(bench.command)
app.command("convert")(convert.command)
app.command("imatrix")(imatrix.command)
app.command("verify")(verify.command)
app.command("run")(run.command)


def _version(value: bool) -> None:
    if value:
        from tersor import __version__

        print(f"tersor {__version__}")
        raise typer.Exit


@app.callback()
def _tersor(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version and exit.")) -> None:
    pass
