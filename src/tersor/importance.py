"""An importance matrix as llama-imatrix makes it, by the walk of a calibrated run: mean squares of the inputs of every matrix of the
unrounded model, on calibration text, as a file that llama-quantize --imatrix and `quantize --calib` read.

Like llama-imatrix, without the head unless asked for it; a tied head is then measured too, as token_embd.weight, under which name
llama-quantize looks. Source: ggml-org/llama.cpp tools/imatrix/imatrix.cpp (collect_imatrix).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tersor.calibrated import Calibrator, as_float
from tersor.calibration.imatrix import write_imatrix
from tersor.calibration.statistics import check_statistics
from tersor.calibration.work import Made, Work
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.containers.gguf_names import architecture_of
from tersor.containers.output import check_output
from tersor.errors import RecipeError
from tersor.outputs import assigned
from tersor.pipeline import draw
from tersor.recipe import Recipe
from tersor.tensor import Array, InputStatistics
from tersor.threads import set_threads
from tersor.weighing import names_imatrix

Progress = Callable[[str, int, int], None]  # as pipeline.Progress


@dataclass(frozen=True)
class ImatrixResult:
    """What `imatrix` wrote. entries: matrices, each with the mean squares of its inputs on `tokens` tokens."""

    path: str
    entries: int
    tokens: int
    file_bytes: int
    seconds: float
    calibration: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        return asdict(self)


def imatrix(
    model: str | Path | Checkpoint,
    out: str | Path,
    calib: str | Path,
    *,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    head: bool = False,
    max_ram: int | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ImatrixResult:
    """Writes out, the model's importance matrix in GGUF, and returns what was written.

    calib, samples, seqlen, seed: as of `quantize`. head: measure the head's input too. max_ram: bytes of resident memory that the run
    keeps within, or is refused. threads, progress: as of `quantize`.
    Raises RecipeError, ModelError (a model that is not one of tersor's own, inputs that are not finite), ContainerError for an architecture
    that GGUF has no names for, OutputError. Nothing is left behind on an error.
    """
    start, target = time.perf_counter(), Path(out)
    if names_imatrix(calib):
        raise RecipeError(f"{calib} is an importance matrix already; give --calib a text, pydoc or self to measure on")
    set_threads(threads)
    opened = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    try:
        model_type = opened.description.config.get("model_type", "")
        architecture_of(str(opened.path), model_type)
        check_output(target, 0, force=force, directory=False)
        drawn = draw(opened, calib, samples, seqlen, seed, progress)
        statistics = measured(opened, drawn.tokens, target.with_name(target.name + ".states"), head, max_ram, progress)
        write_imatrix(target, statistics, model_type, drawn.provenance, force=force)
    finally:
        if opened is not model:
            opened.close()
    size = target.stat().st_size
    return ImatrixResult(str(target), len(statistics), drawn.tokens.size, size, time.perf_counter() - start, drawn.provenance)


def measured(
    checkpoint: Checkpoint,
    tokens: Array,
    folder: Path,
    head: bool = False,
    max_ram: int | None = None,
    progress: Progress | None = None,
) -> dict[str, InputStatistics]:
    """Returns statistics of the inputs of every matrix of the blocks by name, of the head's too if asked for, the model running in float32.

    tokens: (sequences, length) int32. folder: for hidden states that are too many for memory; it is removed.
    Raises ModelError, naming the first matrix, for inputs that are not finite.
    """
    recipe = Recipe.parse("f32")
    choices, plan = assigned(checkpoint, CONTAINERS["huggingface"], recipe)

    def told(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress("measure inputs", done, total)

    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
    return _Measurer(checkpoint, recipe, choices, plan, tokens, max_ram, progress=told).measure(folder, head)


class _Measurer(Calibrator):
    """A calibrated run that rounds nothing and keeps what it sees."""

    def measure(self, folder: Path, head: bool) -> dict[str, InputStatistics]:
        """Returns the statistics of one run."""
        self._seen: dict[str, InputStatistics] = {}
        work = Work(folder, {}, resume=False)
        try:
            self._begin(work)
            work.kept = self._tokens.size if self._room.keeps else 0
            self._embed()
            for index in range(len(self._spec.layers)):
                self._block(index)
                work.drop(index)
                self._checkpoint.release()
            if head:
                self._seen[self._head_name] = self._head_statistics()
                check_statistics(self._seen[self._head_name], self._head_name, rounded=False)
        finally:
            work.remove()
        return self._seen

    def _round_group(self, weights: Mapping[str, Array], statistics: InputStatistics) -> dict[str, Made]:
        self._seen |= dict.fromkeys(weights, statistics)
        return {name: Made(as_float(w), "keep", 0.0, None) for name, w in weights.items()}
