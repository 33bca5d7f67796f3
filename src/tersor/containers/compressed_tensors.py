"""stub"""

from __future__ import annotations

from tersor.containers.huggingface import HuggingFace


class CompressedTensors(HuggingFace):
    name = "compressed-tensors"

    def recognizes(self, path):
        return False
