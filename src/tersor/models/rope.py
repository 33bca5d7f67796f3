"""Rotary position embeddings: the frequencies of every kind of scaling that a config may name.

Source of the plain form: Su et al., RoFormer, 2021, section 3.4.2. Where a formula was published as code only, it is
the one of huggingface/transformers src/transformers/modeling_rope_utils.py, which configs are written for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tersor.errors import ModelError, unknown
from tersor.tensor import Array


@dataclass(frozen=True, eq=False)
class Rope:
    """A rotation. inv_freq: (head_dim/2,) float32, radians per position; scale: factor of cos and sin.

    context: positions that the scaling stretches the model to, when it says so, else 0.
    """

    inv_freq: Array
    scale: float = 1.0
    context: int = 0


Settings = Mapping[str, Any]


def rope_of(config: Mapping[str, Any], head_dim: int, kind: str | None = None, theta_key: str = "rope_theta", theta: float = 1e4) -> Rope:
    """Returns the rotation that a config describes, in the old spelling (`rope_theta`, `rope_scaling`) or the new
    (`rope_parameters`, nested by layer type for models with several).

    kind: the layer type whose entry is meant. theta_key, theta: the old key of its base and the base by default.
    Raises ModelError for a scaling that is unknown (by name), or incomplete.
    """
    settings = _settings(config, kind, theta_key)
    name = settings.get("rope_type") or settings.get("type") or "default"
    if name not in SCALINGS:
        raise ModelError(f"config.json: {unknown('rope scaling', str(name), SCALINGS)}")
    if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ModelError(f"config.json: partial_rotary_factor is {settings['partial_rotary_factor']}; only 1.0 is supported")
    base = _number(settings, "rope_theta", theta)
    # float32 throughout, as Hugging Face computes it: at position p an error of eps in a frequency turns by p * eps
    inv_freq = np.float32(1) / np.float32(base) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    return SCALINGS[name](inv_freq, settings, base, config)


def _settings(config: Mapping[str, Any], kind: str | None, theta_key: str) -> Settings:
    """Returns one flat dict of rope settings from either spelling."""
    given = config.get("rope_parameters")
    if given is None:
        scaling = config.get("rope_scaling") if kind != "sliding_attention" else None
        settings: Settings = {"rope_theta": config.get(theta_key), **_mapping(scaling)}
    else:
        settings = _mapping(given) if kind is None else _mapping(_mapping(given).get(kind))
    settings = {"partial_rotary_factor": config.get("partial_rotary_factor"), **settings}
    return {key: value for key, value in settings.items() if value is not None}


def _mapping(value: Any) -> Settings:
    """Returns a JSON object of the config, empty for null."""
    if not isinstance(value, Mapping) and value is not None:
        raise ModelError(f"config.json: rope scaling is {value!r}; need an object")
    return value or {}


def _number(settings: Settings, key: str, default: float | None = None) -> float:
    """Returns a positive number of the rope settings."""
    value = settings.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelError(f"config.json: rope scaling: {key} is {value!r}; need a number > 0")
    return float(value)


def _default(inv_freq: Array, settings: Settings, base: float, config: Mapping[str, Any]) -> Rope:
    """Returns the frequencies as they are."""
    return Rope(inv_freq)


def _dynamic(inv_freq: Array, settings: Settings, base: float, config: Mapping[str, Any]) -> Rope:
    """Returns the frequencies as they are: dynamic NTK scaling changes nothing up to max_position_embeddings, and
    beyond it would change the rotation of keys that are cached already; the context limit keeps us below."""
    _number(settings, "factor")
    return Rope(inv_freq)


def _linear(inv_freq: Array, settings: Settings, base: float, config: Mapping[str, Any]) -> Rope:
    """Returns frequencies divided by factor (position interpolation: Chen et al., 2023)."""
    return Rope(inv_freq / np.float32(_number(settings, "factor")))


def _llama3(inv_freq: Array, settings: Settings, base: float, config: Mapping[str, Any]) -> Rope:
    """Returns Llama 3.1's frequencies: long wavelengths are divided by factor, short ones kept, those between blended."""
    factor, low, high = (_number(settings, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _number(settings, "original_max_position_embeddings", config.get("max_position_embeddings"))
    if high <= low:
        raise ModelError(f"config.json: rope scaling: high_freq_factor {high} is not above low_freq_factor {low}")
    turns = original * inv_freq / np.float32(2 * math.pi)  # of each frequency over the original context
    smooth = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    return Rope(((1 - smooth) * inv_freq / np.float32(factor) + smooth * inv_freq).astype(np.float32))


def _yarn(inv_freq: Array, settings: Settings, base: float, config: Mapping[str, Any]) -> Rope:
    """Returns YaRN's frequencies and attention factor (Peng et al., 2023, sections 3.2 to 3.4)."""
    original = _number(settings, "original_max_position_embeddings", config.get("max_position_embeddings"))
    factor = _number(settings, "factor")
    half = len(inv_freq)

    def pair_that_turns(rotations: float) -> float:
        return half * math.log(original / (rotations * 2 * math.pi)) / math.log(base)

    first = pair_that_turns(_number(settings, "beta_fast", 32))
    last = pair_that_turns(_number(settings, "beta_slow", 1))
    if settings.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    width = last - first if last != first else 0.001
    interpolated = np.clip((np.arange(half, dtype=np.float32) - np.float32(first)) / np.float32(width), 0, 1)
    blended = inv_freq / np.float32(factor) * interpolated + inv_freq * (1 - interpolated)
    return Rope(blended.astype(np.float32), _yarn_attention_factor(settings, factor), int(factor * original))


def _yarn_attention_factor(settings: Settings, factor: float) -> float:
    """Returns the factor of cos and sin: as given, or 0.1 ln(factor) + 1, or the ratio of DeepSeek's two scales."""
    if "attention_factor" in settings:
        return _number(settings, "attention_factor")

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return scale(_number(settings, "mscale")) / scale(_number(settings, "mscale_all_dim"))
    return scale(1.0)


SCALINGS: dict[str, Callable[[Array, Settings, float, Mapping[str, Any]], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
