"""Running a model: load, sessions with a cache, sampling, tokenizer, chat."""

from __future__ import annotations

from tersor.engine.continuation import Generation, Request
from tersor.engine.model import Model, load
from tersor.engine.sampling import Sampler, Sampling
from tersor.engine.session import Session
from tersor.engine.tokenizer import Tokenizer

__all__ = ["Generation", "Model", "Request", "Sampler", "Sampling", "Session", "Tokenizer", "load"]
