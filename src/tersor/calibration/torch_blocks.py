"""Any transformers decoder, block by block: a skeleton without weights, and one block's weights in memory at a time.

    blocks = TorchBlocks(checkpoint)             parameters on the meta device, buffers (rotary frequencies, scales) as they are
    x = blocks.embed(tokens)
    for i in range(len(blocks)):
        with blocks.load(i) as block:
            for g, names in enumerate(block.groups): for part in block.inputs(g, x): ...      statistics, then block.replace(name, w)
            x = block.run(x)

Groups are the nn.Linear modules that get the same input, in the order they run, found by watching a few tokens pass. A mixture of
experts whose experts transformers fuses into one parameter has other names in its files; it is refused with the name that is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.containers.container import Checkpoint
from tersor.errors import ModelError
from tersor.formats import get_format
from tersor.tensor import Array

PROBE_TOKENS = 4


class TorchBlocks:
    """A transformers causal language model as a row of blocks."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Builds the skeleton from the checkpoint's config. Raises ModelError for a model_type that transformers does not know, or
        one without a list of blocks."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = dict(checkpoint.description.config)
        try:
            with _parameters_on_meta():
                described = AutoConfig.for_model(config.pop("model_type"), **config)
                self._model: nn.Module = AutoModelForCausalLM.from_config(described).eval()  # type: ignore[no-untyped-call]
        except (KeyError, ValueError) as error:
            raise ModelError(f"{checkpoint.path}: transformers cannot build this model: {str(error).strip().splitlines()[0]}") from None
        lists = [(name, m) for name, m in self._model.named_modules() if isinstance(m, nn.ModuleList) and _is_row_of_blocks(m)]
        if not lists:
            raise ModelError(f"{checkpoint.path}: {type(self._model).__name__} holds no list of decoder blocks; use an own architecture")
        self._name, found = max(lists, key=lambda entry: len(entry[1]))
        self._layers: list[nn.Module] = list(found)
        self._checkpoint, self._device, self._dtype = checkpoint, torch.device(device), dtype
        self._arguments: dict[tuple[int, int], dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._layers)

    def embed(self, tokens: Array) -> Tensor:
        """Returns what the first block gets, (n, s, hidden). tokens: (n, s) int."""
        inputs, _ = self._watch(torch.from_numpy(np.ascontiguousarray(tokens, np.int64)).to(self._device))
        return inputs

    def load(self, index: int) -> TorchBlock:
        """Returns block `index` with its weights; use it in a `with`, which drops them again."""
        layer = self._layers[index]
        prefix = f"{self._name}.{index}."
        self._fill(layer, prefix)
        return TorchBlock(self, index, layer, prefix)

    def arguments(self, index: int, length: int) -> dict[str, Any]:
        """Returns what the model gives block `index` besides the hidden states, for one sequence of this length."""
        if (index, length) not in self._arguments:
            _, found = self._watch(torch.zeros((1, length), dtype=torch.int64, device=self._device))
            self._arguments.update(((i, length), kwargs) for i, kwargs in enumerate(found))
        return self._arguments[index, length]

    def _watch(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Returns the first block's hidden states and every block's other arguments, from a forward pass whose blocks do nothing."""
        body = self._model.get_submodule(self._name.rpartition(".")[0])
        leaf = self._name.rpartition(".")[2]
        watchers = [_Watcher(layer) for layer in self._layers]
        others = [m for m in body.children() if not isinstance(m, nn.ModuleList)]
        names = {id(m): n for n, m in self._model.named_modules()}
        setattr(body, leaf, nn.ModuleList(watchers))
        try:
            for module in others:
                self._fill(module, names[id(module)] + ".")
            with torch.no_grad():
                body(input_ids=tokens, use_cache=False)
        finally:
            setattr(body, leaf, nn.ModuleList(self._layers))
            for module in others:
                _empty(module)
        first = watchers[0].seen
        assert first is not None
        return first[0], [w.seen[1] for w in watchers if w.seen is not None]

    def _fill(self, module: nn.Module, prefix: str) -> None:
        """Reads the module's parameters from the checkpoint."""
        for name, parameter in module.named_parameters():
            if prefix + name not in self._checkpoint.tensors:
                raise ModelError(f"{self._checkpoint.path}: no tensor {prefix + name}, which {type(module).__name__} needs")
            tensor = self._checkpoint.read(prefix + name)
            if tuple(tensor.shape) != tuple(parameter.shape):
                raise ModelError(f"{self._checkpoint.path}: {prefix + name} is {tuple(tensor.shape)}; need {tuple(parameter.shape)}")
            values = torch.from_numpy(np.array(get_format(tensor.format).dequantize(tensor), np.float32))
            _set(module, name, values.to(self._device, self._dtype))
        module.to(self._device)
        self._checkpoint.release()


class TorchBlock:
    """One block with its weights. groups: the names, in the checkpoint, of the linear weights that share an input, in running order."""

    def __init__(self, blocks: TorchBlocks, index: int, layer: nn.Module, prefix: str) -> None:
        self._blocks, self._index, self._layer = blocks, index, layer
        self._linears = {f"{prefix}{name}.weight": m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        self.groups = self._find_groups()

    def __enter__(self) -> TorchBlock:
        return self

    def __exit__(self, *_: object) -> None:
        _empty(self._layer)

    def run(self, x: Tensor) -> Tensor:
        """Returns the block's outputs, (n, s, hidden). x: its inputs."""
        return torch.cat([self._one(part) for part in torch.split(x, 1)])

    def inputs(self, group: int, x: Tensor) -> Iterator[Tensor]:
        """Yields what a group's linear layers multiply, (s, in) for each sequence of x; what runs after the group is left out."""
        first = self._linears[self.groups[group][0]]
        for part in torch.split(x, 1):
            caught: list[Tensor] = []

            def catch(_: nn.Module, args: tuple[Tensor, ...], caught: list[Tensor] = caught) -> None:
                caught.append(args[0])
                raise _CaughtError

            handle = first.register_forward_pre_hook(catch)
            try:
                self._one(part)
            except _CaughtError:
                pass
            finally:
                handle.remove()
            yield caught[0].flatten(0, -2)

    def weight(self, name: str) -> Array:
        """Returns a linear layer's weight, (out, in) float32."""
        values: Array = self._linears[name].weight.detach().float().cpu().numpy()
        return values

    def replace(self, name: str, w: Array) -> None:
        """Puts other values, (out, in) float32, in the place of a weight."""
        self._linears[name].weight.data.copy_(torch.from_numpy(np.array(w, np.float32)))

    def _one(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out = self._layer(x, **self._blocks.arguments(self._index, x.shape[1]))
        states: Tensor = out[0] if isinstance(out, tuple) else out  # older blocks return their attention weights too
        return states

    def _find_groups(self) -> tuple[tuple[str, ...], ...]:
        seen: list[tuple[str, Tensor]] = []
        handles = [
            m.register_forward_pre_hook(lambda _, args, name=name: seen.append((name, args[0]))) for name, m in self._linears.items()
        ]
        width = next(iter(self._linears.values())).in_features
        self._one(torch.ones((1, PROBE_TOKENS, width), device=self._blocks._device, dtype=self._blocks._dtype))
        for handle in handles:
            handle.remove()
        groups: list[list[str]] = []
        for i, (name, x) in enumerate(seen):
            if i and x is seen[i - 1][1]:
                groups[-1].append(name)
            else:
                groups.append([name])
        return tuple(tuple(group) for group in groups)


class _CaughtError(Exception):
    """Stops a block once the inputs that were wanted are there."""


class _Watcher(nn.Module):
    """Stands in for a block, keeps what it was called with and passes the hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.seen: tuple[Tensor, dict[str, Any]] | None = None
        self.__dict__.update({k: v for k, v in vars(layer).items() if isinstance(v, (str, int))})  # attention_type and the like

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.seen = (hidden_states, kwargs)
        return hidden_states


def _is_row_of_blocks(modules: nn.ModuleList) -> bool:
    """Returns whether these are blocks: of one class, each with linear layers in it."""
    return len({type(m) for m in modules}) == 1 and all(any(isinstance(c, nn.Linear) for c in m.modules()) for m in modules)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While this lasts, new parameters have shapes but no memory; buffers, which no file holds, are computed as always."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _set(module: nn.Module, name: str, values: Tensor) -> None:
    """Replaces a parameter by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(values, requires_grad=False)


def _empty(module: nn.Module) -> None:
    """Drops the memory of a module's parameters."""
    for name, parameter in list(module.named_parameters()):
        _set(module, name, parameter.to("meta"))
