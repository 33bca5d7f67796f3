"""The streaming loop with calibration: block by block, the inputs of each linear layer are looked at before it is rounded.

    methods that are guided: one pass forward and backward through the unquantized model tells what errors cost it (calibration/guides.py)
    states = embedding of the calibration tokens
    each block:  its weights as float32, folded where the recipe folds
                 each group of linear layers that share an input, in the order they run:
                     statistics of the inputs, which the already rounded part of the model has produced
                     round each weight; put the decoded one in its place; go on through the block
                 tune what stays float;  the block's tensors, and the states after it, go to disk

True sequential order: an error that an earlier layer makes is seen, and may be made good, by all later ones (GPTQ, arXiv 2210.17323,
section 3.3). Memory holds one block, one Gram matrix (of guided methods one for each layer of a group) and one batch of sequences;
all else lies in files, hidden states too unless they are few (calibration/work.py, memory.py).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from tersor import _native, ops
from tersor.calibration.blocks import DecoderWalk, Rows
from tersor.calibration.doctor import Examination, examine
from tersor.calibration.guides import Guide, Guides, measure_guides, workspace
from tersor.calibration.memory import Room, plan_room
from tersor.calibration.samples import Samples
from tersor.calibration.statistics import StatisticsBuilder, check_statistics, panels
from tersor.calibration.work import Made, Work
from tersor.containers.container import Checkpoint
from tersor.errors import FormatError, ModelError, RecipeError
from tersor.formats import get_format
from tersor.memory import resident_bytes
from tersor.methods import Step
from tersor.methods.clip import clip
from tersor.models import DecoderSpec, check_tensors, expected_tensors, spec_of
from tersor.models.folding import apply_scale, layer_folds
from tersor.models.layer import has_bias, read_vectors
from tersor.models.spec import GROUPS
from tersor.recipe import CASTS, Choice, Recipe, is_edge
from tersor.slabs import FLOAT16_MAX, dequantize, quantize_tensor
from tersor.tensor import Array, InputStatistics, QuantizedTensor, TensorInfo
from tersor.threads import blas_alone, each

EXAMINED = 16  # samples that the doctor runs the layers on at most; fewer of a short run, whose price it would double else
EXAMINED_LEAST, EXAMINED_SHARE = 4, 8  # at least so many, and one of so many
EXAMINED_TOKENS = 256  # of each of them, its first: half the price of a sample, and its importance is told as well (doctor.py)

Progress = Callable[[str, int, int], None]  # as pipeline.Progress


@dataclass(frozen=True)
class BlockReport:
    """What is told after each block. errors: relative RMS error of each linear layer's output on the calibration inputs."""

    index: int
    blocks: int
    errors: Mapping[str, float]
    trained: tuple[float, float] | None  # held-out loss before and after training, where there was any
    seconds: float
    seconds_left: float
    resident: int  # bytes of this process

    def __str__(self) -> str:
        errors = " ".join(f"{name.split('.')[-2].removesuffix('_proj')} {100 * error:.2g}" for name, error in self.errors.items())
        where = f"block {self.index + 1} of {self.blocks}: output error in % {errors}"
        if self.trained is not None:
            where += "; trained: held-out error {:.3g} -> {:.3g}".format(*self.trained)
        return f"{where}; {self.seconds:.1f} s, {self.seconds_left:.0f} s left, {self.resident / 2**20:.0f} MiB"


class Calibrator:
    """One calibrated run over a model that tersor's own decoder describes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        choices: Mapping[str, Choice],
        plan: Sequence[TensorInfo],
        tokens: Array,
        max_ram: int | None = None,
        force: bool = False,
        report: Callable[[Any], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """tokens: (sequences, length) int32. plan: every tensor as it will be stored. force: layers that calibration never reaches
        are rounded without it, instead of refused.

        Raises ModelError for a model that is not one of tersor's own, RecipeError when max_ram bytes are too few.
        """
        self._keep(checkpoint, recipe, choices, plan, tokens, force, report, progress)
        self._spec: DecoderSpec = spec_of(checkpoint.description.config)
        check_tensors(self._spec, checkpoint.tensors, str(checkpoint.path))
        self._compares = any(step.method.compares(step.options) for step in recipe.steps)
        self._guided = {name for name in self._weights if choices[name].step.method.guided(choices[name].step.options)}
        self._room = self._plan_room(max_ram)

    def _keep(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        choices: Mapping[str, Choice],
        plan: Sequence[TensorInfo],
        tokens: Array,
        force: bool,
        report: Callable[[Any], None] | None,
        progress: Progress | None,
    ) -> None:
        """Keeps what rounding needs, whatever runs the blocks."""
        self._checkpoint, self._recipe, self._choices = checkpoint, recipe, choices
        self._plan = {info.name: info for info in plan}
        self._tokens, self._force = tokens, force
        self._report, self._progress = report, progress
        self._trained: tuple[float, float] | None = None
        self._weights = {info.name: prod(info.shape) for info in plan if len(info.shape) == 2 and not is_edge(info.name)}
        self._weights_done = 0

    def examine(self, samples: Samples, folder: Path) -> Examination:
        """Returns what the doctor says of the samples, after a look at every layer's inputs on some of them.

        The model runs in 6 bits for it, where its shapes allow that. folder: for what lies between the layers.
        """
        n = len(self._tokens)
        chosen = np.linspace(0, n - 1, min(n, EXAMINED, max(EXAMINED_LEAST, n // EXAMINED_SHARE))).astype(int)
        all_tokens, self._tokens = self._tokens, np.ascontiguousarray(self._tokens[chosen, :EXAMINED_TOKENS])
        looked_at = self._tokens.shape
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed here
        self._work = Work(folder, {}, resume=False)
        self._work.kept = self._tokens.size if self._room.keeps else 0
        halves: list[tuple[str, InputStatistics, InputStatistics]] = []
        try:
            self._embed()
            for index in range(len(self._spec.layers)):
                weights = self._read_block(index)
                walk = self._walk(index, weights, "quantized", activations="int8")
                for group in walk.groups:
                    half = self._halves(walk, weights[group[0]].shape[1])
                    if self._rounds(group) or not all(np.isfinite(h.mean_square).all() for h in half):
                        halves.append((group[0].removesuffix(".weight"), *half))
                    walk.advance([_in_few_bits(weights[name]) for name in group])
                self._work.drop(index)
                self._checkpoint.release()
        finally:
            self._tokens = all_tokens
            self._work.remove()
        hessian = any(step.method.needs == "gram" for step in self._recipe.steps)
        return examine(samples, self._spec.vocab_size, halves, examined=looked_at, hessian=hessian)

    def _rounds(self, group: Sequence[str]) -> bool:
        """Returns whether any of the weights is rounded to a grid."""
        return any(not self._choices[name].is_cast for name in group)

    def _halves(self, walk: DecoderWalk, columns: int) -> tuple[InputStatistics, InputStatistics]:
        """Returns statistics of the current inputs over the first and over the second half of the sequences."""
        builders, length, at = (StatisticsBuilder(columns), StatisticsBuilder(columns)), self._tokens.shape[1], 0
        middle = (len(self._tokens) + 1) // 2 * length
        for x in walk.inputs():
            first = max(0, min(len(x), middle - at))
            builders[0].add(x[:first])
            builders[1].add(x[first:])
            at += len(x)
        return builders[0].result(), builders[1].result()

    def run(self, work: Work) -> None:
        """Makes every tensor of the blocks, and the head if its method asks for statistics, into work."""
        self._begin(work)
        work.kept = self._tokens.size if self._room.keeps else 0
        if self._guided:
            shape, batch = self._tokens.shape, self._room.sequences
            measure_guides(self._checkpoint, self._spec, self._guided, self._embed_float, work, shape, batch, partial(self._told, "fisher"))
        blocks, begun, first = len(self._spec.layers), time.perf_counter(), self._work.done
        if first == 0:
            self._embed()
        for index in range(first, blocks):
            start = time.perf_counter()
            made = self._block(index)
            self._work.save(made)
            self._checkpoint.release()
            now = time.perf_counter()
            if self._report is not None:
                errors = {name: m.output_error for name, m in made.items() if m.output_error is not None}
                left = (now - begun) / (index + 1 - first) * (blocks - index - 1)
                self._report(BlockReport(index, blocks, errors, self._trained, now - start, left, resident_bytes()))
        for extra in self._extras()[self._work.done - blocks :]:
            self._work.save(extra())

    def _plan_room(self, max_ram: int | None) -> Room:
        """Returns the batches of this run. Raises RecipeError when they do not fit."""
        names = [f"model.layers.0.{part}.weight" for group in GROUPS for part in group]
        layers = range(len(self._spec.layers))
        methods = {name: [self._choices[name.replace(".0.", f".{i}.", 1)].step.method for i in layers] for name in names}
        scaled = any(step.method.needs == "gram" for step in self._recipe.before)
        wanted = {name: scaled or any(method.needs == "gram" for method in of_layers) for name, of_layers in methods.items()}
        return plan_room(
            self._spec,
            self._tokens.shape,
            workspaces={name: max(m.workspace(*self._plan[name].shape) for m in of_layers) for name, of_layers in methods.items()},
            grams={name: int(gram) * (1 + self._compares) for name, gram in wanted.items()},
            streams=1 + self._compares,
            before=workspace(self._spec, self._tokens.shape[1]) if self._guided else (0, 0),
            guided={name for name in names if any(other.endswith(name.removeprefix("model.layers.0.")) for other in self._guided)},
            max_ram=max_ram,
        )

    def _extras(self) -> list[Callable[[], dict[str, Made]]]:
        """Returns what is to be done after the blocks, in order."""
        head = self._choices[self._head_name]
        extras: list[Callable[[], dict[str, Made]]] = []
        if not head.is_cast and head.step.method.calibrates(self._plan[self._head_name].format):
            extras.append(lambda: {self._head_name: self._head()})
        extras += [partial(self._distill, step) for step in self._recipe.after if step.method.stage == "distill"]
        return extras

    def _embed(self) -> None:
        """Writes the states before the first block: the embedding as it will be stored, for every token."""
        name, s = "model.embed_tokens.weight", self._spec
        table, places = self._embeddings()
        stored = get_format(self._plan[name].format)
        unrounded = table if self._compares else None
        if stored.row_independent and not self._choices[name].is_cast:
            scale, chosen = np.float32(s.embedding_scale), self._choices[name].step
            # A tied head that asks for the statistics of its input is rounded last; until then errors of about its size stand in.
            rounded = (
                clip(table / scale, stored)
                if chosen.method.calibrates(stored.name)
                else chosen.method.run(table / scale, stored, None, chosen.options)
            )
            table = stored.dequantize(rounded) * scale
        for stream, rows in (("quantized", table), ("float", unrounded)):
            if rows is not None:
                states = self._work.states(stream, 0, s.hidden_size)
                _write_rows(states, rows, places)
                states.close()

    def _embed_float(self, states: Rows) -> None:
        """Writes the unquantized model's states before the first block."""
        _write_rows(states, *self._embeddings())

    def _embeddings(self) -> tuple[Array, Array]:
        """Returns the embeddings of the tokens that occur, (distinct, hidden) float32, and where in it each token's is, as the tokens."""
        name, s = "model.embed_tokens.weight", self._spec
        distinct, places = np.unique(self._tokens, return_inverse=True)
        table = np.empty((len(distinct), s.hidden_size), np.float32)
        step = max(1, self._room.batch_bytes // (4 * s.hidden_size))
        for begin in range(0, s.vocab_size, step):
            span = slice(*np.searchsorted(distinct, [begin, min(begin + step, s.vocab_size)]))
            if span.start == span.stop:
                continue
            rows = dequantize(self._checkpoint.read(name, slice(begin, min(begin + step, s.vocab_size))))[distinct[span] - begin]
            table[span] = rows
        table *= np.float32(s.embedding_scale)
        return table, places.reshape(self._tokens.shape)

    def _block(self, index: int) -> dict[str, Made]:
        """Returns the block's tensors; the states after it are written."""
        weights = self._read_block(index)
        guides = Guides(self._work, index)
        made = self._fold(index, weights, guides)
        made |= self._round_block(index, weights) if self._is_trained(index) else self._round_groups(index, weights, guides)
        for step in self._recipe.after:
            if step.method.stage == "tune":
                made |= self._tune(index, weights, made, step)
        return made

    def _round_groups(self, index: int, weights: dict[str, Array], guides: Guides) -> dict[str, Made]:
        """Returns the block's matrices, rounded group by group; they are taken out of weights, and the states after it are written."""
        made: dict[str, Made] = {}
        walk = self._walk(index, weights, "quantized")
        original = self._walk(index, weights, "float") if self._compares else None
        for group in walk.groups:
            guided, rest = [name for name in group if name in self._guided], tuple(name for name in group if name not in self._guided)
            alike = {(name,): guides[name] for name in guided} | ({rest: None} if rest else {})
            columns = weights[group[0]].shape[1]
            statistics = [self._statistics(walk, names, columns, original, guide) for names, guide in alike.items()]
            if original is not None:
                original.advance([as_float(weights[name]) for name in group])
            parts = [({name: weights.pop(name) for name in names}, of_them) for names, of_them in zip(alike, statistics)]
            rounded = each(lambda part: self._round_group(*part), parts) if len(parts) > 1 else [self._round_group(*parts[0])]
            made |= {name: tensor for part in rounded for name, tensor in part.items()}
            del alike, statistics, parts
            for name in group:
                self._advance(name)
            walk.advance([made[name].tensor for name in group])
        return made

    def _is_trained(self, index: int) -> bool:
        """Returns whether a block is rounded as a whole, by training. Raises RecipeError when only some of its matrices are to be."""
        names = [f"model.layers.{index}.{part}.weight" for group in GROUPS for part in group]
        steps = [self._choices[name].step for name in names if not self._choices[name].is_cast]
        trained = [step for step in steps if step.method.needs == "samples"]
        if trained and len(set(map(str, steps))) > 1:
            other = next(step for step in steps if str(step) != str(trained[0]))
            raise RecipeError(f"block {index}: {trained[0]} trains a block's matrices together, but some are to be rounded by {other}")
        return bool(trained)

    def _round_block(self, index: int, weights: dict[str, Array]) -> dict[str, Made]:
        """Returns the block's matrices, rounded together; they are taken out of weights, and the states after it are written."""
        from tersor.calibration.trained import round_block

        original = self._walk(index, weights, "float")
        for group in original.groups:
            original.advance([as_float(weights[name]) for name in group])
        names = [name for group in original.groups for name in group]
        formats = {name: get_format(self._plan[name].format) for name in names}
        step = next(self._choices[name].step for name in names if not self._choices[name].is_cast)
        inputs, targets = self._read_states("quantized", index), self._read_states("float", index + 1)
        tensors, descent = round_block(self._spec, index, inputs, targets, weights, formats, step.options)
        self._trained = (descent.before, descent.after)
        walk, made = self._walk(index, weights, "quantized"), {}
        for group in walk.groups:
            statistics = self._statistics(walk, group, weights[group[0]].shape[1])
            for name in group:
                made[name] = self._judged(tensors[name], str(step), weights.pop(name), statistics)
                self._advance(name)
            walk.advance([tensors[name] for name in group])
        return made

    def _tune(self, index: int, weights: dict[str, Array], made: Mapping[str, Made], step: Step) -> dict[str, Made]:
        """Returns the block's tensors after tuning; the states after it are written anew."""
        from tersor.calibration.trained import tuned_block

        inputs, targets = self._read_states("quantized", index), self._read_states("float", index + 1)
        matrices = {name: m.tensor for name, m in made.items() if len(m.tensor.shape) > 1}
        tensors, vectors, descent = tuned_block(self._spec, index, inputs, targets, matrices, weights, step.options)
        self._trained = (descent.before, descent.after)
        changed = {name: replace(made[name], tensor=tensor, method=f"{made[name].method}+{step}") for name, tensor in tensors.items()}
        for name, values in vectors.items():
            stored = get_format(self._plan[name].format).quantize(values)
            weights[name] = dequantize(stored).reshape(-1)
            changed[name] = Made(stored, str(step), 0.0, None)
        walk = self._walk(index, weights, "quantized")
        for group in walk.groups:
            walk.advance([tensors[name] for name in group])
        return changed

    def _distill(self, step: Step) -> dict[str, Made]:
        """Returns every tensor of the blocks and the norms, trained together."""
        names = {name: self._plan[name] for name in expected_tensors(self._spec)}
        made = {name: self._work.read(name) if name in self._work else self._stored(info) for name, info in names.items()}
        matrices = {name: m.tensor for name, m in made.items() if len(m.tensor.shape) > 1}
        floats = {name: dequantize(m.tensor).reshape(-1) for name, m in made.items() if name not in matrices}
        tensors, vectors, descent = step.method.run(
            self._spec, self._checkpoint.read, matrices, floats, self._tokens, step.options, progress=partial(self._told, "distill")
        )
        self._trained = (descent.before, descent.after)
        changed = {
            name: replace(made[name], tensor=tensor, method=f"{made[name].method}+{step}")
            for name, tensor in tensors.items()
            if name in self._work
        }
        for name, values in vectors.items():
            changed[name] = Made(get_format(self._plan[name].format).quantize(values), str(step), 0.0, None)
        return changed

    def _stored(self, info: TensorInfo) -> Made:
        """Returns a tensor that is rounded without statistics, as the pipeline will."""
        source, choice = self._checkpoint.tensors[info.name], self._choices[info.name]
        if source.format == info.format:
            return Made(self._checkpoint.read(info.name), "keep", 0.0, None)
        tensor, error = quantize_tensor(self._checkpoint, source, info.format, choice.step, lambda done: None)
        return Made(tensor, "cast" if choice.is_cast else str(choice.step), error, None)

    def _told(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(stage, done, total)

    def _read_states(self, stream: str, index: int) -> Array:
        """Returns the hidden states before a block, (sequences, length, hidden) float32."""
        states = self._work.states(stream, index, self._spec.hidden_size)
        values = np.require(states.read(0, self._tokens.size), requirements="W").reshape(*self._tokens.shape, -1)
        states.close()
        return values

    def _fold(self, index: int, weights: dict[str, Array], guides: Guides) -> dict[str, Made]:
        """Changes the block's weights as the recipe's scale step says, the function staying, and the guides with them; returns the
        vectors that changed."""
        steps = [step for step in self._recipe.before if step.method.stage == "scale"]
        if not steps:
            return {}
        (step,), walk, scales = steps, self._walk(index, weights, "quantized", keep=False), []
        folds = layer_folds(self._spec, index)
        for group, fold in zip(walk.groups, folds):
            statistics = self._statistics(walk, group, fold.columns)
            formats = [get_format(self._plan[name].format) for name in group]
            scales.append(step.method.run([weights[name] for name in group], formats, statistics, step.options, fold.sources))
            walk.advance([as_float(weights[name]) for name in group])
        changed: dict[str, Made] = {}
        for fold, scale in zip(folds, scales):
            weights |= apply_scale(fold, weights, scale)
            by_output = fold.by_output(scale)
            for name in fold.producer:
                guides.rescale(name, by_output)
                if name in self._plan and weights[name].ndim == 1:
                    stored = get_format(self._plan[name].format).quantize(weights[name])
                    weights[name] = dequantize(stored).reshape(-1)
                    changed[name] = Made(stored, step.method.name, 0.0, None)
        return changed

    def _read_block(self, index: int) -> dict[str, Array]:
        """Returns every tensor of a block as float32, by name."""
        prefix = f"model.layers.{index}."
        names = [name for name in self._checkpoint.tensors if name.startswith(prefix) and name in self._plan]
        return {name: np.array(dequantize(self._checkpoint.read(name)), np.float32) for name in names}

    def _walk(
        self, index: int, weights: Mapping[str, Array], stream: str, keep: bool = True, activations: str | None = None
    ) -> DecoderWalk:
        """Returns a walk through block `index` on a stream's states.

        keep: whether the states after it are the stream's next. activations: as of ops.pack; None: what the plan's formats deserve.
        """
        s, prefix = self._spec, f"model.layers.{index}."
        biases = [
            np.concatenate([weights[f"{prefix}{name}.bias"] for name in names]) if has_bias(s, group) else None
            for group, names in enumerate(GROUPS)
        ]
        vectors = read_vectors(s, index, weights.__getitem__)
        before = self._work.states(stream, index, s.hidden_size)
        after = self._work.states(stream, index + 1, s.hidden_size) if keep else self._work.states("aside", 0, s.hidden_size)
        scratch = self._work.scratch(stream)
        # What is rounded to few bits goes on through the integer kernels that will run it; their error is far below the rounding's.
        few = stream == "quantized" and all(get_format(self._plan[name].format).bits <= 6 for name in weights if weights[name].ndim > 1)
        activations = activations or ("int8" if few else "float")
        shape, sequences = self._tokens.shape, self._room.sequences
        return DecoderWalk(s, index, vectors, biases, before, after, shape, scratch, sequences, activations)

    def _statistics(
        self,
        walk: DecoderWalk,
        group: Sequence[str],
        columns: int,
        original: DecoderWalk | None = None,
        guide: Guide | None = None,
    ) -> InputStatistics:
        """Returns statistics of a group's inputs, as much as the recipe asks for; with `cross` where the original walks along; with
        tokens weighed, and with `outputs`, where a layer that is a group by itself has a guide."""
        steps = [self._choices[name].step for name in group if not self._choices[name].is_cast]
        steps += [step for step in self._recipe.before if step.method.stage == "scale" and original is None]
        cross = original is not None and any(step.method.compares(step.options) for step in steps)
        builder = StatisticsBuilder(columns, gram=any(step.method.needs == "gram" for step in steps), cross=cross)
        at = 0
        for x, y in zip(walk.inputs(), original.inputs() if cross and original is not None else repeat(None)):
            builder.add(x, y, None if guide is None else guide.tokens[at : at + len(x)])
            at += len(x)
        statistics = builder.result()
        if guide is not None:
            statistics = replace(statistics, outputs=guide.outputs)
        check_statistics(statistics, group[0], rounded=self._rounds(group) and not self._force)
        return statistics

    def _round_group(self, weights: Mapping[str, Array], statistics: InputStatistics) -> dict[str, Made]:
        """Returns the weights of a group as the plan stores them; those of one format and method as one matrix: the same, but faster."""
        tensors: dict[str, tuple[QuantizedTensor, str]] = {}
        alike: dict[tuple[str, str], list[str]] = {}
        for name in weights:
            choice, format = self._choices[name], self._plan[name].format
            single = choice.is_cast or format in CASTS or not get_format(format).row_independent
            alike.setdefault((name, "") if single else (str(choice.step), format), []).append(name)
        for names in alike.values():
            if len(names) == 1:
                tensors[names[0]] = self._round(names[0], weights[names[0]], statistics)
                continue
            joined, method = self._round(names[0], np.concatenate([weights[name] for name in names]), statistics)
            begin = 0
            for name in names:
                rows = slice(begin, begin + len(weights[name]))
                fields = {key: array[rows] for key, array in joined.fields.items()}
                tensors[name] = QuantizedTensor(joined.format, weights[name].shape, fields), method
                begin = rows.stop
        return {name: self._judged(*tensors[name], w, statistics) for name, w in weights.items()}

    def _round(self, name: str, w: Array, statistics: InputStatistics) -> tuple[QuantizedTensor, str]:
        """Returns w as the plan stores the named weight, and by which method."""
        choice, fmt = self._choices[name], get_format(self._plan[name].format)
        if fmt.name in CASTS or choice.is_cast:
            source = self._checkpoint.read(name)
            kept = source.format == fmt.name and np.array_equal(dequantize(source).reshape(w.shape), w)  # not so where it was scaled
            return (source, "keep") if kept else (fmt.quantize(w), "cast")
        if not statistics.mean_square.any():  # forced
            return clip(w, fmt), "clip"
        try:
            with blas_alone():
                return choice.step.method.run(w, fmt, statistics, choice.step.options), str(choice.step)
        except (FormatError, ModelError) as refusal:
            raise type(refusal)(f"{name}: {refusal}") from None

    @staticmethod
    def _judged(tensor: QuantizedTensor, method: str, w: Array, statistics: InputStatistics) -> Made:
        """Returns a tensor with what is said of it beside the weights that it stands for."""
        error = dequantize(tensor).reshape(w.shape) - w
        return Made(tensor, method, _ratio(error, w), output_error(error, w, statistics))

    @property
    def _head_name(self) -> str:
        return "model.embed_tokens.weight" if self._spec.tied else "lm_head.weight"

    def _head(self) -> Made:
        """Returns the head, rounded."""
        name, statistics = self._head_name, self._head_statistics()
        check_statistics(statistics, name, rounded=True)
        w = np.array(dequantize(self._checkpoint.read(name)), np.float32)
        return self._judged(*self._round(name, w, statistics), w, statistics)

    def _head_statistics(self) -> InputStatistics:
        """Returns statistics of the head's input, the last block's states after the final norm."""
        s = self._spec
        norm = dequantize(self._checkpoint.read("model.norm.weight")).reshape(-1) + np.float32(s.norm_offset)
        states = self._work.states("quantized", len(s.layers), s.hidden_size)
        builder = StatisticsBuilder(s.hidden_size, gram=self._choices[self._head_name].step.method.needs == "gram")
        step = self._room.sequences * self._tokens.shape[1]
        for begin in range(0, self._tokens.size, step):
            builder.add(ops.rms_norm(states.read(begin, min(begin + step, self._tokens.size)), norm, s.norm_eps))
        states.close()
        return builder.result()

    def _begin(self, work: Work) -> None:
        """Takes up a run where it stands."""
        self._work = work
        self._weights_done = sum(weights for name, weights in self._weights.items() if name in work)
        self._tell_weights()

    def _advance(self, name: str) -> None:
        self._weights_done += self._weights.get(name, 0)
        self._tell_weights()

    def _tell_weights(self) -> None:
        if self._progress is not None:
            self._progress("quantize", self._weights_done, sum(self._weights.values()))


def _write_rows(states: Rows, table: Array, places: Array) -> None:
    """Writes table[places], (sequences, length, hidden), a sequence at a time."""
    for i, row in enumerate(places):
        states.write(i * len(row), table[row])


def _in_few_bits(w: Array) -> QuantizedTensor:
    """Returns weights in 6 bits, or as they are where rows are not whole groups or a value is beyond a group's scale."""
    few = get_format("int6_g64s")
    return few.quantize(w) if few.fits(w.shape) and np.abs(w).max(initial=0) < FLOAT16_MAX else as_float(w)


def as_float(w: Array) -> QuantizedTensor:
    """Returns float32 weights as a tensor."""
    return QuantizedTensor("f32", w.shape, {"values": w})


def output_error(error: Array, w: Array, statistics: InputStatistics) -> float | None:
    """Returns the relative RMS error of the products x W^T over the calibration inputs: sqrt(tr(E H E^T) / tr(W H W^T)).

    error: E, w: W, (out, in) float32. Without a Gram matrix H is taken as diagonal.
    """
    if statistics.gram is None:
        h = statistics.importance
        return _root(*(float(((a * a) @ h).sum(dtype=np.float64)) for a in (error, w)))
    return _root(*(_trace(a, statistics.gram) for a in (error, w)))


def _trace(a: Array, gram: Array) -> float:
    """Returns tr(A H A^T) as the sum over A^T A * H, both symmetric: of each panel of columns only what lies up to the diagonal."""
    if _native.multiplies_by_tiles():
        return _native.gram_product(a, gram)

    def part(panel: slice) -> float:
        products = a[:, panel].T @ a[:, : panel.stop]
        products[:, : panel.start] *= 2
        return float(np.einsum("ij,ij->", products, gram[panel, : panel.stop]))

    return sum(each(part, panels(len(gram))))


def _ratio(error: Array, w: Array) -> float:
    """Returns |error| / |w|."""
    return _root(*(float(np.einsum("ij,ij->", a, a, dtype=np.float64)) for a in (error, w)))


def _root(over: float, under: float) -> float:
    return sqrt(max(over, 0.0) / under) if under > 0 else 0.0


def run_of(recipe: Recipe, provenance: Mapping[str, Any], source: Path, container: str) -> dict[str, Any]:
    """Returns what identifies a run, so that another one does not go on from its work."""
    from tersor import __version__

    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    return {
        "recipe": str(recipe),
        "container": container,
        "calibration": dict(provenance),
        "source": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()],
        "tersor": __version__,
        "isa": _native.isa(),
    }
