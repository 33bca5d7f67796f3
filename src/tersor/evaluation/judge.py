"""One call that judges a model on a text, alone or against its original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tersor.evaluation.kl import Base, Divergence, check_same_vocabulary, divergence
from tersor.evaluation.model import LanguageModel
from tersor.evaluation.perplexity import Perplexity, perplexity
from tersor.evaluation.text import cut, read_text


def evaluate(
    model: str | Path | LanguageModel,
    *,
    against: str | Path | LanguageModel | None = None,
    text: str | Path | None = None,
    window: int = 512,
    stride: int | None = None,
    windows: int | None = 16,
    bos: bool | None = None,
    threads: int | None = None,
    activations: str = "int8",
    kv: str = "f16",
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity | Divergence:
    """Returns the model's perplexity or, with `against`, how far it is from that model, in the same pass.

    A path given as `model` is run as `run` and `bench` run it, activations in 8 bits where there is a kernel; one given as `against` is
    run on its dequantized weights with float activations, because it stands for the truth.
    activations, kv: of `model`, if it is a path, as in `load`; cached keys and values of `against` are float16.
    text: a UTF-8 file, or None for pydoc_data.topics. window, stride, windows, bos: see evaluation/text.py; they are stated in the
    record's protocol. windows None: the whole text. progress: called with (windows done, windows in all).
    Raises ModelError, ContainerError and RecipeError.
    """
    judged = _load(model, threads, activations, kv)
    name, content = read_text(text)
    base = None if against is None else _load(against, threads, "float")
    if base is not None:
        check_same_vocabulary(judged, base)
    cuts = cut((judged if base is None else base).tokenizer, name, content, window, stride, windows, bos)
    if isinstance(model, (str, Path)):
        cuts = replace(cuts, protocol=replace(cuts.protocol, activations=activations, kv=kv))
    return perplexity(judged, cuts, progress) if base is None else divergence(judged, Base(base, cuts), progress)


def _load(model: str | Path | LanguageModel, threads: int | None, activations: str = "int8", kv: str = "f16") -> LanguageModel:
    if not isinstance(model, (str, Path)):
        return model
    from tersor.engine import load

    return load(model, threads=threads, activations=activations, kv=kv)
