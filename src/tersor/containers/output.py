"""Outputs that appear under their final name only when they are whole: a temporary neighbour, then a rename."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tersor.errors import OutputError


def temporary_path(path: Path) -> Path:
    """Returns a hidden, unused name in the same directory, so that the rename stays within one file system."""
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def check_output(path: Path, need_bytes: int, *, force: bool, directory: bool) -> None:
    """Raises OutputError when path exists and not force, would replace what is no model, has no parent, or does not fit the disk.

    Only a model is replaced by force: a directory with a config.json, or a plain file; never a directory of anything else.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the directory {path.parent} does not exist; create it first")
    if path.exists():
        if not force:
            raise OutputError(f"{path}: exists already; choose another name or use --force to replace it")
        if path.is_dir() != directory or (directory and not (path / "config.json").is_file()):
            kind = "a directory without config.json" if path.is_dir() else "a file"
            need = "a model directory" if directory else "a file"
            raise OutputError(f"{path}: is {kind}, and --force replaces only {need}; choose another name")
    free = shutil.disk_usage(path.parent).free
    if free < need_bytes:
        raise OutputError(f"{path}: needs {need_bytes} bytes, the disk has {free} free; make room or choose another disk")


@contextmanager
def disk_errors(path: Path, need_bytes: int) -> Iterator[None]:
    """Turns an OSError while writing path into an OutputError; a full disk says how many bytes the whole output needs."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{path}: the disk is full; the output needs {need_bytes} bytes, make room or choose another disk") from error
        raise OutputError(f"{path}: cannot write: {error.strerror or error}") from error


def replace_directory(temporary: Path, path: Path) -> None:
    """Renames a finished directory to its final name; an old one is moved aside first and removed last."""
    if not path.exists():
        temporary.rename(path)
        return
    old = temporary_path(path)
    path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove(temporary: Path) -> None:
    """Removes a temporary file or directory, if it is still there."""
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with suppress(OSError):
            temporary.unlink()
