"""transformers' model of the architecture, in float32, on the weights as the independent reader of the container decodes them."""

from __future__ import annotations

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
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        state = {name: torch.from_numpy(np.array(values, np.float32)) for name, values in reader.weights(checkpoint.path)}
        if "lm_head.weight" not in state:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, strict=True, assign=True)
        for name, module in model.named_modules():
            if name.endswith("rotary_emb"):  # buffers that no file holds
                module.__init__(config=config)
        with torch.no_grad():
            out: Array = model.eval()(input_ids=torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()
        return out
