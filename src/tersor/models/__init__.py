"""The architectures. ARCHITECTURES maps Hugging Face's `model_type` to the function that turns a config into a DecoderSpec.

Adding an architecture is one new file and one line here; the conformance suite picks it up by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tersor.errors import ModelError, unknown
from tersor.models import gemma2, gemma3, llama, mistral, qwen2, qwen3
from tersor.models.decoder import Decoder
from tersor.models.spec import DecoderSpec, Layer, check_tensors, expected_tensors, linear_groups

ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], DecoderSpec]] = {
    "llama": llama.spec,
    "mistral": mistral.spec,
    "qwen2": qwen2.spec,
    "qwen3": qwen3.spec,
    "gemma2": gemma2.spec,
    "gemma3_text": gemma3.spec,
}


def spec_of(config: Mapping[str, Any]) -> DecoderSpec:
    """Returns the decoder that config.json describes. Raises ModelError for an unknown model_type (lists the known
    ones) and for whatever the architecture cannot use."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(f"config.json: {unknown('architecture', str(kind), ARCHITECTURES)}")
    return ARCHITECTURES[kind](config)


__all__ = ["ARCHITECTURES", "Decoder", "DecoderSpec", "Layer", "check_tensors", "expected_tensors", "linear_groups", "spec_of"]
