"""Peak memory of quantizing a sharded checkpoint of 1.1 billion random weights with RTN to Q4_K.

    python -m benchmarks.memory [--recipe rtn:q4_k] [--limit-mib 1024] [--folder DIR]

Writes a bfloat16 Hugging Face directory of TinyLlama's shape (2.2 GB, in shards of 500 MB) and runs `tersor quantize` on it
in a process of its own; the figure is that process's peak resident set, as the operating system counted it. Exit code 1
when the limit is passed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYERS, WIDTH, FFN, HEADS, KV_HEADS, VOCABULARY = 22, 2048, 5632, 32, 4, 32000


def shapes(vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields every tensor of the model."""
    kv = WIDTH // HEADS * KV_HEADS
    yield "model.embed_tokens.weight", (vocabulary, WIDTH)
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        for name, shape in {
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (kv, WIDTH),
            "self_attn.v_proj": (kv, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "mlp.gate_proj": (FFN, WIDTH),
            "mlp.up_proj": (FFN, WIDTH),
            "mlp.down_proj": (WIDTH, FFN),
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }.items():
            yield f"{block}{name}.weight", shape
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (vocabulary, WIDTH)


def make(folder: Path, shard_bytes: int = 500_000_000, vocabulary: int = VOCABULARY) -> int:
    """Writes the checkpoint, float16, and returns its number of parameters."""
    rng, shards, shard, size, total = np.random.default_rng(0), [], {}, 0, 0
    for name, shape in shapes(vocabulary):
        w = rng.standard_normal(shape, dtype=np.float32) * 0.02 if len(shape) == 2 else np.ones(shape, np.float32)
        shard[name] = w.astype(np.float16)
        size, total = size + 2 * w.size, total + w.size
        if size >= shard_bytes:
            shards.append(list(shard))
            save_file(shard, folder / f"shard-{len(shards)}.safetensors")
            shard, size = {}, 0
    shards.append(list(shard))
    save_file(shard, folder / f"shard-{len(shards)}.safetensors")
    files = {name: f"shard-{i + 1}.safetensors" for i, names in enumerate(shards) for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 2 * total}, "weight_map": files}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="rtn:q4_k")
    parser.add_argument("--limit-mib", type=float, default=1024)
    parser.add_argument("--folder", help="where the checkpoint is made (default: the system's temporary folder)")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        source, out = Path(folder) / "source", Path(folder) / "out.gguf"
        source.mkdir()
        parameters = make(source)
        before = sum(f.stat().st_size for f in source.iterdir())
        start = time.perf_counter()
        command = [sys.executable, "-m", "tersor.cli", "quantize", str(source), "-o", str(out), "--recipe", a.recipe]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            return 1
        peak = usage.ru_maxrss / 1024
        print(
            f"{parameters / 1e9:.2f} billion weights, {before / 1e6:.0f} MB in {len(list(source.glob('*.safetensors')))} shards, {a.recipe}"
        )
        print(f"file {out.stat().st_size / 1e6:.0f} MB, {time.perf_counter() - start:.0f} s, {usage.ru_utime + usage.ru_stime:.0f} CPU s")
        print(f"peak memory {peak:.0f} MiB, limit {a.limit_mib:.0f} MiB: {'held' if peak <= a.limit_mib else 'PASSED OVER'}")
        return int(peak > a.limit_mib)


if __name__ == "__main__":
    sys.exit(main())
