"""Single tokens of plain layers, on transformers' caches. The judge is transformers on the dequantized weights, without a cache."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from tersor.integrations import step
from tersor.integrations.transformers import TersorConfig
from tersor.integrations.weight import QuantizedWeight
from tiny import tiny_model

RNG = np.random.default_rng(3)
IDS = torch.from_numpy(RNG.integers(3, 300, (1, 24)))
WHOLE = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def steps(monkeypatch):
    """Counts the layers that were done in one call."""
    calls, run = [], step.Step.run
    monkeypatch.setattr(step.Step, "run", lambda self, *a: calls.append(1) or run(self, *a))
    return calls


def gemma(path):
    config = transformers.GemmaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
    )
    torch.manual_seed(0)
    model = transformers.GemmaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(path)
    return path


MODELS = {
    "llama": lambda path: tiny_model(path),
    "one kv head": lambda path: tiny_model(path, kv_heads=1),
    "no sharing": lambda path: tiny_model(path, kv_heads=4, tie=False),
    "head_dim 12": lambda path: tiny_model(path, hidden=96, heads=8, kv_heads=4),
    "head_dim 80": lambda path: tiny_model(path, hidden=160, heads=2, kv_heads=1),
    "qwen2": lambda path: tiny_model(path, "qwen2"),
    "gemma": gemma,
    "mistral": lambda path: tiny_model(path, "mistral", config={"sliding_window": None}),
}


def both(path):
    """Returns our model and transformers' own, of the same numbers."""
    ours = transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=TersorConfig("int4_g32s", "float"))
    theirs = type(ours)(ours.config)
    theirs.load_state_dict({n: t.dense() if isinstance(t, QuantizedWeight) else t for n, t in ours.state_dict().items()})
    return ours.eval(), theirs.float().eval()


@pytest.fixture
def llamas(tmp_path):
    return both(tiny_model(tmp_path / "m"))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def logits(model, ids=IDS, cache=None):
    return model(ids, past_key_values=cache).logits


def decoded(model, cache, ids=IDS, start=8):
    """Returns the logits of all tokens from start - 1 on: a prompt, then one token after the other."""
    parts = [logits(model, ids[:, :start], cache)[:, -1:]]
    parts += [logits(model, ids[:, i : i + 1], cache) for i in range(start, ids.shape[1])]
    return torch.cat(parts, 1)


# Steps


@pytest.mark.parametrize("name", MODELS)
def test_steps_give_what_all_tokens_at_once_give(tmp_path, steps, name):
    ours, theirs = both(MODELS[name](tmp_path / "m"))
    close(decoded(ours, DynamicCache(config=ours.config)), logits(theirs)[:, 7:])
    assert len(steps) == 2 * 16
    cache, plain = DynamicCache(), DynamicCache()
    decoded(ours, cache)
    decoded(theirs, plain)
    assert cache.get_seq_length() == 24
    for mine, layer in zip(cache.layers, plain.layers):
        close(mine.keys, layer.keys)
        close(mine.values, layer.values)


def test_a_cache_grows_beyond_its_room(llamas, steps):
    ids = torch.from_numpy(RNG.integers(3, 300, (3, 180)))
    close(decoded(llamas[0], DynamicCache(), ids, 3), logits(llamas[1], ids)[:, 2:])
    assert len(steps) == 2 * 177


def test_more_sequences_than_a_step_takes(llamas, steps):
    ids = torch.from_numpy(RNG.integers(3, 300, (step.ROWS + 1, 12)))
    close(decoded(llamas[0], DynamicCache(), ids), logits(llamas[1], ids)[:, 7:])
    assert not steps
    close(decoded(llamas[0], DynamicCache(), ids[1:]), logits(llamas[1], ids[1:])[:, 7:])
    assert len(steps) == 2 * 4


@pytest.mark.parametrize("window, fast", [(4, 0), (64, 0), (None, 32)])
def test_a_sliding_window_is_transformers(tmp_path, steps, window, fast):
    ours, theirs = both(tiny_model(tmp_path / "m", "mistral", config={"sliding_window": window}))
    close(decoded(ours, DynamicCache(config=ours.config)), logits(theirs)[:, 7:])
    assert len(steps) == fast
    close(decoded(ours, DynamicCache()), logits(theirs)[:, 7:])  # one that keeps all


def test_a_static_cache_is_transformers(llamas, steps):
    close(decoded(llamas[0], StaticCache(config=llamas[0].config, max_cache_len=40)), logits(llamas[1])[:, 7:])
    assert not steps


def test_a_users_cache_class_is_asked(llamas):
    class Counting(DynamicCache):
        calls = 0

        def update(self, *args, **kwargs):
            self.calls += 1
            return super().update(*args, **kwargs)

    cache = Counting()
    close(decoded(llamas[0], cache), logits(llamas[1])[:, 7:])
    assert cache.calls == 2 * 17


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}])
def test_generate_gives_the_tokens_of_the_dequantized_model(llamas, options):
    ours, theirs = llamas
    ids = IDS.repeat(1, 2)
    assert torch.equal(ours.generate(ids, **WHOLE, **options), theirs.generate(ids, **WHOLE, **options))


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_with_padding_on_the_left(llamas, beams):
    ids = torch.cat([IDS, IDS + 7])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    ours, theirs = (m.generate(ids, attention_mask=mask, num_beams=beams, **WHOLE) for m in llamas)
    assert torch.equal(ours, theirs)


# What else is done to caches


def continued(model, cache, ids):
    return torch.cat([logits(model, ids[:, i : i + 1], cache) for i in range(ids.shape[1])], 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_cache_is_continued_twice(llamas, copied):
    ours, theirs = llamas
    cache = DynamicCache()
    decoded(ours, cache, IDS[:, :16])
    twin = copied(cache)
    for one, more in ((cache, IDS[:, 16:]), (twin, IDS[:, 16:] + 9), (cache, IDS[:, :4] + 5)):
        had = one.layers[0].keys.shape[2]
        tokens = torch.cat([IDS[:, :16], IDS[:, 16:], more], 1) if had > 16 else torch.cat([IDS[:, :16], more], 1)
        close(continued(ours, one, more), logits(theirs, tokens)[:, had:])
        one.crop(-1)  # what the cache shows is what was computed with
        close(logits(ours, more[:, -1:], one), logits(theirs, tokens)[:, -1:])


def test_a_cropped_cache_goes_on_and_earlier_views_stay(llamas, steps):
    ours, theirs = llamas
    cache = DynamicCache()
    decoded(ours, cache, IDS[:, :16])
    before = cache.layers[0].keys
    kept, twin = before.clone(), copy.copy(cache.layers[0])
    cache.crop(-4)
    other = IDS[:, 16:] + 3
    close(continued(ours, cache, other), logits(theirs, torch.cat([IDS[:, :12], other], 1))[:, 12:])
    assert torch.equal(before, kept)
    cache.layers[0] = twin
    cache.layers[1].keys, cache.layers[1].values = (t[:, :, :12] for t in (cache.layers[1].keys, cache.layers[1].values))
    assert cache.get_seq_length() == 16 and torch.equal(twin.keys, kept)
    assert len(steps) == 2 * 16


def test_a_reordered_and_repeated_cache_goes_on(llamas):
    ours, theirs = llamas
    ids, more = torch.cat([IDS, IDS + 7])[:, :12], IDS[:, :3]
    cache = DynamicCache()
    decoded(ours, cache, ids)
    cache.reorder_cache(torch.tensor([1, 1]))
    close(continued(ours, cache, more.repeat(2, 1)), logits(theirs, torch.cat([ids[[1, 1]], more.repeat(2, 1)], 1))[:, 12:])
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(3)
    close(continued(ours, cache, more.repeat(3, 1)), logits(theirs, torch.cat([ids[1:], more, more], 1))[:, 15:].repeat(3, 1, 1))
    cache.reset()
    close(decoded(ours, cache), logits(theirs)[:, 7:])


def test_a_cache_of_inference_mode_is_continued_outside(llamas):
    cache = DynamicCache()
    with torch.inference_mode():
        decoded(llamas[0], cache, IDS[:, :16])
    close(continued(llamas[0], cache, IDS[:, 16:]), logits(llamas[1])[:, 16:])


# What must be noticed


def test_changed_vectors_and_weights_are_noticed(tmp_path, steps):
    ours, theirs = both(tiny_model(tmp_path / "m", "qwen2"))
    decoded(ours, DynamicCache())
    with torch.no_grad():
        for model in (ours, theirs):
            model.model.layers[0].input_layernorm.weight.mul_(1.5)
            model.model.layers[1].self_attn.k_proj.bias.add_(1)
            model.model.layers[1].post_attention_layernorm.weight.data = torch.full((64,), 0.7)
    close(decoded(ours, DynamicCache()), logits(theirs)[:, 7:])
    assert len(steps) == 2 * 2 * 16
    for model in (ours, theirs):
        model.model.layers[0].self_attn.v_proj.weight = torch.nn.Parameter(torch.ones(32, 64) / 64)
    close(decoded(ours, DynamicCache()), logits(theirs)[:, 7:])
    assert len(steps) == (2 + 2 + 1) * 16


def test_an_attention_function_of_the_users_is_called(llamas, steps):
    calls = []

    def mine(*args, **kwargs):
        calls.append(1)
        return transformers.integrations.sdpa_attention.sdpa_attention_forward(*args, **kwargs)

    transformers.AttentionInterface.register("of_a_test", mine)
    transformers.AttentionMaskInterface.register("of_a_test", transformers.masking_utils.sdpa_mask)
    llamas[0].set_attn_implementation("of_a_test")
    decoded(llamas[0], DynamicCache())
    assert len(calls) == 2 * 17 and not steps


def test_hooks_see_single_tokens_too(llamas, steps):
    calls = []
    handle = llamas[0].model.layers[1].self_attn.v_proj.register_forward_hook(lambda *a: calls.append(1))
    close(decoded(llamas[0], DynamicCache()), logits(llamas[1])[:, 7:])
    handle.remove()
    assert len(calls) == 17 and len(steps) == 16


@pytest.mark.parametrize(
    "change", [lambda t: t.double(), lambda t: t[..., :6], lambda t: torch.cat([t, t], 1), lambda t: t + torch.arange(8.0)]
)
def test_angles_of_another_kind_are_left_to_transformers(change):
    cos, sin = torch.ones(2, 1, 8), torch.zeros(2, 1, 8)
    assert step.tables((cos, sin), 8) is not None
    assert step.tables((cos, change(sin)), 8) is None


def test_copies_of_a_model_and_two_threads(llamas):
    ours, theirs = llamas
    meant = theirs.generate(IDS, **WHOLE)
    assert torch.equal(ours.generate(IDS, **WHOLE), meant)
    twins = [ours, copy.deepcopy(ours)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda m: m.generate(IDS, **WHOLE), [m for m in twins for _ in range(3)]))
    assert all(torch.equal(m, meant) for m in made)
