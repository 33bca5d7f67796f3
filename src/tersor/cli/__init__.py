"""The command line: parse, call the library, print. One thin file per command; app.py lists them.

Exit codes: 0 done; 2 bad input, told in one line on stderr; 130 stopped by Ctrl-C; 143 by SIGTERM; 1 a fault of tersor
itself (one line, or the traceback with TERSOR_DEBUG=1). Results go to stdout, progress and messages to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from tersor.errors import TersorError


def main() -> None:
    """The `tersor` command."""
    signal.signal(signal.SIGTERM, _terminated)
    code = execute(sys.argv[1:])
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    raise SystemExit(code)


def execute(arguments: Sequence[str]) -> int:
    """Runs one command line, without the program's name, and returns its exit code."""
    from typer import Abort, BadParameter

    from tersor.cli.app import app

    usage_error: type[Any] = BadParameter.__mro__[2]  # click's ClickException, wherever this typer keeps it
    try:
        return int(app(list(arguments), prog_name="tersor", standalone_mode=False) or 0)
    except TersorError as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, Abort):
        return 130
    except BrokenPipeError:  # the reader of our output went away: `tersor inspect x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if isinstance(error, usage_error):
            return _fail(error.format_message(), 2)
        if os.environ.get("TERSOR_DEBUG") == "1":
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return _fail(f"internal error: {what}; run again with TERSOR_DEBUG=1 and report the traceback", 1)


def _fail(message: str, code: int) -> int:
    print("tersor: " + " ".join(message.split()), file=sys.stderr)
    return code


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # unwinds, so that temporary files are removed
