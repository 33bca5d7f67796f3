"""The one streaming loop: checkpoint -> method -> QuantizedTensor -> container, a slab of rows at a time.

Peak memory is one tensor as stored in the output plus a few slabs of float32, whatever the size of the model: rows of a
row-independent format are read, quantized and measured SLAB_BYTES at a time, and the pages read are given back to the system.
A format that needs the whole tensor (`int8_t`, `nf4_dq`) costs that tensor in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tersor.containers import open_checkpoint
from tersor.containers.container import Checkpoint, Container, Writer
from tersor.containers.gguf_split import stored_files
from tersor.containers.output import check_output
from tersor.errors import ContainerError, FormatError, ModelError, OutputError, RecipeError, unknown
from tersor.outputs import assigned, choose_container, container_name, described
from tersor.planning.budget import parse_budget
from tersor.recipe import CASTS, Choice, Recipe, is_edge
from tersor.slabs import keep_tensor, quantize_tensor
from tersor.targets import check_demands
from tersor.tensor import ActivationScheme, InputStatistics, ModelDescription, QuantizedTensor, TensorInfo
from tersor.threads import set_threads
from tersor.verification.record import DIRECTORY_NAME
from tersor.weighing import Weighed, check_served, matched, names_imatrix, pairs, uses_calibration

if TYPE_CHECKING:
    from tersor.calibrated import BlockReport
    from tersor.calibration.doctor import Examination
    from tersor.calibration.samples import Samples
    from tersor.calibration.work import Work
    from tersor.verification.record import Verification

DEVICES = ("cpu", "cuda")
GGUF_RECIPE = "rtn:q4_k|q5_0"
DIRECTORY_RECIPE = "clip:int4_g128s|int4_g64s|int4_g32s"  # symmetric: transformers loads no others (targets.py)
RECIPES = {  # of containers that hold other numbers
    "gguf": GGUF_RECIPE,
    "awq": "clip:int4_g64",  # one group size for all
    "bnb": "clip:nf4_dq|keep",
    "hqq": "hqq:int4_g64z|int4_g32z",
    "mlx": "clip:int4_g64m|int4_g32m",
}

Progress = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)


@dataclass(frozen=True)
class TensorResult:
    """What became of one tensor. error: relative RMS error of the stored weights, |w' - w| / |w| (Frobenius norms).

    output_error: likewise of the products with the calibration inputs, or None without calibration.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    format: str
    method: str
    nbytes: int
    error: float
    output_error: float | None = None

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight, scales and all other metadata of the tensor included."""
        return 8.0 * self.nbytes / prod(self.shape)


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` wrote. note: what the source was stored in, when that was not float, what a fold cost, and how many matrices an
    importance matrix says nothing of. calibration: what it was calibrated on. verification: None when it was not asked for."""

    path: str
    container: str
    recipe: str
    tensors: tuple[TensorResult, ...]
    file_bytes: int
    seconds: float
    note: str
    calibration: Mapping[str, Any] = field(default_factory=dict)
    verification: Verification | None = None

    @property
    def parameters(self) -> int:
        """Number of weights of all tensors."""
        return sum(prod(t.shape) for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """File bits per weight of the whole model: embedding, norms, metadata and tokenizer included."""
        return 8.0 * self.file_bytes / self.parameters

    @property
    def block_bits_per_weight(self) -> float:
        """True bits per weight of the matrices of the blocks, which is what a recipe's format promises."""
        blocks = [t for t in self.tensors if len(t.shape) > 1 and not is_edge(t.name)] or list(self.tensors)
        return 8.0 * sum(t.nbytes for t in blocks) / sum(prod(t.shape) for t in blocks)

    @property
    def error(self) -> float:
        """Relative RMS error of the matrices of the blocks: root of the mean of the tensors' squared errors, weighted by size."""
        blocks = [t for t in self.tensors if len(t.shape) > 1 and not is_edge(t.name)] or list(self.tensors)
        return sqrt(sum(t.error**2 * prod(t.shape) for t in blocks) / sum(prod(t.shape) for t in blocks))

    @property
    def output_error(self) -> float | None:
        """Relative RMS error of the products with the calibration inputs, weighted by size like `error`; None without calibration."""
        known = [(t.output_error, prod(t.shape)) for t in self.tensors if t.output_error is not None]
        return sqrt(sum(e**2 * n for e, n in known) / sum(n for _, n in known)) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        tensors = [asdict(t) | {"bits_per_weight": t.bits_per_weight} for t in self.tensors]
        derived = ("parameters", "bits_per_weight", "block_bits_per_weight", "error", "output_error")
        return asdict(self) | {name: getattr(self, name) for name in derived} | {"tensors": tensors}


def quantize(
    model: str | Path | Checkpoint,
    out: str | Path,
    recipe: str | Recipe | None = None,
    *,
    to: str | None = None,
    budget: int | str | None = None,
    calib: str | Path | None = None,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    activations: str | None = None,
    max_ram: int | None = None,
    resume: bool = False,
    device: str = "cpu",
    force: bool = False,
    threads: int | None = None,
    verify: bool = True,
    progress: Progress | None = None,
    report: Callable[[BlockReport | Examination], None] | None = None,
) -> QuantizeResult:
    """Writes the model with every tensor in the format that the recipe names, and returns what was written.

    model: a Hugging Face directory, a .gguf file, a hub id, or an opened Checkpoint; one that is quantized already is
        dequantized first, which `note` of the result says.
    recipe: see recipe.py; None: 4 bits, as RECIPES or DIRECTORY_RECIPE say.
    to: a name of CONTAINERS, or of an engine (TARGETS) whose demands the plan has to meet; without it a name that ends in .gguf gives
        GGUF, any other a directory (compressed-tensors, or huggingface when nothing is quantized).
    budget: what the whole output may take: bytes, `3.5GiB`, or `4.25bpw` (bits per weight). The recipe then names steps alone (None: clip),
        and every matrix gets the format with which the least divergence from the model is predicted (planning/budget.py); needs calib.
    calib: what to calibrate on, as calibration/samples.py says: a text file, JSONL, tokens, `pydoc`, `self`, `hub:NAME`; None: nothing.
        samples, seqlen: so many sequences of so many tokens, drawn by seed. Or llama.cpp's importance matrix, GGUF or .dat: then nothing
        is run, samples, seqlen and seed say nothing, and methods that need more than mean squares are refused (weighing.py).
    activations: what the file says about rounding inputs to 8 bits when it runs. None: nothing; `token`: one scale a token, from itself;
        an observer's name (minmax, percentile, mse, entropy): static scales, from the inputs that the quantized model shows on the
        calibration tokens. Only compressed-tensors can say it.
    max_ram: bytes of resident memory that a calibrated run keeps within, or is refused. resume: go on with an interrupted run.
    device: cpu or cuda, which runs the blocks by torch; so are, on any device, those of architectures that only transformers knows.
    force: replace an existing output, and go on with calibration data that the doctor refuses.
    threads: of all native loops of this process from now on.
    verify: open the output again, with a reader that is not ours where there is one, compare every value with what was to be written,
        and leave verification.json beside it (verification/verify.py; not the logits). What is wrong is in the result, not raised.
    progress: called with (what is being done, steps done, steps in all), at the beginning of each thing too.
    report: called with what the doctor finds before a calibrated run (calibration/doctor.py), and after every block.
    Everything that can be checked is checked before the first byte is written; nothing is left behind under the final name on an error.
    Raises RecipeError, FormatError, ContainerError, ModelError (NaN or infinite weights, with tensor and position) and OutputError.
    """
    start = time.perf_counter()
    target = Path(out)
    if budget is None:
        parsed = Recipe.parse(RECIPES.get(container_name(target, to), DIRECTORY_RECIPE) if recipe is None else recipe)
    else:
        parsed = _frame(recipe, container_name(target, to), calib, activations)
    _check_calibration(parsed, calib, max_ram, resume, activations, device)
    if device not in DEVICES:
        raise RecipeError(unknown("device", device, DEVICES))
    set_threads(threads)
    opened = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    try:
        _check_not_source(target, opened.path)
        checkpoint = view(opened, parsed)
        container = choose_container(target, parsed, to)
        if budget is None:
            choices, plan = assigned(checkpoint, container, parsed)
            check_demands(to, plan)
        matrix, drawn, lacking = None, None, ""
        importance: Mapping[str, InputStatistics] = {}
        if calib is not None and names_imatrix(calib):
            from tersor.calibration.imatrix import read_imatrix

            shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
            matrix = read_imatrix(Path(calib), checkpoint.description.config.get("model_type", ""), shapes)
            importance, lacking = matched(matrix, parsed, choices, plan, force)
        elif calib is not None:
            drawn = draw(checkpoint, calib, samples, seqlen, seed, progress)
        if budget is not None and drawn is not None:
            from tersor.fitting import fit

            nbytes = parse_budget(budget, sum(prod(info.shape) for info in checkpoint.tensors.values()))
            parsed = fit(checkpoint, container, to, target, parsed, nbytes, drawn, max_ram, progress).recipe
            choices, plan = assigned(checkpoint, container, parsed)
            check_demands(to, plan)
        learned = matrix or drawn
        description = described(checkpoint.description, plan, parsed, learned)
        with _calibrated(
            checkpoint, parsed, choices, plan, drawn, target, container, max_ram, resume, device, force, progress, report
        ) as work:
            if activations is not None:
                description = replace(description, activations=_scheme(activations, checkpoint, container, drawn, work))
            meant: dict[str, str] | None = {} if verify else None
            results = _write(checkpoint, container, target, description, plan, choices, importance, work, force, progress, meant)
    finally:
        if opened is not model:
            opened.close()
    size = file_bytes(target)
    verification = _verified(target, meant, max_ram, progress)
    return QuantizeResult(
        str(target),
        container.name,
        str(parsed),
        tuple(results),
        size,
        time.perf_counter() - start,
        "; ".join(filter(None, (source_note(opened.tensors), checkpoint.note, lacking))),
        {} if learned is None else learned.provenance,
        verification,
    )


def _frame(recipe: str | Recipe | None, container: str, calib: str | Path | None, activations: str | None) -> Recipe:
    """Returns what a budget leaves open. Raises RecipeError for what a budget cannot go with."""
    from tersor.fitting import frame_of

    if calib is None:
        raise RecipeError("--budget judges formats by what they cost on text; give --calib FILE, --calib pydoc or --calib self")
    if names_imatrix(calib):
        raise RecipeError(f"--budget judges formats by their cost on text, and {calib} is an importance matrix; give a text, pydoc or self")
    if activations is not None:
        raise RecipeError("--budget does not count the scales of --activations; choose the formats by --recipe")
    return frame_of(None if recipe is None else str(recipe), container)


def view(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """Returns the checkpoint as the recipe's whole-model folds show it."""
    for step in recipe.before:
        if step.method.stage == "view":
            checkpoint = step.method.run(checkpoint, step.options)
    return checkpoint


def draw(checkpoint: Checkpoint, calib: str | Path, samples: int, seqlen: int, seed: int, progress: Progress | None = None) -> Samples:
    """Returns the calibration tokens. Raises RecipeError and ModelError as read_samples does."""
    from tersor.calibration.generation import generator
    from tersor.calibration.samples import read_samples
    from tersor.engine import load
    from tersor.engine.tokenizer import Tokenizer
    from tersor.models import ARCHITECTURES, spec_of

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress("write calibration text", done, total)

    config = checkpoint.description.config
    tokenizer = None if str(calib).endswith(".npy") else Tokenizer(checkpoint.description)
    return read_samples(
        calib,
        tokenizer,
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        generate=generator(load(checkpoint), told) if calib == "self" else None,
        vocab_size=config.get("vocab_size"),
        context=spec_of(config).context if config.get("model_type") in ARCHITECTURES else config.get("max_position_embeddings"),
    )


def _check_calibration(
    recipe: Recipe, calib: str | Path | None, max_ram: int | None, resume: bool, activations: str | None, device: str
) -> None:
    """Raises RecipeError when the recipe or the inputs' scales need calibration and there is none, or have no use for it."""
    static = activations is not None and activations != "token"
    if static:
        from tersor.calibration.observers import OBSERVERS  # only here: it brings the engine, half a second for a run without

        if activations not in OBSERVERS:
            raise RecipeError(unknown("activations", str(activations), ("token", *OBSERVERS)))
    needing = [step for step in recipe.steps if step.method.needs != "nothing"]
    needing += [step for step, format in pairs(recipe) if step.method.needs_for(format)]
    by_matrix = names_imatrix(calib)
    if by_matrix and calib is not None:
        check_served(recipe, calib)
        if static:
            raise RecipeError(
                f"--activations {activations} needs the inputs, and {calib} has their mean squares; give a text, pydoc or self"
            )
    if calib is None and needing:
        raise RecipeError(f"{needing[0]} needs calibration data; give --calib FILE, --calib pydoc or --calib self")
    if calib is None and static:
        raise RecipeError(f"--activations {activations} needs calibration data; give --calib FILE, --calib pydoc or --calib self")
    for option, given in (("--max-ram", max_ram is not None), ("--resume", resume), (f"--device {device}", device == "cuda")):
        if given and (calib is None or by_matrix):
            without = "by an importance matrix" if by_matrix else "without calibration"
            raise RecipeError(f"{option} is for calibrated runs (--calib); {without} a run keeps one tensor in memory")
    if calib is not None and not static and not uses_calibration(recipe):
        raise RecipeError(f"{recipe} has no use for calibration data; use clip or gptq, or leave --calib out")


def _scheme(activations: str, checkpoint: Checkpoint, container: Container, samples: Samples | None, work: Work | None) -> ActivationScheme:
    """Returns how the file wants inputs rounded. Raises ContainerError when the container cannot say it."""
    from tersor.calibration.input_scales import input_scales
    from tersor.models import spec_of

    if container.name != "compressed-tensors":
        raise ContainerError(f"{container.name} cannot say how inputs are rounded (--activations); use --to compressed-tensors")
    if activations == "token" or samples is None:
        return ActivationScheme()

    def read(name: str) -> QuantizedTensor:
        return work.read(name).tensor if work is not None and name in work else checkpoint.read(name)

    return ActivationScheme(input_scales(spec_of(checkpoint.description.config), read, samples.tokens, activations))


@contextmanager
def _calibrated(
    checkpoint: Checkpoint,
    recipe: Recipe,
    choices: Mapping[str, Choice],
    plan: Sequence[TensorInfo],
    samples: Samples | None,
    target: Path,
    container: Container,
    max_ram: int | None,
    resume: bool,
    device: str,
    force: bool,
    progress: Progress | None,
    report: Callable[[BlockReport | Examination], None] | None,
) -> Iterator[Work | None]:
    """Gives what calibration made, None without samples; its folder is removed when the output is whole."""
    if samples is None:
        yield None
        return
    from tersor.calibrated import Calibrator, run_of
    from tersor.calibrated_torch import TorchCalibrator
    from tersor.calibration.work import Work
    from tersor.models import ARCHITECTURES

    need = sum(info.nbytes for info in plan)
    check_output(target, need, force=force, directory=container.suffix == "")
    folder = target.with_name(target.name + ".work")
    run = run_of(recipe, samples.provenance, checkpoint.path, container.name)
    own = checkpoint.description.config.get("model_type") in ARCHITECTURES and device == "cpu"
    calibrator = (
        Calibrator(checkpoint, recipe, choices, plan, samples.tokens, max_ram, force, report, progress)
        if own
        else TorchCalibrator(checkpoint, recipe, choices, plan, samples.tokens, max_ram, device, force, report, progress)
    )
    work = Work(folder, run, resume)
    try:
        if work.done == 0:
            examination = calibrator.examine(samples, folder / "doctor")
            if report is not None:
                report(examination)
            examination.refuse(force)
        calibrator.run(work)
        yield work
    except (FormatError, ModelError, RecipeError):
        work.remove()  # the same would be refused again
        raise
    except BaseException:
        with suppress(OutputError):  # what is done is kept if it can be
            work.settle()
        if not work.holds:
            work.remove()
        raise
    work.remove()


def source_note(tensors: Mapping[str, TensorInfo]) -> str:
    """Returns a sentence on formats that the source itself is quantized in; empty when it is float."""
    counts: dict[str, int] = {}
    for info in tensors.values():
        if info.format not in CASTS:
            counts[info.format] = counts.get(info.format, 0) + 1
    if not counts:
        return ""
    formats = ", ".join(f"{name} ({n} tensor{'s' * (n > 1)})" for name, n in sorted(counts.items(), key=lambda item: -item[1]))
    return f"the source is itself stored in {formats}: errors are against its dequantized weights, and its own grids are flattered"


def file_bytes(path: Path) -> int:
    """Returns the bytes of a file, of all parts of a split one, or of all files of a directory but its verification."""
    if path.is_file():
        return sum(part.stat().st_size for part in stored_files(path))
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and f.name != DIRECTORY_NAME)


def _write(
    checkpoint: Checkpoint,
    container: Container,
    target: Path,
    description: ModelDescription,
    plan: Sequence[TensorInfo],
    choices: Mapping[str, Choice],
    importance: Mapping[str, InputStatistics],
    work: Work | None,
    force: bool,
    progress: Progress | None,
    meant: dict[str, str] | None,
) -> list[TensorResult]:
    """Writes every tensor, and returns what became of each; meant gets the digests of their values. importance: of an importance matrix."""
    what, total, done = "quantize" if work is None else "write", sum(prod(info.shape) for info in plan), 0
    results = []
    if progress is not None:
        progress(what, 0, total)
    with container.create(target, description, plan, force=force) as writer:
        for info in plan:
            source = checkpoint.tensors[info.name]

            def report(weights: int) -> None:
                nonlocal done
                done += weights
                if progress is not None:
                    progress(what, done, total)

            choice = choices[info.name]
            if work is not None and info.name in work:
                made = work.read(info.name)
                _note(meant, info.name, made.tensor, writer)
                writer.write(info.name, made.tensor)
                results.append(
                    TensorResult(
                        info.name, info.shape, source.format, info.format, made.method, made.tensor.nbytes, made.error, made.output_error
                    )
                )
                report(prod(info.shape))
                continue
            weighed = Weighed(choice.step, importance[info.name]) if info.name in importance else None
            if source.format == info.format and (choice.is_cast or source.format in CASTS):
                tensor, error = keep_tensor(checkpoint, info, report), 0.0
            else:
                tensor, error = quantize_tensor(checkpoint, source, info.format, weighed.step if weighed else choice.step, report)
            method = (
                choice.method if info.format not in CASTS and not choice.is_cast else "keep" if source.format == info.format else "cast"
            )
            _note(meant, info.name, tensor, writer)
            writer.write(info.name, tensor)
            checkpoint.release()
            products = weighed.output_error if weighed else None
            results.append(TensorResult(info.name, info.shape, source.format, info.format, method, tensor.nbytes, error, products))
    return results


def _note(meant: dict[str, str] | None, name: str, tensor: QuantizedTensor, writer: Writer) -> None:
    if meant is not None:
        from tersor.verification.digests import values_digest

        meant[name] = values_digest(writer.kept(name, tensor))


def _verified(target: Path, meant: Mapping[str, str] | None, max_ram: int | None, progress: Progress | None) -> Verification | None:
    from tersor.verification.record import drop_proof
    from tersor.verification.verify import verify

    if meant is None:
        drop_proof(target)
        return None
    return verify(target, meant=meant, logits=False, max_ram=max_ram, progress=progress)


def _check_not_source(out: Path, source: Path) -> None:
    if out.resolve() == source.resolve():
        raise OutputError(f"{out} is the model itself; choose another name for the output")
