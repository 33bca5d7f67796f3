"""What every container promises, over all of CONTAINERS and every format that each one holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tersor.containers import CONTAINERS, get_container, open_checkpoint
from tersor.containers.container import Checkpoint, Container
from tersor.errors import ContainerError, OutputError
from tersor.formats import FORMATS, get_format
from tersor.tensor import QuantizedTensor, TensorInfo
from tiny import tiny_model

CASES = [(container, format) for container in CONTAINERS for format in FORMATS if CONTAINERS[container].holds(format)]
WRITABLE = [(container, format) for container, format in CASES if FORMATS[format].can_encode and FORMATS[format].fits((256, 768))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model whose rows of 768 values suit every group size."""
    return open_checkpoint(
        tiny_model(tmp_path_factory.mktemp("m") / "m", hidden=768, intermediate=256, layers=1, heads=4, kv_heads=2, tie=False)
    )


@pytest.fixture(params=CONTAINERS)
def container(request: pytest.FixtureRequest) -> Container:
    return CONTAINERS[request.param]


def target(container: Container, directory: Path) -> Path:
    return directory / f"out{container.suffix}"


def tensors_of(model: Checkpoint, format: str) -> dict[str, QuantizedTensor]:
    """Returns the model's tensors, two of its matrices in this format; q because containers reorder its rows."""
    chosen = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")
    tensors = {name: model.read(name) for name in model.tensors}
    for name in chosen if format != "f32" else ():
        tensors[name] = get_format(format).quantize(tensors[name].fields["values"])
    return tensors


def plan_of(tensors: dict[str, QuantizedTensor]) -> list[TensorInfo]:
    return [TensorInfo(name, t.format, t.shape, t.nbytes) for name, t in tensors.items()]


def write(container: Container, path: Path, model: Checkpoint, tensors: dict[str, QuantizedTensor], force: bool = False) -> None:
    with container.create(path, model.description, plan_of(tensors), force=force) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@pytest.mark.parametrize(("name", "format"), WRITABLE)
def test_every_held_format_comes_back_to_the_bit(name: str, format: str, model: Checkpoint, tmp_path: Path) -> None:
    container, tensors = CONTAINERS[name], tensors_of(model, format)
    path = target(container, tmp_path)
    write(container, path, model, tensors)
    with open_checkpoint(path) as found:
        assert list(found.tensors) == list(tensors) or set(found.tensors) == set(tensors)
        for key, expected in tensors.items():
            info, tensor = found.tensors[key], found.read(key)
            assert (info.name, info.format, info.shape, info.nbytes) == (key, expected.format, expected.shape, expected.nbytes)
            assert (tensor.format, tensor.shape, set(tensor.fields)) == (expected.format, expected.shape, set(expected.fields))
            for field, array in expected.fields.items():
                np.testing.assert_array_equal(tensor.fields[field], array, err_msg=f"{key} {field}")
                assert tensor.fields[field].dtype == array.dtype and tensor.fields[field].shape == array.shape


@pytest.mark.parametrize(("name", "format"), [case for case in WRITABLE if FORMATS[case[1]].row_independent])
def test_row_slices_are_slices_of_the_whole(name: str, format: str, model: Checkpoint, tmp_path: Path) -> None:
    container, path = CONTAINERS[name], target(CONTAINERS[name], tmp_path)
    write(container, path, model, tensors_of(model, format))
    checkpoint = open_checkpoint(path)
    for key in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        whole = checkpoint.read(key)
        for rows in (slice(0, 1), slice(100, 200), slice(255, 999), slice(7, 7)):
            part = checkpoint.read(key, rows)
            assert part.shape == (len(range(*rows.indices(whole.rows))), whole.columns)
            for field, array in whole.fields.items():
                np.testing.assert_array_equal(part.fields[field], array[rows], err_msg=f"{key} {field} {rows}")


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_is_not_held_is_refused_by_name(name: str, model: Checkpoint, tmp_path: Path) -> None:
    container = CONTAINERS[name]
    foreign = next(f for f in FORMATS if not container.holds(f))
    plan = [TensorInfo("model.embed_tokens.weight", foreign, (320, 768), 1)]
    with pytest.raises(ContainerError, match=f"{name} cannot hold {foreign} \\(model.embed_tokens.weight\\)"):
        container.create(target(container, tmp_path), model.description, plan)
    assert list(tmp_path.iterdir()) == []


def test_is_recognized_by_itself_alone(container: Container, model: Checkpoint, tmp_path: Path) -> None:
    path = target(container, tmp_path)
    quantized = [format for name, format in WRITABLE if name == container.name and format not in ("f32", "f16", "bf16")]
    write(container, path, model, tensors_of(model, quantized[0] if quantized else "f32"))
    assert [c.name for c in CONTAINERS.values() if c.recognizes(path)] == [container.name]
    assert open_checkpoint(path).container == container.name and get_container(container.name) is container


def test_description_survives(container: Container, model: Checkpoint, tmp_path: Path) -> None:
    path = target(container, tmp_path)
    write(container, path, model, tensors_of(model, "f32"))
    found = open_checkpoint(path).description
    for key, value in model.description.config.items():
        assert key == "dtype" or found.config[key] == value, key
    from tokenizers import Tokenizer

    text = "The quick brown fox, 0123!\n"
    ids = [Tokenizer.from_buffer(d.files["tokenizer.json"]).encode(text).ids for d in (model.description, found)]
    assert ids[0] == ids[1]
    template = json.loads(found.files["tokenizer_config.json"])["chat_template"]
    assert template == json.loads(model.description.files["tokenizer_config.json"])["chat_template"]


def test_nothing_under_the_final_name_before_the_end(container: Container, model: Checkpoint, tmp_path: Path) -> None:
    path, tensors = target(container, tmp_path), tensors_of(model, "f32")
    writer = container.create(path, model.description, plan_of(tensors))
    for name in reversed(tensors):  # any order
        writer.write(name, tensors[name])
        assert not path.exists()
    writer.commit()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_nothing(error: type[BaseException], container: Container, model: Checkpoint, tmp_path: Path) -> None:
    tensors = tensors_of(model, "f32")
    with pytest.raises(error), container.create(target(container, tmp_path), model.description, plan_of(tensors)) as writer:
        writer.write("model.norm.weight", tensors["model.norm.weight"])
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_left_out_is_an_error(container: Container, model: Checkpoint, tmp_path: Path) -> None:
    tensors = tensors_of(model, "f32")
    plan = plan_of(tensors)
    del tensors["model.norm.weight"]
    with (
        pytest.raises(ContainerError, match=r"1 announced tensors were not written, first model\.norm\.weight"),
        container.create(target(container, tmp_path), model.description, plan) as writer,
    ):
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_was_not_announced_is_an_error(container: Container, model: Checkpoint, tmp_path: Path) -> None:
    tensors = tensors_of(model, "f32")
    other = get_format("f16").quantize(tensors["model.norm.weight"].fields["values"][0])
    with container.create(target(container, tmp_path), model.description, plan_of(tensors)) as writer:
        with pytest.raises(ContainerError, match=r"model\.norm\.weight is f16 \[768\], but f32 \[768\] was announced"):
            writer.write("model.norm.weight", other)
        with pytest.raises(ContainerError, match=r"x is f16 \[768\], but nothing of that name was announced"):
            writer.write("x", other)
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    with pytest.raises(ContainerError, match="announced twice"):
        container.create(tmp_path / "twice", model.description, plan_of(tensors) * 2)


def test_existing_output_needs_force(container: Container, model: Checkpoint, tmp_path: Path) -> None:
    path, tensors = target(container, tmp_path), tensors_of(model, "f32")
    write(container, path, model, tensors)
    with pytest.raises(OutputError, match="exists already; choose another name or use --force"):
        write(container, path, model, tensors)
    write(container, path, model, tensors, force=True)
    (tmp_path / "other").mkdir() if container.suffix else (tmp_path / "other").touch()
    with pytest.raises(OutputError, match="--force replaces only"):
        write(container, tmp_path / "other", model, tensors, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["other", path.name])


def test_overwriting_the_source_is_safe_for_its_views(container: Container, model: Checkpoint, tmp_path: Path) -> None:
    """The old file lives on until its last view is gone, so nothing is torn when an output replaces what is being read."""
    path, tensors = target(container, tmp_path), tensors_of(model, "f32")
    write(container, path, model, tensors)
    old = open_checkpoint(path)
    view = old.read("model.layers.0.mlp.up_proj.weight").fields["values"]
    write(
        container,
        path,
        model,
        {n: QuantizedTensor(t.format, t.shape, {"values": t.fields["values"] * 2}) for n, t in tensors.items()},
        force=True,
    )
    np.testing.assert_array_equal(view, tensors["model.layers.0.mlp.up_proj.weight"].fields["values"])
    with open_checkpoint(path) as new:
        np.testing.assert_array_equal(new.read("model.layers.0.mlp.up_proj.weight").fields["values"], 2 * view)


def test_unknown_names_list_the_known(container: Container, model: Checkpoint, tmp_path: Path) -> None:
    write(container, target(container, tmp_path), model, tensors_of(model, "f32"))
    with pytest.raises(ContainerError, match="no tensor 'nope'"):
        open_checkpoint(target(container, tmp_path)).read("nope")
    with pytest.raises(ContainerError, match=f"unknown container 'zip'; known: {', '.join(sorted(CONTAINERS))}"):
        get_container("zip")
