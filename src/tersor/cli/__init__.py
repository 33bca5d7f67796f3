"""The command line: parse, call the library, print. One thin file per command; app.py lists them.

Exit codes: 0 done; 2 bad input, told in one line on stderr; 130 stopped by Ctrl-C; 143 by SIGTERM; 1 a fault of tersor
itself (one line, or the traceback with TERSOR_DEBUG=1). Results go to stdout, progress and messages to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from tersor.errors import TersorError


def main() -> None:
    """The `tersor` command."""
    signal.signal(signal.SIGTERM, _terminated)
    # BLAS threads that wait for work give up their CPU soon (2^8 cycles): between its products our own threads need it.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "8")
    raise SystemExit(execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int:
    """Runs one command line, without the program's name, and returns its exit code."""
    from typer import Abort, BadParameter, Exit
    from typer.main import get_command

    from tersor.cli.app import app

    usage_error: type[Any] = BadParameter.__mro__[2]  # click's ClickException, wherever this typer keeps it
    try:
        command = get_command(app)
        with command.make_context("tersor", list(arguments) or ["--help"]) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except Exit as exit:
        return exit.exit_code
    except TersorError as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, Abort):
        return _fail("stopped", 130)
    except BrokenPipeError:
        return _unread()
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


def _unread() -> int:
    """The reader of our output went away (`tersor inspect x | head`): what is still buffered goes nowhere, without a complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # unwinds, so that temporary files are removed
