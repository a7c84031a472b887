"""The embedding cache: immutable segments, and an index file as each one's commit.

Layout, under one folder::

    seg/<time_ns>-<random>.zip     entries (segment.py)
    index/<time_ns>-<random>.idx   what makes them visible (index.py)
    uses.jsonl                     look-ups, one line a run

A writer publishes a segment, then its index, each written beside its place, flushed and renamed. Names are unique, so
writers need no lock; a key that two of them write is stored twice, and either entry is right.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from proteus_pipeline.embeddings import index as index_file
from proteus_pipeline.embeddings import segment as segment_file
from proteus_pipeline.embeddings.index import Attestation, Index, SegmentHeader
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.segment import Placed
from proteus_pipeline.embeddings.stored import NUMPY_DTYPES, content_hash, to_fp32
from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.stores.files import atomic_path, storage_error, write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

ACCEPT = ("any", "same_class")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
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
    device_class
        Where it was computed.
    seconds
        What it took, by its share of its segment's tokens.

    """

    key: str
    shape: tuple[int, ...]
    stored: str
    content: str
    device_class: str
    seconds: float
    segment: str
    offset: int
    nbytes: int
    row: int


class EmbeddingCache:
    """Embeddings by key, under one folder.

    Parameters
    ----------
    path
        The folder; created by the first write.
    accept
        ``any``: entries of every device class are hits, those of this machine's class first; ``same_class``: only
        those of this machine's class are.
    device_class
        Returns this machine's class; called only where entries differ in theirs.

    Raises
    ------
    ConfigError
        For an unknown `accept`.

    """

    def __init__(self, path: Path | str, *, accept: str = "any", device_class: Callable[[], str] | None = None) -> None:
        if accept not in ACCEPT:
            raise ConfigError(f"cache.accept is {accept!r}", f"use one of {', '.join(ACCEPT)}")
        self.path = Path(path)
        self._accept = accept
        self._device_class = device_class or _this_device_class
        self._indexes: dict[str, Index | None] = {}

    def refresh(self) -> None:
        """See the segments that other processes published since, and forget those that are gone."""
        folder = self.path / "index"
        try:
            names = {p.name for p in folder.iterdir() if p.suffix == ".idx" and not p.name.startswith(".")}
        except FileNotFoundError:
            names = set()
        except OSError as error:
            raise storage_error("read", folder, error) from error
        for name in self._indexes.keys() - names:
            del self._indexes[name]
        for name in sorted(names - self._indexes.keys()):
            try:
                self._indexes[name] = Index.read(folder / name)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                _log.warning("%s", error)
                self._indexes[name] = None  # warned of once

    def candidates(self, keys: Sequence[str]) -> dict[str, list[Entry]]:
        """Return the acceptable entries of each key that has any, the best first: own class, then the newest."""
        self.refresh()
        found: dict[str, list[Entry]] = {}
        if not keys:
            return found
        wanted = index_file.key_array(list(keys))
        for name in sorted(self._indexes, reverse=True):
            index = self._indexes[name]
            if index is None:
                continue
            for position, row in enumerate(index.find(wanted)):
                if row >= 0:
                    found.setdefault(keys[position], []).append(_entry(keys[position], index, int(row)))
        if self._accept == "any" and all(len({e.device_class for e in entries}) == 1 for entries in found.values()):
            return found
        mine = self._device_class()
        if self._accept == "same_class":
            kept = {key: [e for e in entries if e.device_class == mine] for key, entries in found.items()}
            return {key: entries for key, entries in kept.items() if entries}
        return {key: sorted(entries, key=lambda e: e.device_class != mine) for key, entries in found.items()}

    def read(self, entry: Entry) -> NDArray[np.generic]:
        """Return an entry's array in its stored dtype, checked against its checksum and its content hash.

        Raises
        ------
        IntegrityError
            When the bytes are not what was written.
        StorageError
            When they are gone or can't be read.

        """
        path = self.path / "seg" / entry.segment
        try:
            with path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), entry.nbytes, entry.offset)
        except OSError as error:
            raise storage_error("read", path, error) from error
        pooled = len(entry.shape) == 1
        rows = segment_file.ROWS_PER_CHUNK if pooled else entry.shape[0]
        chunk = segment_file.decode_chunk(data, entry.stored, entry.shape[-1], rows, str(path))
        array = chunk[entry.row] if pooled else chunk
        if content_hash(array, entry.stored) != entry.content:
            raise IntegrityError(f"entry {entry.key} in {path} is not what its index says", "it is computed again")
        return array

    def find(self, keys: Iterable[str]) -> Iterator[tuple[Entry, NDArray[np.generic]]]:
        """Yield the first sound entry of each key that has one, with its array; damaged ones are warned of."""
        unique = list(dict.fromkeys(keys))
        for entries in self.candidates(unique).values():
            for entry in entries:
                try:
                    array = self.read(entry)
                except StorageError as error:
                    _log.warning("%s", error)
                    continue
                yield entry, array
                break

    def get(self, key: str) -> NDArray[np.float32] | None:
        """Return one embedding as fp32, (L, D) or (D,), or None."""
        return next((to_fp32(array, entry.stored) for entry, array in self.find([key])), None)

    def publish(
        self,
        keys: Sequence[str],
        arrays: Sequence[NDArray[np.generic]],
        lengths: Sequence[int],
        *,
        trunk: str,
        recipe: Recipe,
        attestation: Attestation,
    ) -> None:
        """Store entries as one segment; when this returns they are on the disk and visible.

        Parameters
        ----------
        keys
            Embedding keys.
        arrays
            In the recipe's stored dtype, all (L, D) or all (D,).
        lengths
            Residues of each sequence.
        trunk, recipe
            What the keys were made from.
        attestation
            How the entries came to be.

        Raises
        ------
        StorageError
            When they can't be written; the cache is then as before.
        ValueError
            When keys, arrays and lengths do not fit each other or the recipe; nothing is written.

        """
        _check_entries(keys, arrays, lengths, recipe)
        name = f"{time.time_ns():020d}-{secrets.token_hex(6)}"
        described = recipe.identity(0) | {"windows": [recipe.window, recipe.overlap]}
        attributes = {"format": segment_file.FORMAT, "trunk": trunk, "recipe": described, "stored": recipe.stored}
        attributes["attestation"] = asdict(attestation)
        target = self.path / "seg" / f"{name}.zip"
        with atomic_path(target) as temporary:
            try:
                placed = segment_file.write_segment(temporary, keys, arrays, recipe.stored, {"proteus": attributes})
                nbytes = temporary.stat().st_size
            except OSError as error:
                raise storage_error("write", target, error) from error
        records = _records(keys, arrays, lengths, placed, recipe.stored)
        layout, width = "pooled" if arrays[0].ndim == 1 else "per_residue", arrays[0].shape[-1]
        header = SegmentHeader(
            target.name, nbytes, layout, recipe.stored, width, trunk, described, attestation, len(keys)
        )
        visible = self.path / "index" / f"{name}.idx"
        try:
            write_atomic(visible, index_file.encode_index(header, records))
        except StorageError:
            if not visible.exists():  # its folder's flush may have failed after it appeared
                target.unlink(missing_ok=True)
            raise

    def record_use(self, hits: int, derived: int, misses: int) -> None:
        """Add a run's look-ups to the cache's own account."""
        when = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        line = json.dumps({"time": when, "hits": hits, "derived": derived, "misses": misses}) + "\n"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # One short write to a file opened for appending: lines of several processes do not mix.
            with (self.path / "uses.jsonl").open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            _log.warning("%s", storage_error("write", self.path / "uses.jsonl", error))

    def stats(self) -> dict[str, int]:
        """Return entries, segments, bytes on disk, raw_bytes they decode to, and hits, derived, misses so far."""
        self.refresh()
        indexes = [i for i in self._indexes.values() if i is not None]
        raw = 0
        for i in indexes:
            rows = int(i.records["length"].sum()) if i.header.layout == "per_residue" else len(i.records)
            raw += rows * i.header.width * NUMPY_DTYPES[i.header.stored].itemsize
        uses = {"hits": 0, "derived": 0, "misses": 0}
        for line in self._uses():
            for field in uses:
                uses[field] += int(line.get(field, 0))
        return {
            "entries": sum(len(i.records) for i in indexes),
            "segments": len(indexes),
            "bytes": sum(i.header.segment_bytes + i.path.stat().st_size for i in indexes),
            "raw_bytes": raw,
            **uses,
        }

    def _uses(self) -> Iterator[dict[str, int]]:
        path = self.path / "uses.jsonl"
        if not path.exists():
            return
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue  # a line cut short by a crash
            if isinstance(value, dict):
                yield value


def _check_entries(
    keys: Sequence[str], arrays: Sequence[NDArray[np.generic]], lengths: Sequence[int], recipe: Recipe
) -> None:
    if not keys or not len(keys) == len(arrays) == len(lengths):
        raise ValueError(f"{len(keys)} keys, {len(arrays)} arrays and {len(lengths)} lengths make no segment")
    if len(set(keys)) != len(keys):
        raise ValueError("a segment holds each key once")
    rows = recipe.pooling == "per_residue"
    width = arrays[0].shape[-1:]
    for key, array, length in zip(keys, arrays, lengths, strict=True):
        if array.dtype != NUMPY_DTYPES[recipe.stored] or array.shape != ((length, *width) if rows else width):
            shown = f"{array.dtype} {array.shape}"
            raise ValueError(f"{shown} is no {recipe.pooling} array of {length} residues in {recipe.stored} ({key})")


def _records(
    keys: Sequence[str],
    arrays: Sequence[NDArray[np.generic]],
    lengths: Sequence[int],
    placed: Sequence[Placed],
    stored: str,
) -> NDArray[np.void]:
    """Return what the index says of each entry, in the order given."""
    records = np.zeros(len(keys), dtype=index_file.RECORD)
    pairs = index_file.key_array(list(keys))
    records["key_high"], records["key_low"] = pairs["high"], pairs["low"]
    for column in ("offset", "nbytes", "row"):
        records[column] = [getattr(p, column) for p in placed]
    records["length"] = lengths
    hashes = b"".join(bytes.fromhex(content_hash(a, stored)) for a in arrays)
    records["content"] = np.frombuffer(hashes, dtype="V16")
    return records


def _entry(key: str, index: Index, row: int) -> Entry:
    record, header = index.records[row], index.header
    length = int(record["length"])
    shape = (length, header.width) if header.layout == "per_residue" else (header.width,)
    a = header.attestation
    seconds = a.seconds * (length + 2) / a.tokens if a.tokens else 0.0
    return Entry(
        key, shape, header.stored, bytes(record["content"]).hex(), a.device_class, seconds,
        header.segment, int(record["offset"]), int(record["nbytes"]), int(record["row"]),
    )  # fmt: skip


def _this_device_class() -> str:
    from proteus_pipeline.models.device import device_class

    return device_class("cpu")
