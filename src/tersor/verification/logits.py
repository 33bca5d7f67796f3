"""Our engine on a file beside another runtime on the same file: the same logits, or the graph, the config or a name is wrong."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from tersor.containers.container import Checkpoint
from tersor.engine import load
from tersor.errors import ModelError, TersorError
from tersor.evaluation.text import pydoc_text
from tersor.models import ARCHITECTURES
from tersor.tensor import Array
from tersor.verification.record import Fault, Logits
from tersor.verification.runtimes import runtime_of

TOKENS = 96
LARGEST_KL = 1e-3  # nats; float32 runtimes differ by less than 1e-6, float16 ones by about 1e-5
MAX_FLOAT_BYTES = 8 << 30  # of float32 weights in another runtime


def compare_logits(
    checkpoint: Checkpoint, progress: Callable[[str, int, int], None] | None = None
) -> tuple[Logits | None, list[Fault], list[str]]:
    """Returns (what was measured, faults, notes): KL divergence from another runtime's predictions on a few sentences."""
    size = 4 * sum(prod(info.shape) for info in checkpoint.tensors.values())
    kind = checkpoint.description.config.get("model_type")
    if kind not in ARCHITECTURES:
        return None, [], [f"logits were not compared: the engine does not run {kind}"]
    if size > MAX_FLOAT_BYTES:
        return None, [], [f"logits were not compared: {size / 2**30:.1f} GiB of float32 weights, more than {MAX_FLOAT_BYTES >> 30} GiB"]
    runtime = runtime_of(checkpoint.container)
    missing = runtime.missing(checkpoint.container)
    if missing is not None:
        return None, [], [f"logits were not compared: {missing}"]
    try:
        model = load(checkpoint, activations="float", kv="f32")
        tokens = probe_tokens(checkpoint, model.vocab_size, model.context)
        ours = log_softmax(model.head(model.forward(tokens, model.new_cache(len(tokens)))))
    except TersorError as error:
        return None, [Fault(str(checkpoint.path), f"our engine cannot run it: {error}")], []
    del model
    if progress is not None:
        progress(f"run in {runtime.name}", 0, 1)
    try:
        theirs = log_softmax(runtime.logits(checkpoint, tokens))
    except TersorError:
        raise
    except Exception as error:  # another package's, of any kind
        return None, [Fault(str(checkpoint.path), f"{runtime.name} cannot run it: {type(error).__name__}: {error}")], []
    if progress is not None:
        progress(f"run in {runtime.name}", 1, 1)
    if theirs.shape != ours.shape:
        return None, [Fault(str(checkpoint.path), f"{runtime.name} gives {list(theirs.shape)} logits, the engine {list(ours.shape)}")], []
    kl = float((np.exp(theirs) * (theirs - ours)).sum(-1).mean())
    measured = Logits(runtime.name, len(tokens), max(kl, 0.0), float(np.abs(ours - theirs).max()))
    if kl <= LARGEST_KL:
        return measured, [], []
    return (
        measured,
        [Fault(str(checkpoint.path), f"its logits in {runtime.name} differ from ours: KL {kl:.3g}, more than {LARGEST_KL}")],
        [],
    )


def probe_tokens(checkpoint: Checkpoint, vocab_size: int, context: int) -> Array:
    """Returns a few sentences' tokens, or arbitrary ones where there is no tokenizer."""
    from tersor.engine.tokenizer import Tokenizer

    count = min(TOKENS, context)
    try:
        ids = Tokenizer(checkpoint.description).encode(pydoc_text()[:4096])[:count]
    except ModelError:
        ids = []
    if len(ids) < 2 or max(ids) >= vocab_size:
        ids = np.random.default_rng(0).integers(0, vocab_size, count).tolist()
    return np.array(ids, np.int32)


def log_softmax(logits: Array) -> Array:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    out: Array = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return out
