"""What a calibrated run has done so far, on disk: so that a run that was killed goes on where it was, to the same bytes.

run.json            what the run is: recipe, samples, source; another run does not go on from it
block-7.safetensors what became of the tensors of block 7, renamed to this name when whole: from then on block 7 is done
float-8, quantized-8  hidden states before block 8, of the unquantized model (if needed) and of the quantized one
guide-8.safetensors   what was measured of block 8 before any was rounded (if needed; guides.py)

States that memory has room for are kept there too, and a block goes to disk while the next one is being made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.calibration.blocks import Rows, sync
from tersor.containers.output import disk_errors
from tersor.errors import OutputError
from tersor.tensor import QuantizedTensor

DERIVED = ("sha256", "tokens")  # of a calibration, from its other parts


@dataclass(frozen=True)
class Made:
    """One tensor as it will be stored, and what is said of it. error: relative RMS error of the weights; output_error: of their product
    with the calibration inputs, or None where there were none."""

    tensor: QuantizedTensor
    method: str
    error: float
    output_error: float | None


class Work:
    """The folder of one run."""

    def __init__(self, folder: Path, run: Mapping[str, Any], resume: bool) -> None:
        """Begins a run or, with resume, goes on with the one that lies in the folder. run: what identifies it, as JSON values.

        `kept` may be set to the number of rows of all hidden states, which are then kept in memory.

        Raises OutputError when there is a run and not resume, or nothing or another run to resume.
        """
        self.folder = folder
        known = folder / "run.json"
        if known.exists() and not resume:
            raise OutputError(f"{folder} holds an interrupted run; go on with --resume, or remove the folder to begin anew")
        if resume:
            _check_same(known, run)
        with disk_errors(folder, 0):
            folder.mkdir(parents=True, exist_ok=True)
            if not known.exists():
                write_whole(known, json.dumps(run, indent=1, sort_keys=True).encode())
        self.kept = 0
        self._live: dict[str, Rows] = {}  # by name: what memory keeps
        self._saving: Future[None] | None = None
        self._saver = ThreadPoolExecutor(1)
        self._places: dict[str, Path] = {}
        self.done = 0
        while (path := self._block(self.done)).exists():
            self._add(path)
            self.done += 1

    def _block(self, index: int) -> Path:
        return self.folder / f"block-{index}.safetensors"

    def _add(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(str(path), "numpy") as file:
            self._places.update(dict.fromkeys(json.loads(file.metadata()["tensors"]), path))

    def states(self, stream: str, index: int, width: int) -> Rows:
        """Returns the hidden states before block `index`. stream: `float` or `quantized`; `aside` for states that nobody goes on from."""
        return self._rows(f"{stream}-{index}", width)

    def guide(self, index: int) -> Path:
        """Returns the file of what was measured of block `index` before any was rounded (guides.py)."""
        return self.folder / f"guide-{index}.safetensors"

    def scratch(self, stream: str) -> Callable[[str, int], Rows]:
        """Returns what gives (name, width) rows for what a walk of this stream writes between groups."""
        return lambda name, width: self._rows(f"between-{stream}-{name}", width)

    def _rows(self, name: str, width: int) -> Rows:
        if not self.kept:
            return Rows(self.folder / name, width)
        if name not in self._live:
            self._live[name] = Rows(self.folder / name, width, self.kept)
        return self._live[name]

    def save(self, made: Mapping[str, Made]) -> None:
        """Stores the next block's tensors; when it is on disk, the states before it are removed. States must be complete.

        It goes there while the caller goes on; what fails is raised by the next call, or by `settle`."""
        from safetensors.numpy import save

        self.settle()
        index = self.done
        arrays = {f"{name}|{field}": array for name, m in made.items() for field, array in m.tensor.fields.items()}
        about = {
            name: {
                "format": m.tensor.format,
                "shape": m.tensor.shape,
                "method": m.method,
                "error": m.error,
                "output_error": m.output_error,
            }
            for name, m in made.items()
        }
        after = [f"{stream}-{index + 1}" for stream in ("float", "quantized")]

        def to_disk() -> None:
            with disk_errors(self.folder, sum(array.nbytes for array in arrays.values())):
                for name in after:
                    if name in self._live:
                        self._live[name].store()
                    elif (self.folder / name).exists():
                        sync(self.folder / name)
                write_whole(self._block(index), save(arrays, {"tensors": json.dumps(about)}))
                self.drop(index)

        self._places.update(dict.fromkeys(made, self._block(index)))
        self.done += 1
        self._saving = self._saver.submit(to_disk)

    def drop(self, index: int) -> None:
        """Removes the states before block `index`, and what was measured of it."""
        for stream in ("float", "quantized"):
            self._live.pop(f"{stream}-{index}", None)
            (self.folder / f"{stream}-{index}").unlink(missing_ok=True)
        self.guide(index).unlink(missing_ok=True)

    def settle(self) -> None:
        """Waits until what was saved is on disk. Raises OutputError when it does not get there."""
        if self._saving is not None:
            wait([self._saving])  # who is interrupted here may wait again
            saving, self._saving = self._saving, None
            saving.result()

    @property
    def holds(self) -> bool:
        """Whether a block is on disk, or what was measured of all, so that there is something to go on from."""
        return self._block(0).exists() or self.guide(0).exists()

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def read(self, name: str) -> Made:
        """Returns what became of a tensor."""
        from safetensors import safe_open

        self.settle()
        with safe_open(str(self._places[name]), "numpy") as file:
            about = json.loads(file.metadata()["tensors"])[name]
            fields = {key.partition("|")[2]: file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}|")}  # noqa: SIM118
        tensor = QuantizedTensor(about["format"], tuple(about["shape"]), fields)
        return Made(tensor, about["method"], about["error"], about["output_error"])

    def remove(self) -> None:
        """Removes the folder."""
        self._saver.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


def _check_same(known: Path, run: Mapping[str, Any]) -> None:
    """Raises OutputError unless the run that lies there is this one."""
    try:
        before = json.loads(known.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise OutputError(f"{known.parent}: there is no run to resume; start it without --resume") from None
    differing = sorted(key for key in before.keys() | run.keys() if before.get(key) != json.loads(json.dumps(run.get(key))))
    if differing:
        key = differing[0]
        was, now = before.get(key), run.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            part = next(part for part in sorted(was.keys() | now.keys(), key=DERIVED.__contains__) if was.get(part) != now.get(part))
            key, was, now = f"{key}'s {part}", was.get(part), now.get(part)
        raise OutputError(f"{known.parent} holds another run, whose {key} was {was}, not {now}; repeat its command or remove it")


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name and renames it when it is on disk."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    sync(part)
    part.rename(path)
