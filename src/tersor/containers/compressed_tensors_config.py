"""config.json's `quantization_config` of compressed-tensors directories: which layers are stored how.

Source: vllm-project/compressed-tensors src/compressed_tensors/quantization/{quant_config,quant_scheme,quant_args}.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError, unknown
from tersor.formats import get_format
from tersor.formats.affine import AffineFormat
from tersor.tensor import ActivationScheme, TensorInfo

METHOD = "compressed-tensors"
PACKED, INTEGER, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
EMBEDDING = "model.embed_tokens"


def affine(format: str) -> AffineFormat | None:
    """Returns the format when it is an affine integer that this container holds (no float minimum), else None."""
    found = get_format(format)
    return found if isinstance(found, AffineFormat) and found.kind != "m" else None


def stores_int8(format: AffineFormat) -> bool:
    """Returns whether the weights are written as plain int8 (int-quantized): 8 bits, symmetric, per channel or per tensor."""
    return format.width == 8 and format.kind == "s" and format.group_size <= 0


@dataclass(frozen=True)
class Scheme:
    """One entry of config_groups. targets: module names, `re:` expressions or class names; format: None = as the whole model's;
    inputs: how they are rounded, "dynamic", "static" or "" = not at all (or dynamically in another way than int8 by token)."""

    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    strategy: str
    group_size: int
    format: str | None
    inputs: str = ""

    @property
    def our_format(self) -> str:
        """Our name for it."""
        axis = {"channel": "c", "tensor": "t"}.get(self.strategy, f"g{self.group_size}")
        return f"int{self.bits}_{axis}{'s' if self.symmetric else ''}"

    def matches(self, module: str) -> int:
        """Returns how closely the scheme targets a module: 3 by name, 2 by expression, 1 by class, 0 not at all."""
        kind = "Embedding" if module == EMBEDDING else "Linear"
        best = 0
        for target in self.targets:
            if target == module:
                return 3
            if target.startswith("re:") and re.match(target[3:], module):
                best = 2
            elif target == kind:
                best = max(best, 1)
        return best


def read_schemes(where: str, quantization: Mapping[str, Any]) -> list[Scheme]:
    """Returns the schemes of a quantization_config. Raises ContainerError for everything that the weights alone do not express."""
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if quantization.get(key):
            raise ContainerError(f"{where}: quantization_config has a {key}, which is not supported; open the float original")
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(group, Mapping) for group in groups.values()):
        raise ContainerError(f"{where}: quantization_config needs config_groups that spell their schemes out; it has {shorten(groups)}")
    return [_read_scheme(f"{where}: config group {shorten(name)!r}", group, quantization.get("format")) for name, group in groups.items()]


def _read_scheme(where: str, group: Mapping[str, Any], format: Any) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping) or weights.get("type", "int") != "int":
        raise ContainerError(f"{where}: weights are {shorten(weights)}; only integers are supported so far")
    if group.get("output_activations"):
        raise ContainerError(f"{where}: output_activations are not supported; open the float original")
    strategy = weights.get("strategy") or ("group" if (weights.get("group_size") or 0) > 0 else "tensor")
    if strategy not in ("group", "channel", "tensor"):
        raise ContainerError(f"{where}: {unknown('strategy', shorten(strategy), ['group', 'channel', 'tensor'])}")
    bits, size, targets = weights.get("num_bits", 8), weights.get("group_size") or 0, group.get("targets")
    if (
        not isinstance(bits, int)
        or not isinstance(size, int)
        or not isinstance(targets, list)
        or not all(isinstance(t, str) for t in targets)
    ):
        raise ContainerError(f"{where}: needs integers num_bits and group_size and a list of targets; the config is damaged")
    own = group.get("format") or (format if format != MIXED else None)
    if own not in (PACKED, INTEGER, None):
        raise ContainerError(f"{where}: {unknown('format', shorten(own), [PACKED, INTEGER])}")
    for target in targets:
        if target.startswith("re:"):
            _check_expression(where, target[3:])
    return Scheme(tuple(targets), bits, bool(weights.get("symmetric", True)), strategy, size, own, _read_inputs(where, inputs))


def _read_inputs(where: str, inputs: Any) -> str:
    """Returns Scheme.inputs. Raises ContainerError for static scales of another kind than symmetric int8 of the whole tensor."""
    if not inputs:
        return ""
    if not isinstance(inputs, Mapping):
        raise ContainerError(f"{where}: input_activations are {shorten(inputs)}; the config is damaged")
    int8 = inputs.get("num_bits", 8) == 8 and inputs.get("type", "int") == "int" and inputs.get("symmetric", True) is True
    strategy = inputs.get("strategy")
    if inputs.get("dynamic"):
        return "dynamic" if int8 and strategy in ("token", None) else ""
    if not int8 or strategy not in ("tensor", None):
        raise ContainerError(
            f"{where}: input_activations with calibrated scales are {shorten(dict(inputs))};"
            " only symmetric int8 of the whole tensor is supported"
        )
    return "static"


def _write_inputs(activations: ActivationScheme) -> dict[str, Any]:
    dynamic = activations.scales is None
    strategy = "token" if dynamic else "tensor"
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy, "group_size": None, "dynamic": dynamic}


def _check_expression(where: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ContainerError(f"{where}: target {shorten(expression)!r} is no regular expression: {error}") from None


def rounds_input(activations: ActivationScheme | None, module: str) -> bool:
    """Returns whether a quantized module's input is rounded: a linear layer's, dynamically, or statically when it has a scale."""
    return activations is not None and module != EMBEDDING and (activations.scales is None or module in activations.scales)


def write_quantization(plan: Iterable[TensorInfo], tied: bool, activations: ActivationScheme | None = None) -> dict[str, Any] | None:
    """Returns the quantization_config of a plan, None when nothing is quantized.

    One scheme is targeted by class with exceptions listed in `ignore`; several are targeted by module names.
    """
    modules: dict[tuple[str, bool], list[str]] = {}
    ignore = ["lm_head"] if tied else []
    for info in plan:
        module = info.name.removesuffix(".weight")
        if affine(info.format) is not None:
            modules.setdefault((info.format, rounds_input(activations, module)), []).append(module)
        elif len(info.shape) == 2 and module != EMBEDDING:
            ignore.append(module)
    if not modules:
        return None
    groups = {}
    for number, ((name, rounded), own) in enumerate(modules.items()):
        format = affine(name)
        assert format is not None
        targets = own
        if len(modules) == 1:
            targets = ["Linear"] * any(m != EMBEDDING for m in own) + ["Embedding"] * (EMBEDDING in own)
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": {
                "num_bits": format.width,
                "type": "int",
                "symmetric": format.kind == "s",
                "strategy": "group" if format.group_size > 0 else "channel" if format.group_size == 0 else "tensor",
                "group_size": format.group_size if format.group_size > 0 else None,
                "dynamic": False,
            },
            "input_activations": _write_inputs(activations) if rounded and activations is not None else None,
            "output_activations": None,
            "format": INTEGER if stores_int8(format) else PACKED,
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
