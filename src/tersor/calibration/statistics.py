"""Statistics of the inputs of linear layers, gathered a batch at a time."""

from __future__ import annotations

from functools import partial

import numpy as np

from tersor import _native
from tersor.errors import ModelError
from tersor.tensor import Array, InputStatistics
from tersor.threads import each

BLOCK_ROWS = 2048  # inputs whose sums are made in float32 before they are added in float64
PANEL = 192  # columns of a matrix that one thread makes at a time
TILE_ROWS = 1024  # inputs that tiles multiply at a time (native/methods/gram.cc), each twice, as three numbers of 2 bytes


class StatisticsBuilder:
    """Sums of inputs. Memory: columns^2 * 8 bytes for each matrix asked for, and gram_workspace(columns) while a batch is added."""

    def __init__(self, columns: int, *, gram: bool = False, cross: bool = False) -> None:
        """gram: X^T X is wanted; cross: Y^T X too, y being the unquantized model's input."""
        self._tokens = 0
        self._squares = np.zeros(columns, np.float64)
        self._magnitudes = np.zeros(columns, np.float64)
        self._absmax = np.zeros(columns, np.float32)
        self._gram = np.zeros((columns, columns), np.float64) if gram else None  # its lower triangle
        self._by_tiles = gram and _native.multiplies_by_tiles()  # in one native call, without the array for products
        self._products = np.empty((columns, columns), np.float32) if gram and not self._by_tiles else None
        self._cross = np.zeros((columns, columns), np.float64) if cross else None

    def add(self, x: Array, unquantized: Array | None = None, weights: Array | None = None) -> None:
        """Adds inputs x, (n, columns) float32, and those of the unquantized model at the same tokens where cross was asked for.

        weights: (n,) float32 >= 0, how much each token counts in gram and cross; None = 1. Everything else counts all alike.
        """
        for begin in range(0, len(x), BLOCK_ROWS):
            rows = x[begin : begin + BLOCK_ROWS]
            other = None if unquantized is None else unquantized[begin : begin + BLOCK_ROWS]
            self._tokens += len(rows)
            _native.column_sums(rows, self._squares, self._magnitudes, self._absmax)
            if weights is not None:
                roots = np.sqrt(weights[begin : begin + BLOCK_ROWS])[:, None]
                rows, other = rows * roots, None if other is None else other * roots
            if self._gram is not None and self._by_tiles:
                _native.add_gram(rows, self._gram)
            if self._products is not None or self._cross is not None:
                each(partial(self._add_panel, rows, other), panels(x.shape[1]))

    def _add_panel(self, x: Array, unquantized: Array | None, panel: slice) -> None:
        """Adds the products of some columns: of the Gram matrix the rows of these columns, up to its diagonal."""
        if self._gram is not None and self._products is not None:
            own, products = x[:, panel], self._products[panel]
            np.matmul(own.T, x[:, : panel.start], out=products[:, : panel.start])
            products[:, panel] = own.T @ own  # numpy makes half of it
            self._gram[panel, : panel.stop] += products[:, : panel.stop]
        if self._cross is not None and unquantized is not None:
            self._cross[panel] += unquantized[:, panel].T @ x

    def result(self) -> InputStatistics:
        """Returns the means; the builder cannot be used after it, since the sums are divided in place."""
        n = max(self._tokens, 1)
        if self._gram is not None:
            del self._products
            mirror(self._gram)
        for sums in (self._gram, self._cross):
            if sums is not None:
                sums /= n
        square, magnitude = (self._squares / n).astype(np.float32), (self._magnitudes / n).astype(np.float32)
        return InputStatistics(self._tokens, square, magnitude, self._absmax, self._gram, self._cross)


def gram_workspace(columns: int) -> int:
    """Returns the bytes that adding to a Gram matrix takes besides the matrix: the batch as tiles, or its products in float32."""
    return 2 * 6 * TILE_ROWS * columns if _native.multiplies_by_tiles() else 4 * columns * columns


def panels(columns: int) -> list[slice]:
    """Returns slices of PANEL columns, one of what is left, the last first: their triangle's rows are longest, and threads end together."""
    return [slice(begin, min(begin + PANEL, columns)) for begin in reversed(range(0, columns, PANEL))]


def mirror(matrix: Array) -> None:
    """Copies the lower triangle of a square matrix to the upper one, in place."""
    for panel in panels(len(matrix)):
        corner = matrix[panel, panel]
        matrix[panel, panel] = np.tril(corner) + np.tril(corner, -1).T
        matrix[panel, panel.stop :] = matrix[panel.stop :, panel].T


def check_statistics(statistics: InputStatistics, where: str, rounded: bool) -> None:
    """Raises ModelError, naming the layer, for inputs that are NaN or infinite, or zero throughout where weights are to be rounded."""
    if not np.isfinite(statistics.mean_square).all():
        column = int(np.flatnonzero(~np.isfinite(statistics.mean_square))[0])
        raise ModelError(
            f"{where}: an input is {statistics.absmax[column]} in column {column}; an earlier weight is damaged or the activations "
            "overflow float32; run `tersor eval` on the source to see whether the model itself works"
        )
    if rounded and not statistics.mean_square.any():
        raise ModelError(
            f"{where}: its input is zero for all {statistics.tokens} calibration tokens, so there is nothing to weigh errors by; "
            "calibrate with other text, or keep this layer (pattern=keep)"
        )
