"""transformers' models on our kernels. The judge is torch on the dequantized weights, transformers' own loader, or our engine."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open

import tersor
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.errors import ContainerError, FormatError, ModelError, RecipeError
from tersor.formats import get_format
from tersor.integrations.linear import Joined, TersorLinear
from tersor.integrations.matrix import Matrix
from tersor.integrations.transformers import TersorConfig, load
from tersor.integrations.weight import QuantizedWeight
from tiny import tiny_model

AutoModelForCausalLM = transformers.AutoModelForCausalLM
IDS = torch.arange(3, 12)[None]
RNG = np.random.default_rng(7)


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def matrix(format="int4_g32s", rows=48, columns=64, activations="int8"):
    return Matrix.of(get_format(format).quantize(RNG.standard_normal((rows, columns), np.float32)), activations)


def meant(model, ids=IDS):
    """Returns the logits of the model with every quantized weight made a float one, by torch alone."""
    plain = type(model)(model.config)
    state = {name: t.dense() if isinstance(t, QuantizedWeight) else t for name, t in model.state_dict().items()}
    plain.load_state_dict(state, strict=True)
    with torch.no_grad():
        return plain.float().eval()(ids).logits


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


# The layer


@pytest.mark.parametrize("format", ["int4_g32s", "int4_g32", "int8_c", "q8_0", "nf4", "f16", "bf16", "f32"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (40, 64), (0, 64)])
def test_layer_is_the_product_within_the_rounding_of_its_input(format, shape):
    m = matrix(format)
    bias = torch.from_numpy(RNG.standard_normal(48, np.float32))
    x = torch.from_numpy(RNG.standard_normal(shape, np.float32))
    w = torch.from_numpy(get_format(format).dequantize(m.tensor))
    y = TersorLinear.of(m, bias)(x)
    exact = x @ w.T + bias
    assert y.shape == exact.shape and y.dtype is torch.float32
    if not x.numel():
        return
    # half a step of at most absmax / 127 for each input (ops.pack), and float32 sums
    step = x.abs().max() / (16256 if x.numel() // 64 <= 16 else 127)
    bound = w.abs().sum(1) * step / 2 + 1e-5 * exact.abs().max()
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_answers_in_the_dtype_of_its_input(dtype):
    layer = TersorLinear.of(matrix(activations="float"))
    x = torch.from_numpy(RNG.standard_normal((3, 64), np.float32)).to(dtype)
    y = layer(x)
    assert y.dtype is dtype
    torch.testing.assert_close(y, (x.float() @ layer.weight.dense().T).to(dtype), rtol=1e-2, atol=1e-2)


def test_layer_takes_views_that_are_not_contiguous():
    layer = TersorLinear.of(matrix(activations="float"))
    x = torch.from_numpy(RNG.standard_normal((64, 5), np.float32)).T
    torch.testing.assert_close(layer(x), x @ layer.weight.dense().T)


def test_layer_refuses_another_width_and_another_device():
    layer = TersorLinear.of(matrix())
    with pytest.raises(ValueError, match="its last axis needs 64"):
        layer(torch.zeros(2, 128))
    with pytest.raises(ModelError, match="the input is on meta"):
        layer(torch.zeros(2, 64, device="meta"))


def test_gradient_is_that_of_a_float_layer():
    layer = TersorLinear.of(matrix(activations="float"), torch.zeros(48))
    plain = torch.nn.Linear(64, 48)
    plain.weight.data = layer.weight.dense()
    plain.bias.data.zero_()
    x, g = torch.randn(2, 5, 64), torch.randn(2, 5, 48)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(ours).backward(g)
    plain(theirs).backward(g)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(layer(x), plain(x))


def test_gradient_of_many_slabs_of_rows(monkeypatch):
    monkeypatch.setattr("tersor.integrations.matrix.SLAB_VALUES", 5 * 64)
    layer = TersorLinear.of(matrix(activations="float"))
    x = torch.randn(3, 64, requires_grad=True)
    g = torch.randn(3, 48)
    layer(x).backward(g)
    torch.testing.assert_close(x.grad, g @ layer.weight.dense())


def test_joined_layers_give_what_each_gives_alone_and_notice_changes_in_place():
    matrices = [matrix(rows=r, activations="float") for r in (48, 16, 32)]
    joined, x = pickle.loads(pickle.dumps(Joined(matrices))), torch.randn(2, 3, 64)
    for index, m in enumerate(matrices):
        torch.testing.assert_close(joined.product(x, index), x @ torch.from_numpy(m.dequantize()).T)
    first = joined.product(x, 0)
    x.mul_(2)
    torch.testing.assert_close(joined.product(x, 0), 2 * first)
    with torch.inference_mode():
        hidden = torch.randn(2, 64)
        joined.product(hidden, 0)
        hidden.mul_(2)
        torch.testing.assert_close(joined.product(hidden, 1), hidden @ torch.from_numpy(matrices[1].dequantize()).T)


def test_layer_with_an_ordinary_weight_is_torchs():
    layer = TersorLinear.of(matrix())
    layer.weight = torch.nn.Parameter(torch.ones(48, 64))
    torch.testing.assert_close(layer(torch.ones(1, 64)), torch.full((1, 48), 64.0))


# The weight


def test_weight_acts_as_its_values():
    w = QuantizedWeight(matrix())
    dense = torch.from_numpy(w.matrix.dequantize())
    assert w.shape == (48, 64) and w.dtype is torch.float32 and w.device.type == "cpu"
    torch.testing.assert_close(w + 1, dense + 1)
    torch.testing.assert_close(torch.nn.functional.linear(torch.ones(1, 64), w), dense.sum(1)[None])
    ids = torch.tensor([[3, 0], [47, 3]])
    torch.testing.assert_close(torch.nn.functional.embedding(ids, w), dense[ids])
    with pytest.raises(IndexError, match="need 0 to 47"):
        torch.nn.functional.embedding(torch.tensor([48]), w)


def test_weight_is_shared_by_copies_and_survives_pickling():
    layer = TersorLinear.of(matrix(), torch.zeros(48))
    twin, other = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    assert twin.weight.matrix is layer.weight.matrix
    x = torch.randn(2, 64)
    assert torch.equal(twin(x), layer(x)) and torch.equal(other(x), layer(x))


def test_weight_refuses_changes_in_place_and_other_devices():
    layer = TersorLinear.of(matrix())
    with pytest.raises(ModelError, match="cannot be changed in place"):
        layer.weight.data += 1
    with pytest.raises(ModelError, match=r"weight\.data: a quantized weight"):
        layer.weight.data = torch.zeros(48, 64)
    with pytest.raises(ModelError, match="run on the CPU"):
        torch.ops.aten._to_copy(layer.weight, device=torch.device("cuda"))
    assert layer.to(torch.bfloat16).weight.matrix is layer.weight.matrix
    assert layer.to("meta").weight.device.type == "meta"


def test_matrix_refuses_activations_that_need_calibrated_scales():
    with pytest.raises(RecipeError, match="unknown activations 'int8_static'"):
        matrix(activations="int8_static")


# from_pretrained of float weights


@pytest.mark.parametrize("recipe", ["rtn:int4_g32s", "clip:int4_g64", "hqq:int4_g32m", "int8_c, layers.1=keep, lm_head=q8_0"])
def test_from_pretrained_quantizes_by_the_recipe(tmp_path, recipe):
    path = tiny_model(tmp_path / "m", dtype="bf16")
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=TersorConfig(recipe, "float"))
    if recipe.startswith(("rtn", "clip")):  # what compressed-tensors holds
        tersor.quantize(path, tmp_path / "q", recipe, verify=False)
    torch.testing.assert_close(logits(model), meant(model), rtol=1e-3, atol=1e-4)
    if (tmp_path / "q").exists():
        with open_checkpoint(tmp_path / "q") as checkpoint:  # the same numbers as `tersor quantize` writes
            for name, weight in model.state_dict().items():
                if isinstance(weight, QuantizedWeight) and name in checkpoint.tensors:
                    theirs = checkpoint.read(name)
                    assert theirs.format == weight.matrix.format
                    np.testing.assert_array_equal(weight.matrix.dequantize(), get_format(theirs.format).dequantize(theirs))
    assert model.lm_head.weight.matrix is model.model.embed_tokens.weight.matrix
    assert model.dtype is torch.float32


def test_defaults_leave_embedding_and_head_in_16_bits(tmp_path):
    path = tiny_model(tmp_path / "m", "qwen2", tie=False)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=TersorConfig("int4_g32s"))
    formats = {name: w.matrix.format for name, w in model.state_dict().items() if isinstance(w, QuantizedWeight)}
    assert formats.pop("model.embed_tokens.weight") == formats.pop("lm_head.weight") == "f16"
    assert set(formats.values()) == {"int4_g32s"} and len(formats) == 14


@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "phi", "gpt2"])
def test_any_architecture(tmp_path, kind):
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
    }
    config = transformers.AutoConfig.for_model(kind, vocab_size=300, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TersorConfig("int8_c", "float"))
    torch.testing.assert_close(logits(model), meant(model), rtol=1e-3, atol=1e-4)
    quantized = [m.weight.matrix.format for m in model.modules() if isinstance(m, TersorLinear)]
    assert not any(type(m) is torch.nn.Linear for m in model.modules())
    assert quantized.count("int8_c") == {"opt": 12, "gpt_neox": 8, "phi": 12, "gpt2": 0}[kind]
    assert model.get_output_embeddings().weight.matrix.format == "f16"
    reloaded = load(tmp_path, activations="float")
    torch.testing.assert_close(logits(reloaded), logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), rtol=1e-3, atol=1e-4)
    if kind == "gpt2":
        assert type(reloaded.transformer.h[0].attn.c_attn.weight) is torch.nn.Parameter


def test_embedding_and_head_are_known_whatever_their_names(tmp_path):
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, tie_word_embeddings=False
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path, quantization_config=TersorConfig("int4_g32s, lm_head=q8_0", "float"))
    assert model.get_output_embeddings().weight.matrix.format == "q8_0"
    assert model.get_input_embeddings().weight.matrix.format == "f16"
    assert model.bert.encoder.layer[0].output.dense.weight.matrix.format == "int4_g32s"
    torch.testing.assert_close(logits(model), meant(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "arguments, kind, message",
    [
        (("awq+gptq:int4_g32",), RecipeError, "needs more than one weight at a time"),
        (("gptq:int4_g32",), RecipeError, "run `tersor quantize`"),
        (("int4_g32s", "int8_static"), RecipeError, "unknown activations"),
        (("int5_g7",), FormatError, "group of 7"),
        (("int4_g32s", "int8", "gptq"), RecipeError, "quant_method 'gptq'"),
    ],
)
def test_config_refuses(arguments, kind, message):
    with pytest.raises(kind, match=message):
        TersorConfig(*arguments)


def test_from_pretrained_refuses(tmp_path):
    path = tiny_model(tmp_path / "m")
    with pytest.raises(FormatError, match="not a multiple of 256"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=TersorConfig("q4_k"))
    with pytest.raises(RecipeError, match="matches none"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=TersorConfig("int4_g32s, nothing=q8_0"))
    with pytest.raises(ModelError, match="device_map: cuda"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=TersorConfig(), device_map="cuda")
    bad = np.ones((64, 128), np.float32)
    bad[3, 5] = np.nan
    path = tiny_model(tmp_path / "nan", change={"model.layers.0.mlp.down_proj.weight": bad})
    with pytest.raises(ModelError, match=r"layers.0.mlp.down_proj.weight holds nan at row 3, column 5"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=TersorConfig("int4_g32s"))
    config = json.loads((path / "config.json").read_text()) | {"quantization_config": {"quant_method": "tersor"}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ContainerError, match="no file format of its own"):
        AutoModelForCausalLM.from_pretrained(path)


# load


SOURCES = [("out", "rtn:int4_g32s"), ("out", "clip:int4_g64, lm_head=keep"), ("out.gguf", "q4_k"), ("out.gguf", "q4_0"), ("floats", "bf16")]


@pytest.mark.parametrize("name, recipe", SOURCES)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_load_gives_the_engines_logits_and_tokens(tmp_path, name, recipe, kind):
    path = tiny_model(tmp_path / "m", kind, hidden=256, intermediate=256)
    tersor.quantize(path, tmp_path / name, recipe, verify=False)
    model = load(tmp_path / name, activations="float")
    torch.testing.assert_close(logits(model), meant(model), rtol=1e-3, atol=1e-3)
    engine = tersor.load(tmp_path / name, activations="float", kv="f32")
    ids = IDS[0].numpy().astype(np.int32)
    theirs = engine.head(engine.forward(ids, engine.new_cache(32)))
    torch.testing.assert_close(logits(model)[0], torch.from_numpy(theirs), rtol=1e-3, atol=1e-3)
    out = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache, tokens = engine.new_cache(32), list(ids)
    hidden = engine.forward(ids, cache)
    for _ in range(8):
        tokens.append(int(engine.head(hidden[-1:]).argmax()))
        hidden = engine.forward(np.array(tokens[-1:], np.int32), cache)
    assert out[0].tolist() == tokens


HELD = {
    "gguf": "q4_0",
    "huggingface": "f16",
    "compressed-tensors": "int4_g32",
    "gptq": "int4_g32so",
    "awq": "int4_g32",
    "bnb": "nf4",
    "hqq": "int4_g32z",
    "mlx": "int4_g32m",
    "onnx": "int4_g32",
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_load_reads_every_container(tmp_path, name):
    out = tmp_path / f"out{CONTAINERS[name].suffix}"
    tersor.quantize(tiny_model(tmp_path / "m", tie=False), out, HELD[name], to=name, verify=False)
    model = load(out, activations="float")
    engine = tersor.load(out, activations="float", kv="f32")
    theirs = engine.head(engine.forward(IDS[0].numpy().astype(np.int32), engine.new_cache(32)))
    torch.testing.assert_close(logits(model)[0], torch.from_numpy(theirs), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(model), meant(model), rtol=1e-3, atol=1e-3)
    assert model.model.layers[0].mlp.up_proj.weight.matrix.format == HELD[name]


def test_load_takes_generation_config_and_an_open_checkpoint(tmp_path):
    with open_checkpoint(tiny_model(tmp_path / "m")) as checkpoint:
        model = load(checkpoint)
    assert model.generation_config.eos_token_id == 2 and model.name_or_path == str(tmp_path / "m")


def test_load_refuses_missing_weights_and_unknown_models(tmp_path):
    path = tiny_model(tmp_path / "m", config={"num_hidden_layers": 3, "layer_types": None})
    names = [n for n in open_checkpoint(path).tensors if "layers.2" in n]
    assert names
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(ModelError, match=r"lacks model.layers.3.\S+ and 8 more"):
        load(path)
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"holds model.layers.2.\S+ and 8 more"):
        load(path)
    (path / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    with pytest.raises(ModelError, match="makes no configuration"):
        load(path)


# Layers with fewer calls


def fused(model):
    return sum("tersor_plain" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("kind, layers", [("llama", 2), ("mistral", 2), ("qwen2", 2), ("qwen3", 0), ("gemma2", 0)])
def test_plain_layers_are_found_and_give_what_the_modules_give(tmp_path, kind, layers):
    model = load(tiny_model(tmp_path / "m", kind), activations="float")
    assert fused(model) == layers
    ids = torch.stack([IDS[0], IDS[0] + 20])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        quick = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        slow = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(quick[1], slow[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quick[0, 3:], slow[0, 3:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, ids), meant(model, ids), rtol=1e-3, atol=1e-3)


def test_hooks_see_what_the_modules_do(tmp_path):
    model = load(tiny_model(tmp_path / "m"))
    before, calls = logits(model), []
    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *a: calls.append(1))
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    handle.remove()
    assert calls == [1]
    with torch.no_grad():
        out = model(IDS, output_hidden_states=True)
    assert len(out.hidden_states) == 3


def test_a_layer_with_another_activation_is_left_alone(tmp_path):
    assert fused(load(tiny_model(tmp_path / "m", config={"hidden_act": "relu"}))) == 0
    model = load(tiny_model(tmp_path / "g", config={"hidden_act": "gelu_pytorch_tanh"}), activations="float")
    assert fused(model) == 2
    torch.testing.assert_close(logits(model), meant(model), rtol=1e-3, atol=1e-4)


# Saving and going back to floats


def test_saved_model_is_read_by_transformers_and_by_us(tmp_path):
    path = tiny_model(tmp_path / "m", dtype="f16")
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=TersorConfig("int4_g32s, layers.1=int8_cs", "float"))
    model.save_pretrained(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(logits(load(tmp_path / "saved", activations="float")), logits(model), rtol=1e-5, atol=1e-5)
    assert "lm_head.weight" not in safe_open(tmp_path / "saved" / "model.safetensors", "np").keys()  # noqa: SIM118
    with open_checkpoint(tmp_path / "saved") as checkpoint:
        assert checkpoint.container == "compressed-tensors"
        assert {info.format for info in checkpoint.tensors.values()} >= {"int4_g32s", "int8_cs"}


def test_saved_zeros_are_those_of_the_model(tmp_path):
    """transformers 5.23 itself does not load packed zero points, so our reader, which the package's own judges, is asked."""
    path = tiny_model(tmp_path / "m", dtype="f16")
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=TersorConfig("int4_g32"))
    model.save_pretrained(tmp_path / "saved")
    tersor.quantize(path, tmp_path / "direct", "int4_g32", verify=False)
    with open_checkpoint(tmp_path / "saved") as saved, open_checkpoint(tmp_path / "direct") as direct:
        assert set(saved.tensors) == set(direct.tensors)
        for name, info in direct.tensors.items():
            ours, theirs = saved.read(name), direct.read(name)
            np.testing.assert_array_equal(get_format(ours.format).dequantize(ours), get_format(info.format).dequantize(theirs))


def test_saving_refuses_what_the_container_cannot_hold(tmp_path):
    path = tiny_model(tmp_path / "m")
    for recipe, message in (("nf4", "q_proj.weight is nf4"), ("int4_g32s, embed=int8_c", "is int8_c and also the head")):
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=TersorConfig(recipe))
        with pytest.raises(ContainerError, match=message):
            model.save_pretrained(tmp_path / "saved")
    q4_0 = AutoModelForCausalLM.from_pretrained(path, quantization_config=TersorConfig("q4_0"))
    q4_0.save_pretrained(tmp_path / "q4_0")  # the same numbers as int4_g32s
    torch.testing.assert_close(logits(load(tmp_path / "q4_0")), logits(q4_0), rtol=1e-3, atol=1e-3)


def test_dequantize_gives_torchs_layers(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "m"), quantization_config=TersorConfig("int4_g32s", "float"))
    before = logits(model)
    plain = model.dequantize()
    assert not any(isinstance(m, TersorLinear) for m in plain.modules())
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-4)


def test_a_whole_model_goes_through_a_pickle(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "m"), quantization_config=TersorConfig("int4_g32s"))
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


# PEFT


def lora(model, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_an_adapter_is_trained_on_quantized_layers(tmp_path, targets):
    base = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "m"), quantization_config=TersorConfig("int4_g32s"))
    before = logits(base)
    model = lora(base, target_modules=targets)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)  # B is 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    with torch.no_grad():
        assert model(IDS, labels=IDS).loss < losses[0] - 0.5  # no layer goes round its adapter
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", quantization_config=TersorConfig("int4_g32s"))
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(again, tmp_path / "adapter")), logits(model), rtol=1e-3, atol=1e-3)


def test_adapter_gradients_are_those_on_the_float_model(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "m"), quantization_config=TersorConfig("int4_g32s", "float"))
    plain = copy.deepcopy(base).dequantize()
    torch.manual_seed(0)
    ours = lora(base, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    theirs = lora(plain, target_modules="all-linear", init_lora_weights=False)
    for model in (ours, theirs):
        model(IDS, labels=IDS).loss.backward()
    mine = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert len(mine) == 28
    for name, parameter in theirs.named_parameters():
        if "lora" in name:
            torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_an_adapter_is_refused(tmp_path, safe):
    base = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "m"), quantization_config=TersorConfig("int4_g32s"))
    model = lora(base, target_modules=["q_proj"], init_lora_weights=False)
    before = logits(model)
    with pytest.raises(ModelError, match="merging an adapter"):
        model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
