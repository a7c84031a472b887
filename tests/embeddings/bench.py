"""Runs of a cluster over the demonstration proteins, and what they leave in a cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.cluster import ClusterOptions
from proteus_pipeline.embeddings.dask_engine import DaskEngine
from proteus_pipeline.embeddings.embedder import Outcome, embed_by
from proteus_pipeline.embeddings.keys import key_strings
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.shard_task import Places, Weights

RECIPE = Recipe(6)


class Told:
    """A run's progress; does something once so many sequences are computed."""

    def __init__(self, at: int = 0, do: Callable[[], None] = lambda: None) -> None:
        self.total = self.hits = self.done = self.tokens = 0
        self._at, self._do = at, do

    def start(self, total: int, hits: int, _tokens: int, _peak: float) -> None:
        self.total, self.hits = total, hits

    def advance(self, sequences: int, tokens: int, _flops: float) -> None:
        before, self.done = self.done, self.done + sequences
        self.tokens += tokens
        if before < self._at <= self.done:
            self._do()


class Bench:
    """A cache to fill by a cluster."""

    def __init__(self, path: Path, registry: Path, trunk: str, proteins: dict[str, str]) -> None:
        self.path, self.trunk, self.proteins = path, trunk, proteins
        self.places = Places(str(path))
        self.weights = Weights(str(registry), "demo@v1.0.0", trunk, "cpu", None, None, 2048)

    def run(
        self,
        options: ClusterOptions,
        told: Told | None = None,
        sequences: Sequence[str] = (),
        cache: EmbeddingCache | None = None,
    ) -> Outcome:
        names = {s: name for name, s in self.proteins.items()}
        engine = DaskEngine(options, lambda: self.weights, self.places, str, self.path.parent / "logs", names)
        return embed_by(
            engine,
            sequences or list(self.proteins.values()),
            trunk=self.trunk,
            recipe=RECIPE,
            cache=cache or EmbeddingCache(self.path),
            progress=told,
        )

    def stored(self) -> Counter[str]:
        """How many entries there are of each key, in all segments: two that merge at once leave two indexes of one."""
        cache = EmbeddingCache(self.path)
        cache.refresh()
        keys = {key for index in cache.visible.indexes for key in key_strings(index.keys())}
        return Counter({key: len({e.segment for e in found}) for key, found in cache.candidates(list(keys)).items()})

    def contents(self) -> dict[str, str]:
        """Content hashes by key, of entries that were read and checked."""
        return {e.key: e.content for e, _ in EmbeddingCache(self.path).find(self.stored())}
