"""nf4, fp4 and double quantization from their definitions, one number at a time. Imports nothing of tersor."""

from __future__ import annotations

from statistics import NormalDist


def nf4_table() -> list[float]:
    """QLoRA (arXiv 2305.14314), section 3 and appendix E, with the offset of its code.

    8 quantiles of N(0, 1) from `offset` down to 1/2 for the positive side, 7 for the negative, one exact zero; scaled to 1.
    offset = 1/2 ((1 - 1/30) + (1 - 1/32)) = 0.9677083 keeps the outermost quantile finite.
    """
    offset = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    quantile = NormalDist().inv_cdf

    def half(count: int) -> list[float]:
        return [quantile(offset + (0.5 - offset) * i / count) for i in range(count)]

    values = sorted([*half(8), 0.0, *(-v for v in half(7))])
    return [v / values[-1] for v in values]


def fp4_table() -> list[float]:
    """sign<<3 | magnitude code, with the magnitudes that bitsandbytes lists: exponents 2^-4, 2^3.., one fraction bit; scaled to 1."""
    magnitudes = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    return [m / 12 for m in magnitudes] + [-m / 12 for m in magnitudes]


def nearest_index(x: float, table: list[float]) -> int:
    """The index of the nearest entry; of two equally near the smaller value, of two equal values the first."""
    return min(range(len(table)), key=lambda i: (abs(x - table[i]), table[i], i))
