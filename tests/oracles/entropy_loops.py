"""Migacz's entropy calibration ("8-bit Inference with TensorRT", GTC 2017, slides "Entropy Calibration - pseudocode" and "Candidate
distribution Q"), one bin at a time. Imports nothing of tersor."""

from __future__ import annotations

from math import inf, log


def threshold_in_bins(histogram: list[float], levels: int = 128) -> float:
    """(m + 0.5) bins for the m in levels .. len(histogram) with the least divergence.

    What lies beyond is added to the last bin that is not empty (the slides: to the last, where Q may be 0).
    """
    best, chosen = inf, len(histogram)
    for i in range(levels, len(histogram) + 1):
        reference = list(histogram[:i])
        if sum(reference) == 0 or (sum(histogram[i - 1 :]) == 0 and i > levels):
            continue  # nothing counted yet, or nothing here and beyond
        reference[max(b for b in range(i) if reference[b] != 0)] += sum(histogram[i:])
        expanded = [0.0] * i
        for level in range(levels):
            bins = [b for b in range(i) if b * levels // i == level]
            filled = [b for b in bins if histogram[b] != 0]
            for b in filled:
                expanded[b] = sum(histogram[k] for k in bins) / len(filled)
        p_total, q_total = sum(reference), sum(expanded)
        divergence = 0.0
        for p, q in zip(reference, expanded):
            if p > 0:
                divergence += inf if q == 0 else p / p_total * log((p / p_total) / (q / q_total))
        if divergence < best:
            best, chosen = divergence, i
    return chosen + 0.5
