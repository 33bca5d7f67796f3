"""Training of a whole quantized decoder against the float one: least KL divergence of the next token, on calibration tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tersor.models.spec import DecoderSpec, linear_groups
from tersor.tensor import Array, QuantizedTensor
from tersor.training.blockwise import PRECISIONS, Values
from tersor.training.decode import decoded
from tersor.training.decoder import Product, Vector, final_norm, logits_of, run_block
from tersor.training.descent import Descent, batches, cosine, descend, split

if TYPE_CHECKING:
    from tersor.methods.tune import TuneOptions

LOGIT_ROWS = 512  # tokens whose logits exist at once

Read = Callable[[str], QuantizedTensor]


def distill(
    spec: DecoderSpec,
    original: Read,
    tensors: Mapping[str, QuantizedTensor],
    vectors: Mapping[str, Array],
    tokens: Array,
    options: TuneOptions,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, QuantizedTensor], dict[str, Array], Descent]:
    """Does what methods.tune.tune_model says; what it refuses is refused there."""
    dtype = PRECISIONS[options.precision]
    ids = torch.from_numpy(np.ascontiguousarray(tokens, np.int64))
    micro = max(1, options.micro_tokens // ids.shape[1])
    wanted = float_hidden(spec, original, ids, dtype, micro)
    head_name = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
    float_head = decoded(original(head_name)).to(dtype)
    head = decoded(tensors[head_name]).to(dtype)
    embedding = decoded(tensors["model.embed_tokens.weight"])
    blocks = [name for group in linear_groups(spec) for name in group]
    values = Values({name: tensors[name] for name in blocks}, vectors)

    def hidden(part: Tensor) -> Tensor:
        x = embedding[part] * spec.embedding_scale
        for i, layer in enumerate(spec.layers):
            times, vector = _of_layer(f"model.layers.{i}.", lambda name, h: values.product(name, h, dtype), values.vectors.__getitem__)
            x = run_block(spec, layer, x, times, vector)
        return final_norm(spec, x, values.vectors["model.norm.weight"])

    train, held = split(len(ids), options.held_out, seed)
    size = min(len(train), max(1, options.batch_tokens // ids.shape[1]))
    steps = max(1, round(options.epochs * len(train) / size))
    order = batches(train, steps, size, seed)
    adam = values.adam(options)

    def move(step: int) -> None:
        for part in torch.split(order[step], micro):
            states = hidden(ids[part])
            _, gradient = divergence(spec, wanted[part], float_head, states.detach(), head)
            states.backward(gradient * (len(part) / len(order[step])))  # type: ignore[no-untyped-call]
        adam.step(cosine(step, steps))
        if progress is not None:
            progress(step + 1, steps)

    def judge() -> float:
        with torch.no_grad():
            parts = [divergence(spec, wanted[p], float_head, hidden(ids[p]), head)[0] * len(p) for p in torch.split(held, micro)]
        return sum(parts) / len(held)

    descent = descend(steps, move, judge, values.parameters, checks=min(options.checks, steps))
    return {**tensors, **values.tensors()}, values.arrays(), descent


def float_hidden(spec: DecoderSpec, original: Read, ids: Tensor, dtype: torch.dtype, micro: int) -> Tensor:
    """Returns what the float model's head multiplies, (n, s, hidden) float32, with one block's weights in memory at a time."""
    with torch.no_grad():
        x = decoded(original("model.embed_tokens.weight"))[ids] * spec.embedding_scale
        for i, layer in enumerate(spec.layers):
            prefix = f"model.layers.{i}."
            weights: dict[str, Tensor] = {}

            def times(name: str, h: Tensor, weights: dict[str, Tensor] = weights) -> Tensor:
                if name not in weights:
                    weights[name] = decoded(original(name)).to(dtype)
                return h.to(dtype) @ weights[name].T

            block_product, block_vector = _of_layer(prefix, times, lambda name: decoded(original(name)).reshape(-1))
            for part in torch.split(x, micro):
                part.copy_(run_block(spec, layer, part, block_product, block_vector))
        return final_norm(spec, x, decoded(original("model.norm.weight")).reshape(-1))


def divergence(spec: DecoderSpec, p_hidden: Tensor, p_head: Tensor, q_hidden: Tensor, q_head: Tensor) -> tuple[float, Tensor]:
    """Returns the mean over tokens of KL(p || q) in nats, and its gradient for q_hidden.

    p_hidden, q_hidden: (n, s, hidden) float32, after the final norm. d KL / d logits = q - p, so that the logits of a few
    tokens at a time are all that is ever held.
    """
    p_rows, q_rows = p_hidden.flatten(0, 1), q_hidden.detach().flatten(0, 1)
    gradient, total = torch.empty_like(q_rows), 0.0
    for at in range(0, len(q_rows), LOGIT_ROWS):
        rows = slice(at, at + LOGIT_ROWS)
        log_p = torch.log_softmax(logits_of(spec, p_rows[rows], p_head).detach(), -1)
        p = log_p.exp()
        with torch.enable_grad():
            h = q_rows[rows].clone().requires_grad_()
            logits = logits_of(spec, h, q_head)
        log_q = torch.log_softmax(logits.detach(), -1)
        total += float((p * (log_p - log_q)).sum(dtype=torch.float64))
        (gradient[rows],) = torch.autograd.grad(logits, h, log_q.exp_().sub_(p))
    return total / len(q_rows), gradient.view_as(q_hidden) / len(q_rows)


def _of_layer(prefix: str, product: Product, vector: Vector) -> tuple[Product, Vector]:
    """Returns the callbacks of one layer, which asks by names within itself."""
    return lambda name, x: product(prefix + name, x), lambda name: vector(prefix + name)
