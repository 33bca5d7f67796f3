"""How much memory a calibrated run takes, and how large its batches may be for it to stay within --max-ram.

peak = what the process holds already
     + the largest block as float32 (twice where the float model walks along)
     + the largest linear layer: its Gram matrix in float64, what adding a batch to it and its method work in; where methods are guided,
       all layers of a group, which have Gram matrices of their own
     + one batch of sequences: its widest activations
     + the hidden states of all sequences, where they are few
or what measuring the model takes before the blocks are rounded (guides.py), where that is more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

from tersor.calibration.statistics import gram_workspace
from tersor.errors import RecipeError
from tersor.memory import resident_bytes
from tersor.models.spec import GROUPS, DecoderSpec, expected_tensors
from tersor.tensor import OUTPUT_BLOCK

KEPT_BYTES = 256 << 20  # of hidden states that are kept in memory, where they are no more
BATCH_TOKENS = 2048  # at most, in one batch: more is slower, since malloc keeps no pieces that are larger than 32 MiB
_SPARE_BYTES = 96 << 20  # of the native libraries' own buffers and of what the allocator keeps


@dataclass(frozen=True)
class Room:
    """sequences: of one batch. batch_bytes: its memory. peak: predicted largest resident memory of the process, bytes.
    keeps: whether hidden states stay in memory."""

    sequences: int
    batch_bytes: int
    peak: int
    keeps: bool


def plan_room(
    spec: DecoderSpec,
    shape: tuple[int, int],
    *,
    workspaces: Mapping[str, int],
    grams: Mapping[str, int],
    streams: int,
    max_ram: int | None,
    before: tuple[int, int],
    guided: Collection[str],
) -> Room:
    """Returns batches that keep the run within max_ram bytes, None = no limit.

    shape: (sequences, tokens of each). workspaces: bytes that the method of a matrix works in, by name. grams: Gram-like matrices that are
    kept for it (0, 1 or 2). streams: hidden states that walk along, 1 or 2. before: bytes that measuring takes first, always and for each
    sequence of a batch. guided: names of matrices with statistics of their own, which are kept for a whole group at once.
    Raises RecipeError, with the figure needed, when not even single sequences fit.
    """
    shapes, length = expected_tensors(spec), shape[1]
    block = 4 * sum(prod(shape) for name, shape in shapes.items() if name.startswith("model.layers.0."))
    heaviest, most = "", 0
    for group in GROUPS:
        names = [f"model.layers.0.{part}.weight" for part in group]
        columns = shapes[names[0]][1]
        own = [name for name in names if name in guided]
        worked_in = {name: workspaces[name] + grams[name] * 8 * columns**2 for name in names}
        at_once = sum(worked_in[name] + 16 * shapes[name][0] * min(shapes[name][0], OUTPUT_BLOCK) for name in own)
        for name in names:
            need = at_once + (0 if name in own else worked_in[name]) + (gram_workspace(columns) if grams[name] else 0)
            if need > most:
                heaviest, most = f"{name.removeprefix('model.layers.0.')} of a block", need
    widest = (
        2 * spec.intermediate_size
        + max(2 * spec.intermediate_size, (spec.heads + 2 * spec.kv_heads) * spec.head_dim)
        + 3 * spec.hidden_size
    )
    held = resident_bytes() + _SPARE_BYTES
    stages = {heaviest: (streams * block + most, 4 * length * widest * streams), "measuring the float model's gradients": before}

    def needs(sequences: int) -> tuple[int, str]:
        return max((held + fixed + sequences * each, stage) for stage, (fixed, each) in stages.items())

    sequences = max(1, BATCH_TOKENS // length)
    if max_ram is not None:
        while sequences > 0 and needs(sequences)[0] > max_ram:
            sequences -= 1
        if sequences < 1:
            least, stage = needs(1)
            raise RecipeError(
                f"--max-ram {max_ram / 2**30:.2f} GiB is too little: {stage} needs {least / 2**30:.2f} GiB; give that much, or use fewer "
                "tokens a sample (--seqlen)"
            )
    peak = needs(sequences)[0]
    # states before and after a block, those that a fold walks aside, and what is between groups
    width = 3 * spec.hidden_size + spec.heads * spec.head_dim + spec.intermediate_size
    states = 4 * prod(shape) * width * streams
    keeps = states <= KEPT_BYTES and (max_ram is None or peak + states <= max_ram)
    return Room(sequences, sequences * stages[heaviest][1], peak + states * keeps, keeps)
