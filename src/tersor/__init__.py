"""tersor makes neural networks small and fast by quantization, and proves what it did."""

from __future__ import annotations
