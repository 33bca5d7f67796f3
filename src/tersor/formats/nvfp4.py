"""nvfp4_gs: 4-bit floats (E2M1), an 8-bit float scale (E4M3) per 16 weights, and one float32 global scale of the tensor.

    w = e2m1(q) * (scale / global_scale)

As compressed-tensors and vLLM store NVFP4. ggml's `nvfp4` has the same codes and the same 16, but no global scale.
Sources: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149, section 2 and appendix B: the two scales);
vllm-project/compressed-tensors compressors/nvfp4/{base,helpers}.py, quantization/utils/helpers.py (`generate_gparam`); the search's
candidate that maps the largest weight to 4 instead of 6: Cook et al., Four Over Six (arXiv 2512.02010).
"""

from __future__ import annotations

from math import prod

import numpy as np

from tersor.formats.format import CLIP_RATIOS, Format, as_rows, check_importance
from tersor.formats.fp8 import LARGEST, e4m3_from_f32, f32_from_e4m3
from tersor.tensor import Array, Params, QuantizedTensor

EXAMPLES = ("nvfp4_gs",)

GROUP = 16

_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
E2M1 = np.concatenate([_MAGNITUDES, -_MAGNITUDES])  # code = sign<<3 | exponent<<1 | mantissa

# Halfway between neighbours; a tie goes to the even code, so a bound above an odd one lies just below.
_HALVES = (_MAGNITUDES[:-1] + _MAGNITUDES[1:]) / np.float32(2)
_BOUNDS = np.where(np.arange(7) % 2 == 1, np.nextafter(_HALVES, np.float32(0)), _HALVES)

_SMALLEST = np.float32(2.0**-9)  # of E4M3: a group that is not all zeros keeps a scale


def parse(name: str) -> Format | None:
    """Returns the format when the name is nvfp4_gs, else None."""
    return Nvfp4Format() if name == "nvfp4_gs" else None


def e2m1_from_f32(w: Array) -> Array:
    """Returns the E2M1 codes, uint8, nearest to w: float32, ties to even, beyond 6 the largest, -0 as +0."""
    codes = np.searchsorted(_BOUNDS, np.abs(w), side="left").astype(np.uint8)
    signed: Array = codes | np.where((w < 0) & (codes > 0), np.uint8(8), np.uint8(0))
    return signed


def pack_low_first(codes: Array) -> Array:
    """Returns (rows, n/2) uint8, byte = c[2i+1] << 4 | c[2i]. codes: (rows, n) uint8 in 0..15, n even."""
    packed: Array = codes[:, 1::2] << 4 | codes[:, 0::2]
    return packed


def unpack_low_first(packed: Array) -> Array:
    """Returns the codes, (rows, n) uint8, of `pack_low_first`."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), dtype=np.uint8)
    codes[:, 0::2] = packed & 15
    codes[:, 1::2] = packed >> 4
    return codes


class Nvfp4Format(Format):
    """codes are 0..15; params: {"scale": uint8 (rows, in/16), raw E4M3 bits; "global_scale": float32 (1, 1)}."""

    name = "nvfp4_gs"
    bits = 4
    group_size = GROUP
    row_independent = False
    uses_importance = False

    def layout(self) -> str:
        return (
            "codes:        uint8 (rows, in/2)  byte = q1<<4 | q0; q = sign 1 | exponent 2, bias 1 | mantissa 1\n"
            "scale:        uint8 (rows, in/16)  E4M3 bits\n"
            "global_scale: float32 (1, 1)\n"
            "w = e2m1[q] * (scale / global_scale), the quotient in float32\n"
            "e2m1 = 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same negative\n"
        )

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) // 2 + prod(shape) // GROUP + 4

    def alternative(self, columns: int) -> str:
        return "use fp8_c"

    def fit(self, w: Array, importance: Array | None = None) -> Params:
        """Returns global_scale = 448 * 6 / max |w| and per group scale = e4m3(global_scale * max |w| / 6).

        A scale that would round to 0 is 2^-9 unless its group is all zeros, so that no group is lost (compressed-tensors
        takes 2^-3 there). A tensor of zeros, or too small for the quotient, has global_scale 1.
        Raises FormatError for any importance: absmax weighs nothing.
        """
        self.refuse_importance(importance)
        absmax = np.abs(w.reshape(w.shape[0], -1, GROUP)).max(axis=-1)
        with np.errstate(over="ignore", divide="ignore"):
            wanted = LARGEST * _MAGNITUDES[-1] / absmax.max(initial=0)
        global_scale = np.array([[wanted if np.isfinite(wanted) else 1]], dtype=np.float32)
        return {"scale": self._scales(absmax, global_scale, 1.0), "global_scale": global_scale}

    def _scales(self, absmax: Array, global_scale: Array, ratio: float) -> Array:
        """Returns the raw scales with which ratio * absmax of each group is the largest value."""
        scale = global_scale * (absmax * np.float32(ratio) / _MAGNITUDES[-1])
        return e4m3_from_f32(np.where(absmax > 0, np.maximum(scale, _SMALLEST), np.float32(0)))

    def steps(self, params: Params) -> Array:
        """Returns scale / global_scale, float32 (rows, groups)."""
        step: Array = f32_from_e4m3(params["scale"]) / params["global_scale"]
        return step

    def encode(self, w: Array, params: Params) -> Array:
        """Returns the codes nearest to w / (scale / global_scale), ties to even; 0 where the scale is 0."""
        step = self.steps(params)[..., None]
        with np.errstate(over="ignore"):
            blocks = w.reshape(*step.shape[:2], GROUP) / np.where(step == 0, np.float32(np.inf), step)
        codes: Array = e2m1_from_f32(blocks).reshape(w.shape)
        return codes

    def decode(self, codes: Array, params: Params) -> Array:
        step = self.steps(params)[..., None]
        w: Array = (E2M1[codes].reshape(*step.shape[:2], GROUP) * step).reshape(codes.shape)
        return w

    def pack(self, codes: Array, params: Params, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
        fields = {
            "codes": pack_low_first(codes),
            "scale": np.ascontiguousarray(params["scale"]),
            "global_scale": np.ascontiguousarray(params["global_scale"], dtype=np.float32),
        }
        return QuantizedTensor(self.name, codes.shape if shape is None else shape, fields)

    def unpack(self, tensor: QuantizedTensor) -> tuple[Array, Params]:
        return unpack_low_first(tensor.fields["codes"]), {name: tensor.fields[name] for name in ("scale", "global_scale")}

    def quantize_clipped(self, w: Array, importance: Array | None = None) -> QuantizedTensor:
        """Returns w with each group's scale the best, by sum h (w - w_hat)^2, of those that map absmax, CLIP_RATIOS of it, or
        6/4 of it (so that the largest weight becomes 4) to 6. The global scale stays."""
        self.check(w.shape)
        h = check_importance(importance, w.shape[-1], self.name)
        rows = as_rows(w)
        params = dict(self.fit(rows))
        absmax = np.abs(rows.reshape(len(rows), -1, GROUP)).max(axis=-1)
        least = np.full(absmax.shape, np.inf)
        best = params["scale"]
        for ratio in (1.0, 1.5, *CLIP_RATIOS):
            params["scale"] = self._scales(absmax, params["global_scale"], ratio)
            error = np.square(rows - self.decode(self.encode(rows, params), params))
            total = (error if h is None else error * h).reshape(*absmax.shape, GROUP).sum(axis=-1, dtype=np.float64)
            best, least = np.where(total < least, params["scale"], best), np.minimum(total, least)
        params["scale"] = best
        return self.pack(self.encode(rows, params), params, w.shape)
