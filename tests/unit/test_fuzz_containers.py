"""Hostile files: whatever bytes a model file holds, the readers answer with a TersorError or with tensors that can be read.

Two kinds of input: files built from random parts by Hypothesis, and thousands of flipped, cut and spliced copies of tiny valid
files from a seeded generator. Memory is bounded by a limit on the address space, in a process of its own.
"""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gguf_bytes as g
from tersor.containers import CONTAINERS, open_checkpoint
from tersor.containers.container import Checkpoint
from tersor.conversion import convert
from tersor.errors import TersorError
from tersor.formats import get_format
from tersor.tensor import TensorInfo
from tiny import tiny_model

MUTATIONS = 1500
INTERESTING = [0, 1, 0x7F, 0x80, 0xFF]
SIZES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def read_all(checkpoint: Checkpoint) -> None:
    """Reads everything that a checkpoint offers."""
    with checkpoint:
        for name, info in checkpoint.tensors.items():
            tensor = checkpoint.read(name)
            assert tensor.shape == info.shape and tensor.nbytes == info.nbytes
            for array in tensor.fields.values():
                array.tobytes()
        dict(checkpoint.description.files)


def survives(path: Path) -> bool:
    """Opens and reads; returns whether the file was accepted. Anything but a TersorError escapes."""
    try:
        read_all(open_checkpoint(path))
    except TersorError as error:
        assert "\n" not in str(error) and len(str(error)) < 4000
        return False
    return True


def mutations(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Yields damaged copies: flipped bytes, numbers replaced by edges, cuts, and pieces moved or repeated; mostly in the first half kB."""
    rng = random.Random(seed)
    for _ in range(count):
        out = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            at = rng.randrange(min(len(out), rng.choice([64, 512, len(out)])) or 1)
            kind = rng.randrange(6)
            if kind == 0:
                out[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                out[at] = rng.choice(INTERESTING)
            elif kind == 2:
                out[at : at + 8] = struct.pack("<Q", rng.choice(SIZES))
            elif kind == 3:
                out[at : at + 4] = struct.pack("<I", rng.choice(SIZES) & 0xFFFFFFFF)
            elif kind == 4:
                del out[at : at + rng.choice([1, 8, 32, len(out)])]
            else:
                out[at:at] = out[at : at + rng.choice([1, 8, 64])]
            if not out:
                break
        yield bytes(out)


def tokens() -> dict[str, tuple[Any, Any]]:
    """Returns a vocabulary for the tiny GGUF file, so that the tokenizer's reader is under fire too."""
    words = ["a", "b", "ab", "<s>", "c", "d", "e", "f", "g", "h"]
    return {
        "tokenizer.ggml.model": (g.STRING, "gpt2"),
        "tokenizer.ggml.pre": (g.STRING, "smollm"),
        "tokenizer.ggml.tokens": ((g.ARRAY, g.STRING), words),
        "tokenizer.ggml.token_type": ((g.ARRAY, g.I32), [1, 1, 1, 3, 1, 1, 1, 1, 1, 1]),
        "tokenizer.ggml.merges": ((g.ARRAY, g.STRING), ["a b"]),
        "tokenizer.ggml.bos_token_id": (g.U32, 3),
    }


def test_damaged_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    accepted = 0
    for data in mutations(g.llama_bytes(tokens())[0], seed=1, count=MUTATIONS):
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        accepted += survives(path)
    assert 0 < accepted < MUTATIONS  # damage to weights alone is not noticed; most of the rest is


def test_damaged_parts(tmp_path: Path) -> None:
    """Of a split model, the one by which it is opened and another."""
    source = tiny_model(tmp_path / "hf", layers=1, hidden=32, intermediate=32, heads=2, kv_heads=1)
    (source / "tokenizer.json").unlink()
    convert(source, tmp_path / "m.gguf", split_bytes=30_000, verify=False)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    for part in (parts[0], parts[-1]):
        whole = part.read_bytes()
        head, accepted = whole[:1500], 0
        for data in mutations(head, seed=4, count=MUTATIONS // 5):
            part.unlink()
            part.write_bytes(data + whole[1500:])
            accepted += survives(parts[0])
        part.unlink()
        part.write_bytes(whole)
        assert accepted < MUTATIONS // 5
    assert survives(parts[0])


QUANTIZED = {**dict.fromkeys(("compressed-tensors", "gptq", "awq"), "int4_g32"), "bnb": "nf4_dq", "mlx": "int4_g32m", "hqq": "int3_g32z"}
# One of every layout of compressed-tensors.
LAYOUTS = {"k": "int3_g16so", "v": "fp8_c", "o": "nvfp4_gs", "up": "mxfp4", "gate": "fp8_t", "down": "int8_cs"}


def directory(path: Path, container: str) -> Path:
    """Returns a tiny directory, its projections quantized."""
    size = 64 if container == "bnb" else 32
    source = tiny_model(path / "hf", layers=1, hidden=size, intermediate=size, heads=2, kv_heads=2, tie=True)
    if container == "huggingface":
        return source
    checkpoint = open_checkpoint(source)
    tensors = {n: checkpoint.read(n) for n in checkpoint.tensors}
    formats = LAYOUTS if container == "compressed-tensors" else {}
    for name, tensor in list(tensors.items()):
        if "_proj" in name:
            format = formats.get(name.split("_proj")[0].rpartition(".")[2], QUANTIZED[container])
            tensors[name] = get_format(format).quantize(tensor.fields["values"])
    plan = [TensorInfo(n, t.format, t.shape, t.nbytes) for n, t in tensors.items()]
    with CONTAINERS[container].create(path / "ct", checkpoint.description, plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return path / "ct"


@pytest.mark.parametrize("container", ["huggingface", *QUANTIZED])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_damaged_directories(container: str, name: str, tmp_path: Path) -> None:
    path = directory(tmp_path, container)
    (path / "tokenizer.json").write_bytes(b"{}")  # carried as bytes, and slow to carry
    whole = (path / name).read_bytes()
    head = whole[:4096]  # the header, and some data behind it
    accepted = 0
    for data in mutations(head, seed=2, count=MUTATIONS // 3):
        (path / name).unlink()
        (path / name).write_bytes(data + whole[4096:])
        accepted += survives(path)
    assert accepted < MUTATIONS // 3


# --- Hypothesis: files that are nearly right ------------------------------------------------------------------------------

numbers = st.one_of(st.integers(0, 40), st.sampled_from(SIZES))
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@st.composite
def gguf_files(draw: st.DrawFn) -> bytes:
    scalars = st.sampled_from([g.U8, g.U32, g.I32, g.F32, g.BOOL, g.U64])
    pairs: dict[str, tuple[Any, Any]] = dict(g.LLAMA_PAIRS)
    for key in draw(
        st.lists(st.sampled_from([*g.LLAMA_PAIRS, "general.alignment", "llama.rope.scaling.type", "tokenizer.ggml.tokens"]), max_size=3)
    ):
        kind = draw(scalars)
        pairs[key] = (kind, draw(numbers) % (256 if kind == g.U8 else 2 if kind == g.BOOL else 2**31))
    names = st.sampled_from(
        ["token_embd.weight", "blk.0.attn_q.weight", "blk.0.attn_q.bias", "rope_freqs.weight", "output_norm.weight", "x", ""]
    )
    tensors = [
        g.Tensor(
            draw(names), draw(st.one_of(st.integers(0, 45), st.just(2**32 - 1))), tuple(draw(st.lists(numbers, max_size=5))), draw(numbers)
        )
        for _ in range(draw(st.integers(0, 4)))
    ]
    return g.gguf_bytes(pairs, tensors, draw(st.binary(max_size=200)))


@FUZZ
@given(gguf_files())
def test_gguf_of_random_parts(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    survives(path)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "F4"]), json_values),
        "shape": st.one_of(st.lists(numbers, max_size=4), json_values),
        "data_offsets": st.one_of(st.lists(numbers, min_size=2, max_size=2), json_values),
    }
)


@FUZZ
@given(
    header=st.one_of(json_values, st.dictionaries(st.text(max_size=8), st.one_of(entries, json_values), max_size=4)),
    data=st.binary(max_size=64),
)
def test_safetensors_of_random_headers(tmp_path: Path, header: Any, data: bytes) -> None:
    path = tmp_path / "m"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    text = json.dumps(header).encode()
    (path / "model.safetensors").unlink(missing_ok=True)
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    survives(path)


@FUZZ
@given(quantization=st.dictionaries(st.sampled_from(["config_groups", "format", "quant_method", "ignore"]), json_values), group=json_values)
def test_quantization_configs_of_random_values(tmp_path: Path, quantization: dict[str, Any], group: Any) -> None:
    path = tmp_path / "ct"
    if not path.exists():
        directory(tmp_path, "compressed-tensors")
        (path / "tokenizer.json").unlink()
    groups = {"group_0": group if not isinstance(group, dict) else {"targets": ["Linear"], "weights": group}}
    config = {"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups, **quantization}}
    (path / "config.json").write_text(json.dumps(config))
    survives(path)


CONFIG_KEYS = st.sampled_from(
    (
        *("hidden_size", "rope_scaling", "rope_parameters", "rope_theta", "layer_types", "sliding_window", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size", "model_type", "partial_rotary_factor"),
    )
)


@FUZZ
@given(config=st.dictionaries(CONFIG_KEYS, json_values))
@example(config={"hidden_size": "\n"})
@example(config={"rope_scaling": "\r\x1b[2J\u2028"})
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_configs_of_random_values_are_written_or_refused(tmp_path: Path, model_type: str, config: dict[str, Any]) -> None:
    """A hostile config.json must not crash the way to GGUF either."""
    path = tmp_path / "hf"
    if not path.exists():
        tiny_model(path, model_type, layers=1, hidden=32, intermediate=32, heads=2, kv_heads=1)
        (path / "tokenizer.json").unlink()
        (tmp_path / "good.json").write_bytes((path / "config.json").read_bytes())
    (path / "config.json").write_text(json.dumps(json.loads((tmp_path / "good.json").read_text()) | config))
    try:
        convert(path, tmp_path / "m.gguf", force=True)
    except TersorError as error:
        assert len(str(error).splitlines()) == 1
    assert not [f for f in tmp_path.iterdir() if f.name.endswith(".tmp")]


# --- memory ---------------------------------------------------------------------------------------------------------------


def test_lying_counts_allocate_nothing(tmp_path: Path) -> None:
    """Each lie asks for gigabytes; what is allocated stays below a megabyte."""
    big = 2**31
    lies = [
        g.preamble(0, 1) + g.string("k") + struct.pack("<IIQ", g.ARRAY, g.STRING, big) + bytes(64),
        g.preamble(0, 1) + g.string("k") + struct.pack("<IIQ", g.ARRAY, g.F64, big) + bytes(64),
        g.preamble(0, 1) + g.string("k") + struct.pack("<IQ", g.STRING, big) + bytes(64),
        g.preamble(0, 1) + struct.pack("<Q", big) + bytes(64),
        g.preamble(big, 0) + bytes(64),
        g.gguf_bytes(g.LLAMA_PAIRS, [g.Tensor("token_embd.weight", 0, (big, big // 2), 0)], bytes(64)),
    ]
    for number, lie in enumerate(lies):
        (tmp_path / f"{number}.gguf").write_bytes(lie)
    tracemalloc.start()
    try:
        for number in range(len(lies)):
            assert not survives(tmp_path / f"{number}.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


LIMITED = """
import resource, sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_fuzz_containers import mutations, survives, tokens
import gguf_bytes as g
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
file = Path({file!r})
for data in mutations(g.llama_bytes(tokens())[0], seed=3, count=300):
    file.unlink(missing_ok=True)
    file.write_bytes(data)
    survives(file)
print("done")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_damaged_files_in_little_memory(tmp_path: Path) -> None:
    """With 256 MiB of address space to spare, no damaged file makes the process die or run out of memory."""
    here = Path(__file__).parent
    code = LIMITED.format(path=[str(here), str(here.parent)], file=str(tmp_path / "m.gguf"))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr[-2000:]
