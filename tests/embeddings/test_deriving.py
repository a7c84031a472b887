"""What follows from stored entries, on the real model and the demonstration proteins: the same bits, or a miss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from entries import HERE, THERE, TRUNK, headers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.deriving import derive, sources
from proteus_pipeline.embeddings.embedder import Outcome, embed
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.stored import to_stored
from proteus_pipeline.models.encoder import Encoded, Encoder, Outputs, make_encoder
from proteus_pipeline.models.pooling import POOLINGS, pool_residues

if TYPE_CHECKING:
    from proteus_pipeline.models.checkpoint import Checkpoint

pytestmark = pytest.mark.xdist_group("deriving")  # one worker computes for all of these tests
STORED = ("fp32", "fp16", "bf16")
WINDOWS = {0: 0, 200: 50}
WINDOWED = 100 if os.environ.get("PROTEUS_TORTURE") == "1" else 16
LAYER = 6


class Memo:
    """The real encoder, asked once for each sequence or window: in strict, what else is in a batch is no matter."""

    def __init__(self, encoder: Encoder) -> None:
        self.architecture = encoder.architecture
        self.made = 0
        self._encoder = encoder
        self._known: dict[tuple[str, Outputs], Encoded] = {}

    def __call__(self) -> Memo:
        self.made += 1
        return self

    def compute(
        self, sequences: Sequence[str], outputs: Outputs, token_budget: int = 2048
    ) -> Iterator[tuple[int, Encoded]]:
        new = list(dict.fromkeys(s for s in sequences if (s, outputs) not in self._known))
        for index, encoded in self._encoder.compute(new, outputs, token_budget):
            self._known[new[index], outputs] = encoded
        return ((i, self._known[s, outputs]) for i, s in enumerate(sequences))

    def flops(self, length: int) -> float:
        return self._encoder.flops(length)

    def peak(self) -> float:
        return self._encoder.peak()


class Lab:
    """The model, the proteins, and a cache of each recipe alone, computed directly."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, proteins: Mapping[str, str]) -> None:
        self.folder, self.trunk = folder, checkpoint.trunk_digest
        self.memo = Memo(make_encoder(checkpoint))
        self._proteins = list(proteins.values())
        self._direct: dict[Recipe, tuple[Path, Outcome]] = {}

    def proteins(self, recipe: Recipe) -> list[str]:
        """Return all; with windows, of which each takes time, mostly the longest; for attention, a few."""
        number = 10 if recipe.pooling == "attention" else WINDOWED if recipe.window else 100
        by_length = sorted(self._proteins, key=len)
        return (by_length[:4] + by_length[::-1])[:number]

    def embed(
        self, recipe: Recipe, path: Path, shared: Path | None = None, *, device_class: str = HERE, sequences: int = 100
    ) -> Outcome:
        self.memo.made = 0
        return embed(
            self.proteins(recipe)[:sequences],
            trunk=self.trunk,
            recipe=recipe,
            cache=EmbeddingCache(path, shared=shared, device_class=lambda: HERE),
            encoder=self.memo,
            attest=lambda: (device_class, "2.0.0"),
        )

    def direct(self, recipe: Recipe) -> tuple[Path, Outcome]:
        """Return a cache that has this recipe's entries alone, and what computing them said."""
        if recipe not in self._direct:
            path = self.folder / str(len(self._direct))
            outcome = self.embed(recipe, path)
            assert (outcome.computed, outcome.derived) == (len(self.proteins(recipe)), 0)
            self._direct[recipe] = path, outcome
        return self._direct[recipe]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint, proteins: dict[str, str]) -> Lab:
    assert len(proteins) == 100
    return Lab(tmp_path_factory.mktemp("lab"), checkpoint, proteins)


def recipe(pooling: str, stored: str, window: int = 0) -> Recipe:
    return Recipe(LAYER, pooling, stored=stored, window=window, overlap=WINDOWS[window])


# From which (pooling, stored) each follows, written out again.
FOLLOWS = {
    ("mean", "fp32"): {("per_residue", "fp32")},
    ("mean", "fp16"): {("mean", "fp32"), ("per_residue", "fp32")},
    ("mean", "bf16"): {("mean", "fp32"), ("per_residue", "fp32")},
    ("cls", "fp32"): {("per_residue", "fp32")},
    ("cls", "fp16"): {("cls", "fp32"), ("per_residue", "fp32"), ("per_residue", "fp16")},
    ("cls", "bf16"): {("cls", "fp32"), ("per_residue", "fp32"), ("per_residue", "bf16")},
    ("max", "fp32"): {("per_residue", "fp32")},
    ("max", "fp16"): {("max", "fp32"), ("per_residue", "fp32"), ("per_residue", "fp16")},
    ("max", "bf16"): {("max", "fp32"), ("per_residue", "fp32"), ("per_residue", "bf16")},
    ("attention", "fp32"): set(),
    ("attention", "fp16"): {("attention", "fp32")},
    ("attention", "bf16"): {("attention", "fp32")},
    ("per_residue", "fp32"): set(),
    ("per_residue", "fp16"): {("per_residue", "fp32")},
    ("per_residue", "bf16"): {("per_residue", "fp32")},
}
KINDS = [(p, s) for p in POOLINGS for s in STORED]
PAIRS = [(target, source) for target in KINDS for source in sorted(FOLLOWS[target])]


@pytest.mark.parametrize("window", WINDOWS, ids=["whole", "windows"])
@pytest.mark.parametrize(("target", "source"), PAIRS, ids=["-".join(t) + " of " + "-".join(s) for t, s in PAIRS])
def test_a_derived_entry_is_bit_for_bit_what_is_computed(
    lab: Lab, tmp_path: Path, target: tuple[str, str], source: tuple[str, str], window: int
):
    wanted, stored = recipe(*target, window), recipe(*source, window)
    path, _ = lab.direct(stored)
    _, direct = lab.direct(wanted)
    number = min(len(lab.proteins(wanted)), len(lab.proteins(stored)))
    got = lab.embed(wanted, tmp_path, shared=path, sequences=number)
    assert (got.hits, got.derived, got.computed, got.tokens) == (0, number, 0, 0)
    assert lab.memo.made == 0
    assert got.entries == direct.entries[:number]  # content hashes, so all bits
    (header,) = headers(tmp_path)
    assert (header.attestation.origin, header.attestation.device_class) == ("derived", HERE)
    assert header.entries == number
    if window == 0 and source[0] == "per_residue":
        assert number == 100
    again = lab.embed(wanted, tmp_path, sequences=number)  # without the source
    assert (again.hits, again.derived, again.computed) == (number, 0, 0)
    assert again.entries == got.entries
    if wanted.pooling == "per_residue":  # and what could be derived of it still can
        cls = replace(wanted, pooling="cls")
        derived = lab.embed(cls, tmp_path, sequences=number)
        assert derived.derived == number
        assert derived.entries == lab.direct(cls)[1].entries[:number]


@pytest.mark.parametrize("window", WINDOWS, ids=["whole", "windows"])
@pytest.mark.parametrize("target", KINDS, ids="-".join)
def test_nothing_else_is_derived(lab: Lab, target: tuple[str, str], window: int):
    """Above all no mean of rounded residues, and nothing for want of attention."""
    wanted = recipe(*target, window)
    assert {(r.pooling, r.stored) for r in sources(wanted)} == FOLLOWS[target]
    missing = {wanted.key(lab.trunk, s): s for s in lab.proteins(recipe("attention", "fp32", window))}
    for other in KINDS:
        if other != target and other not in FOLLOWS[target]:
            cache = EmbeddingCache(lab.direct(recipe(*other, window))[0])
            assert list(derive(cache, lab.trunk, wanted, missing)) == []


@pytest.mark.parametrize(
    ("target", "source"),
    [
        (("mean", "fp16"), ("per_residue", "fp16")),
        (("mean", "fp32"), ("per_residue", "bf16")),
        (("attention", "fp32"), ("per_residue", "fp32")),
        (("per_residue", "fp32"), ("per_residue", "fp16")),
    ],
)
def test_what_does_not_follow_is_computed(lab: Lab, tmp_path: Path, target: tuple[str, str], source: tuple[str, str]):
    path, _ = lab.direct(recipe(*source))
    got = lab.embed(recipe(*target), tmp_path, shared=path, sequences=10)
    assert (got.hits, got.derived, got.computed) == (0, 0, 10)
    assert got.entries == lab.direct(recipe(*target))[1].entries[:10]
    assert {h.attestation.origin for h in headers(tmp_path)} == {"computed"}


def test_a_mean_of_rounded_residues_is_another(lab: Lab):
    """Or it could be derived, and this module would be too careful."""
    residues = EmbeddingCache(lab.direct(recipe("per_residue", "fp16"))[0])
    means = EmbeddingCache(lab.direct(recipe("mean", "fp16"))[0])
    differ = 0
    for sequence in lab.proteins(recipe("mean", "fp16")):
        stored = residues.get(recipe("per_residue", "fp16").key(lab.trunk, sequence))
        mean = means.get(recipe("mean", "fp16").key(lab.trunk, sequence))
        assert stored is not None and mean is not None
        differ += to_stored(pool_residues(stored, "mean"), "fp16").tobytes() != to_stored(mean, "fp16").tobytes()
    assert differ > 50


def test_hits_derived_and_computed_are_told_apart(lab: Lab, tmp_path: Path):
    wanted, source = recipe("mean", "fp16"), recipe("per_residue", "fp32")
    path, _ = lab.direct(source)
    _, direct = lab.direct(wanted)
    proteins = lab.proteins(wanted)
    cache = EmbeddingCache(tmp_path)
    # 5 are there, 10 follow from what is there, 5 do not.
    lab.embed(wanted, tmp_path, sequences=5)
    some = EmbeddingCache(path)
    publication = cache.begin(lab.trunk, source)
    for sequence in proteins[3:15]:
        ((entry, array),) = some.find([source.key(lab.trunk, sequence)])
        publication.add(entry.key, array, entry.length, some.read_start(entry))
    publication.publish(Attestation(THERE, "2.0.0", "2026-01-01T00:00:00+00:00", 7.0, 100))
    before = {h.segment for h in headers(tmp_path)}
    got = lab.embed(wanted, tmp_path, sequences=20)
    assert (got.unique, got.hits, got.derived, got.computed) == (20, 5, 10, 5)
    assert got.entries == direct.entries[:20]
    assert got.tokens == sum(len(s) + 2 for s in proteins[15:20])
    new = {h.attestation.origin: h for h in headers(tmp_path) if h.segment not in before}
    assert {origin: h.entries for origin, h in new.items()} == {"derived": 10, "computed": 5}
    assert new["derived"].attestation.device_class == THERE  # whose bits they are
    assert new["derived"].attestation.tokens == sum(len(s) + 2 for s in proteins[5:15])
    stats = cache.stats()
    assert (stats["hits"], stats["derived"], stats["misses"]) == (5, 10, 10)
    again = lab.embed(wanted, tmp_path, sequences=20)
    assert (again.hits, again.derived, again.computed) == (20, 0, 0)


def test_entries_of_two_device_classes_stay_apart(lab: Lab, tmp_path: Path):
    wanted, source = recipe("mean", "fp32"), recipe("per_residue", "fp32")
    lab.embed(source, tmp_path, device_class=THERE, sequences=4)
    lab.embed(source, tmp_path, device_class="cpu/other", sequences=10)
    got = lab.embed(wanted, tmp_path, sequences=10)
    assert got.derived == 10
    # Both are others than this machine's, and said to be: of hits that were derived, and of those hits themselves.
    assert got.other_classes == {"cpu/other": 6, THERE: 4}
    again = lab.embed(wanted, tmp_path, sequences=10)
    assert (again.hits, again.other_classes) == (10, got.other_classes)
    derived = [h for h in headers(tmp_path) if h.attestation.origin == "derived"]
    assert {h.attestation.device_class: h.entries for h in derived} == {THERE: 4, "cpu/other": 6}


def test_a_damaged_source_is_computed(lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    wanted, source = recipe("mean", "fp32"), recipe("per_residue", "fp32")
    lab.embed(source, tmp_path, sequences=6)
    key = source.key(lab.trunk, lab.proteins(source)[2])
    (entry,) = EmbeddingCache(tmp_path).candidates([key])[key]
    with (tmp_path / "seg" / entry.segment).open("r+b") as file:
        file.seek(entry.offset + entry.nbytes // 2)
        file.write(b"\x00\xff\x00\xff")
    got = lab.embed(wanted, tmp_path, sequences=6)
    assert (got.derived, got.computed) == (5, 1)
    assert got.entries == lab.direct(wanted)[1].entries[:6]
    assert "fails its checksum" in caplog.text


@pytest.mark.parametrize("how", ["damaged", "never known"])
def test_a_start_token_that_is_not_known_is_computed(lab: Lab, tmp_path: Path, how: str):
    wanted, source = recipe("cls", "fp32"), recipe("per_residue", "fp32")
    if how == "damaged":
        lab.embed(source, tmp_path, sequences=6)
        (header,) = headers(tmp_path)
        with (tmp_path / "seg" / header.segment).open("r+b") as file:
            file.seek(header.chunk_starts[0] + 40)
            file.write(b"\x00\xff\x00\xff")
    else:
        known = EmbeddingCache(lab.direct(source)[0])
        keys = [source.key(lab.trunk, s) for s in lab.proteins(source)[:6]]
        arrays = {entry.key: (array, entry.length) for entry, array in known.find(keys)}
        EmbeddingCache(tmp_path).publish(
            keys,
            [arrays[k][0] for k in keys],
            [arrays[k][1] for k in keys],
            trunk=lab.trunk,
            recipe=source,
            attestation=Attestation(HERE, "2.0.0", "2026-01-01T00:00:00+00:00", 1.0, 10),
        )
    got = lab.embed(wanted, tmp_path, sequences=6)
    assert (got.derived, got.computed) == (0, 6)
    assert got.entries == lab.direct(wanted)[1].entries[:6]
    assert lab.embed(recipe("max", "fp32"), tmp_path, sequences=6).derived == 6


TINY = st.sampled_from([0.0, -0.0, 1e-9, -1e-9, 2e-8, 3e-8, -3e-8, 6e-8, 1e-42, -1e-42, 1.0, -1.0, 1.00001, 65504.0])
ARRAYS = st_numpy.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 17)),
    elements=st.one_of(TINY, st.floats(-60000, 60000, width=32)).map(lambda v: float(np.float32(v))),
)


@example(np.array([[1e-9], [-1e-9]], dtype=np.float32), "fp16", "fp16", "max")  # both are zeros when rounded
@settings(max_examples=200)
@given(ARRAYS, st.sampled_from(STORED), st.sampled_from(STORED), st.sampled_from(("mean", "max", "per_residue")))
def test_of_any_numbers_it_is_the_same_bits_or_a_miss(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray, stored: str, had: str, pooling: str
):
    """Zeros have signs, and small numbers of either sign round to them."""
    source, wanted = Recipe(2, "per_residue", stored=had, engine=1), Recipe(2, pooling, stored=stored, engine=1)
    cache = EmbeddingCache(tmp_path_factory.mktemp("any"))
    sequence = "A" * len(array)
    publication = cache.begin(TRUNK, source)
    publication.add(source.key(TRUNK, sequence), to_stored(array, had), len(array))
    publication.publish(Attestation(HERE, "2.0.0", "2026-01-01T00:00:00+00:00", 1.0, 10))
    direct = array if pooling == "per_residue" else pool_residues(array, pooling)
    for derived in derive(cache, TRUNK, wanted, {wanted.key(TRUNK, sequence): sequence}):
        assert derived.array.tobytes() == to_stored(direct, stored).tobytes()


def test_the_memo_gives_what_the_encoder_gives(lab: Lab, checkpoint: Checkpoint, tmp_path: Path):
    """On which all of this module stands."""
    wanted = recipe("mean", "fp32")
    fresh: Callable[[], Encoder] = lambda: make_encoder(checkpoint)  # noqa: E731
    few = lab.proteins(wanted)[:6]
    got = embed(
        few,
        trunk=lab.trunk,
        recipe=wanted,
        cache=EmbeddingCache(tmp_path),
        encoder=fresh,
        attest=lambda: (HERE, "2.0.0"),
        token_budget=300,
    )
    assert got.entries == lab.direct(wanted)[1].entries[:6]
