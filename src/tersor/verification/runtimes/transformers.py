"""transformers' model of the architecture, in float32, on the weights as the independent reader of the container decodes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tersor.containers.container import Checkpoint
from tersor.tensor import Array
from tersor.verification.independent import independent_reader
from tersor.verification.runtimes.runtime import Runtime


class TransformersRuntime(Runtime):
    """The model code and the weights are both another's; nothing of ours but config.json."""

    name = "transformers"

    def missing(self, container: str) -> str | None:
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ImportError as error:
            return f"transformers cannot be imported ({error}); install it with: pip install 'tersor[verify]'"
        reader = independent_reader(container)
        return reader if isinstance(reader, str) else None

    def logits(self, checkpoint: Checkpoint, tokens: Array) -> Array:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        reader = independent_reader(checkpoint.container)
        assert not isinstance(reader, str), reader  # `missing` has said so
        config = AutoConfig.for_model(**{k: v for k, v in checkpoint.description.config.items() if k not in ("dtype", "torch_dtype")})
        config._attn_implementation = "eager"
        with _parameters_on_meta():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        state = {name: torch.from_numpy(np.array(values, np.float32)) for name, values in reader.weights(checkpoint.path)}
        if "lm_head.weight" not in state:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, strict=True, assign=True)
        with torch.no_grad():
            out: Array = model.eval()(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
        return out


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory, which the file's weights take the place of, but real buffers: rotary
    frequencies and gemma's scale of the embedding are in no file."""
    import torch

    register = torch.nn.Module.register_parameter

    def register_on_meta(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(self, name, None if param is None else torch.nn.Parameter(param.to("meta"), requires_grad=False))

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
