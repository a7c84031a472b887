"""What a look-up found: entries, and where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from proteus_pipeline.embeddings.index import Attestation, Index, Record, SegmentHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Entry(NamedTuple):
    """One stored embedding: what a manifest says of it, and where it lies.

    Attributes
    ----------
    key
        32 hexadecimal digits.
    shape
        (L, D) or (D,).
    stored
        ``fp32``, ``fp16`` or ``bf16``.
    content
        The content hash.
    length
        Residues of its sequence.
    device_class
        Where it was computed.
    seconds
        What it took, by its share of its segment's tokens.
    segment, offset, nbytes, row
        Its bytes, and its row among its segment's entries.

    """

    key: str
    shape: tuple[int, ...]
    stored: str
    content: str
    length: int
    device_class: str
    seconds: float
    segment: str
    offset: int
    nbytes: int
    row: int


@dataclass(frozen=True)
class Found:
    """Which entries some keys have: the best of each key first.

    Attributes
    ----------
    keys
        That were asked for.
    position
        (n,) of each entry's key in `keys`; sorted.
    source, row
        (n,) of its index, in `indexes`, and its row there.

    """

    keys: Sequence[str]
    position: NDArray[np.int64]
    source: NDArray[np.int64]
    row: NDArray[np.int64]
    indexes: Sequence[Index]

    @property
    def hits(self) -> int:
        """How many of the keys have an entry."""
        return len(np.unique(self.position))

    def missing(self) -> list[str]:
        """Return the keys that have none."""
        have = np.zeros(len(self.keys), dtype=bool)
        have[self.position] = True
        return [self.keys[i] for i in np.flatnonzero(~have).tolist()]

    def headers(self) -> list[SegmentHeader]:
        """Return what holds for the segments that the entries lie in."""
        used: list[SegmentHeader] = []
        for number, index in enumerate(self.indexes):
            rows = self.row[self.source == number]
            used += [index.segments[n] for n in np.unique(index.records["segment"][rows]).tolist()]
        return used

    def entries(self) -> Iterator[Entry]:
        """Yield all entries, those of one key together, the best first."""
        for source, row, position in zip(self.source, self.row, self.position, strict=True):
            index = self.indexes[source]
            yield entry_of(self.keys[position], index, index.record(int(row)))

    def places(self) -> Iterator[tuple[str, list[str], list[int], list[bytes]]]:
        """Yield where the best entries lie: a segment, its keys, their offsets, sorted, and their content hashes."""
        first = np.flatnonzero(np.diff(self.position, prepend=-1))
        for source, index in enumerate(self.indexes):
            here = first[self.source[first] == source]
            if not len(here):
                continue
            records = index.records[self.row[here]]
            order = np.lexsort((records["offset"], records["segment"]))
            here, records = here[order], records[order]
            numbers, firsts = np.unique(records["segment"], return_index=True)
            for number, start, end in zip(numbers, firsts, [*firsts[1:], len(here)], strict=True):
                some = records[start:end]
                hashes = some["content"].tobytes()
                contents = [hashes[i : i + 16] for i in range(0, len(hashes), 16)]
                keys = [self.keys[i] for i in self.position[here[start:end]].tolist()]
                yield index.segments[number].segment, keys, some["offset"].tolist(), contents

    def best(self) -> Iterator[Entry]:
        """Yield each key's best entry."""
        first = np.flatnonzero(np.diff(self.position, prepend=-1))
        for i in first:
            index = self.indexes[self.source[i]]
            yield entry_of(self.keys[self.position[i]], index, index.record(int(self.row[i])))


def entry_of(key: str, index: Index, record: Record) -> Entry:
    """Return the entry that a record of an index describes."""
    _, offset, nbytes, content, row, length, number = record
    header = index.segments[number]
    a: Attestation = header.attestation
    return Entry(
        key,
        (length, header.width) if header.layout == "per_residue" else (header.width,),
        header.stored,
        content.hex(),
        length,
        a.device_class,
        a.seconds * (length + 2) / a.tokens if a.tokens else 0.0,
        header.segment,
        offset,
        nbytes,
        row,
    )
