"""Embeddings by sequence id, read from a cache in the ids' order and a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from proteus_pipeline.embeddings.computing import Embedded
from proteus_pipeline.embeddings.stored import to_fp32
from proteus_pipeline.errors import StorageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from proteus_pipeline.embeddings.cache import EmbeddingCache

BATCH_BYTES = 32 << 20
"""Of the embeddings that are held at once, as fp32; one that is larger is held alone."""


@dataclass(frozen=True)
class Selection:
    """Some ids, and which embedding of a cache each of them has: all pooled, or all per residue."""

    cache: EmbeddingCache
    ids: Sequence[str]
    entries: Sequence[Embedded]

    def __post_init__(self) -> None:
        if not self.ids or len(self.ids) != len(self.entries) or len(set(self.ids)) != len(self.ids):
            raise ValueError(f"{len(self.ids)} ids and {len(self.entries)} entries: give one each, and each id once")

    @property
    def pooled(self) -> bool:
        """Whether each is (D,), and not (L, D)."""
        return len(self.entries[0].shape) == 1

    @property
    def width(self) -> int:
        """D."""
        return self.entries[0].shape[-1]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield each id with its embedding as fp32, as `batches` does."""
        for batch in self.batches():
            yield from batch

    def batches(self) -> Iterator[list[tuple[str, NDArray[np.float32]]]]:
        """Yield the ids with their embeddings as fp32, as many at once as `BATCH_BYTES` allows.

        Raises
        ------
        StorageError
            When an embedding is gone from the cache.

        """
        start = nbytes = 0
        for stop, entry in enumerate(self.entries):
            size = 4 * self.width * (1 if self.pooled else entry.shape[0])
            if stop > start and nbytes + size > BATCH_BYTES:
                yield self._read(start, stop)
                start, nbytes = stop, 0
            nbytes += size
        yield self._read(start, len(self))

    def _read(self, start: int, stop: int) -> list[tuple[str, NDArray[np.float32]]]:
        ids, keys = self.ids[start:stop], [e.key for e in self.entries[start:stop]]
        # The cache yields each key once, and in an order of its own.
        found = {entry.key: to_fp32(array, entry.stored) for entry, array in self.cache.find(keys)}
        if missing := [i for i, key in zip(ids, keys, strict=True) if key not in found]:
            raise StorageError(f"the embedding of {missing[0]} is gone from {self.cache.path}", "run the command again")
        return [(i, found[key]) for i, key in zip(ids, keys, strict=True)]
