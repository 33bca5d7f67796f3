"""A file mapped into memory, read through bounds-checked views whose pages can be given back."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tersor.errors import ContainerError
from tersor.tensor import Array


class MappedFile:
    """A read-only mapping of a whole file. Views stay valid after `close`: the mapping lives as long as its last view.

    A file that somebody else truncates while it is mapped kills the process (SIGBUS), as with every mmap reader.
    """

    def __init__(self, path: Path) -> None:
        """Maps the file. Raises ContainerError when it is missing, empty or unreadable."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size == 0:
                    raise ContainerError(f"{path}: the file is empty; copy or download it again")
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ContainerError(f"{path}: cannot read: {error.strerror or error}") from error

    def view(self, offset: int, dtype: npt.DTypeLike, count: int) -> Array:
        """Returns `count` items at `offset` bytes, read-only, (count,). A copy only when the offset is not aligned for dtype.

        The caller has checked that the range lies in the file.
        """
        kind = np.dtype(dtype)
        assert self._map is not None, "the file is closed"
        assert offset >= 0 and offset + count * kind.itemsize <= self.size
        flat = np.frombuffer(self._map, dtype=kind, count=count, offset=offset)
        if not flat.flags.aligned:
            flat = flat.copy()
            flat.flags.writeable = False
        return flat

    def read(self, offset: int, count: int) -> bytes:
        """Returns `count` bytes at `offset`."""
        assert self._map is not None, "the file is closed"
        return self._map[offset : offset + count]

    def release(self) -> None:
        """Tells the system that the pages read so far are not needed; they come back from the file when touched again."""
        if self._map is not None and hasattr(self._map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Drops the mapping; the system unmaps it when the last view is gone."""
        self._map = None
