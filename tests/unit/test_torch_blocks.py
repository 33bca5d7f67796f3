"""Blocks one at a time against the whole transformers model."""

import numpy as np
import pytest
import torch
import transformers

from tersor.calibration.torch_blocks import TorchBlocks
from tersor.containers import open_checkpoint
from tersor.errors import ModelError
from tersor.models import linear_groups, spec_of
from tiny import ARCHITECTURES, VOCABULARY, tiny_model

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 24)).astype(np.int32)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_blocks_make_the_whole_models_hidden_states(model_type, tmp_path):
    path = tiny_model(tmp_path / "m", model_type)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS).long(), output_hidden_states=True).hidden_states
    with open_checkpoint(path) as checkpoint:
        blocks = TorchBlocks(checkpoint)
        x = blocks.embed(TOKENS)
        torch.testing.assert_close(x, expected[0])
        found = []
        for i in range(len(blocks)):
            with blocks.load(i) as block:
                found += block.groups
                x = block.run(x)
            if i + 1 < len(blocks):
                torch.testing.assert_close(x, expected[i + 1], rtol=1e-4, atol=1e-5)
            assert all(p.is_meta for layer in blocks._layers for p in layer.parameters())  # nothing stays loaded
        assert tuple(found) == linear_groups(spec_of(checkpoint.description.config))


def test_inputs_of_a_group_are_what_its_layers_multiply(tmp_path):
    with open_checkpoint(tiny_model(tmp_path / "m")) as checkpoint:
        blocks = TorchBlocks(checkpoint)
        x = blocks.embed(TOKENS)
        with blocks.load(0) as block:
            seen = {}
            for name, module in block._linears.items():
                module.register_forward_hook(lambda _, args, out, name=name: seen.setdefault(name, []).append(out[0]))
            block.run(x)
            outputs = {name: torch.stack(parts) for name, parts in seen.items()}
            for g, names in enumerate(block.groups):
                rows = torch.cat(list(block.inputs(g, x)))
                for name in names:
                    torch.testing.assert_close(rows @ torch.from_numpy(block.weight(name)).T, outputs[name].flatten(0, 1))


def test_replaced_weights_are_used(tmp_path):
    with open_checkpoint(tiny_model(tmp_path / "m")) as checkpoint:
        blocks = TorchBlocks(checkpoint)
        x = blocks.embed(TOKENS)
        with blocks.load(0) as block:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                block.replace(f"model.layers.0.{name}.weight", 0 * block.weight(f"model.layers.0.{name}.weight"))
            torch.testing.assert_close(block.run(x), x)  # both branches add nothing


def test_what_cannot_be_built_or_read_is_refused(tmp_path):
    import json

    path = tiny_model(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    with open_checkpoint(path) as checkpoint, pytest.raises(ModelError, match="transformers cannot build this model"):
        TorchBlocks(checkpoint)
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with open_checkpoint(path) as checkpoint, pytest.raises(ModelError, match=r"gate_proj\.weight is \(128, 64\); need \(96, 64\)"):
        TorchBlocks(checkpoint).load(0)
    (path / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    with open_checkpoint(path) as checkpoint, pytest.raises(ModelError, match=r"no tensor model\.layers\.0\.self_attn\.q_proj\.bias"):
        TorchBlocks(checkpoint).load(0)


def test_mixtures_of_fused_experts_are_refused_by_name(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_local_experts": 2}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "m")
    with open_checkpoint(tmp_path / "m") as checkpoint, pytest.raises(ModelError, match=r"no tensor model\.layers\.0\.mlp\."):
        TorchBlocks(checkpoint).load(0)
