"""gptq: rounds column by column and lets the columns to come make up for the errors, by the inputs' second moments.

    least  tr((W - W_hat) H (W - W_hat)^T),   H = X^T X / n

Sources: Frantar et al., GPTQ (arXiv 2210.17323, Algorithm 1), in the form of LDLQ (Chee et al., QuIP, arXiv 2307.13304,
Theorem 6; see hessian.py); refinement after it in refine.py; the asymmetric target of Li et al., GPTAQ (arXiv 2504.02692);
feedback along the outputs too, of YAQA (arXiv 2505.22988): with G the second moments of the loss's gradients for the outputs,

    least  tr(G E H E^T) = sum_r D_r e~_r H e~_r^T,   e~_r = e_r + sum_{q<r} U_qr e_q,   G = U D U^T,  E = W - W_hat

so that rows, too, make up for the errors of the rows before them: those of OUTPUT_ROWS at a time, and what is left within them is not.

Group parameters are fitted when a group's first column is reached, from the weights as the errors so far have changed
them, and stay as they are while the group's columns are rounded. Deviations from the paper: no inverse of H is made;
ranges are searched for least D-weighted error (D of H = U D U^T, which is how much a miss of that column costs once the
later ones make up for it); damping adapts; a column without inputs (H_kk = 0) keeps its weight and rounds to nearest,
where the paper's code sets it to 0, since calibration cannot prove that it never has any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tersor.errors import ModelError, RecipeError
from tersor.formats import Format, as_rows, get_format
from tersor.formats.floats import FloatFormat
from tersor.formats.lookup import DoubleLookupFormat
from tersor.methods.feedback import feed_back, fit
from tersor.methods.hessian import Damped, Factor, checked_gram, factorize
from tersor.methods.ordered import in_order
from tersor.methods.outliers import beside_outliers
from tersor.methods.refine import refine
from tersor.methods.rtn import require_encoder
from tersor.tensor import Array, InputStatistics, Params, QuantizedTensor
from tersor.threads import blas_alone, each

PART_ROWS = 512  # that one thread rounds at a time, at most: enough that what the parts share costs little
# KLD: of smollm2-rot in int4_g64, 32 samples, 8 windows of 2,048 (benchmarks/README.md).
OUTPUT_ROWS = 64  # that are rounded before those after them make up for their errors. KLD 0.0500, by 128 rows 0.0515
OUTPUT_DAMP = 0.1  # share of G's mean diagonal added to it. KLD 0.0500, by 0.03 0.0533, by 0.3 0.0513


@dataclass(frozen=True)
class GptqOptions:
    """act_order:  a second pass over the columns by falling diagonal of H, with the group parameters of the first, which
                goes through them as they are stored: so no list of groups per column need be stored.
    damp:       share of H's mean diagonal added to it, > 0; grows tenfold while H is not positive definite. On inputs that
                calibration had not seen, 0.05 was better than 0.001, 0.01 and 0.1 (16,384 tokens, 576 and 1,536 columns).
    search:     ranges of least weighted error instead of min-max.
    refine:     rounds of coordinate descent and least squares afterwards, 0 = none.
    asymmetric: how far the target moves from W towards the weights that undo the errors of earlier layers, 0..1; needs
                statistics.cross when it is there, and is not used without.
    fisher:     tokens and outputs count by what they do to the whole model's predictions, which a backward pass of the float model
                tells before anything is rounded (training/fisher.py; torch). Of the blocks' layers; a head is rounded without.
                Outputs only in formats whose rows share nothing.
    """

    act_order: bool = False
    damp: float = 0.05
    search: bool = True
    refine: int = 1
    asymmetric: float = 0.0
    fisher: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damp <= 1:
            raise RecipeError(f"gptq: damp={self.damp:g}; need more than 0 and at most 1, a share of the mean diagonal")
        if not 0 <= self.refine <= 100:
            raise RecipeError(f"gptq: refine={self.refine}; need 0 to 100 rounds")
        if not 0 <= self.asymmetric <= 1:
            raise RecipeError(f"gptq: asymmetric={self.asymmetric:g}; need 0 to 1")


@in_order
@beside_outliers
@blas_alone()
def gptq(w: Array, format: Format, statistics: InputStatistics | None, options: GptqOptions | None = None) -> QuantizedTensor:
    """Returns w, (..., in) float32 and finite, rounded with error feedback under statistics.gram, and with options.fisher
    along the rows under statistics.outputs. Casts round to nearest.

    Raises FormatError when the format is decode-only or does not fit the shape; ModelError when the Hessian is missing, of
    another size, not finite, zero, or not positive definite, or gradients are of another number of rows.
    """
    options = options or GptqOptions()
    require_encoder(format, "gptq")
    format.check(w.shape)
    rows = as_rows(w)
    where = f"gptq:{format.name}"
    gram = checked_gram(statistics, rows.shape[1], where)
    if isinstance(format, FloatFormat):
        return format.quantize(w)
    factor = factorize(gram, np.arange(len(gram)), options.damp, where)
    if options.asymmetric > 0 and statistics is not None and statistics.cross is not None:
        rows = asymmetric_target(rows, gram, statistics.cross, factor, options.asymmetric)
    coupling = _coupling(statistics, len(rows), where) if options.fisher and statistics is not None and format.row_independent else []
    codes, params = _solve(rows, format, gram, factor, None, options, coupling)
    if options.act_order:
        del factor  # one at a time in memory
        factor = factorize(gram, np.argsort(-np.diagonal(gram), kind="stable"), options.damp, where)
        codes, params = _solve(rows, format, gram, factor, params, options, coupling)
    return format.pack(codes, params, w.shape)


def asymmetric_target(w: Array, gram: Array, cross: Array, factor: Factor, share: float) -> Array:
    """Returns W + share (W* - W), float32, with W* = W C H^-1 the least of |W X~^T - W* X^T|, X~ being the unquantized model's inputs.

    cross: C = X~^T X / n, (in, in) float64. H^-1 is that of the damped H, so W* - W = W (C - H) H^-1 stays small where
    calibration says little. Source: GPTAQ (arXiv 2504.02692, equation 4), in closed form.
    """
    moved = w.astype(np.float64) @ (cross - gram)
    return (w + share * factor.solve(moved)).astype(np.float32)


def _coupling(statistics: InputStatistics, rows: int, where: str) -> list[Factor]:
    """Returns the factors of G's blocks, in the order of the rows; none where nothing was measured. Raises ModelError for other sizes."""
    outputs = statistics.outputs
    if outputs and (measured := sum(map(len, outputs))) != rows:
        raise ModelError(f"{where}: gradients were measured for {measured} outputs; need {rows}, one for each row of the weights")
    grams = (g.astype(np.float64) if g.any() else np.eye(len(g)) for g in outputs)  # no gradient reaches some: alike
    return [factorize(g, np.arange(len(g)), OUTPUT_DAMP, f"{where}, outputs") for g in grams]


def _solve(
    w: Array, format: Format, gram: Array, factor: Factor, params: Params | None, options: GptqOptions, coupling: Sequence[Factor] = ()
) -> tuple[Array, Params]:
    """Returns (codes, params) of w, (rows, in) float32, in the factor's order. params: frozen ones to begin with, or None. coupling:
    factors of what errors of neighbouring rows cost together, for all rows, or none."""
    if params is None and not format.row_independent:
        if isinstance(format, DoubleLookupFormat):
            # Its absmax are stored relative to those of all rows: found by the single format, then stored, then rounded to.
            single = _solve(w, get_format(format.name.removesuffix("_dq")), gram, factor, None, options)[1]
            params = format.nest(single["absmax"])
        else:
            params = fit(format, w, np.diagonal(gram), options.search)

    def solve(rows: slice) -> tuple[Array, Params]:
        known = None if params is None else {name: value[rows] for name, value in params.items()}
        codes, fitted = feed_back(target[rows], format, factor, known, options.search)
        return refine(target[rows], format, codes, fitted, damped, options.refine)

    target, damped = w, Damped(gram, factor.damping)
    if not format.row_independent:
        return solve(slice(None))
    if not coupling:
        return _joined(each(solve, _equal_parts(len(w))))
    target, done, first = w.copy(), [], 0
    for along in coupling:
        last = first + len(along.order)
        errors = np.zeros((w.shape[1], last - first), np.float32)  # of these rows, each a column
        for begin in range(first, last, OUTPUT_ROWS):
            rows = slice(begin, min(begin + OUTPUT_ROWS, last))
            above, own = slice(0, begin - first), slice(begin - first, rows.stop - first)
            target[rows] += along.expected(errors[:, above] @ along.feedback(above, own), own).T
            middle = (rows.start + rows.stop + 1) // 2
            parts = each(solve, [part for part in (slice(begin, middle), slice(middle, rows.stop)) if part.start < part.stop])
            done.append(_joined(parts))
            errors[:, own] = (w[rows] - format.decode(*done[-1])).T
        first = last
    return _joined(done)


def _joined(parts: Sequence[tuple[Array, Params]]) -> tuple[Array, Params]:
    """Returns (codes, params) of rows that follow each other."""
    names = parts[0][1]
    return np.concatenate([codes for codes, _ in parts]), {name: np.concatenate([fitted[name] for _, fitted in parts]) for name in names}


def _equal_parts(rows: int) -> list[slice]:
    """Returns slices of nearly the same length, at most PART_ROWS rows each and an even number of them where there are rows enough."""
    borders = np.linspace(0, rows, 2 * -(-rows // (2 * PART_ROWS)) + 1).astype(int).tolist()
    return [slice(begin, end) for begin, end in pairwise(borders) if begin < end]
