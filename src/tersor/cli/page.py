"""docs/cli.md, made from the commands themselves: `python -m tersor.cli.page > docs/cli.md`, and `--check docs/cli.md` to compare."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from typer.main import get_command

from tersor.cli.app import app

_HEAD = """# The command line

<!-- Made by `python -m tersor.cli.page`; do not edit. -->

MODEL and PATH are a Hugging Face directory, a `.gguf` file or a hub id (`org/name`). Results go to stdout, progress and messages to
stderr. `--json` prints one JSON document instead of text.

| exit code | meaning |
|---|---|
| 0 | done |
| 2 | bad input, told in one line: what, where, got, need, fix |
| 130, 143 | stopped by Ctrl-C or SIGTERM; nothing half-written is left under the final name |
| 1 | a fault of tersor itself; `TERSOR_DEBUG=1` shows the traceback |

`TERSOR_ISA=name` forces an instruction set (`tersor bench --isa` lists them).
"""


def page() -> str:
    """Returns docs/cli.md."""
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    return _HEAD + "".join(_command(name, command) for name, command in commands.items()) + "\n" + _recipes()


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    choices = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    usage = " ".join(f"{p.metavar}" if p.required else f"[{p.metavar}]" for p in arguments)
    required = " ".join(f"{p.opts[-1]} {p.metavar}" for p in choices if p.required)
    lines = [f"\n## tersor {name}\n", "```\n" + " ".join(filter(None, [f"tersor {name}", usage, required, "[OPTIONS]"])) + "\n```\n"]
    lines.append(inspect.cleandoc(command.help or "") + "\n")
    lines += ["| argument | meaning |", "|---|---|"]
    lines += [f"| `{p.metavar}` | {_cell(p.help)} |" for p in arguments]
    lines += ["", "| option | meaning | default |", "|---|---|---|"]
    lines += [f"| {_names(p)} | {_cell(p.help)} | {_default(p)} |" for p in choices]
    return "\n".join(lines) + "\n"


def _names(p: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*p.opts, *p.secondary_opts))
    return names if p.is_flag else f"{names} {p.metavar}"


def _default(p: Any) -> str:
    if p.required:
        return "required"
    if p.default is None or p.default is False or callable(p.default):
        return ""
    return f"`{p.default}`"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def _recipes() -> str:
    """Returns the recipe's grammar, from its module."""
    import tersor.recipe

    text = inspect.cleandoc(tersor.recipe.__doc__ or "")
    first, rest = text.split("\n", 1)
    return f"## Recipes\n\n{first}\n{rest.rstrip()}\n"


def main(arguments: list[str]) -> int:
    """Prints the page, or compares it with the file after --check; returns the exit code."""
    if not arguments:
        sys.stdout.write(page())
        return 0
    if len(arguments) != 2 or arguments[0] != "--check":
        print("usage: python -m tersor.cli.page [--check PATH]", file=sys.stderr)
        return 2
    path = Path(arguments[1])
    if path.is_file() and path.read_text(encoding="utf-8") == page():
        return 0
    print(f"{path} is stale; run: python -m tersor.cli.page > {path}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
