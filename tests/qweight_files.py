"""GPTQ and AWQ directories as other tools write them: a tiny model, some of whose linear layers are replaced by given parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tiny import tiny_model

Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"
HEAD = "lm_head"


def foreign(path: Path, layers: Mapping[str, Mapping[str, np.ndarray]], quantization: Any, **tiny: Any) -> Path:
    """Writes a model of 64 columns with these layers as {module: {part: array}} and this quantization_config. tiny: for tiny_model."""
    tiny_model(path, layers=1, hidden=64, intermediate=64, heads=2, kv_heads=2, **{"tie": False, **tiny})
    tensors = load_file(path / "model.safetensors")
    for module, parts in layers.items():
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{part}": array for part, array in parts.items()}
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return path


def numbers(
    bits: int, rows: int = 64, columns: int = 64, groups: int = 2, symmetric: bool = False, seed: int = 0
) -> tuple[list, list, list]:
    """Returns random (codes, zeros, scales); zeros are of all values, 0 too."""
    rng = np.random.default_rng(seed)
    zeros = rng.integers(0, 2**bits, (rows, groups))
    zeros.flat[: 2**bits] = np.arange(2**bits)[: zeros.size]
    scales = rng.random((rows, groups)).astype(np.float16)
    return (
        rng.integers(0, 2**bits, (rows, columns)).tolist(),
        (np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros).tolist(),
        scales.tolist(),
    )
