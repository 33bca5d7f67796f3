"""What calibrated methods learn from: samples of tokens, what a model's layers read on them, and whether that is enough."""

from __future__ import annotations

from tersor.calibration.samples import Samples, read_samples

__all__ = ["Samples", "read_samples"]
