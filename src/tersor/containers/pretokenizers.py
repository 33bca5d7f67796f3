"""The pre-tokenizers of byte-level BPE: GGUF names them (`tokenizer.ggml.pre`), tokenizer.json spells them out.

A pre-tokenizer is a chain of regular expressions: each one splits every piece so far into its matches and what lies between.
Source: llama.cpp src/llama-vocab.cpp (names, `llm_tokenizer_bpe`), and the tokenizer.json of the models that the names come from;
where llama.cpp rewrote an expression for its own engine, the model's original stands here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The expression that is built into tokenizers' ByteLevel (Radford et al., GPT-2, encoder.py).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """steps: the chain. ignore_merges: a piece that is a token is taken whole. nfc: text is brought to Unicode's NFC first.
    add_bos: whether a text starts with BOS when the file does not say."""

    steps: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False


_PLAIN = PreTokenizer((_GPT2,))
_DIGITS = PreTokenizer((_DIGIT, _GPT2))
_LLAMA = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_GROUPS = PreTokenizer((_LLAMA3,))
_QWEN = PreTokenizer((_QWEN2,), nfc=True)

# The first name of each is what we write.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _PLAIN,
    "mpt": _PLAIN,
    "olmo": _PLAIN,
    "phi-2": _PLAIN,
    "trillion": _PLAIN,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "exaone": _DIGITS,
    "minerva-7b": _DIGITS,
    "llama-bpe": _LLAMA,
    "llama3": _LLAMA,
    "llama-v3": _LLAMA,
    "falcon3": _LLAMA,
    "pixtral": _LLAMA,
    "smaug-bpe": _GROUPS,
    "dbrx": _GROUPS,
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _QWEN,
    "kormo": _QWEN,
    "stablelm2": PreTokenizer((_QWEN2,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}


def pre_tokenizer_json(pre: PreTokenizer) -> dict[str, Any]:
    """Returns the `pre_tokenizer` of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre.steps[-1] == _GPT2}
    steps: list[dict[str, Any]] = [_step_json(step) for step in (pre.steps[:-1] if byte_level["use_regex"] else pre.steps)]
    return {"type": "Sequence", "pretokenizers": [*steps, byte_level]} if steps else byte_level


def _step_json(step: str) -> dict[str, Any]:
    if step == _DIGIT:
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}


def name_of(pre_tokenizer: Any, ignore_merges: bool, nfc: bool) -> str | None:
    """Returns the GGUF name of tokenizer.json's `pre_tokenizer`, None when there is none for it.

    llama.cpp itself never normalizes: text that is not in NFC already is split a little differently there than by qwen2's tokenizer.json.
    """
    wanted = _steps(pre_tokenizer), ignore_merges, nfc
    return next((name for name, pre in PRE_TOKENIZERS.items() if (pre.steps, pre.ignore_merges, pre.nfc) == wanted), None)


def _steps(node: Any) -> tuple[str, ...] | None:
    """Returns the chain of a pre_tokenizer, None when it does something that no chain of splits does."""
    if not isinstance(node, Mapping):
        return None
    kind = node.get("type")
    if kind == "Sequence":
        parts: Sequence[Any] = node.get("pretokenizers") or ()
        chains = [_steps(part) for part in parts]
        return None if None in chains else tuple(step for chain in chains if chain is not None for step in chain)
    if kind == "ByteLevel" and not node.get("add_prefix_space"):
        return (_GPT2,) if node.get("use_regex", True) else ()
    if kind == "Digits" and node.get("individual_digits"):
        return (_DIGIT,)
    pattern = node.get("pattern")
    # "Removed, inverted" keeps the matches alone: the same, for expressions that leave nothing out.
    keeps_all = (node.get("behavior"), bool(node.get("invert"))) in (("Isolated", False), ("Removed", True))
    if kind == "Split" and keeps_all and isinstance(pattern, Mapping) and isinstance(pattern.get("Regex"), str):
        return (pattern["Regex"],)
    return None
