"""The independent readers. READERS maps the name of a container to the reader that is not ours."""

from __future__ import annotations

from tersor.verification.reader import Reader
from tersor.verification.readers.awq import AWQReader
from tersor.verification.readers.bitsandbytes import BitsAndBytesReader
from tersor.verification.readers.compressed_tensors import CompressedTensorsReader
from tersor.verification.readers.gguf import GGUFPackageReader
from tersor.verification.readers.gptq import GPTQReader
from tersor.verification.readers.hqq import HQQReader
from tersor.verification.readers.huggingface import HuggingFaceReader
from tersor.verification.readers.mlx import MLXReader
from tersor.verification.readers.onnx import OnnxReader

READERS: dict[str, Reader] = {
    "awq": AWQReader(),
    "bnb": BitsAndBytesReader(),
    "compressed-tensors": CompressedTensorsReader(),
    "gguf": GGUFPackageReader(),
    "gptq": GPTQReader(),
    "hqq": HQQReader(),
    "huggingface": HuggingFaceReader(),
    "mlx": MLXReader(),
    "onnx": OnnxReader(),
}
