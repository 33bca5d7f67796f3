"""tersor makes neural networks small and fast by quantization, and proves what it did.

    import tersor
    tersor.quantize("model-directory", "model-q4_0.gguf", "q4_0")
    print(tersor.evaluate("model-q4_0.gguf", against="model-directory").kl_mean)
    print(tersor.load("model-q4_0.gguf").generate("Once upon a time").text)

Every public name is imported when it is first used, so that `import tersor` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tersor.comparison import compare as compare
    from tersor.containers import open_checkpoint as open_checkpoint
    from tersor.conversion import convert as convert
    from tersor.engine import load as load
    from tersor.errors import TersorError as TersorError
    from tersor.evaluation import evaluate as evaluate
    from tersor.formats import FORMATS as FORMATS
    from tersor.formats import get_format as get_format
    from tersor.importance import imatrix as imatrix
    from tersor.inspection import inspect as inspect
    from tersor.pipeline import quantize as quantize
    from tersor.planning import plan as plan
    from tersor.recipe import Recipe as Recipe
    from tersor.tensor import QuantizedTensor as QuantizedTensor
    from tersor.verification.verify import verify as verify

_HOMES = {
    "FORMATS": "tersor.formats",
    "QuantizedTensor": "tersor.tensor",
    "Recipe": "tersor.recipe",
    "TersorError": "tersor.errors",
    "compare": "tersor.comparison",
    "convert": "tersor.conversion",
    "evaluate": "tersor.evaluation",
    "get_format": "tersor.formats",
    "imatrix": "tersor.importance",
    "inspect": "tersor.inspection",
    "load": "tersor.engine",
    "open_checkpoint": "tersor.containers",
    "plan": "tersor.planning",
    "quantize": "tersor.pipeline",
    "verify": "tersor.verification.verify",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tersor' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
