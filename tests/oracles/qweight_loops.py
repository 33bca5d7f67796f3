"""GPTQ and AWQ layers one bit at a time, from the drawings of AutoGPTQ's and AutoAWQ's modules. Imports nothing of tersor.

codes (rows, in), zeros and scales (rows, groups) are nested lists of numbers; g_idx (in,) is each column's group.
"""

from __future__ import annotations

import numpy as np

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def gptq_parts(codes: list, zeros: list, scales: list, g_idx: list, bits: int, stored_minus: int) -> dict[str, np.ndarray]:
    """The tensors of a layer. stored_minus: what is taken from a zero before it is stored, 1 for v1 and 0 for v2."""
    rows, columns, groups = len(codes), len(codes[0]), len(zeros[0])
    qweight = np.zeros((-(-columns * bits // 32), rows), np.uint32)
    for r in range(rows):
        for i in range(columns):
            for b in range(bits):
                at = i * bits + b
                qweight[at // 32, r] |= np.uint32((codes[r][i] >> b & 1) << at % 32)
    qzeros = np.zeros((groups, -(-rows * bits // 32)), np.uint32)
    for r in range(rows):
        for g in range(groups):
            stored = (zeros[r][g] - stored_minus) % 2**bits
            for b in range(bits):
                at = r * bits + b
                qzeros[g, at // 32] |= np.uint32((stored >> b & 1) << at % 32)
    return {
        "qweight": qweight.view(np.int32),
        "qzeros": qzeros.view(np.int32),
        "scales": np.array(scales, np.float16).T.copy(),
        "g_idx": np.array(g_idx, np.int32),
    }


def awq_parts(codes: list, zeros: list, scales: list) -> dict[str, np.ndarray]:
    """The tensors of a layer in the GEMM packing."""

    def words(value: np.ndarray) -> np.ndarray:  # (n, rows) -> (n, rows / 8)
        out = np.zeros((value.shape[0], value.shape[1] // 8), np.uint32)
        for n in range(out.shape[0]):
            for k in range(out.shape[1]):
                for nibble in range(8):
                    out[n, k] |= np.uint32(int(value[n, 8 * k + AWQ_ORDER[nibble]]) << 4 * nibble)
        return out.view(np.int32)

    return {"qweight": words(np.array(codes).T), "qzeros": words(np.array(zeros).T), "scales": np.array(scales, np.float16).T.copy()}


def weights(codes: list, zeros: list, scales: list, g_idx: list) -> np.ndarray:
    """w[r, i] = (code - zero of its group) * scale of its group, float32."""
    out = np.empty((len(codes), len(codes[0])), np.float32)
    for r, row in enumerate(codes):
        for i, code in enumerate(row):
            out[r, i] = np.float32(code - zeros[r][g_idx[i]]) * np.float32(scales[r][g_idx[i]])
    return out


def gptq_weights(parts: dict[str, np.ndarray], bits: int, stored_minus: int) -> np.ndarray:
    """The weights that a layer's stored tensors stand for, (rows, in) float32: a column of words is one long number."""
    mask, g_idx = 2**bits - 1, parts["g_idx"].tolist()
    rows, columns = parts["qweight"].shape[1], len(g_idx)
    zero_numbers = [int.from_bytes(words.astype("<i4").tobytes(), "little") for words in parts["qzeros"]]
    out = np.empty((rows, columns), np.float32)
    for r in range(rows):
        number = int.from_bytes(parts["qweight"][:, r].astype("<i4").tobytes(), "little")
        codes = [number >> i * bits & mask for i in range(columns)]
        zeros = [((stored >> r * bits & mask) + stored_minus) % 2**bits for stored in zero_numbers]
        steps = np.array([code - zeros[g_idx[i]] for i, code in enumerate(codes)], np.float32)
        out[r] = steps * parts["scales"][g_idx, r].astype(np.float32)
    return out
