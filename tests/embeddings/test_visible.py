"""What readers see, whatever was published, merged and hidden before."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from entries import HERE, THERE, TRUNK, Made, headers, made_by, make, publish, serves
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ends_well, script

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.events import make_event, write_event
from proteus_pipeline.embeddings.index import Attestation, SegmentHeader
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.errors import StorageError
from proteus_pipeline.stores import files

PUBLISHED = 300 if os.environ.get("PROTEUS_TORTURE") == "1" else 40


def merge(path: Path, *, everything: bool = True) -> EmbeddingCache:
    cache = EmbeddingCache(path)
    cache.refresh()
    cache.visible.merge(everything=everything)
    return cache


def listed(path: Path) -> tuple[int, int]:
    """Return how many index files and runs there are."""
    return tuple(len(list((path / n).iterdir())) if (path / n).is_dir() else 0 for n in ("index", "runs"))


def test_many_small_publications_become_few_files_and_none_is_lost(tmp_path: Path):
    mades = [made_by(f"w-{n}") for n in range(23)]
    opened = EmbeddingCache(tmp_path)
    for made in mades:
        publish(EmbeddingCache(tmp_path), made)
    assert sum(listed(tmp_path)) < 12
    assert [path.name for path in tmp_path.rglob(".tmp-*")] == []
    for cache in (opened, EmbeddingCache(tmp_path)):
        assert {serves(cache, made) for made in mades} == {3}
        stats = cache.stats()
        assert (stats["entries"], stats["segments"]) == (69, 23)
        assert stats["raw_bytes"] == sum(a.nbytes for made in mades for a in made.arrays.values())
        assert stats["bytes"] == sum(p.stat().st_size for p in tmp_path.glob("*/*"))


def test_one_run_of_all_says_what_the_indexes_said(tmp_path: Path):
    mades = [made_by(f"w-{n}") for n in range(3)]
    for made in mades:
        publish(EmbeddingCache(tmp_path), made)
    before, said = EmbeddingCache(tmp_path), headers(tmp_path)
    found = {key: before.candidates(list(made.arrays))[key] for made in mades for key in made.arrays}
    assert listed(tmp_path) == (3, 0)
    for _ in range(2):  # and merging it again changes nothing
        merge(tmp_path)
        assert listed(tmp_path) == (0, 1)
        for cache in (before, EmbeddingCache(tmp_path)):
            assert {k: v for made in mades for k, v in cache.candidates(list(made.arrays)).items()} == found
        assert sorted(headers(tmp_path), key=lambda h: h.segment) == sorted(said, key=lambda h: h.segment)


def test_a_segment_that_two_runs_name_is_counted_once_and_then_named_once(tmp_path: Path):
    """As two who merge at the same time leave it."""
    mades = [made_by(f"w-{n}") for n in range(3)]
    for made in mades:
        publish(EmbeddingCache(tmp_path), made)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "index").iterdir()}
    expected = EmbeddingCache(tmp_path).stats()
    merge(tmp_path)
    for name, data in kept.items():
        (tmp_path / "index" / name).write_bytes(data)
    publish(EmbeddingCache(tmp_path), made_by("more-0"))
    for _ in range(2):
        stats = EmbeddingCache(tmp_path).stats()
        assert (stats["entries"], stats["segments"]) == (expected["entries"] + 3, 4)
        more = sum(a.nbytes for a in made_by("more-0").arrays.values())
        assert stats["raw_bytes"] == expected["raw_bytes"] + more
        assert {serves(EmbeddingCache(tmp_path), made) for made in mades} == {3}
        cache = merge(tmp_path)
    assert {len(v) for made in mades for v in cache.candidates(list(made.arrays)).values()} == {1}


def test_merging_what_is_one_file_already_or_nothing_does_nothing(tmp_path: Path):
    merge(tmp_path)
    publish(EmbeddingCache(tmp_path), make(3))
    merge(tmp_path, everything=False)
    assert listed(tmp_path) == (1, 0)


def test_retired_segments_leave_runs_and_the_others_stay(tmp_path: Path):
    mades = [made_by(f"w-{n}") for n in range(3)]
    for made in mades:
        publish(EmbeddingCache(tmp_path), made)
    cache = EmbeddingCache(tmp_path)
    gone = cache.candidates(list(mades[1].arrays)).popitem()[1][0].segment
    write_event(cache.store, make_event("retired", "evicted", segments={gone: []}))
    assert [serves(cache, made) for made in mades] == [3, 0, 3]
    assert gone in cache.visible.segments(hidden=True)
    merge(tmp_path)
    fresh = EmbeddingCache(tmp_path)
    assert [serves(fresh, made) for made in mades] == [3, 0, 3]
    assert gone not in fresh.visible.segments(hidden=True)
    assert fresh.stats()["entries"] == 6
    rest = [fresh.candidates(list(made.arrays)).popitem()[1][0].segment for made in (mades[0], mades[2])]
    write_event(fresh.store, make_event("retired", "evicted", segments={name: [] for name in rest}))
    merge(tmp_path)
    assert listed(tmp_path) == (0, 0)
    assert EmbeddingCache(tmp_path).stats()["entries"] == 0


@pytest.mark.parametrize("kind", ["invalidated", "quarantined"])
def test_what_an_event_hides_survives_a_merge_and_reappears_without_it(tmp_path: Path, kind: str):
    made, other = make(6), make(6, prefix="other")
    publish(EmbeddingCache(tmp_path), made)
    publish(EmbeddingCache(tmp_path), other)
    cache = EmbeddingCache(tmp_path)
    keys = list(made.arrays)
    segment = cache.candidates(keys)[keys[0]][0].segment
    quarantine = {"segments": {segment: keys[:4]}}
    name = write_event(
        cache.store, make_event(kind, "x", **({"trunk": TRUNK} if kind == "invalidated" else quarantine))
    )
    left = [0, 0] if kind == "invalidated" else [2, 6]
    assert [serves(cache, m) for m in (made, other)] == left
    merge(tmp_path)
    for reader in (cache, EmbeddingCache(tmp_path)):
        assert [serves(reader, m) for m in (made, other)] == left
        assert sum(reader.get(key) is not None for key in keys) == left[0]
    (tmp_path / name).unlink()
    for reader in (cache, EmbeddingCache(tmp_path)):
        assert [serves(reader, m) for m in (made, other)] == [6, 6]


def test_quarantined_keys_are_those_of_their_segment_alone(tmp_path: Path):
    made, again = make(4, seed=1), make(4, seed=2)
    cache = EmbeddingCache(tmp_path)
    publish(cache, made)
    publish(cache, again)
    keys = list(made.arrays)
    newest, oldest = cache.candidates(keys)[keys[0]]
    write_event(cache.store, make_event("quarantined", "x", segments={newest.segment: keys[:2], "1-never.zip": keys}))
    for _ in range(2):
        arrays = {entry.key: array for entry, array in EmbeddingCache(tmp_path).find(keys)}
        expected = [made, made, again, again]
        assert [arrays[k].tobytes() for k in keys] == [
            m.arrays[k].tobytes() for k, m in zip(keys, expected, strict=True)
        ]
        assert [cache.get(k).tobytes() for k in keys] == [arrays[k].tobytes() for k in keys]
        merge(tmp_path)
    write_event(cache.store, make_event("quarantined", "x", segments={oldest.segment: keys}))
    assert [cache.get(k) is None for k in keys] == [True, True, False, False]


def test_a_merge_that_cant_be_written_leaves_all_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "runs").write_bytes(b"")
    (tmp_path / "runs").unlink()
    mades = [made_by(f"w-{n}") for n in range(3)]
    for made in mades:
        publish(EmbeddingCache(tmp_path), made)
    cache = EmbeddingCache(tmp_path)
    cache.refresh()
    (tmp_path / "runs").write_bytes(b"in the way")
    with pytest.raises(StorageError, match=r"cannot \w+ .*runs"):
        cache.visible.merge(everything=True)
    (tmp_path / "runs").unlink()
    assert listed(tmp_path) == (3, 0)
    assert {serves(EmbeddingCache(tmp_path), made) for made in mades} == {3}


MERGER = """
import sys, random
from pathlib import Path
from entries import *
path, chance, merged = Path(sys.argv[1]), random.Random(int(sys.argv[2])), 0
cache = EmbeddingCache(path)
while not (path / "over").exists():
    cache.refresh()
    before = set(cache.visible._loaded)
    cache.visible.merge(everything=chance.random() < 0.3)
    merged += set(cache.visible._loaded) != before
print(merged)
"""

# Its publications merge nothing themselves.
PUBLISHER = """
import sys, os
from entries import *
cache = EmbeddingCache(sys.argv[1])
cache.tidy = lambda: None
for number in range(int(sys.argv[2])):
    publish(cache, made_by(f"p-{number}"))
    os.write(1, f"{number}\\n".encode())
"""


@pytest.mark.torture
def test_two_who_merge_a_third_who_publishes_and_a_reader_who_misses_nothing(tmp_path: Path):
    mergers = [script(MERGER, tmp_path, seed) for seed in range(2)]
    publisher = script(PUBLISHER, tmp_path, PUBLISHED)
    reader = EmbeddingCache(tmp_path)
    seen: list[Made] = []
    reads = 0
    assert publisher.stdout is not None
    for line in publisher.stdout:
        seen.append(made_by(f"p-{int(line)}"))
        for made in [*seen[-3:], *seen[:: max(1, len(seen) // 8)]]:
            assert serves(reader, made) == 3, (int(line), reads)
            assert reader.get(next(iter(made.arrays))) is not None
            reads += 4
        stats = reader.stats()
        assert stats["entries"] >= 3 * len(seen)
        assert stats["entries"] == 3 * stats["segments"]
    assert publisher.wait(timeout=60) == 0
    (tmp_path / "over").touch()
    merges = [int(ends_well(merger)) for merger in mergers]
    assert len(seen) == PUBLISHED
    assert min(merges) > 1
    for _ in range(2):
        fresh = EmbeddingCache(tmp_path)
        assert {serves(fresh, made) for made in seen} == {3}
        stats = fresh.stats()
        assert (stats["entries"], stats["segments"]) == (3 * PUBLISHED, PUBLISHED)
        assert stats["raw_bytes"] == sum(a.nbytes for made in seen for a in made.arrays.values())
        merge(tmp_path)
    assert listed(tmp_path) == (0, 1)
    print(f"{PUBLISHED} publications, {merges} merges, {reads} reads meanwhile")


# Any history: what find() returns is what a dict says.

# Two of them share their high half, and one is far from where an evenly spread key would lie.
KEYS = [f"{high:016x}{low:016x}" for high, low in [(0, 0), (1, 1), (1 << 60, 7), (7 << 60, 3), (7 << 60, 4)]]
KEYS += ["f" * 32]
TRUNKS = (TRUNK, "f" * 32)
RECIPES = [Recipe(2, "mean", engine=1), Recipe(2, "mean", stored="bf16", engine=1), Recipe(3, "per_residue", engine=1)]
LENGTH, WIDTH = 3, 4

OPERATIONS = st.one_of(
    st.tuples(
        st.just("publish"),
        st.sets(st.sampled_from(KEYS), min_size=1),
        st.sampled_from(TRUNKS),
        st.sampled_from(RECIPES),
        st.sampled_from([HERE, HERE, THERE]),
    ),
    st.tuples(st.just("merge"), st.booleans()),
    st.tuples(st.just("tidy")),
    st.tuples(st.just("retire"), st.integers(0, 20)),
    st.tuples(st.just("quarantine"), st.integers(0, 20), st.sets(st.sampled_from(KEYS), min_size=1)),
    st.tuples(
        st.just("invalidate"), st.sampled_from(TRUNKS), st.sampled_from([{}, {"layer": 2}, {"stored": "bf16", "layer": 2}])
    ),
    st.tuples(st.just("take back"), st.integers(0, 20)),
    st.tuples(st.just("look")),
)  # fmt: skip


@dataclass
class Published:
    """One segment, as the model knows it."""

    header: SegmentHeader
    arrays: dict[str, np.ndarray]
    hidden_by: set[str] = field(default_factory=set)
    hidden_keys: dict[str, set[str]] = field(default_factory=dict)

    def shows(self, key: str) -> bool:
        hidden = any(key in keys for keys in self.hidden_keys.values())
        return key in self.arrays and not self.hidden_by and not hidden


class Twin:
    """A cache, and a plain model of what it should say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.segments: list[Published] = []
        self.events: list[str] = []
        self.final: set[str] = set()  # retired before a merge: taking that back may bring nothing back
        self.readers = [self.open() for _ in range(2)]

    def open(self, **more: str) -> EmbeddingCache:
        return EmbeddingCache(self.path, device_class=lambda: HERE, **more)

    def do(self, what: str, *args: object) -> None:
        getattr(self, what.replace(" ", "_"))(*args)

    def publish(self, keys: set[str], trunk: str, recipe: Recipe, device_class: str) -> None:
        shape = (LENGTH, WIDTH) if recipe.pooling == "per_residue" else (WIDTH,)
        dtype = "<u2" if recipe.stored == "bf16" else "<f4"
        number = len(self.segments)
        arrays = {key: np.full(shape, 1000 * number + KEYS.index(key) + 1, dtype=dtype) for key in sorted(keys)}
        publication = self.open().begin(trunk, recipe)
        for key, array in arrays.items():
            publication.add(key, array, LENGTH)
        attestation = Attestation(device_class, "2.0.0", "2026-01-01T00:00:00+00:00", 1.0, 5 * len(keys))
        self.segments.append(Published(publication.publish(attestation), arrays))

    def merge(self, everything: bool) -> None:
        merge(self.path, everything=everything)
        self.final |= set(self.events)

    def tidy(self) -> None:
        self.open().tidy()
        self.final |= set(self.events)

    def retire(self, number: int) -> None:
        if self.segments:
            victim = self.segments[number % len(self.segments)]
            name = self._event("retired", segments={victim.header.segment: []})
            victim.hidden_by.add(name)

    def quarantine(self, number: int, keys: set[str]) -> None:
        if self.segments:
            victim = self.segments[number % len(self.segments)]
            name = self._event("quarantined", segments={victim.header.segment: sorted(keys)})
            victim.hidden_keys[name] = keys

    def invalidate(self, trunk: str, recipe: dict[str, object]) -> None:
        name = self._event("invalidated", trunk=trunk, recipe=recipe)
        for one in self.segments:
            described = one.header.recipe
            if one.header.trunk == trunk and all(described[k] == v for k, v in recipe.items()):
                one.hidden_by.add(name)

    def take_back(self, number: int) -> None:
        if not self.events:
            return
        name = self.events[number % len(self.events)]
        retired = name in self.final and any(name in one.hidden_by for one in self.segments)
        if retired and '"retired"' in (self.path / name).read_text():
            return
        self.events.remove(name)
        (self.path / name).unlink()
        for one in self.segments:
            one.hidden_by.discard(name)
            one.hidden_keys.pop(name, None)

    def _event(self, kind: str, **what: object) -> str:
        name = write_event(self.open().store, make_event(kind, "x", **what))
        self.events.append(name)
        return name

    def expected(self, key: str, *, same_class: bool = False) -> list[bytes]:
        """Return what is visible of a key, the best first: this machine's class, then the newest."""
        shown = [one for one in self.segments if one.shows(key)]
        if same_class:
            shown = [one for one in shown if one.header.attestation.device_class == HERE]
        shown.sort(key=lambda one: (one.header.attestation.device_class != HERE, -one.header.published))
        return [one.arrays[key].tobytes() for one in shown]

    def look(self) -> None:
        for cache in [*self.readers, self.open()]:
            found = {entry.key: array.tobytes() for entry, array in cache.find(KEYS)}
            assert found == {key: self.expected(key)[0] for key in KEYS if self.expected(key)}
            candidates = cache.candidates(KEYS)
            for key in KEYS:
                assert [cache.read(e).tobytes() for e in candidates.get(key, [])] == self.expected(key)
                one = cache.find_one(key)
                assert one[1].tobytes() in self.expected(key) if one else not self.expected(key)
            shown = [one.header for one in self.segments if not one.hidden_by]
            stats = cache.stats()
            quarantined = sum(
                len(set(one.arrays) & set().union(*one.hidden_keys.values()))
                for one in self.segments
                if not one.hidden_by
            )
            assert stats["segments"] == len(shown)
            assert stats["entries"] == sum(h.entries for h in shown) - quarantined
        mine = self.open(accept="same_class")
        found = {entry.key: array.tobytes() for entry, array in mine.find(KEYS)}
        assert found == {key: w[0] for key in KEYS if (w := self.expected(key, same_class=True))}


@contextmanager
def unflushed() -> Iterator[None]:
    """Without flushing, which takes most of the time of so small writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_fsync", lambda _: None)
        yield


@settings(max_examples=60)
@given(history=st.lists(OPERATIONS, max_size=25))
def test_whatever_happened_find_returns_what_a_dict_says(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple]
):
    twin = Twin(tmp_path_factory.mktemp("twin"))
    with unflushed():
        for what, *args in history:
            twin.do(what, *args)
        twin.look()
        time.sleep(0.06)  # folders' times are believed by now
        twin.look()
        twin.do("merge", True)
        twin.look()
