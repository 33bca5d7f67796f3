"""Products of float32 matrices on the calling thread: by the CPU's matrix tiles (AMX) where it has them, else by numpy's BLAS.

For statistics of calibration: methods multiply by numpy, so that the same statistics give the same bytes whatever the kernels. Tiles
multiply bfloat16, and a float32 is the sum of three (native/methods/product.h): the products have its precision, in two thirds of the time
that AVX-512 takes.
"""

from __future__ import annotations

import numpy as np

from tersor import _native
from tersor.tensor import Array


def product(a: Array, b: Array) -> Array:
    """Returns a b, (m, n), of a (m, k) and b (k, n), all float32."""
    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    write_product(a, b, out)
    return out


def write_product(a: Array, b: Array, out: Array) -> None:
    """Writes a b into out, (m, n) float32, whose rows are contiguous."""
    if _by_tiles(a, b):
        _native.multiply(a, b, out)
    else:
        np.matmul(a, b, out=out)


def _by_tiles(a: Array, b: Array) -> bool:
    """Returns whether the tiles take these: a by contiguous rows or columns, b by contiguous rows."""
    return bool(_native.multiplies_by_tiles()) and a.itemsize in a.strides and b.strides[1] == b.itemsize
