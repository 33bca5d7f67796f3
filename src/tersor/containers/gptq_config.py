"""`quantization_config` of GPTQ directories (and the same in quantize_config.json): which layers are stored how.

    bits, group_size (-1: one group a row), sym, desc_act        of every quantized layer, unless `dynamic` says otherwise
    checkpoint_format (or format)                                 gptq = v1, zeros are stored minus one; gptq_v2 = as they are
    lm_head                                                       whether the head is quantized too
    dynamic {"+:regex": {bits, group_size, sym, desc_act}}        of modules whose name the expression matches from its start
            {"-:regex": {}}                                       modules that are not quantized; the first match counts
    modules_in_block_to_quantize [[names]]                        optimum's way to say what is quantized
    pack_dtype                                                    int32
    quant_method auto-round, packing_format auto_round:auto_gptq  the same buffers as auto-round saves them by itself

Source: ModelCloud/GPTQModel gptqmodel/quantization/config.py (QuantizeConfig, dynamic_get); vllm-project/vllm
vllm/model_executor/layers/quantization/utils/gptq_utils.py (get_dynamic_override); huggingface/optimum optimum/gptq/quantizer.py;
intel/auto-round docs/step_by_step.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tersor.containers.qweight import EMBEDDING, HEAD, module_expression, stored_format
from tersor.containers.safetensors_file import shorten
from tersor.errors import ContainerError, unknown
from tersor.formats.affine import AffineFormat
from tersor.tensor import TensorInfo

METHOD = "gptq"
AUTO_ROUND = "auto-round"
AUTO_ROUND_PACKING = ("auto_round:auto_gptq", "auto_round:gptq", "auto_gptq", "gptq")  # GPTQ's buffers, zeros minus one
V1, V2 = "gptq", "gptq_v2"
BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256)  # of gptqmodel's kernels (512 and 1024 are no group of ours)


@dataclass(frozen=True)
class Scheme:
    """How a layer is stored. group_size: columns, -1 = all. by_column: desc_act, columns were rounded in an order that g_idx says."""

    bits: int
    group_size: int
    symmetric: bool
    by_column: bool = False

    def format_name(self, columns: int, symmetric: bool) -> str:
        """Returns our name of it for a layer of so many columns. A group that is the whole row, and too long for us, is a row's."""
        whole = self.group_size == -1 or self.group_size > columns or (self.group_size == columns and columns > GROUP_SIZES[-1])
        return f"int{self.bits}_{'c' if whole else f'g{self.group_size}'}{'s' if symmetric else ''}"


@dataclass(frozen=True)
class Quantization:
    """A quantization_config. overrides: expressions with the scheme of what they match, None = not quantized."""

    base: Scheme
    version: str
    overrides: tuple[tuple[re.Pattern[str], Scheme | None], ...] = ()

    def scheme(self, module: str) -> Scheme | None:
        """Returns how the config says that a module is stored, None for not at all."""
        for pattern, scheme in self.overrides:
            if pattern.match(module):
                return scheme
        return self.base


def read_quantization(where: str, quantization: Mapping[str, Any]) -> Quantization:
    """Returns a quantization_config as read. Raises ContainerError for everything that we do not read the weights by."""
    for key in ("rotation", "adapter", "is_marlin_format"):
        if quantization.get(key):
            raise ContainerError(f"{where}: quantization_config has {key} {shorten(quantization[key])}, which is not supported")
    if quantization.get("quant_method") == AUTO_ROUND:
        _check_auto_round(where, quantization)
    words = quantization.get("pack_dtype") or "int32"
    if words not in ("int32", "torch.int32"):
        raise ContainerError(f"{where}: {unknown('pack_dtype', shorten(words), ['int32'])}; save it again with int32")
    base = _read_scheme(where, quantization, None)
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(isinstance(own, Mapping) for own in dynamic.values()):
        raise ContainerError(f"{where}: dynamic is {shorten(dynamic)}, needs expressions with an object each; the config is damaged")
    overrides = tuple(_read_override(f"{where}: dynamic {shorten(key)!r}", key, own, base) for key, own in dynamic.items())
    return Quantization(base, _read_version(where, quantization), overrides)


def _check_auto_round(where: str, quantization: Mapping[str, Any]) -> None:
    packing = quantization.get("packing_format")
    if packing not in AUTO_ROUND_PACKING:
        raise ContainerError(f"{where}: {unknown('packing_format', shorten(packing), AUTO_ROUND_PACKING)}; save it with format auto_gptq")
    if quantization.get("extra_config"):
        raise ContainerError(f"{where}: extra_config (layers with bits of their own) is not supported; save it with format auto_gptq")


def _read_version(where: str, quantization: Mapping[str, Any]) -> str:
    named = [quantization[key] for key in ("checkpoint_format", "format") if quantization.get(key) is not None] or [V1]
    for version in named:
        if version not in (V1, V2):
            raise ContainerError(f"{where}: {unknown('checkpoint_format', shorten(version), [V1, V2])}; save it again as {V2}")
    if named[0] != named[-1]:
        raise ContainerError(f"{where}: checkpoint_format is {named[0]} but format {named[-1]}, and loaders differ in which they follow")
    return str(named[0])


def _read_scheme(where: str, own: Mapping[str, Any], base: Scheme | None) -> Scheme:
    """Returns the scheme of an object; what it leaves out is as in base, or the loaders' default."""
    bits = own.get("bits", base.bits if base else None)
    size = own.get("group_size", base.group_size if base else 128)
    symmetric = own.get("sym", base.symmetric if base else True)
    if not isinstance(bits, int) or bits not in BITS:
        raise ContainerError(f"{where}: bits is {shorten(bits)}; GPTQ layers of {', '.join(map(str, BITS))} bits are supported")
    if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and size < 1):
        raise ContainerError(f"{where}: group_size is {shorten(size)}, needs a number of columns, or -1 for all; the config is damaged")
    by_column = own.get("desc_act", base.by_column if base else False)
    for key, value in (("sym", symmetric), ("desc_act", by_column)):
        if not isinstance(value, bool):
            raise ContainerError(f"{where}: {key} is {shorten(value)}, needs true or false; the config is damaged")
    return Scheme(bits, size, symmetric, by_column)


def _read_override(where: str, key: str, own: Mapping[str, Any], base: Scheme) -> tuple[re.Pattern[str], Scheme | None]:
    try:
        pattern = re.compile(key[2:] if key[:2] in ("+:", "-:") else key)
    except (re.error, OverflowError, RecursionError) as error:
        raise ContainerError(f"{where} is no regular expression: {error}") from None
    return pattern, None if key.startswith("-:") else _read_scheme(where, own, base)


def write_quantization(plan: Iterable[TensorInfo]) -> dict[str, Any] | None:
    """Returns the quantization_config of a plan, None when nothing is quantized.

    The most frequent format is the model's; other formats, and linear layers left in float, go to `dynamic`.
    """
    modules: dict[AffineFormat, list[str]] = {}
    floats: list[str] = []
    ordered = False
    for info in plan:
        module, format = info.name.removesuffix(".weight"), stored_format(info.format)
        if format is not None:
            modules.setdefault(format, []).append(module)
            ordered |= info.format != format.name
        elif len(info.shape) == 2 and module not in (EMBEDDING, HEAD):
            floats.append(module)
    if not modules:
        return None
    base, _ = Counter({format: len(own) for format, own in modules.items()}).most_common(1)[0]
    others = {format: own for format, own in modules.items() if format != base}
    dynamic: dict[str, dict[str, Any]] = {f"+:{module_expression(own)}": _entry(format) for format, own in others.items()}
    config = {
        "quant_method": METHOD,
        **_entry(base),
        "desc_act": ordered,
        "checkpoint_format": checkpoint_format(modules),
        "pack_dtype": "int32",
        "lm_head": any(HEAD in own for own in modules.values()),
    }
    if floats:
        dynamic[f"-:{module_expression(floats)}"] = {}
        config["modules_in_block_to_quantize"] = [[module for own in modules.values() for module in own]]
    return {**config, "dynamic": dynamic} if dynamic else config


def checkpoint_format(formats: Iterable[AffineFormat]) -> str:
    """Returns which version is written: v2 if any format is asymmetric, else v1 (gptq.py says why)."""
    return V2 if any(format.kind == "" for format in formats) else V1


def _entry(format: AffineFormat) -> dict[str, Any]:
    return {"bits": format.width, "group_size": format.group_size or -1, "sym": format.kind == "s"}
