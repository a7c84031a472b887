from __future__ import annotations

import getpass
import json
import time
from pathlib import Path

import pytest
from entries import HERE, TRUNK, make, publish, serves
from processes import ends_well, script

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.events import CacheEvent, make_event, read_event, write_event
from proteus_pipeline.embeddings.index import Attestation, SegmentHeader
from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.stores.store import LocalStore

RECIPE = make(1).recipe.described()


def header(name: int, **changes: object) -> SegmentHeader:
    attestation = Attestation(HERE, "2.0.0", "2026-01-01T00:00:00+00:00", 1.0, 10)
    said: dict = {"segment": f"{name:020d}-s.zip", "segment_bytes": 1, "layout": "pooled", "stored": "fp32"}
    said |= {"width": 8, "trunk": TRUNK, "recipe": RECIPE, "attestation": attestation, "entries": 1}
    return SegmentHeader(**said | changes)


def test_an_event_reads_back_as_it_was_written(tmp_path: Path):
    store = LocalStore(tmp_path)
    before = time.time_ns()
    for event in (
        make_event("invalidated", "wrong weights", trunk=TRUNK, recipe={"layer": 6, "windows": None}),
        make_event("quarantined", 'a flipped bit "here"\nand there', segments={"1-a.zip": ["0" * 32], "2-b.zip": []}),
        make_event("retired", "größer als erlaubt", segments={"1-a.zip": []}),
    ):
        name = write_event(store, event)
        assert name.startswith(f"events/{event.time:020d}-")
        assert read_event(store, name) == event
        assert before <= event.time <= time.time_ns()
        assert event.by == getpass.getuser()
    assert len(store.names("events")) == 3


def test_what_an_invalidation_hides():
    event = CacheEvent("invalidated", 100, "me", "why", TRUNK, {"layer": 2})
    assert event.hides(header(99))
    assert not event.hides(header(100))  # published since
    assert not event.hides(header(101))
    assert not event.hides(header(99, trunk="f" * 32))
    assert not event.hides(header(99, recipe=RECIPE | {"layer": 3}))
    assert not event.hides(header(99, recipe={}))
    assert CacheEvent("invalidated", 100, "me", "why", TRUNK).hides(header(99, recipe={}))  # all recipes
    both = CacheEvent("invalidated", 100, "me", "why", TRUNK, {"layer": 2, "stored": "fp16"})
    assert not both.hides(header(99))  # each field given has to agree


def test_what_the_others_hide():
    name = header(1).segment
    assert CacheEvent("retired", 100, "me", "why", segments={name: []}).hides(header(1))
    assert not CacheEvent("retired", 100, "me", "why", segments={name: []}).hides(header(2))
    # A quarantine is of entries, and no segment's.
    assert not CacheEvent("quarantined", 100, "me", "why", segments={name: ["0" * 32]}).hides(header(1))


def test_a_damaged_event_stops_readers_and_says_which(tmp_path: Path):
    """It hides something: whoever went on would serve what somebody withdrew."""
    made = make(3)
    cache = EmbeddingCache(tmp_path)
    publish(cache, made)
    name = write_event(cache.store, make_event("invalidated", "x", trunk=TRUNK))
    path = tmp_path / name
    whole = path.read_bytes()
    value = json.loads(whole)
    cases = [b"", b"{}", b"[]", b"null", b"no json", whole[:-1], whole.replace(TRUNK.encode(), b"f" * 32)]
    cases += [json.dumps({k: v for k, v in value.items() if k != gone}).encode() for gone in value]
    for damaged in cases:
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=rf"{path.name} is damaged, and which entries it hides is not known"):
            EmbeddingCache(tmp_path).get(next(iter(made.arrays)))
    for at in range(0, len(whole), 3):
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        path.write_bytes(flipped)
        with pytest.raises(IntegrityError, match=path.name):
            read_event(cache.store, name)
    path.unlink()  # the remedy that the error names
    assert serves(EmbeddingCache(tmp_path), made) == 3


def test_an_event_of_a_later_format_or_kind_says_to_upgrade(tmp_path: Path):
    from proteus_pipeline.embeddings import events

    store = LocalStore(tmp_path)
    name = write_event(store, make_event("retired", "x", segments={"a": []}))
    for change in ({"format": 2}, {"kind": "merged"}):
        value = json.loads(store.read(name)) | change
        del value["checksum"]
        (tmp_path / name).write_text(json.dumps(value | {"checksum": events._checksum(value)}))
        with pytest.raises(IntegrityError, match="is of a later format; upgrade proteus_pipeline"):
            read_event(store, name)


def test_an_event_that_is_gone_says_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_event(LocalStore(tmp_path), "events/gone.json")


def test_an_event_that_cant_be_written_is_an_error(tmp_path: Path):
    (tmp_path / "events").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        write_event(LocalStore(tmp_path), make_event("retired", "x", segments={"a": []}))


@pytest.mark.parametrize("kind", ["invalidated", "quarantined", "retired"])
def test_readers_honour_an_event_of_another_process_at_once(tmp_path: Path, kind: str):
    """Whether they ask for many keys or for one; and again when it is taken back."""
    made = make(5)
    cache = EmbeddingCache(tmp_path)
    publish(cache, made)
    keys = list(made.arrays)
    assert serves(cache, made) == 5
    segment = cache.candidates(keys)[keys[0]][0].segment
    what = {"invalidated": {"trunk": TRUNK}, "quarantined": {"segments": {segment: keys[:2]}}}
    code = (
        "import sys, json; from proteus_pipeline.embeddings.events import *\n"
        "from proteus_pipeline.stores.store import LocalStore\n"
        "print(write_event(LocalStore(sys.argv[1]), make_event(sys.argv[2], 'x', **json.loads(sys.argv[3]))))"
    )
    left = 3 if kind == "quarantined" else 0
    told = json.dumps(what.get(kind, {"segments": {segment: []}}))
    name = ends_well(script(code, tmp_path, kind, told)).strip()
    for reader in (cache, EmbeddingCache(tmp_path)):
        assert sum(reader.get(key) is not None for key in keys) == left
        assert serves(reader, made) == left
        assert sum(found.hits for found in reader.look_up(keys)) == left
    (tmp_path / name).unlink()
    assert cache.get(keys[0]) is not None
    assert serves(cache, made) == 5


def test_what_is_published_after_an_invalidation_is_served(tmp_path: Path):
    made, again = make(3), make(3, seed=1)
    cache = EmbeddingCache(tmp_path)
    publish(cache, made)
    write_event(cache.store, make_event("invalidated", "x", trunk=TRUNK))
    assert serves(cache, again) == 0
    publish(cache, again)
    assert serves(cache, again) == serves(EmbeddingCache(tmp_path), again) == 3


def test_an_invalidation_is_of_what_it_names(tmp_path: Path):
    pooled, half, residues = make(3), make(3, stored="fp16", prefix="h"), make(3, pooling="per_residue", prefix="r")
    cache = EmbeddingCache(tmp_path)
    for made in (pooled, half, residues):
        publish(cache, made)
    write_event(cache.store, make_event("invalidated", "x", trunk=TRUNK, recipe={"pooling": "mean", "stored": "fp16"}))
    assert [serves(cache, made) for made in (pooled, half, residues)] == [3, 0, 3]
    write_event(cache.store, make_event("invalidated", "x", trunk="f" * 32))
    write_event(cache.store, make_event("invalidated", "x", trunk=TRUNK, recipe={"layer": 2, "pooling": "mean"}))
    assert [serves(cache, made) for made in (pooled, half, residues)] == [0, 0, 3]


def test_an_own_invalidation_hides_what_a_shared_cache_has_and_other_events_are_about_own_files(tmp_path: Path):
    made, more = make(3), make(2, prefix="more")
    publish(EmbeddingCache(tmp_path / "shared"), made)
    publish(EmbeddingCache(tmp_path / "shared"), more)
    mine, others = (EmbeddingCache(tmp_path / n, shared=tmp_path / "shared") for n in ("mine", "others"))
    assert serves(mine, made) == serves(others, made) == 3
    segment = mine.candidates([next(iter(made.arrays))]).popitem()[1][0].segment
    write_event(mine.store, make_event("quarantined", "x", segments={segment: list(made.arrays)}))
    write_event(mine.store, make_event("retired", "x", segments={segment: []}))
    assert serves(mine, made) == 3
    assert serves(mine, more) == 2
    assert serves(others, made) == 3
    assert not (tmp_path / "shared" / "events").exists()
    write_event(others.store, make_event("invalidated", "x", trunk=TRUNK))
    assert serves(others, made) == serves(others, more) == 0
