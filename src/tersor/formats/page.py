"""docs/formats.md, made from the formats themselves.

`python -m tersor.formats.page > docs/formats.md` writes it, `python -m tersor.formats.page --check docs/formats.md` compares.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from tersor.containers import CONTAINERS
from tersor.formats import FORMATS, Format, affine, float_zero, floats, fp8, ggml, int8, lookup, nvfp4, ordered, outliers, signs

_HEAD = """# Number formats

<!-- Made by `python -m tersor.formats.page`; do not edit. -->

A format says which numbers can be stored and where their bytes are. Formulas and rounding rules: [numerics.md](numerics.md).

Notation: a tensor is (rows, in); groups run along `in`. q is a code, w the decoded weight. Multi-byte numbers are little-endian.
"Dense, LSB first" is one bit stream per row: value i is bits [i\\*B, i\\*B + B), stream bit k is bit k % 8 of byte k // 8.
For B = 3:

```
byte 0 = c2[1:0] c1[2:0] c0[2:0]    byte 1 = c5[0] c4[2:0] c3[2:0] c2[2]    byte 2 = c7[2:0] c6[2:0] c5[2:1]
```

Bits per weight are exact, scales and all else included, here for a matrix of 4096 x 4096. "Importance" names the methods that weigh
errors by column importance in this format. The engine runs every format, from the containers named.

| container | loaded by |
|---|---|
| gguf | llama.cpp, llama-cpp-python, ollama, LM Studio |
| huggingface | transformers, vLLM and everything else that reads safetensors |
| compressed-tensors | vLLM and SGLang (4 and 8 bits), transformers with the `compressed-tensors` package (symmetric ones) |
| onnx | onnxruntime, onnxruntime-genai |
| bnb | transformers with the `bitsandbytes` package |
| mlx | mlx-lm |
| hqq | transformers 4 with the `hqq` package |
"""

_FAMILIES: tuple[tuple[str, ModuleType, str], ...] = (
    ("Floats", floats, "IEEE numbers, nothing shared. Source: IEEE 754; bfloat16 is the upper half of binary32."),
    (
        "ggml blocks",
        ggml,
        "The types of GGUF files, byte for byte. Those that cannot be written can be read and run.\n"
        "Source: ggml-org/ggml `src/ggml-common.h` (structs, tables), `src/ggml-quants.c`; checked against the `gguf` package.",
    ),
    (
        "Affine integers",
        affine,
        "`intB_gN`: B = 1, 2, 3, 4, 5, 6, 8; N = 16..256, a multiple of 16. `_c`: one scale per row. `_t`: one per tensor.\n"
        "No suffix: integer zero; `s`: symmetric; `m`: float16 minimum. With `f` after it: scales and minima are float32, as in files\n"
        "made of a float32 model; products keep them. The table lists examples; every combination exists but `int1_..s`, which is\n"
        "`binary`. Source: arXiv 1712.05877 equation 1; packing as compressed-tensors `pack_quantized`.",
    ),
    (
        "Affine integers with a float zero",
        float_zero,
        "`intB_gNz`, `intB_cz`: what HQQ stores. Source: mobiusml/hqq `hqq/core/quantize.py`.",
    ),
    (
        "Affine integers in an order of columns",
        ordered,
        "`intB_gNo`, `intB_gNso`: GPTQ's act-order (`g_idx`), groups of columns of like importance. Source: ModelCloud/GPTQModel\n"
        "`gptqmodel/nn_modules/qlinear/__init__.py`.",
    ),
    (
        "Binary and ternary",
        signs,
        "`binary_gN`, `ternary_gN`: N = 16..256, a multiple of 16. Sources: XNOR-Net (arXiv 1603.05279), TWN (arXiv 1605.04711).",
    ),
    ("int8 rows", int8, "The weights of LLM.int8(). Source: arXiv 2208.07339 section 3.1; bitsandbytes `nn/modules.py` (`SCB`)."),
    (
        "int8 rows with columns apart",
        outliers,
        "`int8_row_xN`, N = 1..1024: LLM.int8() with its outlier columns stored in 16 bits. Source: arXiv 2208.07339\n"
        "section 3.2; a fixed number of columns, those of the largest inputs, as arXiv 2310.09259 (QUIK).",
    ),
    (
        "Lookup tables",
        lookup,
        "Source: QLoRA (arXiv 2305.14314); bitsandbytes `functional.py`. The 256 values of the dynamic 8-bit map are those of\n"
        "`create_dynamic_map`: +-10^(i-6) times the 2^i midpoints of [0.1, 1] cut in 2^i parts, i = 0..6, and 0 and 1.",
    ),
    (
        "8-bit floats",
        fp8,
        "E4M3 (torch's float8_e4m3fn). `_c`: one scale per row. `_t`: one per tensor. `_b128`: one per 128 x 128 weights.\n"
        "Source: arXiv 2209.05433; scales as compressed-tensors' FP8_DYNAMIC, FP8 and FP8_BLOCK.",
    ),
    (
        "NVFP4 with a global scale",
        nvfp4,
        "Source: arXiv 2509.25149; compressed-tensors `compressors/nvfp4`. ggml's `nvfp4` has no global scale. MXFP4 is ggml's `mxfp4` in\n"
        "every container: the same numbers, its fields laid out anew at the border.",
    ),
)


# Of the families with free bits and group sizes: the forms that are drawn.
_DRAWN = {"int4_g64", "int4_g64s", "int4_g64m", "int8_cs", "int4_t", "int4_g64sf", "binary_g64", "ternary_g64"}
_DRAWN |= {"int4_g64z", "int4_g128o", "int4_g64so"}


def page() -> str:
    """Returns docs/formats.md."""
    return _HEAD + "".join(_family(title, family, text) for title, family, text in _FAMILIES)


def _family(title: str, family: ModuleType, text: str) -> str:
    formats = [FORMATS[name] for name in family.EXAMPLES]
    lines = [
        f"\n## {title}\n",
        text + "\n",
        "| format | bits/weight | group | written | importance | containers |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(f) for f in formats]
    return "\n".join(lines) + "\n" + "".join(f"\n`{names}`\n\n```\n{layout}```\n" for layout, names in _layouts(formats).items())


def _row(f: Format) -> str:
    group = {0: "row", -1: "tensor", 1: "-"}.get(f.group_size, str(f.group_size))
    containers = ", ".join(name for name, container in CONTAINERS.items() if container.holds(f.name))
    importance = "-" if not f.can_encode else "rtn, clip" if f.uses_importance else "-" if f.group_size == 1 else "clip"
    cells = (f"`{f.name}`", f"{f.bits_per_weight():.7g}", group, "yes" if f.can_encode else "read only", importance, containers or "-")
    return f"| {' | '.join(cells)} |"


def _layouts(formats: list[Format]) -> dict[str, str]:
    """Returns the drawn layouts with the names that share them, in order; of the families with free group sizes one per form."""
    free = (affine.AffineFormat, float_zero.FloatZeroFormat, ordered.OrderedFormat, signs.BinaryFormat, signs.TernaryFormat)
    drawn: dict[str, str] = {}
    for f in formats:
        if not isinstance(f, free) or f.name in _DRAWN:
            layout = f.layout()
            drawn[layout] = f"{drawn[layout]}`, `{f.name}" if layout in drawn else f.name
    return drawn


def main(arguments: list[str]) -> int:
    """Prints the page; with `--check FILE` returns 1 when the file differs."""
    if not arguments:
        sys.stdout.write(page())
        return 0
    if len(arguments) != 2 or arguments[0] != "--check":
        sys.stderr.write("usage: python -m tersor.formats.page [--check FILE]\n")
        return 2
    path = Path(arguments[1])
    if path.is_file() and path.read_text(encoding="utf-8") == page():
        return 0
    sys.stderr.write(f"{path} is stale; run: python -m tersor.formats.page > {path}\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
