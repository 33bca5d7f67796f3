"""Differentiable decoding keeps every format's values and gradients; the torch decoder is transformers' on every architecture."""

import numpy as np
import pytest
import torch
import transformers

from tersor.containers import open_checkpoint
from tersor.errors import ModelError
from tersor.formats import FORMATS, get_format, ordered, outliers
from tersor.models import spec_of
from tersor.training.decode import TrainableTensor, product
from tersor.training.decoder import final_norm, logits_of, run_block
from tiny import ARCHITECTURES, VOCABULARY, tiny_model

ENCODERS = [name for name, f in FORMATS.items() if f.can_encode]
FIXED = ("f32", "f16", "bf16", "mxfp4", "nvfp4_gs", "fp8_b128", *ordered.EXAMPLES, *outliers.EXAMPLES)
TRAINABLE = [name for name in ENCODERS if name not in FIXED]


def quantized(name: str, rows: int = 6, columns: int = 768):
    w = (np.random.default_rng(0).standard_t(5, size=(rows, columns)) * 0.05).astype(np.float32)
    return get_format(name).quantize(w)


@pytest.mark.parametrize("name", ENCODERS)
def test_values_as_stored_decode_to_the_formats_own_weights(name):
    tensor = quantized(name)
    trainable = TrainableTensor.of(tensor)
    expected = get_format(name).dequantize(tensor)
    assert np.abs(trainable.weight(trainable.start).numpy() - expected).max() <= 2**-23 * np.abs(expected).max()
    stored = trainable.store(trainable.start)
    assert all(stored.fields[k].tobytes() == tensor.fields[k].tobytes() for k in tensor.fields)


@pytest.mark.parametrize("name", TRAINABLE)
def test_changed_values_decode_as_the_format_decodes_them(name):
    trainable = TrainableTensor.of(quantized(name))
    rng = np.random.default_rng(1)
    assert trainable.names
    changed = [v * torch.from_numpy(rng.uniform(0.8, 1.25, len(v)).astype(np.float32)) for v in trainable.start]
    stored = trainable.store(changed)
    expected = get_format(name).dequantize(stored)
    rounding = 2**-10 if any(a.dtype == np.float16 for a in get_format(name).unpack(stored)[1].values()) else 2**-22
    assert np.abs(trainable.weight(changed).numpy() - expected).max() <= 2 * rounding * np.abs(expected).max()
    assert not np.array_equal(expected, get_format(name).dequantize(trainable.tensor))


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_are_those_of_a_decoded_weight(name):
    # Double quantization gets a second, short block.
    trainable = TrainableTensor.of(quantized(name, 13 if "_dq" in name else 5, 1344 if "_dq" in name else 768))
    values = [v.clone().requires_grad_() for v in trainable.start]
    x = torch.randn(2, 3, trainable.tensor.columns, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = product(x, trainable, values)
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * seed).sum().backward()
    w = trainable.weight(trainable.start)
    torch.testing.assert_close(x.grad, seed @ w)
    of_w = (seed.flatten(0, 1).T @ x.detach().flatten(0, 1)).double()
    for i, value in enumerate(values):  # d w_hat / d value by differences: decoding is linear, so any step is exact
        for at in {0, len(value) // 2, len(value) - 1}:
            moved = [v.detach().clone() for v in values]
            moved[i][at] += 1
            expected = (of_w * (trainable.weight(moved) - w)).sum()
            assert float(value.grad[at]) == pytest.approx(float(expected), rel=1e-3, abs=1e-3)


def test_units_change_a_run_by_its_own_size():
    trainable = TrainableTensor.of(quantized("int4_g64m"))
    for i in range(2):
        moved = [v.clone() for v in trainable.start]
        moved[i] += trainable.units[i]
        change = (trainable.weight(moved) - trainable.weight(trainable.start)).reshape(-1, 64).norm(dim=1)
        torch.testing.assert_close(change, trainable.weight(trainable.start).reshape(-1, 64).norm(dim=1), rtol=1e-4, atol=0)


def test_a_group_of_zeros_cannot_be_trained():
    trainable = TrainableTensor.of(get_format("int4_g64s").quantize(np.zeros((2, 64), np.float32)))
    assert trainable.units[0].tolist() == [0, 0]


def test_values_that_float16_cannot_hold_are_refused():
    trainable = TrainableTensor.of(quantized("int4_g64s"))
    with pytest.raises(ModelError, match="int4_g64s: a trained scale is not finite in float16; use a lower learning rate"):
        trainable.store([trainable.start[0] * 1e9])


def test_decode_only_tensors_are_fixed():
    name = next(name for name, f in FORMATS.items() if not f.can_encode)
    f = get_format(name)
    from tersor.tensor import QuantizedTensor

    raw = np.random.default_rng(0).integers(0, 60, (2, f.nbytes((1, 256))), dtype=np.uint8)
    trainable = TrainableTensor.of(QuantizedTensor(name, (2, 256), {"blocks": raw}))
    assert trainable.names == () and trainable.fixed is not None and trainable.store(()) is trainable.tensor


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_forward_is_that_of_transformers(model_type, tmp_path):
    path = tiny_model(tmp_path / "m", model_type)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (2, 40)))
    with open_checkpoint(path) as checkpoint, torch.no_grad():
        spec = spec_of(checkpoint.description.config)

        def read(name: str) -> torch.Tensor:
            tensor = checkpoint.read(name)
            return torch.from_numpy(np.array(get_format(tensor.format).dequantize(tensor)))

        x = read("model.embed_tokens.weight")[tokens] * spec.embedding_scale
        for i, layer in enumerate(spec.layers):
            prefix = f"model.layers.{i}."
            x = run_block(spec, layer, x, lambda n, h, p=prefix: h @ read(p + n).T, lambda n, p=prefix: read(p + n))
        head = read("model.embed_tokens.weight" if spec.tied else "lm_head.weight")
        logits = logits_of(spec, final_norm(spec, x, read("model.norm.weight")), head)
        torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bf16", "mxfp4"])
def test_tensors_without_float_parameters_pass_gradients_to_their_inputs(name):
    trainable = TrainableTensor.of(quantized(name))
    x = torch.randn(2, 768, generator=torch.Generator().manual_seed(0)).requires_grad_()
    product(x, trainable, ()).sum().backward()
    torch.testing.assert_close(x.grad, torch.from_numpy(get_format(name).dequantize(trainable.tensor).copy()).sum(0).expand(2, -1))
