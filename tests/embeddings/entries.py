"""Made-up entries, for tests of what stores them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.index import Attestation, SegmentHeader
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.stored import to_stored
from proteus_pipeline.identity import digests

TRUNK = "0123456789abcdef0123456789abcdef"
HERE, THERE = "cpu/x86_64/AVX2/Here", "cuda/sm_90"


@dataclass
class Made:
    """What was published: arrays in their stored dtype, by key."""

    recipe: Recipe
    arrays: dict[str, np.ndarray]
    lengths: list[int]


def make(
    number: int, *, pooling: str = "mean", stored: str = "fp32", width: int = 8, seed: int = 0, prefix: str = "key"
) -> Made:
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.integers(3, 12, number)]
    shapes = [(n, width) if pooling == "per_residue" else (width,) for n in lengths]
    arrays = {
        digests.of_bytes(f"{prefix}{i}".encode()): to_stored(rng.standard_normal(shape).astype(np.float32), stored)
        for i, shape in enumerate(shapes)
    }
    return Made(Recipe(layer=2, pooling=pooling, stored=stored, engine=1), arrays, lengths)


def made_by(writer: str) -> Made:
    """Return what a writer publishes under a name that ends in a number: pooled or per residue, by that."""
    pooling = ("mean", "per_residue")[int(writer.rsplit("-", 1)[-1]) % 2]
    return make(3, pooling=pooling, stored="fp16", width=64, prefix=f"{writer}-")


def publish(
    cache: EmbeddingCache, made: Made, device_class: str = HERE, *, seconds: float = 3.0, tokens: int = 100
) -> None:
    attestation = Attestation(device_class, "2.0.0", "2026-01-01T00:00:00+00:00", seconds, tokens)
    keys, arrays = list(made.arrays), list(made.arrays.values())
    cache.publish(keys, arrays, made.lengths, trunk=TRUNK, recipe=made.recipe, attestation=attestation)


def headers(path: Path) -> list[SegmentHeader]:
    """Return what the indexes of a cache say of its segments."""
    cache = EmbeddingCache(path)
    cache.refresh()
    return list(cache.visible.segments().values())


def serves(cache: EmbeddingCache, made: Made) -> int:
    """Return how many of the entries are hits, having made sure that each is what was published."""
    hits = 0
    for entry, array in cache.find(made.arrays):
        expected = made.arrays[entry.key]
        assert array.dtype == expected.dtype
        assert array.shape == entry.shape == expected.shape
        assert array.tobytes() == expected.tobytes()
        hits += 1
    return hits
