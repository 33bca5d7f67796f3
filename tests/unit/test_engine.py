"""Loading, generation and sessions on tiny random models; transformers' generate is the oracle of the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tersor.containers.container import Checkpoint
from tersor.engine import Model, Request, load
from tersor.errors import ModelError, RecipeError
from tersor.formats import get_format
from tersor.models.decoder import MOST_ROWS
from tersor.tensor import ModelDescription, QuantizedTensor, TensorInfo
from tiny import tiny_config, tiny_model, tiny_tensors, tokenizer_json

PROMPT = "the quick brown fox"
SHORT = {"max_position_embeddings": 96}


class MemoryCheckpoint(Checkpoint):
    """A checkpoint of arrays, every matrix but the norms in one format."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], format: str = "f32") -> None:
        self.path, self.container = Path("memory"), "memory"
        self.description = ModelDescription(config, {"tokenizer.json": tokenizer_json().encode()})
        self._stored = {n: get_format(format if w.ndim == 2 else "f32").quantize(w) for n, w in tensors.items()}
        self.tensors = {n: TensorInfo(n, t.format, t.shape, t.nbytes) for n, t in self._stored.items()}
        self.dense = {n: get_format(t.format).dequantize(t) for n, t in self._stored.items()}

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        assert rows is None
        return self._stored[name]

    def release(self) -> None:
        """Nothing is mapped."""

    def close(self) -> None:
        """Nothing is open."""


def config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """Returns a config of hidden size 256, which every format's groups divide."""
    return tiny_config(kind, 256, 256, 2, 4, 2, True) | changes


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # untied, or it repeats its input; this draw does not end before 24 tokens
    return tiny_model(tmp_path_factory.mktemp("tiny") / "llama", tie=False, seed=1, config=SHORT)


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return load(path, activations="float", kv="f32")


def oracle_tokens(path: Path, tokens: list[int], count: int, **settings: Any) -> list[int]:
    """Returns the tokens that transformers generates after these."""
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    out = reference.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False, **settings)
    return out[0, len(tokens) :].tolist()


def test_greedy_tokens_are_those_of_transformers(model: Model, path: Path) -> None:
    got = model.generate(PROMPT, max_tokens=24)
    want = oracle_tokens(path, model.tokenizer.encode(PROMPT), 24)
    assert len(want) == 24 and list(got.tokens) == want
    assert got.text == model.tokenizer.decode(got.tokens).rstrip("\ufffd")


def test_repeat_penalty_is_that_of_transformers(model: Model, path: Path) -> None:
    got = model.generate(PROMPT, max_tokens=24, repeat_penalty=1.7)
    want = oracle_tokens(path, model.tokenizer.encode(PROMPT), 24, repetition_penalty=1.7)
    assert len(want) == 24 and list(got.tokens) == want
    assert got.tokens != model.generate(PROMPT, max_tokens=24).tokens


def test_stream_yields_the_text_of_generate(model: Model) -> None:
    options = {"max_tokens": 30, "temperature": 1.0, "top_k": 50, "seed": 3}
    pieces = list(model.stream(PROMPT, **options))  # type: ignore[arg-type]
    whole = model.generate(PROMPT, **options)  # type: ignore[arg-type]
    assert len(pieces) > 1 and "".join(pieces) == whole.text
    assert model.generate(PROMPT, **(options | {"seed": 4})).tokens != whole.tokens  # type: ignore[arg-type]


def test_length_ends_it(model: Model) -> None:
    got = model.generate(PROMPT, max_tokens=5, temperature=1.0, seed=1)
    assert (len(got.tokens), got.finish, got.prompt_tokens) == (5, "length", len(model.tokenizer.encode(PROMPT)))
    assert got.prefill_seconds > 0 and got.decode_seconds > 0 and got.prefill_rate > 0 and got.decode_rate > 0


def test_any_eos_token_ends_it_without_a_trace(path: Path, tmp_path: Path) -> None:
    plain = load(path, activations="float", kv="f32").generate(PROMPT, max_tokens=8)
    ends = plain.tokens[3]
    first = plain.tokens.index(ends)
    tiny_model(tmp_path / "m", tie=False, seed=1, config=SHORT)
    (tmp_path / "m" / "generation_config.json").write_text(f'{{"eos_token_id": [7, {ends}]}}')
    other = load(tmp_path / "m", activations="float", kv="f32")
    got = other.generate(PROMPT, max_tokens=8)
    assert (got.tokens, got.finish) == (plain.tokens[:first], "eos")
    assert got.text == other.tokenizer.decode(plain.tokens[:first]).rstrip("\ufffd")


def test_a_stop_string_across_tokens_ends_it(model: Model) -> None:
    whole = model.generate(PROMPT, max_tokens=40, temperature=1.0, seed=2)
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    at = whole.text.index(stop)
    got = model.generate(PROMPT, max_tokens=40, temperature=1.0, seed=2, stop=["not in it", stop])
    assert (got.text, got.finish) == (whole.text[:at], "stop")
    assert len(got.tokens) < len(whole.tokens)
    assert model.generate(PROMPT, max_tokens=40, temperature=1.0, seed=2, stop=stop).text == whole.text[:at]
    pieces = list(model.stream(PROMPT, max_tokens=40, temperature=1.0, seed=2, stop=stop))
    assert "".join(pieces) == whole.text[:at]


def test_the_context_ends_it(model: Model) -> None:
    prompt = "a" * 90
    count = len(model.tokenizer.encode(prompt))
    assert count < model.context == 96
    got = model.generate(prompt, max_tokens=1000, temperature=1.0, seed=5)
    assert (got.finish, len(got.tokens)) == ("context", 96 - count + 1)  # the last one made needs no place any more


def test_a_prompt_beyond_the_context_is_refused(model: Model) -> None:
    with pytest.raises(ModelError, match=r"the prompt has \d+ tokens; the model's context is 96; shorten it"):
        model.generate("0 " * 100)
    with pytest.raises(ModelError, match=r"the prompt has \d+ tokens; the context holds 8"):
        model.session(8).generate("0 " * 10, Request())
    with pytest.raises(ModelError, match="the prompt is empty"):
        model.generate("")


def test_chat_goes_through_the_template(model: Model) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokens = model.prompt_tokens(messages)
    assert model.tokenizer.decode(tokens, special=True) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokens[0] == 1 and tokens.count(1) == 2
    assert model.generate(messages, max_tokens=3).prompt_tokens == len(tokens)


def test_a_session_computes_only_what_is_new(model: Model) -> None:
    session = model.session()
    request = Request(max_tokens=6)
    first = session.generate(PROMPT, request)
    assert first.cached_tokens == 0 and first == _timeless(model.generate(PROMPT, max_tokens=6), first)
    again = session.generate(PROMPT, request)
    assert again.cached_tokens == again.prompt_tokens - 1 and again.tokens == first.tokens
    longer = PROMPT + " jumps over the dog"
    got, want = session.generate(longer, request), model.generate(longer, max_tokens=6)
    assert 0 < got.cached_tokens < got.prompt_tokens and got.tokens == want.tokens
    changed = "the lazy dog"
    got, want = session.generate(changed, request), model.generate(changed, max_tokens=6)
    assert got.tokens == want.tokens


def _timeless(a: Any, b: Any) -> Any:
    """Returns a with b's timings, which never agree."""
    from dataclasses import replace

    return replace(a, prefill_seconds=b.prefill_seconds, decode_seconds=b.decode_seconds)


def test_prefill_in_chunks_equals_one_by_one(tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path / "m", layers=1), activations="float", kv="f32")
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, MOST_ROWS + 40)
    cache = model.new_cache(len(tokens))
    whole = model.forward(tokens, cache)
    assert whole.shape == (len(tokens), 64) and cache.length == len(tokens)
    np.testing.assert_array_equal(model.forward(tokens, model.new_cache(len(tokens)), last=True), whole[-1:])
    cache.truncate(MOST_ROWS - 5)
    rest = np.concatenate([model.forward(tokens[i : i + 1], cache) for i in range(MOST_ROWS - 5, len(tokens))])
    np.testing.assert_allclose(rest, whole[MOST_ROWS - 5 :], rtol=0, atol=1e-4)


def test_hidden_states_of_one_token_are_the_callers(model: Model) -> None:
    cache = model.new_cache(4)
    first = model.forward(np.array([3]), cache)
    kept = first.copy()
    model.forward(np.array([4]), cache)
    np.testing.assert_array_equal(first, kept)


def test_two_threads_may_decode_at_once(model: Model) -> None:
    tokens = np.arange(3, 40, dtype=np.int32)

    def decode(order: np.ndarray) -> np.ndarray:
        cache = model.new_cache(len(order))
        return np.concatenate([model.forward(order[i : i + 1], cache) for i in range(len(order))])

    want = [decode(tokens), decode(tokens[::-1])]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            got = list(pool.map(decode, [tokens, tokens[::-1]]))
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([0, 320]), "tokens: 320 is out of range; the model knows 0 to 319"),
        (np.array([-1, 3]), "tokens: -1 is out of range"),
        (np.array([], np.int32), "need a vector of at least one integer"),
        (np.array([[1]]), "need a vector"),
        (np.array([1.0]), "got float64"),
        (np.zeros(9, np.int64), "9 tokens after 0 do not fit a cache of 8 positions"),
        (np.array([2**40]), "out of range"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_tokens_that_cannot_be_run_are_refused(model: Model, tokens: np.ndarray, message: str) -> None:
    cache = model.new_cache(8)
    with pytest.raises(ModelError, match=message):
        model.forward(tokens, cache)
    assert cache.length == 0


@pytest.mark.parametrize("capacity", [0, 97])
def test_a_cache_beyond_the_context_is_refused(model: Model, capacity: int) -> None:
    with pytest.raises(ModelError, match=f"a cache of {capacity} positions"):
        model.new_cache(capacity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "int4"}, "unknown activations 'int4'; known: float, int8, int8_static, int8_token, llm_int8"),
        ({"kv": "q8_0"}, "unknown kv type 'q8_0'; known: f16, f32, int4, int8"),
        ({"threads": 0}, "threads"),
        ({"threads": 100_000}, "threads"),
    ],
    ids=str,
)
def test_unknown_options_are_refused(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(path, **options)


@pytest.mark.parametrize(
    "format", ["bf16", "f16", "q4_1", "q6_k", "iq4_xs", "int4_g64", "int3_g128s", "int8_row", "nf4", "nf4_dq", "int8_t"]
)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_quantized_weights_run_as_their_values(format: str, kind: str) -> None:
    settings = config(kind)
    quantized = MemoryCheckpoint(settings, tiny_tensors(settings), format)
    dense = MemoryCheckpoint(settings, quantized.dense)
    tokens = np.arange(40, dtype=np.int32)
    logits = []
    for checkpoint in (quantized, dense):
        model = load(checkpoint, activations="float", kv="f32")
        logits.append(model.head(model.forward(tokens, model.new_cache(40))))
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("format", ["q4_1", "q8_0", "q4_k", "int4_g32"])
def test_int8_activations_stay_close(format: str) -> None:
    settings = config()
    checkpoint = MemoryCheckpoint(settings, tiny_tensors(settings), format)
    tokens = np.arange(64, dtype=np.int32)
    exact, rounded = (load(checkpoint, activations=a) for a in ("float", "int8"))
    a, b = (m.head(m.forward(tokens, m.new_cache(64))) for m in (exact, rounded))
    # a rounding step is 1/127 of a group's largest value, about 2.5 sigma: an error of about 0.6 % of the values' spread
    error = np.sqrt(np.mean((a - b) ** 2)) / a.std()
    assert 0 < error < 0.03


def test_mixed_formats_join() -> None:
    settings = config()
    tensors = tiny_tensors(settings)
    mixed = MemoryCheckpoint(settings, tensors, "q4_k")
    for name in ("self_attn.v_proj", "mlp.down_proj", "mlp.up_proj"):
        full = f"model.layers.0.{name}.weight"
        mixed._stored[full] = get_format("q6_k").quantize(tensors[full])
        mixed.dense[full] = get_format("q6_k").dequantize(mixed._stored[full])
    dense = MemoryCheckpoint(settings, mixed.dense)
    tokens = np.arange(20, dtype=np.int32)
    a, b = (load(c, activations="float", kv="f32") for c in (mixed, dense))
    got, want = (m.head(m.forward(tokens, m.new_cache(20))) for m in (a, b))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)


def test_weight_bytes_and_kernels(model: Model) -> None:
    stored = sum(w.size for name, w in tiny_tensors(config_of(model)).items() if w.ndim == 2) * 4
    assert stored <= model.weight_bytes < 1.2 * stored + 64_000
    assert model.kernels and all(isinstance(name, str) for name in model.kernels)


def config_of(model: Model) -> dict[str, Any]:
    """Returns the model's config as a dict."""
    return dict(model.description.config)


def test_tensors_that_do_not_fit_are_listed() -> None:
    settings = config()
    tensors = tiny_tensors(settings)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(64, np.float32)
    tensors["model.norm.weight"] = np.ones(8, np.float32)
    with pytest.raises(ModelError) as caught:
        load(MemoryCheckpoint(settings, tensors))
    assert str(caught.value) == (
        "memory: the tensors do not fit config.json: missing model.layers.1.mlp.up_proj.weight; unexpected "
        "model.layers.0.self_attn.q_norm.weight; wrong shape model.norm.weight (8,) instead of (256,)"
    )


def test_many_misfits_are_counted() -> None:
    settings = config(num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"missing (model\.layers\.2\.\S+, ){4}model\.layers\.2\.\S+ and 4 more$"):
        load(MemoryCheckpoint(settings, tiny_tensors(config())))


def test_redundant_tensors_are_passed_over() -> None:
    settings = config()
    tensors = tiny_tensors(settings)
    tensors["lm_head.weight"] = np.zeros_like(tensors["model.embed_tokens.weight"])  # tied: the embedding is the head
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(32, np.float32)
    model = load(MemoryCheckpoint(settings, tensors))
    assert np.abs(model.head(model.forward(np.array([3]), model.new_cache(1)))).max() > 0


def test_a_model_without_tokenizer_runs_on_tokens() -> None:
    settings = config()
    checkpoint = MemoryCheckpoint(settings, tiny_tensors(settings))
    checkpoint.description = ModelDescription(settings)
    model = load(checkpoint)
    assert model.forward(np.array([1, 2]), model.new_cache(2)).shape == (2, 256)
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        model.generate("x")
