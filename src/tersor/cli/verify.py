"""tersor verify: is a model file what was meant, and does the rest of the world read it so?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tersor.cli import options

if TYPE_CHECKING:
    from tersor.verification.record import Verification


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Hugging Face directory, .gguf file or hub id.", show_default=False)],
    against: Annotated[
        str | None, typer.Option("--against", "-a", metavar="BASE", help="The original, which the model should be near.")
    ] = None,
    logits: Annotated[bool, typer.Option("--logits/--no-logits", help="Run the model here and in another runtime too.")] = True,
    json: options.Json = False,
) -> None:
    """Check a model file, bit for bit.

    Opens PATH again with a reader that is not tersor's and compares every weight; compares its bytes and values with those that
    verification.json keeps; with --against, its weights and predictions with the original's; runs it in another runtime and compares
    the logits; and looks for what is known to go wrong. Writes verification.json. Exit code 1 when anything is wrong.
    """
    from tersor.cli.printing import print_json, progress
    from tersor.verification.verify import verify

    with progress() as report:
        result = verify(path, against, logits=logits, progress=lambda what, done, total: report(what, done, total))
    if json:
        print_json(result.to_dict())
    else:
        print_verification(result)
    fail_if_wrong(result)


def fail_if_wrong(result: Verification | None) -> None:
    """Ends the program with exit code 1 when anything is wrong."""
    if result is not None and result.faults:
        raise typer.Exit(1)


def print_outcome(result: Verification) -> None:
    """Prints one line when all is well, everything when it is not."""
    if result.faults:
        print_verification(result)
    elif result.reader:
        print(f"verified: {result.compared} tensors, opened again by {result.reader}, have every value that was meant")
    else:
        print(f"{result.verdict}: {'; '.join(result.notes)}")
    for finding in result.findings if not result.faults else ():
        print(f"suspicious: {finding}")


def print_verification(result: Verification) -> None:
    """Prints what was found, faults first."""
    from tersor.verification.record import MEANT_UNKNOWN

    unknown = any(note.startswith(MEANT_UNKNOWN) for note in result.notes)
    print(f"{result.path}: {result.verdict}" + (", as far as it can be: what was to be in it is not known" if unknown else ""))
    if result.reader and result.tensors:
        print(f"  {result.compared} of {len(result.tensors)} tensors read by {result.reader} to the bit as we read them")
    if result.logits is not None:
        print(f"  logits in {result.logits.runtime}: KL {result.logits.kl:.2g} over {result.logits.tokens} tokens")
    if "kl" in result.against:
        print(f"  KL from the original {result.against['kl']:.4f}, same top-1 {100 * result.against['top1']:.1f} %")
    for title, lines in (("wrong", result.faults), ("suspicious", result.findings), ("not checked", result.notes)):
        if lines:
            print(f"{title}:")
        for line in lines:
            print(f"  {line}")
