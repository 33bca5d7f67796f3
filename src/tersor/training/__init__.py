"""Training with torch: differentiable decoding, the decoders' forward pass, and the loops of `tune` and `autoround`.

Torch is an extra. Nothing here is imported before it is needed; `require_torch` says what to install when it is missing.
"""

from __future__ import annotations

from importlib.util import find_spec

from tersor.errors import RecipeError


def require_torch(what: str) -> None:
    """Raises RecipeError, naming the extra, when torch is not installed. what: who needs it."""
    if find_spec("torch") is None:
        raise RecipeError(f"{what}: needs torch, which is not installed; pip install 'tersor[torch]'")
