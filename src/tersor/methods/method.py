"""What a method is: the interface that every member of METHODS implements. A method decides the codes; it never sees bytes or files."""

from __future__ import annotations

from typing import Protocol

from tersor.formats import Format
from tersor.tensor import Array, QuantizedTensor


class Method(Protocol):
    """A function from weights to a stored tensor."""

    def __call__(self, w: Array, format: Format, importance: Array | None = None) -> QuantizedTensor:
        """Returns w, (..., in) float32 and finite, in this format.

        importance: (in,) float32 >= 0, the weight of a column's squared error (the mean of x^2 over calibration tokens), or None.
        Raises FormatError when the format cannot store the shape or can only be decoded.
        """
