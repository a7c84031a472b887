"""Writes golden_cache/: a cache of format 1, which every later version has to read. It was run once.

Run again only for a new format, into a new folder beside it: ``python write_golden_cache.py FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.stored import to_stored

TRUNK = "0123456789abcdef0123456789abcdef"
LENGTHS = [*range(3, 21)]
RECIPES = {
    "pooled": Recipe(layer=6, pooling="mean", stored="fp32", engine=1),
    "half": Recipe(layer=6, pooling="per_residue", stored="fp16", engine=1),
    "brain": Recipe(layer=6, pooling="per_residue", stored="bf16", window=12, overlap=4, engine=1),
}


def sequence(length: int) -> str:
    return ("MKTAYIAKQRQISFVKSHFSRQ" * 2)[:length]


def value(name: str, length: int) -> np.ndarray:
    """Return what the entry of a sequence holds: numbers that anyone can write down again, exact in every dtype."""
    number = list(RECIPES).index(name)
    if name == "pooled":
        return (np.arange(4, dtype=np.float32) - length) / 8
    return ((np.arange(length * 4, dtype=np.float32).reshape(length, 4) % 64) - 32 + number) / 16


def main(folder: Path) -> None:
    cache = EmbeddingCache(folder)
    for name, recipe in RECIPES.items():
        lengths = LENGTHS if name == "pooled" else LENGTHS[::6]
        cache.publish(
            [recipe.key(TRUNK, sequence(n)) for n in lengths],
            [to_stored(value(name, n), recipe.stored) for n in lengths],
            lengths,
            trunk=TRUNK,
            recipe=recipe,
            attestation=Attestation("cpu/x86_64/AVX2/GenuineIntel", "2.4.0", "2026-01-01T00:00:00+00:00", 1.5, 300),
        )
    cache.record_use(hits=2, derived=1, misses=24)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
