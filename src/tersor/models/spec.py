"""What a decoder is made of: sizes, norms, biases and scales; the tensors that it needs; which of them share an input.

An architecture's file turns a Hugging Face config into a DecoderSpec; everything else here follows from the spec alone,
so that sizes are known from config.json before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tersor.errors import ModelError, unknown
from tersor.models.rope import Rope
from tersor.tensor import TensorInfo

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # Hugging Face's name -> ops.gated's
LARGEST = 1 << 24  # of any size in a config: a hostile one must not make us allocate
MOST_LAYERS = 4096

# The linear layers by their names within a layer, those that multiply the same input together, in the order they run.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass(frozen=True)
class Layer:
    """What differs between layers. window: keys that a query sees, its own included; 0 = all. rope: its rotation."""

    window: int
    rope: Rope


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer. Sizes are counts of values; see models/decoder.py for the order of the operations."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int  # positions it was made for
    tied: bool  # the embedding is the head
    layers: tuple[Layer, ...]
    norm_eps: float
    activation: str  # as ops.gated names it
    attention_scale: float  # q k^T is multiplied by it
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of every head of q and k, before the rotation
    sandwich: bool = False  # norms after attention and MLP too, before their sum with the residual
    norm_offset: float = 0.0  # norms multiply by weight + norm_offset
    embedding_scale: float = 1.0
    attention_softcap: float = 0.0  # 0 = none
    final_softcap: float = 0.0


def expected_tensors(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor that a checkpoint of this spec holds, by Hugging Face name, in model order."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (spec.vocab_size, spec.hidden_size)}
    block = layer_tensors(spec)
    for i in range(len(spec.layers)):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (spec.hidden_size,)
    if not spec.tied:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def layer_tensors(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of one layer's tensors by their names within the layer."""
    d, f, q, kv = spec.hidden_size, spec.intermediate_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    projections = [
        ("self_attn.q_proj", q, d, spec.qkv_bias),
        ("self_attn.k_proj", kv, d, spec.qkv_bias),
        ("self_attn.v_proj", kv, d, spec.qkv_bias),
        ("self_attn.o_proj", d, q, spec.output_bias),
        ("mlp.gate_proj", f, d, spec.mlp_bias),
        ("mlp.up_proj", f, d, spec.mlp_bias),
        ("mlp.down_proj", d, f, spec.mlp_bias),
    ]
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
    for name, rows, columns, bias in projections:
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    if spec.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (spec.head_dim,), "self_attn.k_norm.weight": (spec.head_dim,)}
    if spec.sandwich:
        shapes |= {"pre_feedforward_layernorm.weight": (d,), "post_feedforward_layernorm.weight": (d,)}
    return shapes


def linear_groups(spec: DecoderSpec) -> tuple[tuple[str, ...], ...]:
    """Returns the linear layers' weights by name, those that multiply the same input together, in the order they run."""
    return tuple(tuple(f"model.layers.{i}.{name}.weight" for name in group) for i in range(len(spec.layers)) for group in GROUPS)


def check_tensors(spec: DecoderSpec, tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Raises ModelError that lists what is missing, unexpected or of another shape in a checkpoint's tensors."""
    expected = expected_tensors(spec)
    missing = [name for name in expected if name not in tensors]
    surplus = [name for name in tensors if name not in expected and not _is_redundant(name, spec)]
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults = [
        f"{title} {_some(names)}" for title, names in (("missing", missing), ("unexpected", surplus), ("wrong shape", misshapen)) if names
    ]
    if faults:
        raise ModelError(f"{where}: the tensors do not fit config.json: {'; '.join(faults)}")


def _is_redundant(name: str, spec: DecoderSpec) -> bool:
    """Returns whether a stored tensor repeats what the config says: rotary buffers of old files, the copy of a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (spec.tied and name == "lm_head.weight")


def _some(names: Sequence[str], most: int = 5) -> str:
    """Returns the names in one line: the first few and how many more."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def dense_spec(config: Mapping[str, Any], layers: Sequence[Layer], *, tied: bool, activation: str | None = None) -> DecoderSpec:
    """Returns what all architectures read from a config in the same way. tied: when the config does not say.

    activation: its Hugging Face name, by default the config's hidden_act. Raises ModelError for sizes that are missing,
    absurd or do not fit each other, and for an unknown activation.
    """
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    kv_heads = size(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"config.json: num_attention_heads is {heads}, not a multiple of num_key_value_heads {kv_heads}")
    dim = head_dim(config)
    act = activation or config.get("hidden_act") or "silu"
    if act not in ACTIVATIONS:
        raise ModelError(f"config.json: {unknown('activation', str(act), ACTIVATIONS)}")
    return DecoderSpec(
        vocab_size=size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(config, "intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        context=max([size(config, "max_position_embeddings"), *(layer.rope.context for layer in layers)]),
        tied=flag(config, "tie_word_embeddings", tied),
        layers=tuple(layers),
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        activation=ACTIVATIONS[act],
        attention_scale=dim**-0.5,
    )


def head_dim(config: Mapping[str, Any]) -> int:
    """Returns head_dim, by default hidden_size / num_attention_heads. Raises ModelError when it is odd or no whole number."""
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise ModelError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; give head_dim")
    dim = size(config, "head_dim", hidden // heads)
    if dim % 2:
        raise ModelError(f"config.json: head_dim is {dim}; rotary embeddings need an even one")
    return dim


def layer_count(config: Mapping[str, Any]) -> int:
    """Returns num_hidden_layers. Raises ModelError above MOST_LAYERS."""
    count = size(config, "num_hidden_layers")
    if count > MOST_LAYERS:
        raise ModelError(f"config.json: num_hidden_layers is {count}; at most {MOST_LAYERS} are accepted")
    return count


def layer_kinds(config: Mapping[str, Any], default: Sequence[str]) -> list[str]:
    """Returns sliding_attention or full_attention for every layer: the config's layer_types, or the default."""
    kinds = config.get("layer_types") or list(default)
    if not isinstance(kinds, list):
        raise ModelError(f"config.json: layer_types is {kinds!r}; need a list")
    if len(kinds) != layer_count(config):
        raise ModelError(f"config.json: layer_types has {len(kinds)} entries for {layer_count(config)} layers")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise ModelError(f"config.json: layer_types: {unknown('kind', str(kind), ('sliding_attention', 'full_attention'))}")
    return kinds


def size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Returns a positive integer of the config. Raises ModelError when it is missing without default, or not one."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"config.json: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
        raise ModelError(f"config.json: {key} is {value!r}; need an integer in 1..{LARGEST}")
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Returns a finite number >= 0 of the config, the default when it is missing or null. Raises ModelError otherwise."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ModelError(f"config.json: {key} is {value!r}; need a number >= 0")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Returns a boolean of the config, the default when it is missing or null. Raises ModelError otherwise."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {key} is {value!r}; need true or false")
    return value
