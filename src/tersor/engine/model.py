"""A model ready to run: load it, then forward, generate or stream."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from tersor import ops
from tersor.containers import open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.engine.batch import Batch
from tersor.engine.continuation import Generation, Request
from tersor.engine.prefill import chunks
from tersor.engine.session import Prompt, Session, last
from tersor.engine.tokenizer import Tokenizer
from tersor.errors import ModelError, RecipeError, unknown
from tersor.models import Decoder, check_tensors, spec_of
from tersor.models.decoder import MOST_ROWS, STEP_ROWS, Steps
from tersor.tensor import Array, ModelDescription, QuantizedTensor
from tersor.threads import set_threads

ACTIVATIONS = ("int8", "int8_token", "int8_static", "llm_int8", "float")
RELEASE_BYTES = 8 << 20  # of a file, read before its pages are given back
CACHE_TYPES = ("f16", "f32", "int8", "int4")


def load(source: str | Path | Checkpoint, *, threads: int | None = None, activations: str = "int8", kv: str = "f16") -> Model:
    """Returns the model, its weights read and packed for this CPU.

    source: a Hugging Face directory, a .gguf file, a hub id, or an open checkpoint (which stays open).
    threads: of all native loops in this process from now on; None = as they are (at first, all CPUs).
    activations: how inputs of quantized products are rounded, as ops.pack says: int8 = per 32 values to 8 or 15 bits (fast,
        and finer than what any file asks for); int8_token, int8_static = per token, or by the file's calibrated scales, as
        other runtimes do (W8A8, W4A8); llm_int8 = per token, outliers apart; float = not at all (exact).
    kv: type of cached keys and values, f16, f32, int8 or int4 (as ops.KVCache has them).
    Raises ModelError for an architecture or tensors that do not fit, RecipeError for an unknown option,
    ContainerError for a file that cannot be read.
    """
    if activations not in ACTIVATIONS:
        raise RecipeError(unknown("activations", activations, ACTIVATIONS))
    if kv not in CACHE_TYPES:
        raise RecipeError(unknown("kv type", kv, CACHE_TYPES))
    set_threads(threads)
    if isinstance(source, Checkpoint):
        return _from_checkpoint(source, activations, kv)
    with open_checkpoint(source) as checkpoint:
        return _from_checkpoint(checkpoint, activations, kv)


def _from_checkpoint(checkpoint: Checkpoint, activations: str, kv: str) -> Model:
    """Returns the model of an open checkpoint."""
    spec = spec_of(checkpoint.description.config)
    check_tensors(spec, checkpoint.tensors, str(checkpoint.path))
    scheme = checkpoint.description.activations
    if activations == "int8_static" and (scheme is None or scheme.scales is None):
        raise ModelError(f"{checkpoint.path}: has no calibrated input scales, which activations int8_static need; use int8_token or int8")
    decoder = Decoder(spec, _releasing(checkpoint), activations, None if scheme is None else scheme.scales)
    checkpoint.release()
    return Model(checkpoint.description, decoder, kv)


def _releasing(checkpoint: Checkpoint) -> Callable[[str], QuantizedTensor]:
    """Returns checkpoint.read that gives pages back as it goes on, so that the file and its packed copy are never resident together."""
    unreleased = 0

    def read(name: str) -> QuantizedTensor:
        nonlocal unreleased
        if unreleased > RELEASE_BYTES:
            checkpoint.release()  # what was handed out stays valid: its pages are read again when they are touched
            unreleased = 0
        tensor = checkpoint.read(name)
        unreleased += tensor.nbytes
        return tensor

    return read


class Model:
    """A decoder with its tokenizer. One caller at a time: products use all threads; a batch answers several requests together."""

    def __init__(self, description: ModelDescription, decoder: Decoder, kv: str) -> None:
        self.description = description
        self._decoder = decoder
        self._kv = kv

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ModelError when the model has none."""
        return Tokenizer(self.description)

    @property
    def vocab_size(self) -> int:
        """Number of logits, and of token ids that forward accepts."""
        return self._decoder.spec.vocab_size

    @property
    def context(self) -> int:
        """Positions that the model was made for."""
        return self._decoder.spec.context

    def read_weights(self) -> int:
        """Reads every matrix once and does nothing else; returns the bytes. Its time is the floor of a decoded token's."""
        return self._decoder.read_weights()

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices as repacked for this CPU, and of the embedding where it is not the head too."""
        return self._decoder.weight_bytes

    def token_bytes(self, position: int) -> int:
        """Returns the bytes read to decode the token at this position: every matrix, and the keys and values that it attends to."""
        s = self._decoder.spec
        each = ops.KVCache(1, s.kv_heads, s.head_dim, 64, self._kv).nbytes // 64
        seen = sum(min(position + 1, layer.window or position + 1) for layer in s.layers)
        return self._decoder.product_bytes + each * seen

    def product_operations(self, n: int) -> int:
        """Returns the operations, a multiplication and an addition being two, of the matrix products for a prompt of n tokens
        and the logits of its last."""
        return 2 * (n * self._decoder.layer_values + self._decoder.head_values)

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that multiply, sorted."""
        return self._decoder.kernels

    def new_cache(self, capacity: int) -> ops.KVCache:
        """Returns an empty cache for this many positions. Raises ModelError beyond the model's context."""
        if not 1 <= capacity <= self.context:
            raise ModelError(f"a cache of {capacity} positions was asked for; the model's context is 1 to {self.context}")
        s = self._decoder.spec
        return ops.KVCache(len(s.layers), s.kv_heads, s.head_dim, capacity, self._kv)

    def forward(self, tokens: Array, cache: ops.KVCache, last: bool = False) -> Array:
        """Returns the hidden states after the final norm, (n, hidden) float32, and appends n positions to the cache.

        tokens: (n,) integers in [0, vocab_size), at positions cache.length and on. last: returns the last token's alone,
        (1, hidden). Raises ModelError for tokens out of range and for more than the cache has room for; the cache is then
        as before.
        """
        ids = self._checked(tokens)
        if cache.length + len(ids) > cache.capacity:
            raise ModelError(f"{len(ids)} tokens after {cache.length} do not fit a cache of {cache.capacity} positions")
        hidden = [self._decoder.forward(ids[part], cache, last) for part in chunks(len(ids), MOST_ROWS)]
        return hidden[-1] if last or len(hidden) == 1 else ops.copied(hidden)

    def head(self, hidden: Array) -> Array:
        """Returns logits, (n, vocab_size) float32. hidden: (n, hidden) as forward gives it."""
        return self._decoder.head(hidden)

    def steps(self) -> Steps:
        """Returns the fast way to read a few tokens at a time, at most STEP_ROWS, of one sequence or one each of several."""
        return self._decoder.steps()

    def session(self, capacity: int | None = None) -> Session:
        """Returns a session whose cache outlives a generation, for conversations. capacity: None = the context, at most 4096."""
        return Session(self, min(self.context, 4096) if capacity is None else capacity)

    def batch(self, max_sequences: int = STEP_ROWS, capacity: int | None = None) -> Batch:
        """Returns an empty batch, for requests that come and go and are answered together. Arguments as of Batch."""
        return Batch(self, max_sequences, capacity)

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """Returns the tokens of a text, BOS as the model wants it, or of a conversation through the chat template."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode(self.tokenizer.apply_chat(prompt), bos=False)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        repeat_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        lookup: int = 0,
    ) -> Generation:
        """Returns the continuation of a text, or the answer to chat messages. Options as in Sampling and Request."""
        request = Request(temperature, top_k, top_p, min_p, repeat_penalty, seed, max_tokens, _strings(stop), lookup)
        return last(self._pieces(prompt, request))

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        repeat_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        lookup: int = 0,
    ) -> Iterator[str]:
        """Returns the same as generate's text, piece by piece as it is made."""
        request = Request(temperature, top_k, top_p, min_p, repeat_penalty, seed, max_tokens, _strings(stop), lookup)
        return self._pieces(prompt, request)

    def generate_many(
        self,
        prompts: Sequence[Prompt],
        *,
        max_sequences: int = STEP_ROWS,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        repeat_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
    ) -> list[Generation]:
        """Returns what generate returns for each prompt, in order, computed together: up to max_sequences at the same time.

        What prompts have in common at the front is computed once. Raises what generate raises, before anything is computed.
        """
        request = Request(temperature, top_k, top_p, min_p, repeat_penalty, seed, max_tokens, _strings(stop))
        tokens = [self.prompt_tokens(prompt) for prompt in prompts]
        longest = max(map(len, tokens), default=1)
        if longest > self.context:
            raise ModelError(f"a prompt has {longest} tokens; the model's context is {self.context}; shorten it")
        batch = self.batch(max_sequences, min(self.context, longest + max_tokens))
        ids = [batch.add_tokens(t, request) for t in tokens]
        done = {part.id: part.generation for part in batch.stream() if part.generation is not None}
        return [done[id] for id in ids]

    def _pieces(self, prompt: Prompt, request: Request) -> Generator[str, None, Generation]:
        """Returns a generation in a session just large enough. Raises ModelError for a prompt longer than the context."""
        tokens = self.prompt_tokens(prompt)
        if len(tokens) > self.context:
            raise ModelError(f"the prompt has {len(tokens)} tokens; the model's context is {self.context}; shorten it")
        return Session(self, min(self.context, max(len(tokens), 1) + request.max_tokens)).complete(tokens, request)

    def _checked(self, tokens: Array) -> Array:
        """Returns tokens as contiguous int32."""
        ids = np.asarray(tokens)
        if ids.ndim != 1 or len(ids) == 0 or ids.dtype.kind not in "iu":
            raise ModelError(f"tokens: got {ids.dtype} of shape {ids.shape}; need a vector of at least one integer")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise ModelError(f"tokens: {low if low < 0 else high} is out of range; the model knows 0 to {self.vocab_size - 1}")
        return np.ascontiguousarray(ids, dtype=np.int32)


def _strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Returns stop strings as a tuple; one string is one stop string."""
    return (stop,) if isinstance(stop, str) else tuple(stop)
