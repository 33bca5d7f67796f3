"""rtn: round to nearest on the format's own grid. No data needed.

Affine integers, nf4, fp4 and int8_row take the range of each group as it is (min-max, absmax). The formats whose `fit`
is itself a search (k-quants, binary, ternary; `Format.uses_importance`) weigh their errors by importance when there is any.
"""

from __future__ import annotations

from tersor.errors import FormatError
from tersor.formats import Format
from tersor.tensor import Array, InputStatistics, QuantizedTensor


def rtn(w: Array, format: Format, statistics: InputStatistics | None = None, options: None = None) -> QuantizedTensor:
    """Returns w, (..., in) float32, rounded to nearest on the grid that `format.fit` gives.

    Raises FormatError when the format is decode-only or does not fit the shape.
    """
    require_encoder(format, "rtn")
    return format.quantize(w, statistics.importance if statistics is not None and format.uses_importance else None)


def require_encoder(format: Format, method: str) -> None:
    """Raises FormatError for a format that can only be decoded."""
    if not format.can_encode:
        raise FormatError(f"{method}:{format.name}: {format.name} can be decoded but not encoded; use q2_k, iq4_xs or int2_g64")
