"""What counts as a difference, and how large one has to be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from proteus_pipeline.embeddings.manifest import Listed, Manifest
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.sketch import sketch
from proteus_pipeline.embeddings.stored import content_hash, to_stored
from proteus_pipeline.sequences.fasta import Record
from proteus_pipeline.stages.differences import (
    TOLERANCES,
    Comparison,
    Difference,
    differing_metrics,
    differing_recipe,
    differing_sequences,
    tolerance,
    turned,
)
from proteus_pipeline.stages.verifying import REMEDIES, Verification, draw

TRUNK = "0123456789abcdef0123456789abcdef"
HERE, THERE = "cpu/x86_64/AVX2/Here", "cuda/sm_90"
RECIPE = Recipe(layer=6)
RECORDS = [Record("one", "MKV", ""), Record("two", "MKW", ""), Record("three", "MKY", "")]


def manifest(keys: dict[str, str], recipe: Recipe = RECIPE) -> Manifest:
    rows = tuple(Listed(key, (2,), "fp32", "", HERE, ()) for key in keys.values())
    return Manifest(TRUNK, dict(recipe.described()), tuple(keys), rows)


def keys(records: list[Record] = RECORDS, recipe: Recipe = RECIPE) -> dict[str, str]:
    return {r.id: recipe.key(TRUNK, r.sequence) for r in records}


def test_an_honest_manifest_has_no_difference():
    assert list(differing_sequences(manifest(keys()), RECORDS, "a.fasta")) == []
    assert list(differing_recipe(RECIPE.described(), RECIPE.described())) == []


def test_swapped_ids_are_both_named_with_whose_key_it_is():
    swapped = dict(zip(("two", "one", "three"), keys().values(), strict=True))
    one, two = sorted(differing_sequences(manifest(swapped), RECORDS, "a.fasta"), key=lambda d: d.what)
    assert (one.what, two.what) == ("one: key of its sequence", "two: key of its sequence")
    assert one.expected == f"{keys()['two']}, the key of two" and one.found == keys()["one"]


def test_a_changed_sequence_an_added_and_a_missing_one():
    records = [Record("one", "MKVA", ""), RECORDS[1], Record("four", "MA", "")]
    found = {d.what: (d.expected, d.found) for d in differing_sequences(manifest(keys()), records, "a.fasta")}
    assert found == {
        "one: key of its sequence": (keys()["one"], RECIPE.key(TRUNK, "MKVA")),
        "four: in the manifest": ("no row", "a sequence in a.fasta"),
        "three: in a.fasta": ("a sequence", "none"),
    }


def test_an_id_with_two_rows():
    stated = manifest(keys())
    twice = replace(stated, ids=(*stated.ids, "one"), entries=(*stated.entries, stated.entries[0]))
    (difference,) = differing_sequences(twice, RECORDS, "a.fasta")
    assert str(difference) == "one: in the manifest: expected one row, found 2 rows"


def test_another_recipe_is_told_by_its_field():
    stated = manifest(keys(recipe=Recipe(layer=4)), Recipe(layer=4))
    assert list(differing_sequences(stated, RECORDS, "a.fasta")) == []  # its keys are of its own recipe
    (difference,) = differing_recipe(stated.recipe, RECIPE.described())
    assert str(difference) == "recipe: layer: expected 4, found 6"
    # A recipe that only the heading has: keys are of another one.
    assert len(list(differing_sequences(replace(stated, recipe=dict(RECIPE.described())), RECORDS, ""))) == 3


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"layer": "six"},
        *(
            dict(RECIPE.described()) | more
            for more in ({"windows": 3}, {"engine": []}, {"engine": 1.5}, {"layer": "6"})
        ),
    ],
)
def test_a_recipe_that_is_none_is_another_one(recipe: dict):
    stated = replace(manifest(keys()), recipe=recipe)
    assert list(differing_sequences(stated, RECORDS, "")) == []
    assert list(differing_recipe(recipe, RECIPE.described()))


def test_windows_count_for_long_sequences_only():
    recipe = Recipe(layer=6, window=4, overlap=1)
    records = [Record("short", "MKV", ""), Record("long", "MKVAAGIV", "")]
    assert list(differing_sequences(manifest(keys(records, recipe), recipe), records, "")) == []
    without = manifest(keys(records, RECIPE), recipe)
    assert [d.what for d in differing_sequences(without, records, "")] == ["long: key of its sequence"]


def test_a_sample_is_its_seeds_whatever_the_order():
    ids = [f"p{n}" for n in range(1000)]
    assert draw(ids, 20, 1) == draw(ids[::-1], 20, 1) != draw(ids, 20, 2)
    assert len(draw(ids, 20, 1)) == 20
    assert draw(ids[:5], 200, 1) == set(ids[:5])


def row(array: np.ndarray, recipe: Recipe = RECIPE, device_class: str = HERE) -> Listed:
    stored = recipe.stored
    return Listed("k", array.shape, stored, content_hash(array, stored), device_class, sketch(array, stored))


def compared(told: Listed, array: np.ndarray, recipe: Recipe = RECIPE) -> Comparison:
    comparison = Comparison(manifest({}), recipe, HERE)
    comparison.compare("one", told, array)
    return comparison


ARRAY = np.random.default_rng(0).standard_normal((5, 64)).astype("<f4")


@pytest.mark.parametrize("device_class", [HERE, THERE, ""])
def test_equal_bits_are_equal_wherever_they_were_made(device_class: str):
    done = compared(row(ARRAY, device_class=device_class), ARRAY)
    assert (done.equal, done.near, done.differences) == (1, 0, [])


def test_one_changed_bit_is_a_difference_on_the_same_device_class_only():
    changed = ARRAY.copy()
    changed[2, 3] = np.nextafter(changed[2, 3], np.float32(9))
    (difference,) = compared(row(ARRAY), changed).differences
    assert difference.what == "one: content" and difference.expected == row(ARRAY).content
    assert difference.found.startswith(row(changed).content)
    changed = ARRAY * np.float32(1 + 1e-6)
    for told, recipe in ELSEWHERE:
        done = compared(told, changed, recipe)
        assert (done.equal, done.near, done.differences) == (0, 1, [])
        assert 0 < done.farthest < 3e-6


ELSEWHERE = ((row(ARRAY, device_class=THERE), RECIPE), (row(ARRAY), replace(RECIPE, numerics="tolerant")))


@pytest.mark.parametrize(("told", "recipe"), ELSEWHERE)
def test_a_hash_that_is_not_of_the_sketchs_array_is_a_difference_on_every_device_class(told: Listed, recipe: Recipe):
    """Otherwise nothing would look at the hashes of a manifest whose device class was renamed."""
    done = compared(replace(told, content="0" * 32), ARRAY, recipe)
    (difference,) = done.differences
    assert (done.equal, done.near) == (0, 0)
    assert (difference.what, difference.expected) == ("one: content", "0" * 32)
    assert difference.found == f"{row(ARRAY).content}, the same by its sketch"
    # Neither by another way to write the same numbers.
    padded = replace(told, content="0" * 32, sketch=tuple(f"{n}{'0' if '.' in n else '.0'}" for n in told.sketch))
    assert len(compared(padded, ARRAY, recipe).differences) == 1


def test_sketches_of_any_size_have_a_distance():
    done = compared(replace(row(ARRAY, device_class=THERE), sketch=("1e308", "-1e308", "1e308", "1", "1")), ARRAY * 2)
    assert [d.what for d in done.differences] == ["one: embedding"]


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
def test_the_tolerance_is_kept(precision: str, stored: str):
    recipe = replace(RECIPE, precision=precision, stored=stored)
    noise = np.random.default_rng(1).standard_normal(ARRAY.shape).astype("<f4")
    noise *= np.linalg.norm(ARRAY) / np.linalg.norm(noise)
    told = row(to_stored(ARRAY, stored), recipe, THERE)
    for apart, agrees in ((0.3 * TOLERANCES[precision], True), (5 * tolerance(recipe), False)):
        done = compared(told, to_stored(ARRAY + np.float32(apart) * noise, stored), recipe)
        assert (done.near, len(done.differences)) == ((1, 0) if agrees else (0, 1))
    assert "expected one within" in str(done.differences[0])


def test_what_a_row_says_beside_its_hash_is_compared_too():
    for told in (replace(row(ARRAY), shape=(64,)), replace(row(ARRAY), stored="fp16")):
        assert len(compared(told, ARRAY).differences) == 1
    forged = replace(row(ARRAY), sketch=row(ARRAY * 2).sketch)
    assert [d.what for d in compared(forged, ARRAY).differences] == ["one: sketch"]


SCORES = {
    "status": "ok",
    "labelled": 100,
    "classes": {"a": 50, "b": 50},
    "embedding": {"accuracy": 0.75, "log_loss": 1.02},
}


def changed(name: str, value: object) -> dict:
    return SCORES | {"embedding": SCORES["embedding"] | {name: value}}  # type: ignore[operator]


def test_metrics_agree_to_the_last_digit_or_within_what_a_few_predictions_make():
    assert list(differing_metrics(SCORES, SCORES, 0.0)) == []
    (difference,) = differing_metrics(changed("accuracy", 0.76), SCORES, 0.0)
    assert str(difference) == "embedding.accuracy: expected 0.76, found 0.75"
    allowed = turned(SCORES)
    assert allowed == 0.03
    for name, near, far in (("accuracy", 0.78, 0.79), ("log_loss", 1.029, 1.04)):
        assert list(differing_metrics(changed(name, near), SCORES, allowed + 1e-9)) == []
        assert len(list(differing_metrics(changed(name, far), SCORES, allowed))) == 1


@pytest.mark.parametrize("allowed", [0.0, 0.5])
def test_counts_words_and_names_of_scores_are_exact(allowed: float):
    for other in (
        SCORES | {"labelled": 99},
        SCORES | {"status": "no labels"},
        SCORES | {"classes": {"a": 50, "c": 50}},
        SCORES | {"gain": 0.1},
        {k: v for k, v in SCORES.items() if k != "embedding"},
        changed("accuracy", "0.75"),
        changed("accuracy", None),
        changed("accuracy", True),
    ):
        assert list(differing_metrics(other, SCORES, allowed))


def test_each_kind_of_difference_has_its_remedy_once():
    differences = tuple(Difference(kind, "a", "b", "c") for kind in REMEDIES) * 2
    done = Verification("m", "n@v1.0.0", HERE, (), 0, 0, 0, 0, 0, 0.0, 0.0, "", differences)
    assert done.remedies == list(REMEDIES.values())
    of_candidate = " ".join(replace(done, manifest="results/candidate.json").remedies)
    assert "candidate=" in of_candidate and "--single-item compare" in of_candidate
    assert "(model=" not in of_candidate and "--single-item probe" not in of_candidate
