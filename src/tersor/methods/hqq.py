"""hqq: half-quadratic quantization: zero points for the least l_p error with p < 1, which forgives outliers. No data needed.

    least over z of  sum |w - w_hat|^p,   w_hat = s (q - z),  q = round(w / s + z)

by half-quadratic splitting, with e standing for the part of the error that is an outlier's:

    e = shrink(w - w_hat) = sign(x) max(|x| - |x|^(p-1) / beta, 0)          x = w - w_hat
    z = mean over the group of  q - (w - e) / s                              beta grows by kappa

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023), equations 3 to 6;
x is in steps of the group (|x| / s), so that beta means the same in every group. The scale stays that of the range, as there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tersor.errors import FormatError, RecipeError
from tersor.formats import Format
from tersor.methods.ordered import in_order
from tersor.methods.rtn import require_encoder
from tersor.tensor import Array, InputStatistics, QuantizedTensor


@dataclass(frozen=True)
class HqqOptions:
    """p: the norm, 0 < p < 1; beta, kappa: weight of the splitting and its growth; rounds: of updates, of which the best counts."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    rounds: int = 20

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise RecipeError(f"hqq: p={self.p:g}; need 0 < p < 1")
        if not (self.beta > 0 and self.kappa >= 1 and self.rounds >= 1):
            raise RecipeError(
                f"hqq: beta={self.beta:g}, kappa={self.kappa:g}, rounds={self.rounds}; need beta > 0, kappa >= 1, rounds >= 1"
            )


@in_order
def hqq(w: Array, format: Format, statistics: InputStatistics | None = None, options: HqqOptions | None = None) -> QuantizedTensor:
    """Returns w, (..., in) float32 and finite, on grids whose zeros (or minima) are moved; no group's l_p error is above rtn's.

    Raises FormatError when the format is decode-only, does not fit the shape, or has no zero or minimum of its own for each
    group: then there is nothing that these updates could move.
    """
    options = options or HqqOptions()
    require_encoder(format, "hqq")
    format.check(w.shape)
    if not {"zero", "min"} & format.fit(np.zeros((1, w.shape[-1]), dtype=np.float32), None).keys():
        raise FormatError(f"hqq:{format.name}: no zero or minimum a group, which hqq moves; use clip:{format.name} or hqq:int4_g64m")
    return format.by_parts(w, lambda rows: _hqq_rows(rows, format, options))


def _hqq_rows(w: Array, format: Format, options: HqqOptions) -> QuantizedTensor:
    params = dict(format.fit(w, None))
    scale = params["scale"].astype(np.float32)
    name = "min" if "min" in params else "zero"
    s = np.where(scale == 0, np.float32(1), scale)[..., None]
    blocks = w.reshape(*((len(w), -1, w.shape[1] // scale.shape[1]) if format.row_independent else (1, 1, w.size)))
    best = params[name]
    codes = format.encode(w, params)
    least = np.full(scale.shape, np.inf)
    beta = options.beta
    for _ in range(options.rounds + 1):
        miss = (w - format.decode(codes, params)).reshape(blocks.shape) / s
        size = np.abs(miss)
        error = np.power(size, np.float32(options.p)).sum(axis=-1, dtype=np.float64)
        better = error < least
        best, least = np.where(better, params[name], best), np.where(better, error, least)
        with np.errstate(divide="ignore"):
            shrunk = np.sign(miss) * np.maximum(size - np.power(size, np.float32(options.p - 1)) / np.float32(beta), 0)
        # The values without their outlying errors, in steps; what they lack of the codes is the zero.
        zero = (codes.reshape(blocks.shape) - (blocks / s - shrunk)).mean(axis=-1, dtype=np.float64).astype(np.float32)
        if name == "min":
            params[name] = (-zero * s[..., 0]).astype(best.dtype)
        elif best.dtype.kind == "f":
            params[name] = zero.astype(best.dtype)
        else:
            params[name] = np.clip(np.rint(zero), 0, 2**format.bits - 1).astype(np.uint8)
        codes = format.encode(w, params)
        beta *= options.kappa
    params[name] = best
    return format.pack(format.encode(w, params), params)
