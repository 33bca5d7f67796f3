"""Running a model: load, sessions with a cache, batches, sampling, tokenizer, chat."""

from __future__ import annotations

from tersor.engine.batch import Batch, Part
from tersor.engine.continuation import Generation, Request
from tersor.engine.model import Model, load
from tersor.engine.sampling import Sampler, Sampling
from tersor.engine.session import Session
from tersor.engine.tokenizer import Tokenizer

__all__ = ["Batch", "Generation", "Model", "Part", "Request", "Sampler", "Sampling", "Session", "Tokenizer", "load"]
