"""What a model weighs, from its config.json alone: parameters, bytes at every bit width and in every format, KV cache, fit in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from tersor.errors import FormatError, ModelError, RecipeError
from tersor.recipe import Recipe
from tersor.tensor import TensorInfo

BIT_WIDTHS = (32, 16, 8, 4, 3, 2)
RECIPES = (  # behind |: the type that llama.cpp falls back to on narrow models
    "f16",
    "q8_0",
    "q6_k|q8_0",
    "q5_k|q5_1",
    "q4_k|q5_0",
    "q4_0",
    "iq4_xs|iq4_nl",
    "int4_g128|int4_g64|int4_g32",
    "q3_k|iq4_nl",
    "int3_g128|int3_g64|int3_g32",
    "q2_k|iq4_nl",
    "int2_g64|int2_g32",
)
KV_BYTES = 2  # float16 keys and values
WORKING_BYTES = 256 << 20  # activations, logits, the interpreter: what running adds to weights and cache


@dataclass(frozen=True)
class Size:
    """Bytes of all tensors under a recipe: scales included, embedding and norms by the recipe's defaults.

    bits: true bits per weight of the whole model. fits: whether weights, KV cache of `context` tokens and working memory fit in the RAM.
    """

    recipe: str
    nbytes: int
    bits: float
    total_bytes: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The weight of a model. widths: bytes if every parameter took so many bits and nothing else; sizes: the truth per recipe."""

    model: str
    architecture: str
    parameters: int
    block_parameters: int
    embedding_parameters: int
    widths: Mapping[int, float]
    sizes: tuple[Size, ...]
    kv_bytes_per_token: int
    context: int
    ram_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        return asdict(self)


def plan(
    model: str | Path,
    *,
    recipes: Sequence[str] | None = None,
    context: int = 1024,
    ram: int | None = None,
    gguf: bool | None = None,
) -> Plan:
    """Returns the plan of a config.json, a Hugging Face directory (weights or not), a .gguf file or a hub id.

    recipes: None = RECIPES, without those that fit no tensor of this width. context: tokens of KV cache to count.
    ram: bytes that may be used; by default all that this machine has.
    gguf: whether embedding and head follow GGUF's defaults; None: GGUF's for ggml types, else the directory's.
    Raises ModelError for a config that no architecture reads, RecipeError and FormatError for recipes.
    """
    if context < 1 or (ram is not None and ram < 1):
        raise RecipeError(f"context {context}, ram {ram}: both must be at least 1")
    config, tensors = describe(model)
    most = config.get("max_position_embeddings")
    if isinstance(most, int) and context > most:
        raise RecipeError(f"context {context}: the model's is {most}; count that many or fewer")
    spec_kv = kv_bytes_per_token(config)
    memory = ram or machine_ram()
    total = sum(prod(t.shape) for t in tensors.values())
    edges = sum(prod(t.shape) for t in tensors.values() if {"embed_tokens", "lm_head"} & set(t.name.split(".")))
    blocks = sum(prod(t.shape) for t in tensors.values() if len(t.shape) > 1) - edges
    sizes = []
    for text in recipes or RECIPES:
        try:
            nbytes = recipe_bytes(tensors, text, bool(config.get("tie_word_embeddings")), gguf)
        except FormatError:
            if recipes:
                raise
            continue
        needed = nbytes + spec_kv * context + WORKING_BYTES
        sizes.append(Size(text, nbytes, 8.0 * nbytes / total, needed, needed <= memory))
    return Plan(
        model=str(model),
        architecture=str(config.get("model_type")),
        parameters=total,
        block_parameters=blocks,
        embedding_parameters=edges,
        widths={bits: total * bits / 8 for bits in BIT_WIDTHS},
        sizes=tuple(sizes),
        kv_bytes_per_token=spec_kv,
        context=context,
        ram_bytes=memory,
    )


def describe(model: str | Path) -> tuple[Mapping[str, Any], Mapping[str, TensorInfo]]:
    """Returns (config, tensors) of a model; from config.json alone the tensors are those that its architecture expects, in bfloat16."""
    from tersor.containers import open_checkpoint

    path = Path(model)
    if path.is_dir() and not list(path.glob("*.safetensors*")):
        path = path / "config.json"
    if path.suffix != ".json":
        with open_checkpoint(model) as checkpoint:
            return checkpoint.description.config, dict(checkpoint.tensors)
    from tersor.models import expected_tensors, spec_of

    config = read_config(path)
    shapes = expected_tensors(spec_of(config))
    return config, {name: TensorInfo(name, "bf16", shape, 2 * prod(shape)) for name, shape in shapes.items()}


def read_config(path: Path) -> dict[str, Any]:
    """Returns config.json as a dict. Raises ModelError when it is missing or no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}; name a config.json, a model directory, a .gguf file or a hub id") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}; name a Hugging Face config.json") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}, not an object; name a Hugging Face config.json")
    return config


def recipe_bytes(tensors: Mapping[str, TensorInfo], text: str, tied: bool = False, gguf: bool | None = None) -> int:
    """Returns the bytes of all tensors under a recipe, as the pipeline would store them."""
    from tersor.containers import CONTAINERS
    from tersor.formats import get_format

    recipe = Recipe.parse(text)
    as_gguf = gguf
    if as_gguf is None:
        as_gguf = not recipe.default.is_cast and all(CONTAINERS["gguf"].holds(f) for f in recipe.default.formats)
    if tied and any(step.method.name == "rotate" for step in recipe.before):  # the final norm goes into the head (methods/rotate.py)
        tensors = {**tensors, "lm_head.weight": replace(tensors["model.embed_tokens.weight"], name="lm_head.weight")}
        tied = False
    total = 0
    for name, choice in recipe.assign(tensors, gguf=as_gguf, tied=tied).items():
        info = tensors[name]
        format = choice.format_for(info)
        total += info.nbytes if format == "keep" else get_format(format).nbytes(info.shape)
    return total


def kv_bytes_per_token(config: Mapping[str, Any]) -> int:
    """Returns the bytes of keys and values that one token takes, 2 * layers * kv_heads * head_dim float16; no window subtracted."""
    from tersor.models import spec_of

    spec = spec_of(config)
    return 2 * len(spec.layers) * spec.kv_heads * spec.head_dim * KV_BYTES


def machine_ram() -> int:
    """Returns the physical memory of this machine in bytes; 0 when the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def parse_bytes(text: str) -> int:
    """Returns bytes of `8GiB`, `8G`, `512MB`, `1.5 TiB` or a plain number. KB, MB, GB, TB are decimal; K, KiB and so on binary."""
    number = text.strip().lower().removesuffix("b")
    binary = number.endswith("i") or not text.strip().lower().endswith("b")
    number = number.removesuffix("i")
    power = " kmgt".find(number[-1:]) if number[-1:] in ("k", "m", "g", "t") else 0
    try:
        value = float(number[:-1] if power else number) * (1024 if binary else 1000) ** power
        if not 0 < value < 2**63:
            raise ValueError
    except ValueError:
        raise RecipeError(f"size {text!r} is none; write it like 8GiB, 512MB or 4000000000") from None
    return int(value)
