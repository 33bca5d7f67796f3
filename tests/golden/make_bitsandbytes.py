"""Makes bitsandbytes_4bit.json: what bitsandbytes 0.50.2 stores for a fixed tensor. Needs torch and bitsandbytes; not run by the tests.

python tests/golden/make_bitsandbytes.py > tests/golden/bitsandbytes_4bit.json
"""

import hashlib
import json

import bitsandbytes
import bitsandbytes.functional as bnb
import torch

ROWS, COLUMNS = 16, 2048


def weights() -> list[float]:
    """A multiplicative hash scaled by a block-dependent factor; exact in float32 up to the final rounding."""
    values = []
    for i in range(ROWS * COLUMNS):
        unit = (i * 2654435761 % 2**32) / 2**32 - 0.5
        values.append(unit * (1 + i // 64 * 37 % 11))
    return values


def main() -> None:
    w = torch.tensor(weights(), dtype=torch.float32).reshape(ROWS, COLUMNS)
    golden: dict[str, object] = {
        "bitsandbytes": bitsandbytes.__version__,
        "shape": [ROWS, COLUMNS],
        "dynamic_map": [v.hex() for v in bnb.create_dynamic_map().tolist()],
    }
    for table in ("nf4", "fp4"):
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type=table, compress_statistics=False)
        codes = packed.reshape(-1)
        if table == "fp4":  # code 8 is -0 and stands for the same value as code 0
            high, low = codes >> 4, codes & 15
            codes = (torch.where(high == 8, 0, high) << 4 | torch.where(low == 8, 0, low)).to(torch.uint8)
        _, nested = bnb.quantize_4bit(w, blocksize=64, quant_type=table, compress_statistics=True)
        absmax = bnb.dequantize_blockwise(nested.absmax, nested.state2) + nested.offset
        golden[table] = {
            "table": [v.hex() for v in state.code.tolist()],
            "first_codes": codes[:64].numpy().tobytes().hex(),
            "codes_sha256": hashlib.sha256(codes.numpy().tobytes()).hexdigest(),
            "absmax_sha256": hashlib.sha256(state.absmax.numpy().tobytes()).hexdigest(),
            "nested_codes": nested.absmax.numpy().tobytes().hex(),
            "nested_absmax": [v.hex() for v in nested.state2.absmax.tolist()],
            "nested_offset": float(nested.offset).hex(),
            "absmax": [v.hex() for v in absmax[:16].tolist()],
        }
    print(json.dumps(golden, indent=1))


if __name__ == "__main__":
    main()
