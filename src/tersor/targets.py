"""The engines that `--to` knows beside the containers: which file each loads, and what it demands of the tensors in it.

    --to vllm         compressed-tensors; q, k, v in one format, gate and up in one; integers of its kernels; head and embedding float
    --to transformers compressed-tensors or bitsandbytes; no integers with zero points, which transformers 5 makes room for in another shape
    --to llama.cpp    GGUF, of ggml's types only
    ...

A demand that the plan does not meet is refused before anything is written, with the tensors and what would meet it. Sources:
vllm-project/vllm model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py (WNA16_SUPPORTED_TYPES_MAP, bits
with and without zeros), quantization/utils/marlin_utils.py (MARLIN_SUPPORTED_GROUP_SIZES), models/llama.py (packed_modules_mapping);
huggingface/transformers integrations/bitsandbytes.py (which modules are skipped); ml-explore/mlx-lm mlx_lm/utils.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from tersor.containers import CONTAINERS
from tersor.errors import RecipeError, unknown
from tersor.formats import get_format
from tersor.formats.affine import AffineFormat
from tersor.formats.ordered import OrderedFormat
from tersor.recipe import CASTS, is_edge
from tersor.tensor import TensorInfo

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what vLLM and SGLang join into one product
_VLLM_BITS, _VLLM_ZERO_BITS, _VLLM_GROUPS = (4, 8), (4, 8), (0, 32, 64, 128)  # 0: the whole row

Demand = Callable[[Mapping[str, TensorInfo]], str | None]  # plan -> what is wrong with it


@dataclass(frozen=True)
class Target:
    """An engine. containers: what it loads, the first being written unless it cannot hold a format; demands: what else it asks."""

    name: str
    containers: tuple[str, ...]
    demands: tuple[Demand, ...] = ()


def fused(names: Collection[str]) -> list[tuple[str, ...]]:
    """Returns the matrices of these names that engines join into one product, together, in FUSED's order."""
    found = []
    for name in names:
        stem, _, part = name.removesuffix(".weight").rpartition(".")
        for group in FUSED:
            if part == group[0]:
                found.append(tuple(other for other in (f"{stem}.{p}.weight" for p in group) if other in names))
    return found


def unequal(matrices: Mapping[str, TensorInfo]) -> list[tuple[str, list[str]]]:
    """Returns (block and part, its formats) of all that engines join into one product though the formats differ."""
    found = []
    for names in fused(matrices):
        formats = [matrices[name].format for name in names]
        if len(set(formats)) > 1:
            stem, _, part = names[0].removesuffix(".weight").rpartition(".")
            group = next(group for group in FUSED if group[0] == part)
            found.append((f"{stem}.[{'|'.join(group)}]", formats))
    return found


def _joined_alike(plan: Mapping[str, TensorInfo]) -> str | None:
    found = unequal(plan)
    if not found:
        return None
    where, formats = found[0]
    return f"{where} are {', '.join(formats)} ({len(found)} such); it joins them into one product: give them one format in the recipe"


def _edges_float(plan: Mapping[str, TensorInfo]) -> str | None:
    for info in plan.values():
        if is_edge(info.name) and info.format not in CASTS:
            return f"{info.name} is {info.format}, and it reads embedding and head as floats; leave them out of the recipe"
    return None


def _vllm_kernels(plan: Mapping[str, TensorInfo]) -> str | None:
    for info in plan.values():
        format = get_format(info.format)
        plain = format.plain if isinstance(format, OrderedFormat) else format
        if not isinstance(plain, AffineFormat):
            continue
        bits = _VLLM_ZERO_BITS if plain.kind == "" else _VLLM_BITS
        if plain.width not in bits or plain.group_size not in _VLLM_GROUPS:
            return f"{info.name} is {info.format}; its kernels have 4 and 8 bits in groups of 32, 64 or 128, or one per row: like int4_g128"
        if plain.width == 8 and plain.kind == "" and plain.group_size > 0:
            return f"{info.name} is {info.format}; its kernels have no 8 bits in groups with zero points; use {info.format}s"
    return None


def _transformers_zeros(plan: Mapping[str, TensorInfo]) -> str | None:
    for info in plan.values():
        format = get_format(info.format)
        plain = format.plain if isinstance(format, OrderedFormat) else format
        if isinstance(plain, AffineFormat) and plain.kind == "":
            what = f"{info.name} is {info.format}; it makes room for zero points of another shape (tried: 5.23)"
            return f"{what}; use {plain.name}s, or --to gptq"
    return None


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("vllm", ("compressed-tensors", "gptq", "awq"), (_joined_alike, _edges_float, _vllm_kernels)),
        Target("sglang", ("compressed-tensors", "gptq", "awq"), (_joined_alike, _edges_float, _vllm_kernels)),
        Target("llama.cpp", ("gguf",)),
        Target("ollama", ("gguf",)),
        Target("lm-studio", ("gguf",)),
        Target("transformers", ("compressed-tensors", "bnb"), (_transformers_zeros,)),
        Target("bitsandbytes", ("bnb",), (_edges_float,)),
        Target("mlx-lm", ("mlx",)),
        Target("onnxruntime", ("onnx",)),
    )
}


def container_for(to: str, formats: Sequence[str]) -> str:
    """Returns the container that `--to` means: itself, or of an engine's the first that holds all these formats.

    Raises RecipeError for an unknown name, and when the engine loads no container that holds a format.
    """
    if to in CONTAINERS:
        return to
    if to not in TARGETS:
        raise RecipeError(unknown("container or engine", to, (*CONTAINERS, *TARGETS)))
    for name in TARGETS[to].containers:
        if all(CONTAINERS[name].holds(format) for format in formats):
            return name
    lost = next(f for f in formats if not any(CONTAINERS[name].holds(f) for name in TARGETS[to].containers))
    raise RecipeError(f"--to {to}: {lost} is in no container that it loads ({', '.join(TARGETS[to].containers)})")


def check_demands(to: str | None, plan: Sequence[TensorInfo]) -> None:
    """Raises RecipeError when the engine named by `--to` would refuse the plan; says why and what it would take."""
    if to not in TARGETS:
        return
    by_name = {info.name: info for info in plan}
    for demand in TARGETS[to].demands:
        fault = demand(by_name)
        if fault is not None:
            raise RecipeError(f"--to {to}: {fault}")
