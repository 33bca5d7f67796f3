"""clip: round to nearest on a grid whose range is clipped so that the squared error is least, group by group. No data needed.

    least over the range:  sum_i h_i (w_i - w_hat_i)^2      h: importance per column, 1 without

A range short of the largest weights costs a few large errors and makes all others smaller. Sources: the clip search of
AWQ (arXiv 2306.00978, its code's auto_clip) and OmniQuant's learned clipping (arXiv 2308.13137, section 3.1), here on the
weights' own error with both ends free, as llm-compressor's MSE observer does with one ratio. Affine integers are searched
natively over both ends and refined by least squares; ggml's types by their own weighted search; nf4, fp4 and int8_row by
ratios of the range (`Format.quantize_clipped`).
"""

from __future__ import annotations

from tersor.formats import Format
from tersor.methods.rtn import require_encoder
from tersor.tensor import Array, InputStatistics, QuantizedTensor


def clip(w: Array, format: Format, statistics: InputStatistics | None = None, options: None = None) -> QuantizedTensor:
    """Returns w, (..., in) float32, on the searched grid; its squared error, weighted by importance, is never above rtn's.

    Raises FormatError when the format is decode-only or does not fit the shape, or the importance has another length
    than the rows, or negative or non-finite values.
    """
    require_encoder(format, "clip")
    return format.quantize_clipped(w, None if statistics is None else statistics.importance)
