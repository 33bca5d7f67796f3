"""llm_int8: the weights of LLM.int8(), vector-wise absmax rounding to signed bytes.

    q = round(w / scale)     scale of a row = max |w| / 127 (int8_row), or as compressed-tensors has it, / 127.5 (int8_cs)

Source: Dettmers et al. 2022 (arXiv 2208.07339), section 3.1. The outliers of section 3.2 have two halves. The inputs': `tersor.load(path,
activations="llm_int8")` multiplies those of magnitude 6 and more in 16 bits and the rest of a token in 8 with one scale, for any format.
The weights': int8_row_xN stores the columns of the N largest inputs in 16 bits, and every way to round inputs leaves those columns' as
they are; which they are takes calibration (--calib). Files of int8_row (bitsandbytes' too) hold all columns in 8 bits, multiply outliers
by those, and need no data.
"""

from __future__ import annotations

from tersor.errors import FormatError
from tersor.formats import Format, get_format
from tersor.formats.outliers import OutlierFormat
from tersor.methods.outliers import beside_outliers
from tersor.tensor import Array, InputStatistics, QuantizedTensor

FORMATS = ("int8_row", "int8_cs")  # one scale per row, no zero point


def llm_int8(w: Array, format: Format, statistics: InputStatistics | None = None, options: None = None) -> QuantizedTensor:
    """Returns w, (..., in) float32, as bytes with a scale for each row, the outlier columns in float16 where the format stores them.

    Raises FormatError for a format that is something else, and for one with outlier columns when statistics are missing or of
    another length.
    """
    if isinstance(format, OutlierFormat) and format.plain.name in FORMATS:
        if statistics is None or statistics.absmax.shape != w.shape[-1:]:
            seen = "no inputs were" if statistics is None else f"inputs of {len(statistics.absmax)} columns were"
            raise FormatError(
                f"llm_int8:{format.name}: {seen} seen, but calibration says which of {w.shape[-1]} columns are outliers; give --calib,"
                f" or use int8_row, or rtn:{format.name}, which looks at the weights"
            )
        return _rounded(w, format, statistics)
    if format.name not in FORMATS:
        known = ", ".join(FORMATS)
        raise FormatError(f"llm_int8:{format.name}: LLM.int8() has 8-bit rows with one scale each; use {known} or int8_row_x16")
    return format.quantize(w, None)


def chooses_columns(format: str) -> bool:
    """Returns whether the format stores outlier columns, which calibration finds."""
    return isinstance(get_format(format), OutlierFormat)


@beside_outliers
def _rounded(w: Array, format: Format, statistics: InputStatistics | None = None, options: None = None) -> QuantizedTensor:
    return format.quantize(w, None)
