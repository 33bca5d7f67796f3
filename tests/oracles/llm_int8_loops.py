"""LLM.int8() (Dettmers et al., arXiv 2208.07339) from the paper, one number at a time. Imports nothing of tersor."""

from __future__ import annotations


def quantize_rows(w: list[list[float]]) -> tuple[list[list[int]], list[float]]:
    """Section 3.1, vector-wise: q = round(127 w / max |w|) of each row, and the row's max |w|."""
    codes, constants = [], []
    for row in w:
        largest = max(abs(v) for v in row)
        constants.append(largest)
        codes.append([round(127 * v / largest) if largest > 0 else 0 for v in row])
    return codes, constants


def decomposed_product(
    x: list[list[float]], w_codes: list[list[int]], w_constants: list[float], threshold: float
) -> tuple[list[list[float]], list[int]]:
    """Section 3.2, equation 8: C = sum over h in O of X[:, h] W[h, :]  +  S * sum over h not in O of Xq[:, h] Wq[h, :].

    O: the columns in which any token of x has a magnitude of at least the threshold. Returns the product and O. The 16-bit part is
    computed exactly here, from the weights as they are stored.
    """
    columns = len(x[0])
    outliers = [h for h in range(columns) if any(abs(row[h]) >= threshold for row in x)]
    regular = [h for h in range(columns) if h not in outliers]
    out = []
    for row in x:
        largest = max((abs(row[h]) for h in regular), default=0.0)
        codes = {h: round(127 * row[h] / largest) if largest > 0 else 0 for h in regular}
        sums = []
        for w_row, constant in zip(w_codes, w_constants):
            integer = sum(codes[h] * w_row[h] for h in regular)
            sixteen = sum(row[h] * w_row[h] * constant / 127 for h in outliers)
            sums.append(sixteen + integer * largest * constant / (127 * 127))
        out.append(sums)
    return out, outliers
