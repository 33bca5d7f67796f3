"""The methods: how numbers are chosen. METHODS maps a name to a Method; adding one is one file and one line here."""

from __future__ import annotations

from tersor.errors import RecipeError, unknown
from tersor.methods.autoround import AutoroundOptions, autoround_block
from tersor.methods.awq import AwqOptions, awq
from tersor.methods.clip import clip
from tersor.methods.gptq import PART_ROWS, GptqOptions, gptq
from tersor.methods.hessian import is_kept
from tersor.methods.hqq import HqqOptions, hqq
from tersor.methods.llm_int8 import chooses_columns, llm_int8
from tersor.methods.method import Method, Step, parse_step
from tersor.methods.refine import SYSTEM_BYTES
from tersor.methods.rotate import RotateOptions, rotated
from tersor.methods.rtn import rtn
from tersor.methods.smoothquant import SmoothQuantOptions, smoothquant
from tersor.methods.tune import TuneOptions, tune_block, tune_model


def _always(options: object) -> bool:
    return True


def _is_asymmetric(options: GptqOptions | None) -> bool:
    return options is not None and options.asymmetric > 0


def _uses_fisher(options: GptqOptions | None) -> bool:
    return options is not None and options.fisher


def _gptq_workspace(rows: int, columns: int) -> int:
    from tersor import _native

    systems = min(SYSTEM_BYTES, min(rows, PART_ROWS) * columns**2 // 8)  # of two floats a unit of 16 columns, 8 bytes
    kept = 8 * columns**2 if is_kept(columns) else 0
    return 12 * columns**2 + kept + 40 * rows * columns + min(_native.threads(), -(-rows // PART_ROWS) * 2) * systems


_ALL = (
    Method("rotate", "view", rotated, options=RotateOptions),
    Method("awq", "scale", awq, needs="gram", options=AwqOptions),
    Method("smoothquant", "scale", smoothquant, needs="importance", options=SmoothQuantOptions),
    Method("rtn", "round", rtn),
    Method("clip", "round", clip),
    Method("hqq", "round", hqq, options=HqqOptions),
    Method("llm_int8", "round", llm_int8, needs_for=chooses_columns),
    Method("gptq", "round", gptq, "gram", GptqOptions, _gptq_workspace, compares=_is_asymmetric, guided=_uses_fisher),
    Method("autoround", "round", autoround_block, "samples", AutoroundOptions, compares=_always),
    Method("tune", "tune", tune_block, "samples", TuneOptions, compares=_always),
    Method("distill", "distill", tune_model, "samples", TuneOptions),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def get_method(name: str) -> Method:
    """Returns the method of this name. Raises RecipeError, listing the known ones, for an unknown name."""
    if name not in METHODS:
        raise RecipeError(unknown("method", name, METHODS))
    return METHODS[name]


__all__ = ["METHODS", "Method", "Step", "get_method", "parse_step"]
