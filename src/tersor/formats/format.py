"""What a number format is: the interface that every member of FORMATS implements.

A format says which numbers can be stored. It knows nothing of files or methods.

    params = fmt.fit(w, importance)   # scales, zeros, ... per group, from the weights
    codes = fmt.encode(w, params)     # integers
    w_hat = fmt.decode(codes, params)
    tensor = fmt.pack(codes, params)  # QuantizedTensor: the bytes as docs/formats.md draws them
    codes, params = fmt.unpack(tensor)

`quantize`, `quantize_clipped` and `dequantize` do all of it at once and are the fast (native) way; the four above are the numpy
reference, and what a method with its own idea about codes (GPTQ) calls group by group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from math import ceil, prod

import numpy as np

from tersor.errors import FormatError
from tersor.tensor import Array, Params, QuantizedTensor

PART_VALUES = 1 << 22  # weights quantized at once where numpy needs temporary arrays

# Shares of a group's range that the generic clip search tries.
CLIP_RATIOS = (0.97, 0.94, 0.91, 0.88, 0.85, 0.81, 0.77, 0.73, 0.68, 0.63, 0.57, 0.5)


class Format(ABC):
    """A number format. Instances are immutable and cheap.

    name:             canonical name, `get_format(name)` gives an equal format.
    bits:             bits of one code.
    group_size:       values along a row that share parameters (a k-quant's super-block: 256); 0 = the whole row;
                      -1 = the whole tensor.
    row_independent:  every row can be quantized by itself, and every field's first axis is the row.
    can_encode:       False for formats that can only be decoded.
    uses_importance:  whether `fit` weighs errors by importance. If False (a min-max grid has nothing to weigh), `fit` and
                      `quantize` refuse it with a FormatError; `quantize_clipped` uses it in every format.
    """

    name: str
    bits: float
    group_size: int
    row_independent: bool = True
    can_encode: bool = True
    uses_importance: bool = True

    @abstractmethod
    def layout(self) -> str:
        """Returns the documented layout, drawn, for docs/formats.md (fields, bytes, formula, source)."""

    @abstractmethod
    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Returns the exact bytes of a tensor of this shape, all fields together."""

    @abstractmethod
    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns the parameters of every group. w: (rows, in) float32; importance: (in,) float32 >= 0 or None.

        Each array's leading axes are (rows, groups), so a caller may choose between two fits group by group; those of a
        format that is not row-independent may belong to the whole tensor.
        """

    @abstractmethod
    def encode(self, w: Array, params: Params) -> Array:
        """Returns the codes nearest to w, (rows, in) uint8. Rounding is half to even unless the layout says otherwise."""

    @abstractmethod
    def decode(self, codes: Array, params: Params) -> Array:
        """Returns (rows, in) float32."""

    @abstractmethod
    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        """Returns the stored tensor. shape defaults to codes.shape."""

    @abstractmethod
    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        """Returns (codes, params) of a stored tensor, exactly as given to pack."""

    def quantize(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        """Returns w, (..., in) float32, stored in this format by round-to-nearest on the fitted grid."""
        self.check(w.shape)

        def quantize_rows(rows: Array) -> QuantizedTensor:
            params = self.fit(rows, importance)
            return self.pack(self.encode(rows, params), params)

        return self.by_parts(w, quantize_rows)

    def quantize_clipped(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        """Returns w by the candidates of `clipped`, each group from the one with the least squared error.

        The error is sum h (w - w_hat)^2 over the group, h being the importance (1 without). `quantize` is among the
        candidates, so no group gets worse by it. Needs a row-independent format whose fields divide evenly among the
        groups; others override it.
        """
        self.check(w.shape)
        importance = check_importance(importance, w.shape[-1], self.name)
        return self.by_parts(w, lambda rows: self._best_groups(rows, importance))

    def fit_clipped(self, w: Array, importance: Array | None = None) -> Params:
        """Returns the parameters of `quantize_clipped`. w: (rows, in) float32."""
        return self.unpack(self.quantize_clipped(w, importance))[1]

    def clipped(self, rows: Array, importance: Array | None) -> Iterator[QuantizedTensor]:
        """Yields the candidates of `quantize_clipped`, for (rows, in) float32; the first is `quantize`.

        A format whose fit is a weighted search adds that search with equal weights (its plain fit may be the format's
        conventional one, as Q4_0's is). The others clip each group to ratio * (min w, max w) for CLIP_RATIOS before their
        own fit: the clip search of AWQ (arXiv 2306.00978) and OmniQuant (arXiv 2308.13137).
        """
        if self.uses_importance:
            yield self.quantize(rows, importance)
            if importance is None:
                yield self.quantize(rows, np.ones(rows.shape[1], dtype=np.float32))
            return
        yield self.quantize(rows)
        blocks = rows.reshape(rows.shape[0], self.groups(rows.shape[1]), -1)
        low, high = blocks.min(axis=-1, keepdims=True), blocks.max(axis=-1, keepdims=True)
        for ratio in CLIP_RATIOS:
            yield self.quantize(np.clip(blocks, low * np.float32(ratio), high * np.float32(ratio)).reshape(rows.shape))

    def _best_groups(self, rows: Array, importance: Array | None) -> QuantizedTensor:
        """Returns the candidates of `clipped` merged group by group."""
        shape = (rows.shape[0], self.groups(rows.shape[1]), -1)
        best: dict[str, Array] = {}
        least = np.full(shape[:2], np.inf)
        for candidate in self.clipped(rows, importance):
            error = np.square(rows - self.dequantize(candidate))
            if importance is not None:
                error *= importance
            total = error.reshape(shape).sum(axis=-1, dtype=np.float64)
            better = total < least
            least[better] = total[better]
            for name, field in candidate.fields.items():
                groups = field.reshape(shape)
                best[name] = np.where(better[..., None], groups, best[name]) if name in best else groups
        return QuantizedTensor(self.name, rows.shape, {name: groups.reshape(rows.shape[0], -1) for name, groups in best.items()})

    def by_parts(self, w: Array, quantize_rows: Callable[[Array], QuantizedTensor]) -> QuantizedTensor:
        """Returns quantize_rows of w in parts of a few million values, joined, so that temporary arrays stay small.

        A format whose rows depend on each other is done in one part.
        """
        rows = as_rows(w)
        step = max(1, PART_VALUES // rows.shape[1]) if self.row_independent else rows.shape[0]
        parts = [quantize_rows(rows[i : i + step]) for i in range(0, rows.shape[0], step)]
        if len(parts) == 1:
            return QuantizedTensor(self.name, w.shape, parts[0].fields)
        return QuantizedTensor(
            self.name, w.shape, {name: np.concatenate([part.fields[name] for part in parts]) for name in parts[0].fields}
        )

    def dequantize(self, tensor: QuantizedTensor) -> Array:
        """Returns the float32 values of a stored tensor, in its shape."""
        codes, params = self.unpack(tensor)
        return self.decode(codes, params).reshape(tensor.shape)

    def refuse_importance(self, importance: Array | None) -> None:
        """Raises FormatError when there is an importance; called by the `fit` of formats that cannot use one."""
        if importance is not None:
            raise FormatError(f"{self.name}: its fit weighs no errors and takes no importance; use the method clip")

    def bits_per_weight(self, shape: tuple[int, ...] = (4096, 4096)) -> float:
        """Returns the true bits per weight for this shape, metadata included."""
        return 8.0 * self.nbytes(shape) / prod(shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Returns whether a tensor of this shape can be stored."""
        return self.group_size <= 0 or shape[-1] % self.group_size == 0

    def check(self, shape: tuple[int, ...], where: str = "tensor") -> None:
        """Raises FormatError when a tensor of this shape cannot be stored; names an alternative."""
        if prod(shape) == 0 or not shape:
            raise FormatError(f"{self.name}: {where} has shape {shape}; need at least one value along every axis")
        if not self.fits(shape):
            raise FormatError(
                f"{self.name}: {where} has {shape[-1]} columns, not a multiple of {self.group_size}; {self.alternative(shape[-1])}"
            )

    def alternative(self, columns: int) -> str:
        """Returns the advice that ends the message of `check`."""
        return "use a format whose group divides the columns"

    def groups(self, columns: int) -> int:
        """Returns the number of groups in a row of this many columns."""
        return 1 if self.group_size <= 0 else ceil(columns / self.group_size)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<format {self.name}>"


def check_importance(importance: Array | None, columns: int, where: str) -> Array | None:
    """Returns the importance as (columns,) float32. Raises FormatError unless it is finite, >= 0 and one per column."""
    if importance is None:
        return None
    h = np.ascontiguousarray(importance, dtype=np.float32)
    if h.shape != (columns,):
        raise FormatError(f"{where}: importance has shape {h.shape}; need one value per column, ({columns},)")
    if not np.isfinite(h).all() or (h < 0).any():
        raise FormatError(f"{where}: importance holds {h[~(np.isfinite(h) & (h >= 0))][0]}; need finite values >= 0")
    return h


def as_rows(w: Array) -> Array:
    """Returns w as a C-contiguous (rows, in) float32 matrix; a vector is one row."""
    return np.ascontiguousarray(w, dtype=np.float32).reshape(prod(w.shape[:-1]), w.shape[-1])
