"""The cache against itself (verify), and against the model (audit)."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from proteus_pipeline.embeddings import segment as segment_file
from proteus_pipeline.embeddings.computing import compute
from proteus_pipeline.embeddings.events import FOLDER as EVENTS
from proteus_pipeline.embeddings.events import event_files, make_event, read_event, write_event
from proteus_pipeline.embeddings.found import Entry
from proteus_pipeline.embeddings.housekeeping import rewrite, visible_entries
from proteus_pipeline.embeddings.index import INDEXES, RUNS, Attestation, Index, SegmentHeader, encode_index
from proteus_pipeline.embeddings.keys import key_array
from proteus_pipeline.embeddings.publication import SEGMENTS, to_records
from proteus_pipeline.embeddings.reading import ahead
from proteus_pipeline.embeddings.stored import content_hash, to_fp32
from proteus_pipeline.errors import FormatError, IntegrityError, StorageError
from proteus_pipeline.identity import digests
from proteus_pipeline.models.device import device_class

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.cache import EmbeddingCache
    from proteus_pipeline.embeddings.recipe import Recipe
    from proteus_pipeline.serving.interface import ModelInterface

QUARANTINE = "quarantine"


@dataclass(frozen=True)
class Finding:
    """One inconsistency.

    Attributes
    ----------
    kind
        ``entry``, ``segment``, ``index``, ``run``, ``event``, ``orphan``.
    name
        Of the file, or of the entry's key.
    what
        What is wrong, and what to do.
    repaired
        What was done about it; empty where nothing was.

    """

    kind: str
    name: str
    what: str
    repaired: str = ""


@dataclass(frozen=True)
class Verified:
    """What `verify` read, and what it found."""

    entries: int
    segments: int
    nbytes: int
    findings: tuple[Finding, ...]


def verify(cache: EmbeddingCache, *, repair: bool = False) -> Verified:
    """Read everything that the cache holds, and compare it with every checksum there is.

    Parameters
    ----------
    cache
        All of it but what lies beneath.
    repair
        Quarantine what is damaged, so that it reads as a miss; make lost indexes again from the segments. Damaged files
        are set aside in ``quarantine/``. Damaged events, and files of another format, are left as they are.

    Raises
    ------
    StorageError
        When the cache can't be read, or with `repair` not be written.

    """
    findings = list(_events(cache))
    if findings:
        return Verified(0, 0, 0, tuple(findings))  # which entries to look at is not known
    findings += _indexes(cache, repair=repair)
    findings += _orphans(cache, repair=repair)
    cache.refresh()
    entries = nbytes = 0
    headers = cache.visible.segments()
    where = cache.visible.by_segment()
    for header in headers.values():
        entries_there = visible_entries(cache, where, header.segment)
        checked, found = _segment(cache, header, entries_there, repair=repair)
        entries, nbytes = entries + checked, nbytes + header.segment_bytes
        findings += found
    return Verified(entries, len(headers), nbytes, tuple(findings))


def _events(cache: EmbeddingCache) -> Iterator[Finding]:
    for name in sorted(event_files(cache.store)):
        try:
            read_event(cache.store, name)
        except FileNotFoundError:  # removed since
            continue
        except IntegrityError as error:
            # What it hid must not come back by itself: whoever knows removes it.
            yield Finding("event", name.removeprefix(f"{EVENTS}/"), str(error))


def _indexes(cache: EmbeddingCache, *, repair: bool) -> Iterator[Finding]:
    for folder, kind in ((INDEXES, "index"), (RUNS, "run")):
        for name in sorted(cache.store.names(folder)):
            what, ours = _wrong_with_index(cache, f"{folder}/{name}")
            if not what:
                continue
            if repair and ours:
                _set_aside(cache, f"{folder}/{name}")
            yield Finding(kind, name, what, "set aside" if repair and ours else "")


def _wrong_with_index(cache: EmbeddingCache, name: str) -> tuple[str, bool]:
    """Return what is wrong with an index, and whether it is of this format, and so ours to repair."""
    try:
        index = Index.read(cache.store, name)
    except FileNotFoundError:  # merged since
        return "", True
    except FormatError as error:
        return str(error), False
    except (StorageError, ValueError, KeyError, TypeError) as error:
        return str(error), True
    return "" if index.sound() else f"the body of {cache.store.location}/{name} fails its checksum", True


def _orphans(cache: EmbeddingCache, *, repair: bool) -> Iterator[Finding]:
    """Find segments that no index names: of a writer that was killed, or whose index was lost."""
    cache.refresh()
    known = cache.visible.segments(hidden=True).keys()
    for name in sorted(cache.store.names(SEGMENTS) - known - cache.visible.retired):
        if not name.endswith(".zip"):
            continue
        path = Path(cache.store.location, SEGMENTS, name)
        try:
            data, header = _index_again(path)
        except FormatError as error:
            yield Finding("segment", name, str(error))
            continue
        except FileNotFoundError:  # another one cleaned up
            continue
        except (IntegrityError, OSError) as error:
            if repair:
                _set_aside(cache, f"{SEGMENTS}/{name}")
            yield Finding("segment", name, str(error), "set aside" if repair else "")
            continue
        if repair:
            cache.store.write(f"{INDEXES}/{Path(name).stem}-{secrets.token_hex(2)}.idx", data)
        what = f"no index names it, so that its {header.entries} entries are not seen; repair makes one"
        yield Finding("orphan", name, what, "indexed" if repair else "")


def _index_again(path: Path) -> tuple[bytes, SegmentHeader]:
    """Return the index of a segment from what it says of itself.

    Raises
    ------
    IntegrityError
        When that is damaged.

    """
    said = segment_file.describe(path)
    try:
        about = said.attributes["proteus"]
        if about["format"] != segment_file.FORMAT:
            raise FormatError(f"{path} has format {about['format']}", "upgrade proteus_pipeline")
        header = SegmentHeader(
            path.name, path.stat().st_size, said.layout, about["stored"], said.width, about["trunk"], about["recipe"],
            Attestation(**about["attestation"]), len(said.keys),
            tuple(said.chunk_starts) if said.layout == "per_residue" else (), digests.of_file(path),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{path} does not say what it holds", "its entries are computed again") from error
    records = to_records(said.placed, said.lengths, said.contents)
    return encode_index([header], key_array(said.keys), records), header


def _segment(
    cache: EmbeddingCache, header: SegmentHeader, entries: Sequence[Entry], *, repair: bool
) -> tuple[int, list[Finding]]:
    name = f"{SEGMENTS}/{header.segment}"
    try:
        size = cache.store.size(name)
    except FileNotFoundError:
        cache.refresh()
        if header.segment not in cache.visible.segments():
            return 0, []  # evicted while this was going on
        if repair:
            event = make_event("retired", "its file is gone", segments={header.segment: []})
            write_event(cache.store, event)
        what = f"the file is gone, and with it {header.entries} entries; they are computed again"
        return 0, [Finding("segment", header.segment, what, "no longer listed" if repair else "")]
    damaged = [e for e, why in zip(entries, ahead(lambda e: _damage(cache, e), entries), strict=True) if why]
    findings = []
    if damaged:
        if repair:
            event = make_event("quarantined", "verify", segments={header.segment: [e.key for e in damaged]})
            write_event(cache.store, event)
            rewrite(cache, [header])  # a file of which a part is damaged can't be copied
        done = "quarantined: reads as a miss, and is computed again" if repair else ""
        findings = [Finding("entry", e.key, f"damaged in {header.segment}", done) for e in damaged]
    elif size != header.segment_bytes or digests.of_file(Path(cache.store.location, name)) != header.digest:
        # Its entries are sound: some other byte of the zip is not, that another zarr reader may need.
        if repair:
            rewrite(cache, [header])
        done = "written again" if repair else ""
        findings = [Finding("segment", header.segment, "is not the file that was written", done)]
    return len(entries), findings


def _damage(cache: EmbeddingCache, entry: Entry) -> str:
    try:
        cache.read(entry)
    except StorageError as error:
        return str(error)
    return ""


def _set_aside(cache: EmbeddingCache, name: str) -> None:
    """Move a damaged file where nobody reads it, and whoever wants to can look at it."""
    kept = f"{QUARANTINE}/{time.time_ns():020d}-{name.replace('/', '-')}"
    cache.store.write(kept, cache.store.read(name))
    cache.store.remove(name)


@dataclass(frozen=True)
class Audited:
    """One stored embedding beside the same one computed now.

    Attributes
    ----------
    key, sequence
        Which.
    device_class
        Where the stored one was computed.
    same_class
        Whether that is this machine's class.
    same
        Whether they agree bit for bit.
    max_abs, relative_l2
        How far they are apart, as fp32.

    """

    key: str
    sequence: str
    device_class: str
    same_class: bool
    same: bool
    max_abs: float
    relative_l2: float


def audit(
    cache: EmbeddingCache,
    sequences: Sequence[str],
    model: ModelInterface,
    recipe: Recipe,
    *,
    sample: int = 20,
    seed: int = 0,
    device: str = "cpu",
) -> list[Audited]:
    """Compute a sample of what is stored once more, and say how far it has drifted.

    Parameters
    ----------
    cache
        What is audited.
    sequences
        Normalised; of those that the cache has, some are drawn.
    model, recipe
        What their entries were made by.
    sample, seed
        How many to draw, and by which seed; all where there are fewer.
    device
        Where they are computed: entries of its class must agree bit for bit in strict, others need not.

    """
    trunk, here = model.checkpoint.trunk_digest, device_class(device)
    by_key = {recipe.key(trunk, s): s for s in sequences}
    there = sorted({e.key for found in cache.look_up(list(by_key)) for e in found.best()})
    chosen = random.Random(seed).sample(there, min(sample, len(there)))  # noqa: S311 - no secret
    stored = dict(cache.candidates(chosen))
    done = []
    encoder = model.encoder(precision=recipe.precision, numerics=recipe.numerics, device=device)
    for computed in compute(encoder, recipe, {key: by_key[key] for key in chosen}):
        key, array = computed.key, computed.array
        content = content_hash(array, recipe.stored)
        now = to_fp32(array, recipe.stored).astype(np.float64)
        for entry in stored[key]:
            before = to_fp32(cache.read(entry), entry.stored).astype(np.float64)
            norm = float(np.linalg.norm(before))
            done.append(
                Audited(
                    key, by_key[key], entry.device_class, entry.device_class == here,
                    entry.content == content, float(np.abs(now - before).max()),
                    float(np.linalg.norm(now - before)) / norm if norm else 0.0,
                )
            )  # fmt: skip
    return done
