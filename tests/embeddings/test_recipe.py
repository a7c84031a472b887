from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.embeddings.recipe import Recipe, windows
from proteus_pipeline.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parent / "golden_keys.json").read_text())
TRUNK = "0123456789abcdef0123456789abcdef"
BASE = Recipe(layer=6, window=20, overlap=5)
# One other value of each field: a field that is added to Recipe has to be added here, and so to the key.
OTHER: dict[str, object] = {
    "layer": 5,
    "pooling": "max",
    "precision": "bf16",
    "numerics": "tolerant",
    "stored": "fp16",
    "window": 21,
    "overlap": 6,
    "engine": BASE.engine + 1,
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["why"])
def test_golden_keys(case: dict):
    assert Recipe(**case["recipe"]).key(case["trunk"], case["sequence"]) == case["key"]


def test_golden_keys_name_every_field():
    fields = {f.name for f in dataclasses.fields(Recipe)}
    assert all(set(case["recipe"]) == fields for case in GOLDEN)
    assert len({case["key"] for case in GOLDEN}) == len(GOLDEN)


def test_every_field_changes_the_key_of_a_long_sequence():
    sequence = "MKTAYIAKQR" * 3
    keys = [BASE.key(TRUNK, sequence)]
    for field in dataclasses.fields(Recipe):
        changed = dataclasses.replace(BASE, **{field.name: OTHER[field.name]})
        keys.append(changed.key(TRUNK, sequence))
    assert len(set(keys)) == len(OTHER) + 1


def test_trunk_and_sequence_change_the_key():
    keys = {BASE.key(t, s) for t in (TRUNK, TRUNK[::-1]) for s in ("MK", "KM", "MKM", "M")}
    assert len(keys) == 8
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in keys)


def test_windows_only_matter_for_sequences_longer_than_one():
    plain = Recipe(layer=6)
    for residues, same in ((1, True), (20, True), (21, False)):
        sequence = "A" * residues
        assert (BASE.key(TRUNK, sequence) == plain.key(TRUNK, sequence)) is same


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pooling": "sum"}, "embedding.pooling"),
        ({"precision": "fp64"}, "embedding.precision"),
        ({"numerics": "loose"}, "embedding.numerics"),
        ({"stored": "int8"}, "embedding.stored"),
        ({"layer": -1}, "layer -1"),
        ({"overlap": 20}, "data.overlap"),
        ({"overlap": -1}, "data.overlap"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(changes: dict[str, object], named: str):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(BASE, **changes)


@given(st.data())
def test_windows_cover_a_sequence_and_the_last_ends_with_it(data: st.DataObject):
    length = data.draw(st.integers(1, 400), label="length")
    window = data.draw(st.integers(1, 100), label="window")
    overlap = data.draw(st.integers(0, window - 1), label="overlap")
    spans = windows(length, window, overlap)
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert all(end - start == min(window, length) for start, end in spans)
    for (start, end), (following, _) in itertools.pairwise(spans):
        assert start < following <= end - overlap  # at least the overlap is shared, and no residue left out
    # None of them could be spared.
    assert len(spans) == 1 + max(0, -(-(length - window) // (window - overlap)))


def test_no_window_is_one_window():
    assert windows(5000, 0, 0) == [(0, 5000)]
