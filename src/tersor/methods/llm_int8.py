"""llm_int8: the weights of LLM.int8(), vector-wise absmax rounding to signed bytes. No data needed.

    q = round(w / scale)     scale of a row = max |w| / 127 (int8_row), or as compressed-tensors has it, / 127.5 (int8_cs)

Source: Dettmers et al. 2022 (arXiv 2208.07339), section 3.1. What makes it LLM.int8() happens when it runs (section 3.2): inputs of
magnitude 6 and more are multiplied in 16 bits, the rest of a token in 8 with one scale. `tersor.load(path, activations="llm_int8")`
does that for any format; no outlier is fixed beforehand, and none is stored: files of this kind (bitsandbytes' too) hold all columns
in 8 bits, and multiply outliers by those.
"""

from __future__ import annotations

from tersor.errors import FormatError
from tersor.formats import Format
from tersor.tensor import Array, InputStatistics, QuantizedTensor

FORMATS = ("int8_row", "int8_cs")  # one scale per row, no zero point


def llm_int8(w: Array, format: Format, statistics: InputStatistics | None = None, options: None = None) -> QuantizedTensor:
    """Returns w, (..., in) float32, as bytes with a scale for each row. Raises FormatError for a format that is something else."""
    if format.name not in FORMATS:
        raise FormatError(f"llm_int8:{format.name}: LLM.int8() has 8-bit rows with one scale each; use {' or '.join(FORMATS)}")
    return format.quantize(w, None)
