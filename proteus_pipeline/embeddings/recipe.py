"""What decides an embedding's numbers besides the weights and the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.identity import digests
from proteus_pipeline.models.encoder import ENGINE_REVISION, NUMERICS, PRECISIONS, Outputs
from proteus_pipeline.models.pooling import POOLINGS

STORED = ("fp32", "fp16", "bf16")
_CHOICES = {"pooling": POOLINGS, "precision": PRECISIONS, "numerics": NUMERICS, "stored": STORED}


@dataclass(frozen=True)
class Recipe:
    """How an embedding is computed and stored.

    Rules that are applied to a sequence before it is embedded (case, unknown residues, truncation) are no part of it:
    they are told apart by the sequence that results, so that changing a rule that touches no protein of a file
    recomputes nothing. Windows are, for the sequences that are longer than one window.

    Attributes
    ----------
    layer
        0 for the scaled token embedding, to the number of layers for the last, after the final norm.
    pooling
        ``mean``, ``cls``, ``max``, ``attention`` or ``per_residue``: `proteus_pipeline.models.pooling.pool`.
    precision, numerics
        As in `proteus_pipeline.models.encoder.make_encoder`.
    stored
        ``fp32``, ``fp16`` or ``bf16``.
    window, overlap
        Residues of one window and shared by two, for longer sequences; 0 and 0 for none. Where windows overlap, a
        residue's vector is the mean of its vectors.
    engine
        The encoder's revision.

    """

    layer: int
    pooling: str = "mean"
    precision: str = "fp32"
    numerics: str = "strict"
    stored: str = "fp32"
    window: int = 0
    overlap: int = 0
    engine: int = ENGINE_REVISION

    def __post_init__(self) -> None:
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                value = getattr(self, field)
                raise ConfigError(f"embedding.{field} is {value!r}", f"use one of {', '.join(allowed)}")
        if self.layer < 0:
            raise ConfigError(
                f"layer {self.layer} is not resolved", "use Recipe with a layer from 0; see resolve_layer"
            )
        Outputs.to_pool(self.layer, self.pooling)  # an error here, and not when weights have been fetched
        if self.window and not 0 <= self.overlap < self.window:
            raise ConfigError(f"data.overlap is {self.overlap}", f"use 0 to {self.window - 1}, below data.max_length")

    @classmethod
    def of_described(cls, described: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a segment or a manifest describes."""
        window, overlap = described["windows"] or (0, 0)
        fields = ("layer", "pooling", "precision", "numerics", "stored", "engine")
        return cls(**{f: described[f] for f in fields}, window=window, overlap=overlap)

    def described(self) -> dict[str, object]:
        """Return all that there is to say of it, windows included whatever a sequence's length."""
        return self.identity(0) | {"windows": [self.window, self.overlap] if self.window else None}

    def identity(self, length: int) -> dict[str, object]:
        """Return what enters the key of a sequence of `length` residues."""
        windowed = self.window and length > self.window
        return {
            "layer": self.layer,
            "pooling": self.pooling,
            "precision": self.precision,
            "numerics": self.numerics,
            "stored": self.stored,
            "windows": [self.window, self.overlap] if windowed else None,
            "engine": self.engine,
        }

    def key(self, trunk_digest: str, sequence: str) -> str:
        """Return the embedding key of a normalised sequence, 32 hexadecimal digits."""
        # A length beyond one window, or one within: there are no other identities.
        length = self.window + 1 if self.window and len(sequence) > self.window else 0
        return digests.of_last(_before_sequence(self, trunk_digest, length), digests.of_sequence(sequence))


@lru_cache(256)
def _before_sequence(recipe: Recipe, trunk_digest: str, length: int) -> bytes:
    return digests.before_last("embedding", trunk_digest, recipe.identity(length))


def windows(length: int, window: int, overlap: int) -> list[tuple[int, int]]:
    """Return the (start, end) of each window over a sequence; the last one ends with it.

    >>> windows(25, window=10, overlap=4)
    [(0, 10), (6, 16), (12, 22), (15, 25)]
    """
    if not window or length <= window:
        return [(0, length)]
    starts = [*range(0, length - window, window - overlap), length - window]
    return [(start, start + window) for start in starts]
