"""tune: what it trains and what stays, that the held-out loss falls, and what the divergence and its gradient are."""

from functools import partial

import numpy as np
import pytest
import torch

from tersor.containers import open_checkpoint
from tersor.errors import ModelError, RecipeError
from tersor.formats import get_format
from tersor.methods.tune import TuneOptions, tune_block, tune_model
from tersor.models import spec_of
from tersor.training.decoder import run_block
from tersor.training.descent import Adam, descend, split
from tersor.training.distill import divergence, float_hidden
from tiny import VOCABULARY, tiny_model

FORMAT = "int3_g32"
QUICK = TuneOptions(epochs=6, rate=0.16, vector_rate=0.16, batch_tokens=64, micro_tokens=32, held_out=0.25, precision="f32")


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request, tmp_path_factory):
    """(spec, read of the float model, its matrices rounded, its vectors, tokens); scales and norms off by some 15 %."""
    rng = np.random.default_rng(4)
    checkpoint = open_checkpoint(tiny_model(tmp_path_factory.mktemp("m") / "m", request.param))
    spec = spec_of(checkpoint.description.config)
    tensors, vectors = {}, {}
    for name, info in checkpoint.tensors.items():
        w = np.array(get_format(info.format).dequantize(checkpoint.read(name)))
        if w.ndim == 1:
            vectors[name] = (w * rng.uniform(0.8, 1.25, w.shape)).astype(np.float32)
            continue
        f = get_format("q8_0" if "layers" not in name else FORMAT)
        tensors[name] = f.quantize(w)
        if "layers" in name:
            rounded, params = f.unpack(tensors[name])
            scale = params["scale"] * rng.uniform(0.8, 1.25, params["scale"].shape)
            tensors[name] = f.pack(rounded, {**params, "scale": scale.astype(np.float16)})
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (16, 16)).astype(np.int32)
    return spec, checkpoint.read, tensors, vectors, tokens


def codes(tensor):
    return get_format(tensor.format).unpack(tensor)[0]


def test_the_model_comes_nearer_and_its_codes_stay(model):
    spec, read, tensors, vectors, tokens = model
    new, new_vectors, descent = tune_model(spec, read, tensors, vectors, tokens, QUICK)
    assert descent.after < 0.9 * descent.before and descent.kept > 0
    assert new.keys() == tensors.keys() and new_vectors.keys() == vectors.keys()
    for name, tensor in tensors.items():
        assert np.array_equal(codes(new[name]), codes(tensor)) and new[name].nbytes == tensor.nbytes
        moved = any(new[name].fields[k].tobytes() != tensor.fields[k].tobytes() for k in tensor.fields)
        assert moved == ("layers" in name)  # the embedding and the head are used as they are
    assert all(not np.array_equal(new_vectors[name], v) for name, v in vectors.items())
    held = torch.from_numpy(tokens.astype(np.int64))[split(len(tokens), QUICK.held_out, 0)[1]]
    assert judged(spec, read, new, new_vectors, held) == pytest.approx(descent.after, rel=0.02)  # float16 scales
    assert judged(spec, read, tensors, vectors, held) == pytest.approx(descent.before, rel=1e-4)


def judged(spec, read, tensors, vectors, ids):
    """The mean KL of the stored model, by way of float_hidden, which decodes through the formats themselves."""
    stored = {**tensors, **{name: get_format("f32").quantize(v) for name, v in vectors.items()}}
    name = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
    heads = [torch.from_numpy(np.array(get_format(t.format).dequantize(t))) for t in (read(name), tensors[name])]
    states = [float_hidden(spec, r, ids, torch.float32, 4) for r in (read, stored.__getitem__)]
    log_p, log_q = (torch.log_softmax(logits(spec, s.double() @ h.double().T), -1) for s, h in zip(states, heads))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def logits(spec, x):
    return spec.final_softcap * torch.tanh(x / spec.final_softcap) if spec.final_softcap else x


def test_micro_batches_change_nothing_but_rounding(model):
    spec, read, tensors, vectors, tokens = model
    after = []
    for micro in (16, 64):
        options = TuneOptions(epochs=1, batch_tokens=64, micro_tokens=micro, held_out=0.25, precision="f32")
        after.append(tune_model(spec, read, tensors, vectors, tokens, options)[2].after)
    assert after[0] == pytest.approx(after[1], rel=1e-4)


def test_same_seed_same_bytes_another_seed_others(model):
    spec, read, tensors, vectors, tokens = model

    def run(seed):
        new, norms, _ = tune_model(spec, read, tensors, vectors, tokens, TuneOptions(epochs=0.5, batch_tokens=64), seed)
        return b"".join(a.tobytes() for t in new.values() for a in t.fields.values()) + b"".join(v.tobytes() for v in norms.values())

    assert run(0) == run(0) != run(1)


def test_a_training_that_makes_it_worse_is_not_kept(model):
    spec, read, tensors, vectors, tokens = model
    wild = TuneOptions(epochs=1, rate=16, vector_rate=16, batch_tokens=64, checks=2, precision="f32")
    new, norms, descent = tune_model(spec, read, tensors, vectors, tokens, wild)
    assert descent.kept == 0 and descent.after == descent.before
    assert all(new[name].fields[k].tobytes() == t.fields[k].tobytes() for name, t in tensors.items() for k in t.fields)
    assert all(np.array_equal(norms[name], v) for name, v in vectors.items())


def test_a_block_comes_nearer_to_its_outputs(model):
    spec, _, tensors, vectors, _ = model
    prefix = "model.layers.0."
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    norms = {name.removeprefix(prefix): v for name, v in vectors.items() if name.startswith(prefix)}
    inputs = np.random.default_rng(1).standard_normal((12, 16, spec.hidden_size)).astype(np.float32)
    read = model[1]

    def decoded(name, tensors):
        return torch.from_numpy(np.array(get_format(tensors[name].format).dequantize(tensors[name])))

    with torch.no_grad():
        float_block = {name: read(prefix + name) for name in (*own, *norms)}
        x = torch.from_numpy(inputs)
        targets = run_block(
            spec, spec.layers[0], x, lambda n, h: h @ decoded(n, float_block).T, lambda n: decoded(n, float_block).reshape(-1)
        ).numpy()
    forward = partial(run_block, spec, spec.layers[0])
    new, new_norms, descent = tune_block(forward, inputs, targets, own, norms, QUICK)
    assert descent.after < 0.9 * descent.before
    assert all(np.array_equal(codes(new[name]), codes(t)) for name, t in own.items())
    with torch.no_grad():
        outputs = run_block(spec, spec.layers[0], x, lambda n, h: h @ decoded(n, new).T, lambda n: torch.from_numpy(new_norms[n])).numpy()
    held = split(12, QUICK.held_out, 0)[1].numpy()
    error = np.square(outputs[held] - targets[held]).sum() / np.square(targets[held]).sum()
    assert error == pytest.approx(descent.after, rel=0.01)


def test_divergence_is_kl_and_its_gradient(model):
    spec = model[0]
    rng = np.random.default_rng(2)
    p, q = (torch.from_numpy(rng.standard_normal((2, 5, spec.hidden_size)).astype(np.float32)) for _ in range(2))
    heads = [torch.from_numpy(rng.standard_normal((VOCABULARY, spec.hidden_size)).astype(np.float32) * 0.2) for _ in range(2)]
    value, gradient = divergence(spec, p, heads[0], q, heads[1])
    wide = q.double().requires_grad_()
    log_p = torch.log_softmax(logits(spec, p.double() @ heads[0].double().T), -1)
    log_q = torch.log_softmax(logits(spec, wide @ heads[1].double().T), -1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / 10
    expected.backward()
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, wide.grad.float(), rtol=1e-4, atol=1e-6)


def test_adam_by_hand():
    p = torch.tensor([2.0, -3.0]).requires_grad_()
    units, rate = [0.5, 4.0], 0.01
    adam = Adam([p], [torch.tensor(units)], [rate])
    first, second, expected = [0.0, 0.0], [0.0, 0.0], [2.0, -3.0]
    for t in range(1, 6):
        (p.square().sum() + t * p[0]).backward()
        adam.step(1 / t)
        for i in range(2):
            gradient = (2 * expected[i] + (t if i == 0 else 0)) * units[i]
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.95 * second[i] + 0.05 * gradient**2
            expected[i] -= rate / t * units[i] * first[i] / (second[i] / (1 - 0.95**t)) ** 0.5
    assert p.tolist() == pytest.approx(expected, rel=1e-5)


def test_descend_leaves_the_best_state_judged():
    p = torch.zeros(1)
    descent = descend(6, lambda step: p.add_(1), lambda: abs(float(p) - 4), [p], checks=3)  # judged at 0, 2, 4, 6
    assert float(p) == 4 and (descent.before, descent.after, descent.kept, descent.steps) == (4, 0, 4, 6)


def test_split_holds_out_at_least_one_and_keeps_one():
    for n, share in ((2, 0.01), (2, 0.99), (10, 0.2)):
        train, held = split(n, share, 0)
        assert sorted([*train.tolist(), *held.tolist()]) == list(range(n)) and min(len(train), len(held)) >= 1
    assert len(split(10, 0.2, 0)[1]) == 2


def test_bad_input_is_refused(model, monkeypatch):
    spec, read, tensors, vectors, tokens = model
    with pytest.raises(ModelError, match=r"tune: tokens \(1, 16\); need \(n, s\) ids in 0..319 with n >= 2"):
        tune_model(spec, read, tensors, vectors, tokens[:1])
    with pytest.raises(ModelError, match="tune: tokens"):
        tune_model(spec, read, tensors, vectors, tokens + VOCABULARY)
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        tune_model(spec, read, tensors, {n: v for n, v in vectors.items() if n != "model.norm.weight"}, tokens)
    with pytest.raises(ModelError, match="tune: inputs"):
        tune_block(None, np.zeros((1, 2, 3)), np.zeros((1, 2, 3)), {}, {})
    with pytest.raises(RecipeError, match=r"epochs 0.*need all above 0"):
        TuneOptions(epochs=0)
    with pytest.raises(RecipeError, match=r"rate -1, .*need finite numbers >= 0"):
        TuneOptions(rate=-1)
    with pytest.raises(RecipeError, match="unknown precision 'fp8'"):
        TuneOptions(precision="fp8")
    monkeypatch.setattr("tersor.training.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"tune: needs torch.*pip install 'tersor\[torch\]'"):
        tune_model(spec, read, tensors, vectors, tokens)
    with pytest.raises(RecipeError, match="tune: needs torch"):
        tune_block(None, np.zeros((2, 2, 3)), np.zeros((2, 2, 3)), {}, {})
