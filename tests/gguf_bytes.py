"""GGUF files laid down by hand, byte for byte, so that a test may also write what no writer would.

gguf_bytes({"general.architecture": "llama", "a": U32(3)}, [Tensor("x", 0, (4, 2), 0)], data)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_STRUCT = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


@dataclass
class Tensor:
    """A tensor info. type: ggml's id; dims: fastest first; offset: into the data."""

    name: str
    type: int
    dims: tuple[int, ...]
    offset: int


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(kind: int, content: Any) -> bytes:
    """Returns a value behind its type. kind: a scalar type, STRING, or (ARRAY, item type)."""
    if isinstance(kind, tuple):
        item = kind[1]
        body = b"".join(string(x) if item == STRING else struct.pack("<" + _STRUCT[item], x) for x in content)
        return struct.pack("<IIQ", ARRAY, item, len(content)) + body
    return struct.pack("<I", kind) + (string(content) if kind == STRING else struct.pack("<" + _STRUCT[kind], content))


def preamble(n_tensors: int, n_pairs: int, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, n_tensors, n_pairs)


def info(tensor: Tensor) -> bytes:
    dims = struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims)
    return string(tensor.name) + dims + struct.pack("<IQ", tensor.type, tensor.offset)


def gguf_bytes(pairs: dict[str, tuple[Any, Any]], tensors: list[Tensor], data: bytes = b"", alignment: int = 32) -> bytes:
    """Returns a whole file. pairs: {key: (type, value)}."""
    head = preamble(len(tensors), len(pairs)) + b"".join(string(k) + value(*v) for k, v in pairs.items())
    head += b"".join(info(t) for t in tensors)
    return head + b"\0" * (-len(head) % alignment) + data


LLAMA_PAIRS: dict[str, tuple[Any, Any]] = {
    "general.architecture": (STRING, "llama"),
    "llama.block_count": (U32, 1),
    "llama.context_length": (U32, 64),
    "llama.embedding_length": (U32, 8),
    "llama.feed_forward_length": (U32, 16),
    "llama.attention.head_count": (U32, 2),
    "llama.attention.head_count_kv": (U32, 1),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
}


def llama_bytes(pairs: dict[str, tuple[Any, Any]] | None = None) -> tuple[bytes, dict[str, np.ndarray]]:
    """Returns (a tiny whole llama file of float32 tensors, its tensors by GGUF name)."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (10, 8),
        "output_norm.weight": (8,),
        "blk.0.attn_norm.weight": (8,),
        "blk.0.attn_q.weight": (8, 8),
        "blk.0.attn_k.weight": (4, 8),
        "blk.0.attn_v.weight": (4, 8),
        "blk.0.attn_output.weight": (8, 8),
        "blk.0.ffn_norm.weight": (8,),
        "blk.0.ffn_gate.weight": (16, 8),
        "blk.0.ffn_up.weight": (16, 8),
        "blk.0.ffn_down.weight": (8, 16),
    }
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors, data = [], b""
    for name, array in arrays.items():
        tensors.append(Tensor(name, 0, tuple(reversed(array.shape)), len(data)))
        data += array.tobytes()
        data += b"\0" * (-len(data) % 32)
    return gguf_bytes(LLAMA_PAIRS | (pairs or {}), tensors, data), arrays
