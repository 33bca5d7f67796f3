"""Fisher information of a decoder's linear layers: what a change of one layer's output costs the whole model, token by token.

    d^2 KL(p || q) / dy^2 = E[g g^T],   g = d -log p(label) / dy,   label drawn from the model's own p

y is a layer's output at a token. One label a token and one backward pass estimate it for every layer at once; labels are
independent, so their cross terms vanish in the mean. What rounding errors E of W cost is then about sum_t (g_t^T E x_t)^2, of which
a rounding method can minimize what factors into inputs and outputs:

    tr(G E H E^T),   H = sum_t |g_t| x_t x_t^T,   G = sum_t g_t g_t^T / |g_t|

Deviation: a token counts by |g|, not by |g|^2. Single labels give a few tokens gradients a hundred times those of others, and by
|g|^2 the sums are those tokens' alone. Sources: Kronecker factors of the Fisher information, K-FAC (arXiv 1503.05671, section 3);
for rounding with feedback along inputs and outputs, YAQA (arXiv 2505.22988); tokens weighed by gradients, GuidedQuant (arXiv 2505.07004).

Forward block by block, then backward, with the hidden states before every block in files: memory holds one block and one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from tersor.models.spec import DecoderSpec, layer_tensors
from tersor.tensor import OUTPUT_BLOCK, Array, QuantizedTensor, output_blocks
from tersor.training.decode import decoded
from tersor.training.decoder import final_norm, logits_of, run_block

if TYPE_CHECKING:
    from tersor.calibration.blocks import Rows

LOGIT_BYTES = 32 << 20  # of float32 logits that exist at once
HEAD_ROWS = 4096  # of the head that are decoded at once
DTYPE = torch.bfloat16  # of products, a batch's sums among them; the residual stream and sums over batches are float32


class Read(Protocol):
    def __call__(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns a tensor of the float model, or some rows of it."""


@dataclass(frozen=True)
class Fisher:
    """Of one linear layer. tokens: |g_t|, (tokens,) float32. outputs: G's blocks along its diagonal, each (rows, rows) float32."""

    tokens: Array
    outputs: tuple[Array, ...]


class Measurement:
    """One pass over a model."""

    def __init__(
        self, spec: DecoderSpec, read: Read, shape: tuple[int, int], states: Callable[[int], Rows], gradients: Rows, batch: int
    ) -> None:
        """shape: (sequences, tokens of each). states: those before block i, files of all tokens; of block 0 they must be there. gradients:
        for the states after the block in work. batch: sequences at a time."""
        self._spec, self._read, self._shape, self._batch = spec, read, shape, batch
        self._states, self._gradients = states, gradients

    def forward(self, index: int) -> None:
        """Writes the states after block `index`."""
        weights, vectors = self._block(index)
        before, after = self._states(index), self._states(index + 1)
        with torch.no_grad():
            for rows in self._batches():
                x = self._sequences(before.read(rows.start, rows.stop))
                y = run_block(self._spec, self._spec.layers[index], x, lambda name, h: h.to(DTYPE) @ weights[name].T, vectors.__getitem__)
                after.write(rows.start, y.flatten(0, 1).numpy())

    def labels(self, seed: int) -> None:
        """Draws a label for every token and writes the gradients of -log p(label) for the states after the last block."""
        s, read = self._spec, self._read
        name = "model.embed_tokens.weight" if s.tied else "lm_head.weight"
        head = torch.empty(s.vocab_size, s.hidden_size, dtype=DTYPE)
        for begin in range(0, s.vocab_size, HEAD_ROWS):
            rows = slice(begin, min(begin + HEAD_ROWS, s.vocab_size))
            head[rows] = decoded(read(name, rows)).to(DTYPE)
        norm = decoded(read("model.norm.weight")).reshape(-1)
        states, step = self._states(len(s.layers)), max(1, LOGIT_BYTES // (4 * s.vocab_size))
        chances = np.random.default_rng(seed).random(self._shape[0] * self._shape[1], np.float32)
        for rows in self._batches():
            x = torch.from_numpy(np.array(states.read(rows.start, rows.stop)))
            drawn = torch.from_numpy(chances[rows])
            parts = [_label_gradient(s, part, norm, head, u) for part, u in zip(torch.split(x, step), torch.split(drawn, step))]
            self._gradients.write(rows.start, torch.cat(parts).numpy())

    def backward(self, index: int, wanted: Collection[str]) -> dict[str, Fisher]:
        """Returns what the wanted layers of block `index` do, by names within it; gradients become those for the states before it."""
        weights, vectors = self._block(index)
        tokens = {name: np.zeros(self._shape[0] * self._shape[1], np.float32) for name in wanted}
        outputs = {name: [torch.zeros(n, n) for n in output_blocks(len(weights[name]))] for name in wanted}
        before = self._states(index)
        for rows in self._batches():

            def product(name: str, h: Tensor, rows: slice = rows) -> Tensor:
                y = h.to(DTYPE) @ weights[name].T
                if name in tokens:
                    y.register_hook(lambda g: _observe(g, tokens[name][rows], outputs[name]))  # type: ignore[no-untyped-call]
                return y

            x = self._sequences(before.read(rows.start, rows.stop)).requires_grad_()
            y = run_block(self._spec, self._spec.layers[index], x, product, vectors.__getitem__)
            y.backward(self._sequences(self._gradients.read(rows.start, rows.stop)))  # type: ignore[no-untyped-call]
            assert x.grad is not None
            self._gradients.write(rows.start, x.grad.flatten(0, 1).numpy())
        return {name: Fisher(tokens[name], tuple(g.numpy() for g in outputs[name])) for name in wanted}

    def _block(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns (matrices in DTYPE, vectors in float32) of a block by their names within it."""
        weights, vectors = {}, {}
        for name, shape in layer_tensors(self._spec).items():
            values = decoded(self._read(f"model.layers.{index}.{name}"))
            if len(shape) == 2:
                weights[name] = values.to(DTYPE)
            else:
                vectors[name] = values.reshape(-1)
        return weights, vectors

    def _batches(self) -> Iterator[slice]:
        n, length = self._shape
        for begin in range(0, n, self._batch):
            yield slice(begin * length, min(begin + self._batch, n) * length)

    def _sequences(self, rows: Array) -> Tensor:
        return torch.from_numpy(np.array(rows)).view(-1, self._shape[1], self._spec.hidden_size)


def workspace(spec: DecoderSpec, length: int) -> tuple[int, int]:
    """Returns the bytes that a Measurement takes at most: (always, for each sequence of a batch)."""
    shapes = [shape for shape in layer_tensors(spec).values() if len(shape) == 2]
    weights = 2 * sum(rows * columns for rows, columns in shapes) + 6 * max(rows * columns for rows, columns in shapes)
    products = 4 * sum(n * n for rows, _ in shapes for n in output_blocks(rows)) + 6 * OUTPUT_BLOCK**2
    head = 2 * spec.vocab_size * spec.hidden_size + 4 * HEAD_ROWS * spec.hidden_size + 6 * LOGIT_BYTES
    widest = 8 * spec.intermediate_size + 16 * spec.hidden_size + 8 * (spec.heads + spec.kv_heads) * spec.head_dim
    masked = spec.attention_softcap > 0 or any(0 < layer.window < length for layer in spec.layers)
    scores = 20 * spec.heads * length**2 if masked else 0  # which exist as a whole then
    return max(weights + products, head), 4 * length * widest + scores


def _label_gradient(spec: DecoderSpec, x: Tensor, norm: Tensor, head: Tensor, chances: Tensor) -> Tensor:
    """Returns the gradients of -log p(label) for hidden states x, (n, hidden) float32. chances: (n,) in 0..1, which draw the labels."""
    states = x.detach().requires_grad_()
    logits = logits_of(spec, final_norm(spec, states, norm), head)
    p = torch.softmax(logits.detach(), -1)
    sums = p.cumsum(-1)
    labels = torch.searchsorted(sums, (chances * sums[:, -1])[:, None]).clamp_max_(spec.vocab_size - 1)
    (gradient,) = torch.autograd.grad(logits, states, p.scatter_add_(-1, labels, -torch.ones_like(chances)[:, None]))
    return gradient


def _observe(gradient: Tensor, tokens: Array, outputs: list[Tensor]) -> None:
    """Adds a batch's gradients for a layer's output, (sequences, length, outputs), to its tokens and products."""
    g = gradient.flatten(0, 1).float()
    size = g.norm(dim=1)
    tokens[:] = size.numpy()
    scaled = (g * size.clamp_min(1e-30).rsqrt()[:, None]).to(DTYPE)
    begin = 0
    for products in outputs:
        part = scaled[:, begin : begin + len(products)]
        products += part.T @ part
        begin += len(products)
