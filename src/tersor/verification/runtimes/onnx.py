"""A decoder's model.onnx in onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tersor.containers.container import Checkpoint
from tersor.tensor import Array
from tersor.verification.runtimes.runtime import Runtime


class Decoding:
    """A session and the keys and values of the tokens that it has seen."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Opens model.onnx in the directory. threads: None = as onnxruntime likes. Whatever onnxruntime raises goes through."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
        past = [given for given in self._session.get_inputs() if given.name.startswith("past_key_values.")]
        self._cache = {given.name: np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32) for given in past}
        self._seen = 0

    def step(self, tokens: Sequence[int] | Array) -> Array:
        """Returns the logits after each token, (n, vocab) float32; tokens follow those of the steps before."""
        ids = np.asarray(tokens, np.int64).reshape(1, -1)
        self._seen += ids.shape[1]
        feed = {"input_ids": ids, "attention_mask": np.ones((1, self._seen), np.int64), **self._cache}
        names = ["logits", *(name.replace("past_key_values", "present") for name in self._cache)]
        logits, *present = self._session.run(names, feed)
        self._cache = dict(zip(self._cache, present))
        return np.asarray(logits[0], np.float32)


def logits(path: Path, tokens: Sequence[int] | Array) -> Array:
    """Returns the logits after each token, (n, vocab) float32, of the model in the directory path, as onnxruntime computes them."""
    return Decoding(path).step(tokens)


class OnnxRuntime(Runtime):
    """onnxruntime, which is what such a directory is for."""

    name = "onnxruntime"

    def missing(self, container: str) -> str | None:
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            return f"onnxruntime cannot be imported ({error}); install it with: pip install onnxruntime"
        return None

    def logits(self, checkpoint: Checkpoint, tokens: Array) -> Array:
        return logits(checkpoint.path, tokens)
