"""Training of one block against what the float block made of the same samples: roundings (autoround), scales and norms (tune)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tersor.formats import Format
from tersor.formats.floats import FloatFormat
from tersor.tensor import Array, QuantizedTensor
from tersor.training.decode import TrainableTensor, product
from tersor.training.decoder import Product, Vector
from tersor.training.descent import Adam, Descent, batches, cosine, descend, linear, split
from tersor.training.rounding import rounding_of

if TYPE_CHECKING:
    from tersor.methods.autoround import AutoroundOptions
    from tersor.methods.tune import TuneOptions

Forward = Callable[[Tensor, Product], Tensor]
ForwardWithVectors = Callable[[Tensor, Product, Vector], Tensor]

PRECISIONS = {"f32": torch.float32, "bf16": torch.bfloat16}


def choose_rounding(
    forward: Forward,
    inputs: Array,
    targets: Array,
    weights: Mapping[str, Array],
    formats: Mapping[str, Format],
    options: AutoroundOptions,
    importance: Mapping[str, Array],
    seed: int,
) -> tuple[dict[str, QuantizedTensor], Descent]:
    """Does what methods.autoround.autoround_block says; what it refuses is refused there."""
    dtype = PRECISIONS[options.precision]
    chosen = {name: rounding_of(w, formats[name], importance.get(name)) for name, w in weights.items() if _has_codes(formats[name])}
    cast = {name: formats[name].quantize(w) for name, w in weights.items() if name not in chosen}
    fixed = {name: torch.from_numpy(np.array(formats[name].dequantize(t))).to(dtype) for name, t in cast.items()}
    decoded: dict[str, Tensor] = {}

    def times(name: str, x: Tensor) -> Tensor:
        w = fixed[name] if name in fixed else decoded[name]
        return x.to(dtype) @ w.to(dtype).T

    def outputs(x: Tensor) -> Tensor:
        decoded.update((name, rounding.weight()) for name, rounding in chosen.items())
        return forward(x, times)

    x, y = torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(np.ascontiguousarray(targets))
    train, held = split(len(x), options.held_out, seed)
    size = min(len(train), max(1, options.batch_tokens // x.shape[1]))
    order = batches(train, options.iterations, size, seed)
    bounded = [part for rounding in chosen.values() for part in rounding.parameters]
    rate = options.rate or 1 / options.iterations

    def move(step: int) -> None:
        loss = (outputs(x[order[step]]).float() - y[order[step]]).square().sum()
        gradients = torch.autograd.grad(loss, [p for p, _, _ in bounded])
        with torch.no_grad():
            for (p, lowest, highest), gradient in zip(bounded, gradients):
                p.sub_(rate * linear(step, options.iterations) * gradient.sign()).clamp_(lowest, highest)

    descent = descend(
        options.iterations if bounded else 0,
        move,
        lambda: _error(outputs, x[held], y[held], size),
        [p for p, _, _ in bounded],
        checks=min(10, options.iterations),
    )
    return {name: chosen[name].store() if name in chosen else cast[name] for name in weights}, descent


def tune_values(
    forward: ForwardWithVectors,
    inputs: Array,
    targets: Array,
    tensors: Mapping[str, QuantizedTensor],
    vectors: Mapping[str, Array],
    options: TuneOptions,
    seed: int,
) -> tuple[dict[str, QuantizedTensor], dict[str, Array], Descent]:
    """Does what methods.tune.tune_block says; what it refuses is refused there."""
    dtype = PRECISIONS[options.precision]
    values = Values(tensors, vectors)
    x, y = torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(np.ascontiguousarray(targets))
    train, held = split(len(x), options.held_out, seed)
    size = min(len(train), max(1, options.batch_tokens // x.shape[1]))
    steps = max(1, round(options.epochs * len(train) / size))
    order = batches(train, steps, size, seed)
    adam = values.adam(options)

    def outputs(part: Tensor) -> Tensor:
        return forward(part, lambda name, h: values.product(name, h, dtype), values.vectors.__getitem__)

    def move(step: int) -> None:
        target = y[order[step]]
        loss = (outputs(x[order[step]]).float() - target).square().mean() / target.square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step(cosine(step, steps))

    descent = descend(steps, move, lambda: _error(outputs, x[held], y[held], size), values.parameters, checks=min(4, steps))
    return values.tensors(), values.arrays(), descent


class Values:
    """Everything of a block or model that stays float and can be trained: the tensors' float parameters, norms and biases."""

    def __init__(self, tensors: Mapping[str, QuantizedTensor], vectors: Mapping[str, Array]) -> None:
        self.trainable = {name: TrainableTensor.of(tensor) for name, tensor in tensors.items()}
        self.of_tensor = {name: [v.clone().requires_grad_() for v in t.start] for name, t in self.trainable.items()}
        self.vectors = {name: torch.from_numpy(np.array(v, np.float32)).requires_grad_() for name, v in vectors.items()}
        self._shapes = {name: v.shape for name, v in vectors.items()}

    @property
    def parameters(self) -> list[Tensor]:
        """All that is trained: the values of the tensors, then the vectors."""
        return [v for values in self.of_tensor.values() for v in values] + list(self.vectors.values())

    def product(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns x W^T in dtype."""
        return product(x, self.trainable[name], self.of_tensor[name], dtype)

    def adam(self, options: TuneOptions) -> Adam:
        """Returns the optimizer of all parameters: those of a tensor of B bits in units of 2^-B of their size, since that is how far off
        its rounding left them, and vectors in units of the mean of that times their root mean square."""
        scores = [2.0**-t.format.bits for t in self.trainable.values() for _ in t.units]
        units = [u for t in self.trainable.values() for u in t.units]
        units += [v.detach().square().mean().sqrt() for v in self.vectors.values()]
        mean = sum(scores) / len(scores) if scores else 2.0**-4
        rates = [options.rate * s for s in scores] + [options.vector_rate * mean] * len(self.vectors)
        return Adam(self.parameters, units, rates)

    def tensors(self) -> dict[str, QuantizedTensor]:
        """Returns the tensors as they are now, in stored precision."""
        return {name: t.store(self.of_tensor[name]) for name, t in self.trainable.items()}

    def arrays(self) -> dict[str, Array]:
        """Returns the vectors as they are now, float32."""
        return {name: v.detach().numpy().copy().reshape(self._shapes[name]) for name, v in self.vectors.items()}


def _has_codes(format: Format) -> bool:
    """Returns whether there is anything to choose: float formats are nearest as they are."""
    return not isinstance(format, FloatFormat)


def _error(outputs: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, size: int) -> float:
    """Returns |outputs(x) - y|^2 / |y|^2 in float64 sums, a few sequences at a time."""
    wrong = 0.0
    with torch.no_grad():
        for part, target in zip(torch.split(x, size), torch.split(y, size)):
            wrong += float((outputs(part).float() - target).square().sum(dtype=torch.float64))
    return wrong / max(float(y.square().sum(dtype=torch.float64)), 1e-300)
