"""Statistics of the inputs of linear layers, gathered a batch at a time."""

from __future__ import annotations

import numpy as np

from tersor.errors import ModelError
from tersor.tensor import Array, InputStatistics

BLOCK_ROWS = 2048  # inputs whose sums are made in float32 before they are added in float64


class StatisticsBuilder:
    """Sums of inputs. Memory: columns^2 * 8 bytes for each matrix asked for, and * 4 while a batch is added."""

    def __init__(self, columns: int, *, gram: bool = False, cross: bool = False) -> None:
        """gram: X^T X is wanted; cross: Y^T X too, y being the unquantized model's input."""
        self._tokens = 0
        self._squares = np.zeros(columns, np.float64)
        self._magnitudes = np.zeros(columns, np.float64)
        self._absmax = np.zeros(columns, np.float32)
        self._gram = np.zeros((columns, columns), np.float64) if gram else None
        self._cross = np.zeros((columns, columns), np.float64) if cross else None

    def add(self, x: Array, unquantized: Array | None = None) -> None:
        """Adds inputs x, (n, columns) float32, and those of the unquantized model at the same tokens where cross was asked for."""
        for begin in range(0, len(x), BLOCK_ROWS):
            rows = x[begin : begin + BLOCK_ROWS]
            magnitudes = np.abs(rows)
            self._tokens += len(rows)
            self._magnitudes += np.ones(len(rows), np.float32) @ magnitudes
            np.maximum(self._absmax, magnitudes.max(axis=0), out=self._absmax)
            if self._gram is not None:
                products = rows.T @ rows
                self._gram += products
                self._squares += np.diagonal(products)
            else:
                self._squares += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
            if self._cross is not None and unquantized is not None:
                self._cross += unquantized[begin : begin + BLOCK_ROWS].T @ rows

    def result(self) -> InputStatistics:
        """Returns the means; the builder cannot be used after it, since the sums are divided in place."""
        n = max(self._tokens, 1)
        for sums in (self._gram, self._cross):
            if sums is not None:
                sums /= n
        square, magnitude = (self._squares / n).astype(np.float32), (self._magnitudes / n).astype(np.float32)
        return InputStatistics(self._tokens, square, magnitude, self._absmax, self._gram, self._cross)


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
