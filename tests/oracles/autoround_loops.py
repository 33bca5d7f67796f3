"""SignRound (arXiv 2309.05516, equations 3 to 5) on one linear layer, one number at a time, gradients by hand. Imports nothing of tersor.

    q = clip(round(w/s + V) + z, 0, top)   w_hat = (q - z) s   s = f16((a hi - b lo) / top)   z = clip(round(-b lo / s), 0, top)

with lo = min(w, 0), hi = max(w, 0) over a group; rounding and float16 pass gradients straight through, clipping only inside.
"""

from __future__ import annotations

import numpy as np


def tune_affine(
    w: np.ndarray, x: np.ndarray, target: np.ndarray, bits: int, group: int, iterations: int, first: float
) -> tuple[list, list, list]:
    """(codes, scales, zeros) per row, the best of all states by |x w_hat^T - target|^2. w: (rows, in); x: (n, in); target: (n, rows)."""
    rows, columns = w.shape
    top = 2**bits - 1
    offsets = [[0.0] * columns for _ in range(rows)]
    alpha = [[1.0] * (columns // group) for _ in range(rows)]
    beta = [[1.0] * (columns // group) for _ in range(rows)]
    best: tuple = (float("inf"), None)
    for step in range(iterations + 1):
        rate = first * (1 - step / iterations)
        codes = [[0] * columns for _ in range(rows)]
        scales, zeros = ([[0.0] * (columns // group) for _ in range(rows)] for _ in range(2))
        w_hat = np.zeros((rows, columns))
        for i in range(rows):
            for g in range(columns // group):
                part = [float(v) for v in w[i, g * group : (g + 1) * group]]
                lo, hi = min(0.0, *part), max(0.0, *part)
                s = float(np.float16((alpha[i][g] * hi - beta[i][g] * lo) / top))
                z = min(top, max(0, round(-beta[i][g] * lo / s)))
                scales[i][g], zeros[i][g] = s, z
                for j in range(g * group, (g + 1) * group):
                    codes[i][j] = min(top, max(0, round(float(w[i, j]) / s + offsets[i][j]) + z))
                    w_hat[i, j] = (codes[i][j] - z) * s
        wrong = x.astype(np.float64) @ w_hat.T - target
        loss = float((wrong * wrong).sum())
        if loss < best[0]:
            best = (loss, (codes, scales, zeros))
        if step == iterations:
            break
        of_w = 2 * wrong.T @ x.astype(np.float64)
        for i in range(rows):
            for g in range(columns // group):
                part = [float(v) for v in w[i, g * group : (g + 1) * group]]
                lo, hi = min(0.0, *part), max(0.0, *part)
                s, z = scales[i][g], zeros[i][g]
                z_inside = 0 <= round(-beta[i][g] * lo / s) <= top
                of_s, of_z = 0.0, 0.0
                for j in range(g * group, (g + 1) * group):
                    inside = 0 <= round(float(w[i, j]) / s + offsets[i][j]) + z <= top
                    of_s += of_w[i, j] * ((codes[i][j] - z) - (float(w[i, j]) / s if inside else 0.0))
                    of_z += of_w[i, j] * (0.0 if inside else -s)
                    moved = offsets[i][j] - rate * float(np.sign(of_w[i, j] * s if inside else 0.0))
                    offsets[i][j] = min(0.5, max(-0.5, moved))
                if z_inside:
                    of_s += of_z * beta[i][g] * lo / s**2
                of_alpha = of_s * hi / top
                of_beta = of_s * -lo / top + (of_z * -lo / s if z_inside else 0.0)
                alpha[i][g] = min(1.0, max(0.0, alpha[i][g] - rate * float(np.sign(of_alpha))))
                beta[i][g] = min(1.0, max(0.0, beta[i][g] - rate * float(np.sign(of_beta))))
    return best[1]


def tune_levels(w: np.ndarray, levels: np.ndarray, x: np.ndarray, target: np.ndarray, iterations: int, first: float) -> np.ndarray:
    """The best w_hat of all states when every weight goes to the level below or above it. levels: (rows, in, count), sorted."""
    rows, columns = w.shape
    offsets = np.zeros((rows, columns))
    best: tuple = (float("inf"), None)
    for step in range(iterations + 1):
        w_hat, gaps = np.zeros((rows, columns)), np.zeros((rows, columns))
        for i in range(rows):
            for j in range(columns):
                value = float(w[i, j])
                down = max((v for v in levels[i, j] if v <= value), default=None)
                up = min((v for v in levels[i, j] if v >= value), default=None)
                down, up = (up if down is None else down), (down if up is None else up)
                gaps[i, j] = up - down
                share = min(1.0, max(0.0, (value - down) / gaps[i, j])) if up != down else 0.0
                w_hat[i, j] = up if share + offsets[i, j] > 0.5 else down
        wrong = x.astype(np.float64) @ w_hat.T - target
        loss = float((wrong * wrong).sum())
        if loss < best[0]:
            best = (loss, w_hat)
        rate = first * (1 - step / iterations)
        offsets = np.clip(offsets - rate * np.sign(2 * wrong.T @ x.astype(np.float64) * gaps), -0.5, 0.5)
    return best[1]
