"""Writes ggml_blocks.json: one hand-made block of every ggml type and the values that ggml's own C code reads from it.

    python make_ggml_blocks.py path/to/libggml-base.so     # found in the llama_cpp package, for instance

The bytes are (37 * i + 11) mod 256, so that every field differs; the float16 scales are 0.5, 0.25 or the like.
"""

import ctypes
import json
import struct
import sys
from pathlib import Path

# name: (ggml type id, values, bytes, {offset: float16 to put there})
TYPES = {
    "q4_0": (2, 32, 18, {0: 0.5}),
    "q4_1": (3, 32, 20, {0: 0.5, 2: -3.0}),
    "q5_0": (6, 32, 22, {0: 0.5}),
    "q5_1": (7, 32, 24, {0: 0.5, 2: -3.0}),
    "q8_0": (8, 32, 34, {0: 0.5}),
    "q2_k": (10, 256, 84, {80: 0.5, 82: 0.25}),
    "q3_k": (11, 256, 110, {108: 0.5}),
    "q4_k": (12, 256, 144, {0: 0.5, 2: 0.25}),
    "q5_k": (13, 256, 176, {0: 0.5, 2: 0.25}),
    "q6_k": (14, 256, 210, {208: 0.5}),
    "iq2_xxs": (16, 256, 66, {0: 0.5}),
    "iq2_xs": (17, 256, 74, {0: 0.5}),
    "iq3_xxs": (18, 256, 98, {0: 0.5}),
    "iq1_s": (19, 256, 50, {0: 0.5}),
    "iq4_nl": (20, 32, 18, {0: 0.5}),
    "iq3_s": (21, 256, 110, {0: 0.5}),
    "iq2_s": (22, 256, 82, {0: 0.5}),
    "iq4_xs": (23, 256, 136, {0: 0.5}),
    "iq1_m": (29, 256, 56, {}),
    "tq1_0": (34, 256, 54, {52: 0.5}),
    "tq2_0": (35, 256, 66, {64: 0.5}),
    "mxfp4": (39, 32, 17, {}),
    "nvfp4": (40, 64, 36, {}),
    "q1_0": (41, 128, 18, {0: 0.5}),
    "q2_0": (42, 64, 18, {0: 0.5}),
}


class Traits(ctypes.Structure):
    """The head of ggml's struct ggml_type_traits (ggml.h)."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("values", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("bytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_float), ctypes.c_int64)),
    )


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    golden = {}
    for name, (number, values, size, scales) in TYPES.items():
        traits = library.ggml_get_type_traits(number).contents
        assert (traits.name.decode().lower(), traits.values, traits.bytes) == (name, values, size), (name, traits.name, traits.values)
        block = bytearray((37 * i + 11) % 256 for i in range(size))
        for offset, scale in scales.items():
            block[offset : offset + 2] = struct.pack("<e", scale)
        out = (ctypes.c_float * values)()
        traits.to_float(bytes(block), out, values)
        golden[name] = {"block": block.hex(), "values": bytes(out).hex()}
    Path(__file__).with_name("ggml_blocks.json").write_text(json.dumps(golden, indent=0) + "\n")


if __name__ == "__main__":
    main()
