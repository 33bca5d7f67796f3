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


def stored_product(x: list[list[float]], w: list[list[float]], outliers: list[int], threshold: float | None = None) -> list[list[float]]:
    """Section 3.2, equation 8, with O fixed beforehand: W[O, :] in 16 bits never enters the rows' absmax, X[:, O] none of the tokens'.

    w: weights, those of the columns in O already numbers of float16. threshold: None, or from where on other inputs of a token are
    not rounded either (multiplied by the 8-bit weights). All sums are exact.
    """
    rest = [h for h in range(len(x[0])) if h not in outliers]
    codes, constants = quantize_rows([[row[h] for h in rest] for row in w])
    out = []
    for row in x:
        inside = [h for h in rest if threshold is None or abs(row[h]) < threshold]
        largest = max((abs(row[h]) for h in inside), default=0.0)
        rounded = {h: round(127 * row[h] / largest) * largest / 127 if h in inside and largest > 0 else row[h] for h in rest}
        sums = []
        for w_row, code_row, constant in zip(w, codes, constants):
            eight = sum(rounded[h] * code_row[i] * constant / 127 for i, h in enumerate(rest))
            sums.append(sum(row[h] * w_row[h] for h in outliers) + eight)
        out.append(sums)
    return out
