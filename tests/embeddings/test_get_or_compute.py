from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_checkpoint

from proteus_pipeline import EmbeddingCache, ModelInterface
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.models.folder import write_folder

SEQUENCES = ["MKTAYIAKQR", "MKV", "GLSDGEWQQVLNVWGKVEAD"]


@pytest.fixture
def model(tmp_path: Path) -> ModelInterface:
    write_folder(make_checkpoint(), tmp_path / "weights")
    return ModelInterface("m", weights=tmp_path / "weights")


@pytest.mark.parametrize("pooling", ["mean", "per_residue"])
def test_what_comes_back_is_what_the_model_computes(tmp_path: Path, model: ModelInterface, pooling: str):
    cache, recipe = EmbeddingCache(tmp_path / "cache"), Recipe(layer=2, pooling=pooling)
    asked = [*SEQUENCES, SEQUENCES[0]]
    for _ in range(2):
        found = cache.get_or_compute(asked, model, recipe)
        for one, two in zip(found, model.embed(asked, layer=2, pooling=pooling), strict=True):
            assert one.dtype == np.float32
            np.testing.assert_array_equal(one, two)
    stats = cache.stats()
    assert (stats["entries"], stats["hits"], stats["misses"]) == (3, 3, 3)
    found[0] += 1  # the caller's own
    np.testing.assert_array_equal(cache.get_or_compute(asked, model, recipe)[3], two)


def test_the_weights_are_not_read_for_what_is_known(
    tmp_path: Path, model: ModelInterface, monkeypatch: pytest.MonkeyPatch
):
    cache, recipe = EmbeddingCache(tmp_path / "cache"), Recipe(layer=1)
    cache.get_or_compute(SEQUENCES, model, recipe)
    monkeypatch.setattr(ModelInterface, "encoder", lambda *_, **__: pytest.fail("asked for the encoder"))
    assert len(cache.get_or_compute(SEQUENCES, model, recipe)) == 3


def test_some_residues_of_a_stored_embedding_can_be_asked_for(tmp_path: Path, model: ModelInterface):
    cache, recipe = EmbeddingCache(tmp_path / "cache"), Recipe(layer=2, pooling="per_residue", stored="fp16")
    (whole,) = cache.get_or_compute(SEQUENCES[:1], model, recipe)
    key = recipe.key(model.checkpoint.trunk_digest, SEQUENCES[0])
    some = cache.get(key, slice(2, 5))
    assert some is not None
    np.testing.assert_array_equal(some, whole[2:5])
    ((entry,),) = cache.candidates([key]).values()
    np.testing.assert_array_equal(cache.read(entry, slice(-1, None)), whole[-1:].astype(np.float16))


@pytest.mark.parametrize("stored", ["fp32", "fp16"])
def test_an_audit_computes_the_same_bits_again_and_finds_others(tmp_path: Path, model: ModelInterface, stored: str):
    cache, recipe = EmbeddingCache(tmp_path / "cache"), Recipe(layer=2, stored=stored)
    cache.get_or_compute(SEQUENCES[:2], model, recipe)
    audited = cache.audit(SEQUENCES, model, recipe)
    assert {a.sequence for a in audited} == set(SEQUENCES[:2])
    assert all(a.same and a.same_class and a.max_abs == a.relative_l2 == 0 for a in audited)
    assert len(cache.audit(SEQUENCES, model, recipe, sample=1)) == 1
    # Other weights' numbers under these weights' keys.
    write_folder(make_checkpoint(seed=1), tmp_path / "other")
    other = ModelInterface("m", weights=tmp_path / "other")
    wrong = EmbeddingCache(tmp_path / "wrong")
    trunk = model.checkpoint.trunk_digest
    (header,) = (cache.refresh(), cache.visible.segments().values())[1]
    publication = wrong.begin(trunk, recipe)
    for sequence, array in zip(SEQUENCES, other.embed(SEQUENCES, layer=2), strict=True):
        publication.add(
            recipe.key(trunk, sequence), array.astype({"fp32": "<f4", "fp16": "<f2"}[stored]), len(sequence)
        )
    publication.publish(header.attestation)
    audited = wrong.audit(SEQUENCES, model, recipe)
    assert len(audited) == 3
    assert not any(a.same for a in audited)
    assert all(a.relative_l2 > 0.01 for a in audited)
