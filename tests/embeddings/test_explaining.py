from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from entries import HERE, THERE

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.explaining import Miss, counts
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.stored import to_stored

OLD, NEW = "a" * 32, "b" * 32
RECIPE = Recipe(layer=2, window=30, overlap=4)
SHORT, LONG = "MKTAYIAKQR", "MKTAYIAKQRQISFVKSHFSRQ" * 2


def store(
    cache: EmbeddingCache,
    sequences: Sequence[str] = (SHORT, LONG),
    recipe: Recipe = RECIPE,
    trunk: str = OLD,
    *,
    device_class: str = HERE,
    seconds: float = 2.0,
) -> None:
    shapes = [(len(s), 8) if recipe.pooling == "per_residue" else (8,) for s in sequences]
    cache.publish(
        [recipe.key(trunk, s) for s in sequences],
        [to_stored(np.ones(shape, dtype=np.float32), recipe.stored) for shape in shapes],
        [len(s) for s in sequences],
        trunk=trunk,
        recipe=recipe,
        attestation=Attestation(device_class, "2.0.0", "2026-01-01T00:00:00+00:00", seconds, 100),
    )


def why(misses: list[Miss]) -> dict[str, tuple[str, ...]]:
    return {m.sequence: m.differs for m in misses}


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path, device_class=lambda: HERE)


@pytest.mark.parametrize(
    ("changed", "component"),
    [
        ({"layer": 1}, "layer"),
        ({"pooling": "attention"}, "pooling"),
        ({"precision": "mixed"}, "precision"),
        ({"numerics": "tolerant"}, "numerics"),
        ({"engine": 1}, "engine"),
    ],
)
def test_each_component_is_named_when_it_alone_changes(
    cache: EmbeddingCache, changed: dict[str, object], component: str
):
    store(cache)
    misses = cache.explain([SHORT, LONG], OLD, replace(RECIPE, **changed))  # type: ignore[arg-type]
    assert why(misses) == {SHORT: (component,), LONG: (component,)}
    assert all(m.nearest == RECIPE.described() | {"trunk": OLD} for m in misses)
    assert counts(misses) == {component: 2}


def test_a_stored_dtype_that_cant_be_derived_is_named(cache: EmbeddingCache):
    store(cache, recipe=replace(RECIPE, stored="fp16"))
    assert set(why(cache.explain([SHORT, LONG], OLD, RECIPE)).values()) == {("stored",)}
    assert cache.explain([SHORT, LONG], OLD, replace(RECIPE, stored="fp16")) == []


def test_other_weights_are_named_with_their_digest(cache: EmbeddingCache):
    store(cache)
    misses = cache.explain([SHORT], NEW, RECIPE)
    assert why(misses) == {SHORT: ("weights",)}
    assert misses[0].nearest is not None
    assert misses[0].nearest["trunk"] == OLD
    assert misses[0].key == RECIPE.key(NEW, SHORT)


def test_a_policy_matters_to_long_sequences_alone(cache: EmbeddingCache):
    store(cache)
    other = replace(RECIPE, window=40)
    assert why(cache.explain([SHORT, LONG], OLD, other)) == {LONG: ("policy",)}
    assert why(cache.explain([SHORT, LONG], OLD, replace(other, layer=1))) == {
        SHORT: ("layer",),
        LONG: ("layer", "policy"),
    }


def test_what_was_never_seen_is_said_so(cache: EmbeddingCache):
    assert why(cache.explain([SHORT], OLD, RECIPE)) == {SHORT: ("never seen",)}
    store(cache, [LONG])
    (miss,) = cache.explain([SHORT, LONG], OLD, RECIPE)
    assert (miss.sequence, miss.differs, miss.nearest) == (SHORT, ("never seen",), None)


def test_what_can_be_derived_is_no_miss(cache: EmbeddingCache):
    store(cache, recipe=replace(RECIPE, pooling="per_residue"))
    assert cache.explain([SHORT, LONG], OLD, RECIPE) == []
    assert len(cache.explain([SHORT, LONG], OLD, replace(RECIPE, pooling="attention"))) == 2


def test_the_nearest_entry_is_the_one_that_differs_least(cache: EmbeddingCache):
    store(cache, recipe=replace(RECIPE, layer=1, precision="bf16"), trunk=NEW)
    store(cache, recipe=replace(RECIPE, layer=1))
    store(cache, [LONG], recipe=replace(RECIPE, numerics="tolerant", layer=0, engine=1))
    assert why(cache.explain([SHORT, LONG], OLD, RECIPE)) == {SHORT: ("layer",), LONG: ("layer",)}
    assert why(cache.explain([SHORT], OLD, replace(RECIPE, precision="bf16"))) == {
        SHORT: ("layer", "precision")  # as near as the other weights' entry, and newer
    }


def test_the_very_entry_hidden_is_said_with_its_reason(cache: EmbeddingCache):
    store(cache)
    assert cache.invalidate(OLD, "wrong tokenizer") == 2
    (first, second) = cache.explain([SHORT, LONG], OLD, RECIPE)
    assert first.differs == second.differs == ("invalidated",)
    assert first.detail == "wrong tokenizer"


def test_an_entry_of_another_device_class_that_is_refused_is_said_so(tmp_path: Path):
    store(EmbeddingCache(tmp_path), device_class=THERE)
    strict = EmbeddingCache(tmp_path, accept="same_class", device_class=lambda: HERE)
    (miss,) = strict.explain([SHORT], OLD, RECIPE)
    assert (miss.differs, miss.detail) == (("device class",), THERE)


def test_a_plan_counts_without_reading(cache: EmbeddingCache):
    store(cache, [SHORT])
    store(cache, ["MKV"], replace(RECIPE, pooling="per_residue"))
    plan = cache.plan([SHORT, SHORT, LONG, "MKV"], OLD, RECIPE, 8, HERE)
    assert (plan.sequences, plan.unique, plan.hits, plan.derived, plan.misses) == (4, 3, 1, 1, 1)
    windows = 30 + 2 + 30 + 2  # of 44 residues, each with a start and an end token
    assert (plan.tokens, plan.nbytes) == (windows, 8 * 4)
    assert plan.seconds == pytest.approx(windows * 4.0 / 200)
    assert cache.plan([LONG], OLD, RECIPE, 8, THERE).seconds is None
    assert cache.plan([LONG], NEW, RECIPE, 8).seconds is None
    residues = cache.plan([LONG], OLD, replace(RECIPE, pooling="per_residue", stored="fp16"), 8)
    assert residues.nbytes == 44 * 8 * 2


def test_a_plan_asks_for_nothing(cache: EmbeddingCache):
    plan = cache.plan([], OLD, RECIPE, 8)
    assert (plan.sequences, plan.misses, plan.tokens, plan.seconds) == (0, 0, 0, None)
