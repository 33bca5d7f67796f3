"""verify: is a model file what was meant, and does the rest of the world read it so?

    1. bytes      its files have the digests that verification.json keeps, when there is one
    2. values     its tensors have the values that were meant: the digests that quantize or convert made of what they handed over
    3. reader     an independent reader (readers/) decodes every tensor to the same float32 values, bit for bit
    4. original   with `against`: no tensor lies farther from the original than its format explains
    5. logits     another runtime (runtimes/) gives our engine's logits
    6. lint       what is legal but known to go wrong (lint.py)

The result is written to verification.json beside the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import numpy as np

from tersor.containers import open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.memory import resident_bytes
from tersor.tensor import Array, TensorInfo
from tersor.verification.digests import file_digests, model_digests, slabs_of
from tersor.verification.independent import independent_reader
from tersor.verification.lint import lint
from tersor.verification.logits import compare_logits
from tersor.verification.original import compare_with_original
from tersor.verification.record import FAILED, MEANT_UNKNOWN, Fault, Logits, Verification, proof_path, read_proof, write_proof

COPIES = 4  # of the largest tensor as float32 that another reader and the comparison hold

Progress = Callable[[str, int, int], None]  # (what, done, in all)


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    meant: Mapping[str, str] | None = None,
    logits: bool = True,
    keep: bool = True,
    max_ram: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Returns what is right and wrong with the model at path, and writes it to verification.json beside it.

    against: the original, whose weights and predictions the model should be near.
    meant: digests of the values that were to be written (digests.values_digest), by tensor; None: those of verification.json, if any.
    logits: whether to run the model here and in another runtime. keep: whether to write verification.json.
    max_ram: bytes of resident memory; an independent reader, which holds a whole tensor as floats, is not asked when it needs more.
    Raises ContainerError when the model cannot be opened at all.
    """
    start = time.perf_counter()
    with open_checkpoint(path) as checkpoint:
        root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        files = file_digests(_files(checkpoint), root)
        proof = read_proof(checkpoint.path)
        # The bytes of a file that failed are no measure; what was meant stays one.
        compares_bytes = proof is not None and meant is None and proof.get("verdict") != FAILED
        faults = _changed_files(proof["files"], files) if proof is not None and compares_bytes else []
        tensors = model_digests(checkpoint)
        expected = meant if meant is not None else None if proof is None else proof["tensors"] or None
        notes = []
        if expected is None:
            advice = "" if against is not None else "; give --against ORIGINAL"
            notes.append(f"{MEANT_UNKNOWN}: no verification.json{advice}")
        else:
            faults += _changed_values(expected, tensors)
        reader, compared, more, note = _read_independently(checkpoint, max_ram, progress)
        faults += more
        notes += note
        found: dict[str, object] = {}
        if against is not None:
            more, note, found = compare_with_original(checkpoint, against, progress)
            faults += more
            notes += note
        measured: Logits | None = None
        if logits and not faults:
            measured, more, note = compare_logits(checkpoint, progress)
            faults += more
            notes += note
        result = Verification(
            path=str(checkpoint.path),
            container=checkpoint.container,
            tersor=_version(),
            reader=reader,
            compared=compared,
            faults=tuple(faults),
            findings=tuple(lint(checkpoint)),
            notes=tuple(notes),
            files=files,
            tensors=dict(expected or {}) if faults else tensors,
            logits=measured,
            against=found,
            seconds=time.perf_counter() - start,
        )
        if keep and not (faults and proof is not None):  # a good proof is not replaced by what a damaged file says
            write_proof(checkpoint.path, result)
    return result


def _version() -> str:
    from tersor import __version__

    return __version__


def _files(checkpoint: Checkpoint) -> list[Path]:
    """Returns the files of a model: all of its directory but the proof, or the GGUF file (all parts of a split one)."""
    if checkpoint.path.is_dir():
        kept = proof_path(checkpoint.path)
        return sorted(f for f in checkpoint.path.rglob("*") if f.is_file() and f != kept and not f.name.startswith("."))
    return sorted(getattr(checkpoint, "paths", [checkpoint.path]))


def _changed_files(kept: Mapping[str, str], files: Mapping[str, str]) -> list[Fault]:
    faults = [Fault(name, "its bytes are not those that were verified") for name in kept if name in files and files[name] != kept[name]]
    return faults + [Fault(name, "was verified and is missing") for name in kept if name not in files]


def _changed_values(meant: Mapping[str, str], tensors: Mapping[str, str]) -> list[Fault]:
    faults = [Fault(name, "was to be written and is missing") for name in meant if name not in tensors]
    faults += [Fault(name, "was never to be written") for name in tensors if name not in meant]
    faults += [
        Fault(name, "its values are not those that were meant") for name in tensors if meant.get(name, tensors[name]) != tensors[name]
    ]
    return faults


def _read_independently(checkpoint: Checkpoint, max_ram: int | None, progress: Progress | None) -> tuple[str, int, list[Fault], list[str]]:
    """Returns (reader, tensors that agree, faults, notes)."""
    need = resident_bytes() + COPIES * 4 * max(prod(info.shape) for info in checkpoint.tensors.values())
    if max_ram is not None and need > max_ram:
        note = f"no independent reader: it would take {need / 2**30:.1f} GiB; run `tersor verify` where there is more"
        return "", 0, [], [note]
    reader = independent_reader(checkpoint.container)
    if isinstance(reader, str):
        return "", 0, [], [f"no independent reader: {reader}"]
    label = reader.label
    left, agreeing = dict(checkpoint.tensors), 0
    faults: list[Fault] = []
    if progress is not None:
        progress("verify", 0, len(checkpoint.tensors))
    name, weights = "the start", reader.weights(checkpoint.path)
    while True:
        try:
            name, values = next(weights)
        except StopIteration:
            break
        except Exception as error:  # another package's, of any kind
            what = f"{label} cannot read what follows {name}: {_first_line(error)}"
            return label, agreeing, [*faults, Fault(str(checkpoint.path), what)], []
        info = left.pop(name, None)
        if info is None:
            if name != "lm_head.weight" or "model.embed_tokens.weight" not in checkpoint.tensors:  # a tied head may be shown twice
                faults.append(Fault(name, f"{label} finds it, we do not"))
            continue
        fault = _difference(checkpoint, info, values, label)
        faults += [] if fault is None else [fault]
        agreeing += fault is None
        checkpoint.release()
        if progress is not None:
            progress("verify", len(checkpoint.tensors) - len(left), len(checkpoint.tensors))
    faults += [Fault(name, f"we find it, {label} does not") for name in left]
    return label, agreeing, faults, []


def _difference(checkpoint: Checkpoint, info: TensorInfo, values: Array, label: str) -> Fault | None:
    """Returns the fault when another reader's values are not ours, bit for bit (-0 and 0 being the same)."""
    if tuple(values.shape) != info.shape:
        return Fault(info.name, f"{label} reads the shape {list(values.shape)}, we read {list(info.shape)}")
    theirs, different, largest = values.reshape(-1, info.shape[-1]), 0, 0.0
    for first, ours in slabs_of(checkpoint.read(info.name)):
        other = theirs[first : first + len(ours)]
        unequal = ~(ours == other)
        if unequal.any():
            different += int(unequal.sum())
            with np.errstate(invalid="ignore"):
                largest = max(largest, float(np.abs(ours.astype(np.float64) - other)[unequal].max()))
    if not different:
        return None
    return Fault(info.name, f"{label} reads other values than we do: {different} of {values.size}, by up to {largest:.3g}")


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
