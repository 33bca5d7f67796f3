"""config.json's `quantization_config` of compressed-tensors directories: which layers are stored how.

Source: vllm-project/compressed-tensors src/compressed_tensors/quantization/{quant_config,quant_scheme,quant_args}.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tersor.containers.compressed_tensors_layouts import LAYOUTS, layout_of
from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError, unknown
from tersor.formats import Format, get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.fp8 import BLOCK
from tersor.formats.ordered import OrderedFormat
from tersor.tensor import ActivationScheme, TensorInfo

METHOD = "compressed-tensors"
INTEGER, FLOAT, NAIVE, MIXED = "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"
EMBEDDING = "model.embed_tokens"
STRATEGIES = ("block", "channel", "group", "tensor", "tensor_group")

# Values of actorder that mean a weight_g_idx; "weight" and "static" mean none. Version 0.20 of the package has taken these out.
_BY_COLUMN = ("group", "dynamic", True)

# Of weights with type float: (bits, strategy, group_size or block_structure) -> our format.
_FLOATS = {
    (8, "channel", 0): "fp8_c",
    (8, "tensor", 0): "fp8_t",
    (8, "block", (BLOCK, BLOCK)): "fp8_b128",
    (4, "tensor_group", 16): "nvfp4_gs",
    (4, "group", 32): "mxfp4",
}


@dataclass(frozen=True)
class Scheme:
    """One entry of config_groups. targets: module names, `re:` expressions or class names; our_format: our name for its weights;
    format: the name of its layout, None = as the tensors say; inputs: how they are rounded, "dynamic" or "static" to int8, "other" =
    in a way that is not kept, which rounds more than our engine does, "" = not at all; ordered: groups are of any columns."""

    targets: tuple[str, ...]
    our_format: str
    format: str | None
    inputs: str = ""
    ordered: bool = False

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
    weights, targets = group.get("weights"), group.get("targets")
    if not isinstance(weights, Mapping) or weights.get("type", "int") not in ("int", "float"):
        raise ContainerError(f"{where}: weights are {shorten(weights)}, need an object of type int or float")
    if group.get("output_activations"):
        raise ContainerError(f"{where}: output_activations are not supported; open the float original")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise ContainerError(f"{where}: targets are {shorten(targets)}, need a list of strings; the config is damaged")
    for target in targets:
        if target.startswith("re:"):
            _check_expression(where, target[3:])
    own = group.get("format") or (format if format != MIXED else None)
    if own == NAIVE:
        own = FLOAT if weights.get("type") == "float" else INTEGER
    if own is not None and (not isinstance(own, str) or own not in LAYOUTS):
        raise ContainerError(f"{where}: {unknown('format', shorten(own), [*LAYOUTS, NAIVE])}")
    inputs = _read_inputs(where, group.get("input_activations"))
    return Scheme(tuple(targets), _read_weights(where, weights), own, inputs, weights.get("actorder") in _BY_COLUMN)


def _read_weights(where: str, weights: Mapping[str, Any]) -> str:
    """Returns our format of a scheme's weights; an integer format need not exist yet (7 bits)."""
    bits, size, symmetric = weights.get("num_bits", 8), weights.get("group_size") or 0, weights.get("symmetric", True)
    if not isinstance(bits, int) or not isinstance(size, int):
        raise ContainerError(f"{where}: num_bits {shorten(bits)} and group_size {shorten(size)} must be integers; the config is damaged")
    strategy = weights.get("strategy") or ("group" if size > 0 else "channel" if size < 0 else "tensor")
    if strategy not in STRATEGIES:
        raise ContainerError(f"{where}: {unknown('strategy', shorten(strategy), STRATEGIES)}")
    if weights.get("type", "int") == "int":
        if strategy in ("block", "tensor_group"):
            raise ContainerError(f"{where}: integer weights with strategy {strategy}, which are not supported; open the float original")
        axis = {"channel": "c", "tensor": "t"}.get(strategy, f"g{size}")
        return f"int{bits}_{axis}{'s' if symmetric else ''}"
    block = weights.get("block_structure")
    unit = tuple(block) if isinstance(block, list) and strategy == "block" else size if "group" in strategy else 0
    found = next((name for key, name in _FLOATS.items() if key == (bits, strategy, unit) and symmetric), None)
    if found is None:
        known = ", ".join(f"{b} bits by {s}" + (f" of {u}" if u else "") for b, s, u in _FLOATS)
        raise ContainerError(f"{where}: float weights are {shorten(dict(weights))}; known, all symmetric: {known}")
    return found


def _read_inputs(where: str, inputs: Any) -> str:
    """Returns Scheme.inputs. Raises ContainerError for static scales of integers of another kind than symmetric int8 of the whole tensor.

    Inputs rounded to floats, or dynamically in another way than int8 by token, are "other": what our engine computes is finer.
    """
    if not inputs:
        return ""
    if not isinstance(inputs, Mapping):
        raise ContainerError(f"{where}: input_activations are {shorten(inputs)}; the config is damaged")
    if inputs.get("type", "int") == "float":
        return "other"
    int8 = inputs.get("num_bits", 8) == 8 and inputs.get("type", "int") == "int" and inputs.get("symmetric", True) is True
    strategy = inputs.get("strategy")
    if inputs.get("dynamic"):
        return "dynamic" if int8 and strategy in ("token", None) else "other"
    if not int8 or strategy not in ("tensor", None):
        raise ContainerError(
            f"{where}: input_activations with calibrated scales are {shorten(dict(inputs))};"
            " only symmetric int8 of the whole tensor is supported"
        )
    return "static"


def _write_weights(format: Format) -> dict[str, Any]:
    """Returns a scheme's weights."""
    common: dict[str, Any] = {"dynamic": False, "group_size": None}
    if isinstance(format, OrderedFormat):
        return {**_write_weights(format.plain), "actorder": _BY_COLUMN[0]}
    if isinstance(format, AffineFormat):
        group = {"group_size": format.group_size} if format.group_size > 0 else {}
        strategy = "group" if format.group_size > 0 else "channel" if format.group_size == 0 else "tensor"
        return {**common, "num_bits": format.width, "type": "int", "symmetric": format.kind == "s", "strategy": strategy, **group}
    bits, strategy, unit = next(key for key, name in _FLOATS.items() if name == format.name)
    size = {"block_structure": list(unit)} if isinstance(unit, tuple) else {"group_size": unit or None}
    return {**common, "num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, **size}


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
        if layout_of(info.format) is not None:
            modules.setdefault((info.format, rounds_input(activations, module)), []).append(module)
        elif len(info.shape) == 2 and module != EMBEDDING:
            ignore.append(module)
    if not modules:
        return None
    groups = {}
    for number, ((name, rounded), own) in enumerate(modules.items()):
        layout = layout_of(name)
        assert layout is not None
        targets = own
        if len(modules) == 1:
            targets = ["Linear"] * any(m != EMBEDDING for m in own) + ["Embedding"] * (EMBEDDING in own)
        groups[f"group_{number}"] = {
            "targets": targets,
            "weights": _write_weights(get_format(name)),
            "input_activations": _write_inputs(activations) if rounded and activations is not None else None,
            "output_activations": None,
            "format": layout.name,
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
