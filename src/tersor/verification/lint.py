"""What is legal in a model file but known to go wrong: each finding names what it is and what will happen.

Where the readers of a container refuse (a missing g_idx, scales of the wrong shape), there is no finding: the file does not open.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod

import numpy as np

from tersor.containers.container import Checkpoint
from tersor.formats import get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.ordered import OrderedFormat
from tersor.models import ARCHITECTURES, expected_tensors, spec_of
from tersor.recipe import CASTS, is_edge
from tersor.slabs import dequantize
from tersor.targets import unequal
from tersor.tensor import QuantizedTensor, TensorInfo
from tersor.verification.record import Fault

FUSING = ("compressed-tensors", "gptq", "awq", "bnb")  # containers that vLLM and SGLang load
ROWS = 256  # of a matrix that are looked at
# |mean| of a matrix's weights, in standard deviations: trained ones stay below 0.05, a zero point off by one gives 0.3 and more.
SHIFT = 0.2
TENSORS_SHOWN = 3


def lint(checkpoint: Checkpoint) -> Iterator[Fault]:
    """Yields what is suspicious in an opened model. Reads a few rows of every quantized matrix."""
    matrices = {name: info for name, info in checkpoint.tensors.items() if len(info.shape) > 1}
    quantized = {name: info for name, info in matrices.items() if info.format not in CASTS}
    yield from _head(checkpoint)
    if quantized:
        yield from _leftovers(matrices)
        yield from _zero_points(checkpoint, quantized)
    if checkpoint.container in FUSING:
        yield from _fused(matrices)
    yield from _files(checkpoint)


def _head(checkpoint: Checkpoint) -> Iterator[Fault]:
    config = checkpoint.description.config
    tied, stored = bool(config.get("tie_word_embeddings")), "lm_head.weight" in checkpoint.tensors
    if tied and stored:
        yield Fault("lm_head.weight", "is stored though config.json ties it to the embedding: loaders ignore one of the two")
    if not tied and not stored:
        yield Fault("lm_head.weight", "is missing and config.json does not tie it to the embedding: loaders make a random one")
    if config.get("model_type") in ARCHITECTURES:
        missing = [name for name in expected_tensors(spec_of(config)) if name not in checkpoint.tensors]
        if missing:
            yield Fault(missing[0], f"and {len(missing) - 1} more tensors of the architecture are missing: loaders make random ones")


def _leftovers(matrices: dict[str, TensorInfo]) -> Iterator[Fault]:
    left = [info for name, info in matrices.items() if info.format in CASTS and not is_edge(name)]
    if left:
        share = sum(prod(info.shape) for info in left) / sum(prod(info.shape) for info in matrices.values())
        yield Fault(_some(left), f"{len(left)} matrices of the blocks are not quantized, {100 * share:.0f} % of all weights")


def _zero_points(checkpoint: Checkpoint, quantized: dict[str, TensorInfo]) -> Iterator[Fault]:
    """A zero point off by one moves every weight the same way; trained matrices have their mean near 0, and zeros of a symmetric
    format that are all off by one are all one number, which asymmetric ones never are."""
    moved, beside = [], []
    for name, info in quantized.items():
        if is_edge(name) or info.format.startswith(("binary", "ternary")):
            continue
        mixed = not get_format(info.format).row_independent
        tensor = checkpoint.read(name) if mixed else checkpoint.read(name, slice(0, ROWS))
        w = dequantize(tensor).reshape(-1, info.shape[-1])[:ROWS]
        beside += [info] if _beside_middle(tensor) else []
        checkpoint.release()
        deviation = float(w.std())
        if not np.isfinite(w).all() or deviation == 0:
            yield Fault(name, "holds values that are not finite" if not np.isfinite(w).all() else "all its weights are equal")
        elif abs(float(w.mean())) > SHIFT * deviation:
            moved.append(info)
    if beside:
        yield Fault(_some(beside), f"all zero points of {len(beside)} matrices are one beside the middle: GPTQ v1 and v2 mixed up")
    elif len(moved) > len(quantized) // 2:
        yield Fault(_some(moved), f"the mean of {len(moved)} matrices is far from 0: zero points off by one (GPTQ v1 and v2 mixed up)?")


def _beside_middle(tensor: QuantizedTensor) -> bool:
    """Returns whether all zeros are the same number, one below or above 2^(bits-1), which symmetric formats have."""
    format = get_format(tensor.format)
    if isinstance(format, OrderedFormat):
        tensor, _ = format.split(tensor)
        format = format.plain
    if not isinstance(format, AffineFormat) or format.kind != "":
        return False
    zeros = format.unpack(tensor)[1]["zero"]
    return zeros.size > 1 and bool((zeros == zeros.flat[0]).all()) and abs(int(zeros.flat[0]) - format.middle) == 1


def _fused(matrices: dict[str, TensorInfo]) -> Iterator[Fault]:
    found = unequal(matrices)
    if found:
        where, formats = found[0]
        yield Fault(where, f"{', '.join(formats)} ({len(found)} such): vLLM and SGLang join these layers into one and refuse the model")


def _files(checkpoint: Checkpoint) -> Iterator[Fault]:
    files = checkpoint.description.files
    settings = _json(files.get("tokenizer_config.json"))
    generation = _json(files.get("generation_config.json"))
    if "tokenizer.json" not in files and "tokenizer.model" not in files:
        yield Fault("tokenizer.json", "is missing: no program can turn text into tokens")
        return
    if "chat_template" not in settings and not any(name.startswith("chat_template") for name in files):
        yield Fault(
            "chat_template.jinja", "is missing: chat programs guess how to ask, and a model that was trained otherwise answers badly"
        )
    ends = (checkpoint.description.config.get("eos_token_id"), generation.get("eos_token_id"), settings.get("eos_token"))
    if all(end is None for end in ends):
        yield Fault("generation_config.json", "no eos_token_id anywhere: generation does not stop")


def _json(data: bytes | None) -> dict[str, object]:
    try:
        value = json.loads(data or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _some(infos: list[TensorInfo]) -> str:
    shown = ", ".join(info.name for info in infos[:TENSORS_SHOWN])
    return shown + (", ..." if len(infos) > TENSORS_SHOWN else "")
