"""How much a tensor's rounding error costs in KL divergence of the next token, before anything is rounded: one backward pass.

With z the logits and y drawn from the model itself, the divergence after a change E of a weight is, to second order,

    KL = 1/2 E_y[<G, E>^2] / tokens,     G = gradient of a sequence's log p(y) with respect to the weight, all tokens summed

(Fisher information; Amari, "Natural gradient works efficiently in learning", 1998). For errors that know nothing of each other that is

    KL = 1/2 sum_ij F_ij E_ij^2          F = E_y[G * G] / tokens,  kept as its sums over rows and over columns: F_ij = gamma_i h_j

so that any number of formats is judged by their weights' errors alone. For the head F_ij = mean p_i (1 - p_i) x_j^2, of all draws at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from tersor.formats import get_format
from tersor.models.spec import DecoderSpec, linear_groups
from tersor.tensor import Array, QuantizedTensor
from tersor.training import require_torch

LOGIT_ROWS = 256  # tokens whose logits exist at once


@dataclass(frozen=True)
class Sensitivity:
    """gamma: (out,), h: (in,), float64, their outer product F, of one use of a weight: in a product, or as rows that are looked up."""

    gamma: Array
    h: Array

    def divergence(self, error: Array) -> float:
        """Returns the KL divergence in nats per token that weights off by error, (out, in), cause."""
        return float(0.5 * self.gamma @ np.square(error.astype(np.float64)) @ self.h)


def measure(
    spec: DecoderSpec,
    original: Callable[[str], QuantizedTensor],
    tokens: Array,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[Sensitivity, ...]]:
    """Returns the sensitivities of every matrix by name; a tied embedding has two, as table and as head.

    original: name -> tensor of the float model, held in float32. tokens: (n, s) int, n sequences, one at a time in memory.
    seed: of the draws y. progress: called with (sequences done, sequences in all), first with 0. Raises RecipeError without torch.
    """
    require_torch("sensitivity")
    import torch

    from tersor.training.decoder import final_norm, logits_of, run_block

    def read(name: str) -> torch.Tensor:
        tensor = original(name)
        return torch.from_numpy(np.array(get_format(tensor.format).dequantize(tensor), np.float32))

    sums: dict[str, list[Array]] = {}
    weights: dict[str, torch.Tensor] = {}
    names = [name for group in linear_groups(spec) for name in group]
    table, final = read("model.embed_tokens.weight"), read("model.norm.weight").reshape(-1)
    head_name = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
    head = table if spec.tied else read(head_name)
    draws = torch.Generator().manual_seed(seed)

    def add(name: str, values: tuple[torch.Tensor, torch.Tensor]) -> None:
        entry = sums.setdefault(name, [np.zeros(1), np.zeros(1)])
        entry[:] = (total + part.double().numpy() for total, part in zip(entry, values))

    def run(ids: torch.Tensor) -> None:
        def looked_up(g: torch.Tensor) -> None:
            rows, places = torch.unique(ids, return_inverse=True)
            squares = torch.zeros(len(rows), g.shape[-1]).index_add_(0, places[0], g[0] * spec.embedding_scale).square_()
            add("embedding", (torch.zeros(len(table)).index_add_(0, rows, squares.sum(1)), squares.sum(0)))

        x = (table[ids] * spec.embedding_scale).requires_grad_()
        x.register_hook(looked_up)  # type: ignore[no-untyped-call]

        def product(prefix: str, part: str, x: torch.Tensor) -> torch.Tensor:
            name = prefix + part
            if name not in weights:
                weights[name] = read(name)
            y = x @ weights[name].T

            def multiplied(g: torch.Tensor) -> None:
                squares = (g[0].T @ x.detach()[0]).square_()
                add(name, (squares.sum(1), squares.sum(0)))

            y.register_hook(multiplied)  # type: ignore[no-untyped-call]
            return y

        def vector(prefix: str, part: str) -> torch.Tensor:
            name = prefix + part
            if name not in weights:
                weights[name] = read(name).reshape(-1)
            return weights[name]

        states = x
        for i, layer in enumerate(spec.layers):
            prefix = f"model.layers.{i}."
            states = run_block(spec, layer, states, partial(product, prefix), partial(vector, prefix))
        hidden = final_norm(spec, states, final)
        rows = hidden.detach().flatten(0, 1)
        spread = torch.zeros(len(head))
        gradient = torch.empty_like(rows)
        for part in (slice(at, at + LOGIT_ROWS) for at in range(0, len(rows), LOGIT_ROWS)):
            with torch.enable_grad():
                h = rows[part].clone().requires_grad_()
                log_p = torch.log_softmax(logits_of(spec, h, head), -1)
                p = log_p.detach().exp()
                sums = p.double().cumsum(-1)  # torch.multinomial takes as long as the backward pass
                y = torch.searchsorted(sums, sums[:, -1:] * torch.rand(len(p), 1, dtype=torch.float64, generator=draws), right=True)
                y = y.clamp_(max=p.shape[-1] - 1)
                (gradient[part],) = torch.autograd.grad(log_p.gather(1, y).sum(), h)
            spread += (p * (1 - p)).sum(0)
        add("head", (spread, rows.square().sum(0)))
        hidden.backward(gradient.view_as(hidden))  # type: ignore[no-untyped-call]

    tell = progress or (lambda done, total: None)
    tell(0, len(tokens))
    for i, sequence in enumerate(torch.from_numpy(np.ascontiguousarray(tokens, np.int64))):
        run(sequence[None])
        tell(i + 1, len(tokens))
    n = tokens.size
    found: dict[str, tuple[Sensitivity, ...]] = {
        name: (Sensitivity(by_row / n, by_column / by_column.sum()),) for name, (by_row, by_column) in sums.items() if name in names
    }
    lookup = Sensitivity(sums["embedding"][0] / n, sums["embedding"][1] / sums["embedding"][1].sum())
    multiplied = Sensitivity(sums["head"][0] / n, sums["head"][1] / n)
    if spec.tied:
        return found | {head_name: (lookup, multiplied)}
    return found | {"model.embed_tokens.weight": (lookup,), head_name: (multiplied,)}
