"""Llama 3's rope scaling as GGUF keeps it: the divisors of the frequencies in a tensor, `rope_freqs.weight`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tersor.containers.gguf_keys import config_number
from tersor.errors import ContainerError
from tersor.tensor import Array


def rope_factors(where: str, scaling: Mapping[str, Any], theta: float, head_dim: int, context: int) -> Array:
    """Returns the divisors of the rope frequencies, (head_dim/2,) float32, that rope_type llama3 means.

    With wavelength L: 1 where L < original/high, factor where L > original/low, and in between
    1 / ((1 - s)/factor + s), s = (original/L - low) / (high - low). Source: transformers modeling_rope_utils.py,
    `_compute_llama3_parameters`; llama.cpp conversion/llama.py.
    """
    factor, low, high = (config_number(where, scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = config_number(where, scaling, "original_max_position_embeddings", context)
    if high <= low:
        raise ContainerError(f"{where}: rope scaling llama3 needs high_freq_factor {high} above low_freq_factor {low}")
    turns = original * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def llama3_scaling(factors: Array, theta: float, context: int) -> dict[str, Any]:
    """Returns the rope_scaling whose divisors these are: llama3 when its formula gives them, or else longrope, which lists them.

    GGUF keeps only the divisors. The settings of all published Llama 3 models are tried first, then those that fit: only
    original/low and original/high can be told from the divisors, and low is taken as 1.
    """
    factor = _snap(float(factors.max()))
    for high, original in ((4.0, 8192), *_fitted_llama3(factors, theta)):
        found = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
        found["original_max_position_embeddings"] = original
        if np.allclose(rope_factors("", found, theta, 2 * len(factors), context), factors, rtol=1e-4):
            return found
    listed = [float(f) for f in factors]
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_factor": listed,
        "long_factor": listed,
        "original_max_position_embeddings": context,
    }


def _fitted_llama3(factors: Array, theta: float) -> list[tuple[float, int]]:
    """Returns [(high, original)] that fit the blended divisors, with low = 1; empty when fewer than two are blended.

    From s = original/(high - 1) * turns_per_position - 1/(high - 1), a straight line.
    """
    factor = float(factors.max())
    if factor <= 1:
        return []
    turns_per_position = theta ** -(np.arange(len(factors)) / len(factors)) / (2 * math.pi)
    smooth = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    if between.sum() < 2:
        return []
    slope, offset = np.polyfit(turns_per_position[between], smooth[between], 1)
    return [(_snap(1 - 1 / offset), round(_snap(-slope / offset)))] if offset < 0 < slope else []


def _snap(value: float) -> float:
    """Returns the nearest integer when it is within the noise of float32 factors, or else the value."""
    return float(round(value)) if abs(value - round(value)) < 1e-3 * abs(value) else value
