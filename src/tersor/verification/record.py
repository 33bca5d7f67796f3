"""What a verification found, and the file beside the model that keeps it: verification.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tersor.errors import ContainerError

DIRECTORY_NAME = "verification.json"
VERIFIED, FAILED, UNPROVEN = "verified", "failed", "not proven"
MEANT_UNKNOWN = "nothing is known of what was meant"  # begins a note


@dataclass(frozen=True)
class Fault:
    """Something that is wrong. where: a file, a tensor or a layer; text: what it is, and what should have been."""

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass(frozen=True)
class Logits:
    """Our engine on the file beside another runtime on it. kl: mean KL divergence, nats; largest: |difference| of log-probabilities."""

    runtime: str
    tokens: int
    kl: float
    largest: float


@dataclass(frozen=True)
class Verification:
    """What was found of a model file.

    reader: package and version of the independent reader, "" when there was none; compared: tensors whose every value it read as we do.
    files: SHA-256 by name. tensors: values_digest by name (digests.py); with faults, of what was meant, none if that is not known.
    notes: what was not checked, and why.
    """

    path: str
    container: str
    tersor: str
    reader: str
    compared: int
    faults: tuple[Fault, ...]
    findings: tuple[Fault, ...]
    notes: tuple[str, ...]
    files: Mapping[str, str]
    tensors: Mapping[str, str]
    logits: Logits | None = None
    against: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """`failed` when anything is wrong; `verified` when an independent reader agreed on every value; else `not proven`."""
        if self.faults:
            return FAILED
        return VERIFIED if self.reader and self.compared == len(self.tensors) else UNPROVEN

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values for JSON."""
        return {"verdict": self.verdict} | asdict(self)


def proof_path(model: Path) -> Path:
    """Returns where the verification of a model is kept: in its directory, or beside its file."""
    return model / DIRECTORY_NAME if model.is_dir() else model.with_name(f"{model.name}.{DIRECTORY_NAME}")


def write_proof(model: Path, verification: Verification) -> Path:
    """Writes verification.json under its final name at once, and returns the path."""
    path = proof_path(model)
    temporary = path.with_name(f".{path.name}.tmp")
    kept = verification.to_dict()
    del kept["path"], kept["seconds"]  # a model may be moved, and the same model gives the same bytes
    temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def drop_proof(model: Path) -> None:
    """Removes the verification of a model that was written anew and not verified."""
    proof_path(model).unlink(missing_ok=True)


def read_proof(model: Path) -> dict[str, Any] | None:
    """Returns what verification.json says, None when there is none. Raises ContainerError when it is damaged."""
    path = proof_path(model)
    if not path.is_file():
        return None
    try:
        proof = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ContainerError(f"{path}: cannot be read ({error}); delete it to verify the model without it") from None
    parts = ("files", "tensors")
    if not isinstance(proof, dict) or not all(
        isinstance(proof.get(part), dict) and all(isinstance(v, str) for v in proof[part].values()) for part in parts
    ):
        raise ContainerError(f"{path}: holds no digests of files and tensors; delete it to verify the model without it")
    return proof
