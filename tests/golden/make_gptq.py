"""Makes gptq.json: what gptqmodel 7.6.0 packs for fixed codes, as GPTQ (v2 and v1) and as AWQ. Needs gptqmodel; not run by the tests.

python tests/golden/make_gptq.py tests/golden/gptq.json
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import gptqmodel
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

ROWS, COLUMNS, GROUP = 32, 64, 32
GROUPS = COLUMNS // GROUP


def noise(count: int, below: int, seed: int) -> list[int]:
    """A multiplicative hash: integers in [0, below)."""
    return [((i + 1) * 2654435761 * (2 * seed + 1) % 2**32 >> 7) % below for i in range(count)]


def layer(bits: int, symmetric: bool, ordered: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns codes (rows, in), zeros and scales (rows, groups), g_idx (in,). Zeros are at least 1, which v1 holds without wrapping."""
    codes = torch.tensor(noise(ROWS * COLUMNS, 2**bits, 1)).reshape(ROWS, COLUMNS)
    zeros = torch.tensor(noise(ROWS * GROUPS, 2**bits - 1, 2)).reshape(ROWS, GROUPS) + 1
    scales = (torch.tensor(noise(ROWS * GROUPS, 1000, 3)).reshape(ROWS, GROUPS) + 24) / 1024  # exact in float16
    g_idx = torch.arange(COLUMNS) // GROUP
    if ordered:
        g_idx = g_idx[torch.tensor([i * 13 % COLUMNS for i in range(COLUMNS)])]
    return codes, torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros, scales, g_idx.to(torch.int32)


def text(tensor: torch.Tensor) -> str:
    """Returns the tensor's bytes in base 64."""
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()


def packed(kind: type, bits: int, symmetric: bool, ordered: bool) -> dict[str, object]:
    """Returns what one of gptqmodel's layers holds after packing the weights that codes, zeros and scales stand for."""
    codes, zeros, scales, g_idx = layer(bits, symmetric, ordered)
    w = (codes - zeros[:, g_idx]) * scales[:, g_idx]
    linear = SimpleNamespace(weight=SimpleNamespace(data=w), bias=None)
    module = kind(bits, GROUP, symmetric, ordered, COLUMNS, ROWS, register_buffers=True)
    if kind is AwqTorchLinear:
        module.pack(linear, scales, zeros)
        return {name: text(getattr(module, name)) for name in ("qweight", "qzeros")} | {"scales": text(module.scales.half())}
    module.pack_original(linear, scales, zeros, g_idx)
    out: dict[str, object] = {name: text(getattr(module, name)) for name in ("qweight", "qzeros", "scales", "g_idx")}
    module.scales = module.scales.to(torch.float32)
    module.eval()
    values = module.dequantize_weight().T.contiguous()
    assert torch.equal(values, w), "gptqmodel does not give back what it packed"
    out["weights_sha256"] = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    return out | {"qzeros_v1": text(module.qzeros)}


def main() -> None:
    cases = {
        f"int{bits}_g{GROUP}{'s' * symmetric}{'o' * ordered}": packed(TorchLinear, bits, symmetric, ordered)
        for bits in (2, 3, 4, 8)
        for symmetric in (False, True)
        for ordered in (False, True)
    }
    awq = {f"int4_g{GROUP}{'s' * symmetric}": packed(AwqTorchLinear, 4, symmetric, False) for symmetric in (False, True)}
    golden = {"gptqmodel": gptqmodel.__version__, "shape": [ROWS, COLUMNS], "gptq": cases, "awq": awq}
    Path(sys.argv[1]).write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
