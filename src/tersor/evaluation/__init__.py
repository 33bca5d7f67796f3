"""Judging a model: perplexity, divergence from the original, speed. Each gives a frozen record with `to_dict`."""

from tersor.evaluation.judge import evaluate
from tersor.evaluation.kl import Divergence
from tersor.evaluation.perplexity import Perplexity
from tersor.evaluation.speed import Speed

__all__ = ["Divergence", "Perplexity", "Speed", "evaluate"]
