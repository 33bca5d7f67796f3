"""rotate: the residual stream in another basis, so that no channel of a weight stands out. Nothing is added at run time.

    h' = h Q     E' = E Q     W' = W diag(g) Q  (what reads; g the norm before it, then 1)     W' = Q^T W, b' = Q^T b  (what writes)

An RMS norm without weights gives norm(h Q) = norm(h) Q, so the function stays. Sources: SliceGPT (arXiv 2401.15024, theorem 1:
computational invariance), QuaRot (arXiv 2404.00456, section 4, stage 1a).

Q = diag(signs) (K1 x K2 x ..), a Kronecker product of small orthogonal factors of orders k1, k2, .., is applied factor by factor, with
k1 + k2 + .. products a value instead of k1 k2 .. For `hadamard` the factors are Hadamard matrices over the root of their order: Sylvester's
of 2^k, and one of Paley's, of the smallest order that holds the odd part of the size (576 = 36 x 16, 1536 = 12 x 128): every entry of Q
is +-1/sqrt(n). An odd part that no Paley order over a prime holds (66 = 2 x 33) gets a random orthogonal factor instead. `random` is one
orthogonal matrix, uniform over all (Haar).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tersor.containers.container import Checkpoint
from tersor.errors import ContainerError, ModelError, RecipeError, unknown
from tersor.formats import get_format
from tersor.models import check_tensors, expected_tensors, spec_of
from tersor.models.folding import residual
from tersor.tensor import Array, QuantizedTensor, TensorInfo

KINDS = ("hadamard", "random")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_SYLVESTER = 64  # order of the largest power of two that is one factor
_PART_VALUES = 1 << 21  # float64 values rotated at once


@dataclass(frozen=True)
class RotateOptions:
    """kind: of KINDS. seed: of the signs and of the random factors; the same seed gives the same rotation."""

    kind: str = "hadamard"
    seed: int = 0


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q = diag(signs) (factors[0] x factors[1] x ..), (n, n), by its Kronecker factors, float64."""

    signs: Array
    factors: tuple[Array, ...]

    def apply(self, x: Array, gain: Array | None = None) -> Array:
        """Returns x diag(gain) Q, (rows, n) float32, computed in float64. x: (rows, n) float32; gain: (n,), None = ones."""
        n = len(self.signs)
        first = self.signs if gain is None else self.signs * gain
        out = np.empty(x.shape, np.float32)
        step = max(1, _PART_VALUES // n)
        for begin in range(0, len(x), step):
            part = x[begin : begin + step] * first
            rows, before = len(part), 1
            for factor in self.factors:  # along its own axis: (rows * before, order, after)
                order = len(factor)
                part = np.matmul(factor.T, part.reshape(rows * before, order, -1))
                before *= order
            out[begin : begin + step] = part.reshape(rows, n)
        return out


def rotation(n: int, kind: str = "hadamard", seed: int = 0) -> Rotation:
    """Returns the rotation of n channels. Raises RecipeError for an unknown kind."""
    if kind not in KINDS:
        raise RecipeError(f"rotate: {unknown('kind', kind, KINDS)}")
    rng = np.random.default_rng(seed)
    if kind == "random":
        return Rotation(np.ones(n), (_haar(n, rng),))
    signs = rng.choice([-1.0, 1.0], n)
    power = n & -n
    odd = n // power
    factors = []
    if odd > 1:
        order = next((odd << k for k in range(2, power.bit_length()) if _paley(odd << k) is not None), 0)
        paley = _paley(order) if order else None
        factors.append(_haar(odd, rng) if paley is None else paley / np.sqrt(order))
        power = n // len(factors[0])
    while power > 1:
        order = min(power, _SYLVESTER)
        factors.append(_sylvester(order) / np.sqrt(order))
        power //= order
    return Rotation(signs, tuple(factors) or (np.ones((1, 1)),))


def rotated(checkpoint: Checkpoint, options: RotateOptions | None = None) -> RotatedCheckpoint:
    """Returns the checkpoint with its residual stream rotated: a view whose tensors, all float32, are made when they are read.

    Reading costs that tensor in float32 and a few MiB; the view closes the checkpoint. A tied head is untied unless the final norm is
    constant: its config says so, `lm_head.weight` appears, and `note` tells what it costs. Raises ModelError for an architecture
    whose norms do not commute with a rotation or that is unknown, RecipeError for an unknown kind.
    """
    return RotatedCheckpoint(checkpoint, options or RotateOptions())


class RotatedCheckpoint(Checkpoint):
    """A checkpoint seen through a rotation of the residual stream. note: what it costs, in a sentence; empty when nothing."""

    def __init__(self, source: Checkpoint, options: RotateOptions) -> None:
        self.path, self.container = source.path, source.container
        self._source = source
        spec = spec_of(source.description.config)
        if spec.sandwich:
            raise ModelError(
                f"{source.path}: rotate cannot turn {source.description.config['model_type']}: the norms after attention and MLP scale"
                " single channels of what is added to the residual stream, which no rotation commutes with; use awq or smoothquant"
            )
        check_tensors(spec, source.tensors, str(source.path))
        self._rotation = rotation(spec.hidden_size, options.kind, options.seed)
        self._norm_weight = np.float32(1 - spec.norm_offset)
        self._offset = np.float32(spec.norm_offset)
        self._was_tied = spec.tied
        self._turned: tuple[str, Array] | None = None  # the last tensor that writes the residual stream
        self._constant = self._constant_norm() if spec.tied else None
        self.note = ""
        description = source.description
        if spec.tied and self._constant is None:
            description = replace(description, config={**description.config, "tie_word_embeddings": False})
            spec = replace(spec, tied=False)
            weights = int(np.prod(source.tensors[EMBEDDING].shape))
            self.note = f"rotate: the head is no longer the embedding, because the final norm's weight went into it: {HEAD} is {weights}"
            self.note += " weights more"
        self.description = description
        self._residual = residual(spec)
        self._norms = {*self._residual.readers.values(), NORM}
        shapes = expected_tensors(spec)
        self.tensors = {name: TensorInfo(name, "f32", shape, 4 * int(np.prod(shape))) for name, shape in shapes.items()}

    def read(self, name: str, rows: slice | None = None) -> QuantizedTensor:
        """Returns the rotated tensor, or those rows of it, float32. What writes the residual stream is turned as a whole and
        kept until another such tensor is read, since it is read some rows at a time."""
        if name not in self.tensors:
            raise ContainerError(f"{self.path}: the rotated model has no tensor {name!r}; it has {len(self.tensors)} tensors")
        shape = self.tensors[name].shape
        if len(shape) == 1:
            values = self._vector(name).reshape(1, -1)
            return _stored(values, shape) if rows is None else _stored(values[rows])
        if name in self._residual.writers:
            if self._turned is None or self._turned[0] != name:
                self._turned = None
                self._turned = name, self._rotation.apply(self._floats(name).T).T  # Q^T W = (W^T Q)^T
            values = self._turned[1] if rows is None else self._turned[1][rows]
        else:
            values = self._floats(EMBEDDING if name == HEAD and self._was_tied else name, rows)
            gain = self._gain(self._residual.readers[name]) if name in self._residual.readers else None
            values = self._rotation.apply(values, gain)
        return _stored(np.ascontiguousarray(values))

    def _vector(self, name: str) -> Array:
        """Returns a norm's weight or a bias as it is after the rotation, (n,)."""
        if name in self._norms:
            keep = name == NORM and self._constant is not None
            return np.full(self.tensors[name].shape, self._constant if keep else self._norm_weight, np.float32)
        values = self._floats(name)
        return self._rotation.apply(values[None])[0] if name in self._residual.writers else values

    def _constant_norm(self) -> np.float32 | None:
        """Returns the final norm's stored weight when all of it is one value, which commutes with a rotation; None otherwise."""
        values = self._floats(NORM)
        return np.float32(values[0]) if (values == values[0]).all() else None

    def _gain(self, norm: str) -> Array:
        """Returns what a norm multiplies by, (hidden,)."""
        gain: Array = self._floats(norm) + self._offset
        return gain

    def _floats(self, name: str, rows: slice | None = None) -> Array:
        """Returns a tensor of the source, or those rows of it, as float32."""
        fmt = get_format(self._source.tensors[name].format)
        if rows is None or fmt.row_independent:
            return fmt.dequantize(self._source.read(name, rows))
        return fmt.dequantize(self._source.read(name))[rows]

    def release(self) -> None:
        """Gives the source's pages back to the system."""
        self._source.release()

    def close(self) -> None:
        """Closes the source."""
        self._source.close()


def _stored(values: Array, shape: tuple[int, ...] | None = None) -> QuantizedTensor:
    """Returns (rows, in) float32 values as a tensor."""
    return QuantizedTensor("f32", shape or values.shape, {"values": values})


def _haar(n: int, rng: np.random.Generator) -> Array:
    """Returns an orthogonal matrix, uniform over all: QR of a normal matrix with R's diagonal made positive (Mezzadri, math-ph/0609050)."""
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    signed: Array = q * np.where(np.diag(r) < 0, -1.0, 1.0)
    return signed


def _sylvester(order: int) -> Array:
    """Returns the Hadamard matrix of a power of two: the sign is the parity of the common bits of row and column."""
    i = np.arange(order)
    common = i[:, None] & i
    parity = sum((common >> bit) & 1 for bit in range(order.bit_length()))
    return 1.0 - 2.0 * (np.asarray(parity) & 1)


def _paley(order: int) -> Array | None:
    """Returns a Hadamard matrix of this order by Paley's constructions over a prime field (J. Math. Phys. 12, 1933), or None.

    I: order = q + 1, q = 3 mod 4: I + S. II: order = 2 (q + 1), q = 1 mod 4: S x (1 1; 1 -1) + I x (1 -1; -1 -1). S is Q, whose entries are
    the quadratic characters of i - j, bordered by ones; for I the border's column is negative.
    """
    for q, second in ((order - 1, False), (order // 2 - 1, True)):
        if q % 4 != (1 if second else 3) or order % 4 or any(q % k == 0 for k in range(2, int(q**0.5) + 1)) or q < 3:
            continue
        character = np.full(q, -1.0)
        character[np.arange(1, q) ** 2 % q] = 1.0
        character[0] = 0.0
        s = np.ones((q + 1, q + 1))
        s[0, 0] = 0.0
        s[1:, 1:] = character[(np.arange(q)[:, None] - np.arange(q)) % q]
        if second:
            return np.kron(s, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(q + 1), [[1.0, -1.0], [-1.0, -1.0]])
        s[1:, 0] = -1.0
        return s + np.eye(q + 1)
    return None
