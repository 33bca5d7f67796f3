"""The trainable roundings of SignRound: which neighbour each weight goes to, and for affine grids how far their range is clipped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tersor.formats import Format
from tersor.formats.affine import AffineFormat
from tersor.tensor import Array, QuantizedTensor

MOST_BITS = 6  # of a format whose levels are all listed; beyond, codes next to each other are levels next to each other


class Rounding(ABC):
    """A matrix whose rounding is being chosen. parameters: (tensor, lowest, highest) each, all start at rounding to nearest."""

    parameters: list[tuple[Tensor, float, float]]

    @abstractmethod
    def weight(self) -> Tensor:
        """Returns w_hat, (rows, in) float32, exactly as stored, with straight-through gradients for the parameters."""

    @abstractmethod
    def store(self) -> QuantizedTensor:
        """Returns the tensor as rounded now."""


def rounding_of(w: Array, format: Format, importance: Array | None) -> Rounding:
    """Returns what can be trained of w, (..., in) float32, in this format. importance: of the grid, where it is searched."""
    if isinstance(format, AffineFormat):
        return AffineRounding(w, format)
    return LevelRounding(w, format, importance)


class AffineRounding(Rounding):
    """SignRound (arXiv 2309.05516, equations 3 and 4) on affine integers:

        w_hat = s (clip(round(w / s + V) + z, 0, 2^B - 1) - z)        V in [-1/2, 1/2] per weight
        s = f((alpha max(w, 0) - beta min(w, 0)) / (2^B - 1))       alpha, beta in [0, 1] per group
        z = clip(round(-beta min(w, 0) / s), 0, 2^B - 1)

    Deviations: V is added before the zero, which is an integer, so nothing changes by it; the symmetric form has one step
    for both ends, s = f(2 max(alpha max w, -beta min w) / (2^B - 1)), the form with a float minimum m = f(beta min w). f rounds to
    the floats of the format: float16, or float32 in which nothing is lost.
    """

    def __init__(self, w: Array, format: AffineFormat) -> None:
        self._format, self._shape = format, w.shape
        rows = torch.from_numpy(np.ascontiguousarray(w, np.float32)).reshape(-1, w.shape[-1])
        self._w = rows.reshape(1, 1, -1) if format.group_size < 0 else rows.reshape(len(rows), format.groups(w.shape[-1]), -1)
        self._low, self._high = self._w.amin(-1, keepdim=True), self._w.amax(-1, keepdim=True)
        if format.kind != "m":
            self._low, self._high = self._low.clamp(max=0), self._high.clamp(min=0)
        self._offset = torch.zeros_like(self._w).requires_grad_()
        self._alpha = torch.ones_like(self._high).requires_grad_()
        self._beta = torch.ones_like(self._low).requires_grad_()
        self.parameters = [(self._offset, -0.5, 0.5), (self._alpha, 0.0, 1.0), (self._beta, 0.0, 1.0)]

    def weight(self) -> Tensor:
        codes, scale, offset = self._grid()
        w = codes * scale + offset if self._format.kind == "m" else (codes - offset) * scale
        return w.reshape(-1, self._shape[-1])

    def store(self) -> QuantizedTensor:
        with torch.no_grad():
            codes, scale, offset = self._grid()
        params = {"scale": scale[..., 0].numpy().astype(self._format.float_type)}
        if self._format.kind == "m":
            params["min"] = offset[..., 0].numpy().astype(self._format.float_type)
        elif self._format.kind == "":
            params["zero"] = offset[..., 0].numpy().astype(np.uint8)
        return self._format.pack(codes.numpy().astype(np.uint8).reshape(-1, self._shape[-1]), params, self._shape)

    def _stored(self, x: Tensor) -> Tensor:
        """Returns x as the format stores it, as float32; float16 straight through."""
        return x if self._format.wide else x.half().float().detach() + (x - x.detach())

    def _grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns codes, scale, and the zero (the minimum for "m"), each as stored, in float32."""
        f, top = self._format, float(self._format.max_code)
        low, high = self._beta * self._low, self._alpha * self._high
        if f.kind == "m":
            offset = self._stored(low)
            scale = self._stored((high - offset).clamp(min=0) / top)
            return _clip(_round((self._w - offset) / _divisor(scale) + self._offset), top), scale, offset
        if f.kind == "s":
            scale = self._stored(2 * torch.maximum(-low, high) / top)
            offset = torch.full_like(scale, float(f.middle))
        else:
            scale = self._stored((high - low) / top)
            offset = _clip(_round(-low / _divisor(scale)), top)
        return _clip(_round(self._w / _divisor(scale) + self._offset) + offset, top), scale, offset


class LevelRounding(Rounding):
    """Any format with fixed parameters: each weight goes to the level below or above it, the nearest when V = 0.

        w_hat = up if (w - down) / (up - down) + V > 1/2 else down        V in [-1/2, 1/2] per weight

    The parameters are those of the clip search; d w_hat / d V = up - down, straight through.
    """

    def __init__(self, w: Array, format: Format, importance: Array | None) -> None:
        self._format, self._shape = format, w.shape
        _, self._params = format.unpack(format.quantize_clipped(w, importance))
        rows = np.ascontiguousarray(w, np.float32).reshape(-1, w.shape[-1])
        nearest = format.encode(rows, self._params)
        self._down, self._up = (torch.from_numpy(a) for a in self._neighbours(rows, nearest))
        down, up = (torch.from_numpy(format.decode(c.numpy(), self._params)) for c in (self._down, self._up))
        self._gap, self._low = up - down, down
        share = (torch.from_numpy(rows) - down) / torch.where(self._gap == 0, 1.0, self._gap)
        self._share = share.clamp(0, 1).nan_to_num(0, 0, 0)
        self._offset = torch.zeros_like(self._share).requires_grad_()
        self.parameters = [(self._offset, -0.5, 0.5)]

    def weight(self) -> Tensor:
        """Returns w_hat; a weight in the middle between two levels starts at the lower one."""
        up = (self._share + self._offset.detach() > 0.5).float()
        return self._low + self._gap * (up + (self._offset - self._offset.detach()))

    def store(self) -> QuantizedTensor:
        up = self._share + self._offset.detach() > 0.5
        return self._format.pack(torch.where(up, self._up, self._down).numpy(), self._params, self._shape)

    def _neighbours(self, w: Array, nearest: Array) -> tuple[Array, Array]:
        """Returns the codes of the largest level <= w and the smallest >= w, those at the end where there is none."""
        down, up = nearest.copy(), nearest.copy()
        value = self._format.decode(nearest, self._params)
        low, high = np.where(value <= w, value, -np.inf), np.where(value >= w, value, np.inf)
        for codes in self._candidates(nearest):
            level = self._format.decode(codes, self._params)
            written = self._format.decode(self._format.encode(level, self._params), self._params) == level
            lower, higher = written & (level <= w) & (level > low), written & (level >= w) & (level < high)
            low[lower], down[lower] = level[lower], codes[lower]
            high[higher], up[higher] = level[higher], codes[higher]
        return down, up

    def _candidates(self, nearest: Array) -> Iterator[Array]:
        """Yields arrays of codes among which every weight has both its neighbours."""
        if self._format.bits <= MOST_BITS:
            for code in range(round(2**self._format.bits)):
                yield np.full_like(nearest, code)
            return
        one = nearest.dtype.type(1)
        yield nearest - one
        yield nearest + one


def _round(x: Tensor) -> Tensor:
    """Returns x rounded half to even; the gradient passes straight through (Bengio et al., arXiv 1308.3432)."""
    return x.round().detach() + (x - x.detach())


def _clip(x: Tensor, top: float) -> Tensor:
    return x.clamp(0, top)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)
