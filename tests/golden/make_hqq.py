"""Makes hqq_layers.json: what hqq 0.2.8.post1 stores of a fixed layer, tensor by tensor. Needs torch and hqq; not run by the tests.

python tests/golden/make_hqq.py > tests/golden/hqq_layers.json
"""

import base64
import hashlib
import json
from typing import Any

import hqq
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

ROWS, COLUMNS = 16, 192
CASES: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"nbits": bits, "group_size": 64} for bits in (8, 6, 5, 4, 3, 2, 1)},
    "1.58 bits": {"nbits": 1.58, "group_size": 32},
    "4 bits, groups of 32 as bfloat16": {"nbits": 4, "group_size": 32, "view_as_float": True, "compute_dtype": torch.bfloat16},
    "3 bits, groups of 32 as float16": {"nbits": 3, "group_size": 32, "view_as_float": True},
    "2 bits, a group a row": {"nbits": 2, "group_size": None},
    "4 bits along the column": {"nbits": 4, "group_size": 64, "axis": 0},
    "4 bits, only rounded": {"nbits": 4, "group_size": 64, "optimize": False},
}


def weights() -> torch.Tensor:
    """A multiplicative hash scaled by a block-dependent factor; exact in float32 up to the final rounding."""
    values = []
    for i in range(ROWS * COLUMNS):
        unit = (i * 2654435761 % 2**32) / 2**32 - 0.5
        values.append(unit * (1 + i // 64 * 37 % 11))
    return torch.tensor(values, dtype=torch.float32).reshape(ROWS, COLUMNS)


def stored(tensor: torch.Tensor) -> dict[str, Any]:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "data": base64.b64encode(data).decode()}


def layer(nbits: float, group_size: int | None, compute_dtype: torch.dtype = torch.float16, **options: Any) -> dict[str, Any]:
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = weights()
    optimize = options.pop("optimize", True)
    config = BaseQuantizeConfig(nbits=nbits, group_size=group_size, **{"axis": 1, **options})
    config["weight_quant_params"]["optimize"] = optimize
    made = HQQLinear(linear, config, compute_dtype=compute_dtype, device="cpu")
    wide = {name: value.float() if torch.is_tensor(value) else value for name, value in made.meta.items()}
    decoded = Quantizer.dequantize(made.W_q.data, wide | {"compute_dtype": torch.float32})
    return {
        "tensors": {name: stored(tensor.data) for name, tensor in sorted(made.state_dict().items())},
        "first": [value.hex() for value in decoded.reshape(-1)[:8].tolist()],
        "sha256": hashlib.sha256(decoded.numpy().tobytes()).hexdigest(),
    }


def main() -> None:
    torch.manual_seed(0)
    layers = {name: layer(**options) for name, options in CASES.items()}
    print(json.dumps({"hqq": hqq.__version__, "shape": [ROWS, COLUMNS], "layers": layers}, indent=1))


if __name__ == "__main__":
    main()
