from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from layouts import contact_head, lm_head, trunk

from proteus_pipeline import ModelInterface, ModelVersionManager
from proteus_pipeline.errors import (
    ConfigError,
    InvalidVersionError,
    ModelError,
    SequenceError,
    StorageError,
    VersionNotFoundError,
)
from proteus_pipeline.models.checkpoint import Checkpoint, canonical
from proteus_pipeline.models.encoder import Outputs, make_encoder
from proteus_pipeline.models.folder import write_folder

SEQUENCES = ["MKTAYIAKQR", "A", "GAVLIMFWPSTCYNQDEKRH", "MKTAYIAKQR"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny: Checkpoint) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny"
    write_folder(tiny, path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelInterface:
    return ModelInterface("m", weights=folder)


def hidden(checkpoint: Checkpoint, layer: int) -> dict[int, np.ndarray]:
    return {i: states[layer] for i, states in make_encoder(checkpoint).encode(SEQUENCES, [layer])}


def test_nothing_is_read_until_it_is_used(tmp_path: Path, tiny: Checkpoint):
    model = ModelInterface("lab/m", weights=tmp_path / "later")
    assert (model.name, model.version, model.source) == ("lab/m", None, {"origin": "later"})
    with pytest.raises(StorageError, match="later does not exist"):
        model.checkpoint  # noqa: B018
    write_folder(tiny, tmp_path / "later")
    assert model.checkpoint.model_digest == tiny.model_digest
    assert model.checkpoint is model.checkpoint


def test_a_model_that_is_not_registered_is_only_missed_when_it_is_used(repository: Path):
    model = ModelInterface("m@v1.0.0", ModelVersionManager(repository))
    with pytest.raises(VersionNotFoundError, match="no model m is registered"):
        model.embed(["MK"])


@pytest.mark.parametrize("name", ["", "a b", "m@", "m@1.a", "m@^1"])
def test_a_name_that_breaks_the_grammar_is_refused_at_once(name: str):
    with pytest.raises(InvalidVersionError):
        ModelInterface(name)


def test_a_registered_version_is_found_by_any_reference(
    repository: Path, model: ModelInterface, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    manager = ModelVersionManager(repository)
    manager.register_version(model, "1.0.0")
    for reference in ("m", "m@v1.0.0", "m@1.x", "m@latest"):
        found = ModelInterface(reference, manager)
        assert found.version is not None
        assert (found.name, found.version.reference) == ("m", "m@v1.0.0")
        assert found.checkpoint.model_digest == tiny.model_digest
        assert found.source == {}
    monkeypatch.chdir(repository)
    assert ModelInterface("m").checkpoint.model_digest == tiny.model_digest


def test_outside_a_project_the_home_is_used(model: ModelInterface, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROTEUS_HOME", str(tmp_path / "home"))
    ModelVersionManager(tmp_path / "home").register_version(model, "1.0.0")
    version = ModelInterface("m").version
    assert version is not None
    assert version.root == tmp_path / "home"


@pytest.mark.parametrize("layer", [0, 1, 2, -1, -3])
def test_embeddings_per_residue_are_the_encoders(model: ModelInterface, layer: int):
    found = model.embed(SEQUENCES, layer=layer, pooling="per_residue")
    expected = hidden(model.checkpoint, layer % 3)
    assert [e.shape for e in found] == [(len(s), 32) for s in SEQUENCES]
    assert all(e.dtype == np.float32 for e in found)
    assert len({e.tobytes() for e in found}) == 3, "equal sequences have equal embeddings, and others do not"
    for i, embedding in enumerate(found):
        np.testing.assert_array_equal(embedding, expected[i][1:-1])


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooled_embeddings_are_over_the_residues_alone(model: ModelInterface, pooling: str):
    found = model.embed(SEQUENCES, pooling=pooling)
    residues = model.embed(SEQUENCES, pooling="per_residue")
    assert [e.shape for e in found] == [(32,)] * len(SEQUENCES)
    for pooled, each in zip(found, residues, strict=True):
        np.testing.assert_allclose(pooled, getattr(each, pooling)(axis=0), rtol=1e-5, atol=1e-6)


def test_the_start_tokens_embedding_is_the_encoders(model: ModelInterface):
    expected = hidden(model.checkpoint, 2)
    for i, embedding in enumerate(model.embed(SEQUENCES, pooling="cls")):
        np.testing.assert_array_equal(embedding, expected[i][0])


def test_no_sequences_give_no_embeddings(model: ModelInterface):
    assert model.embed([]) == []


def test_sequences_are_read_by_the_rules_of_the_config(model: ModelInterface):
    lower, plain, stop = model.embed(["mkta", "MKTA", "MKTA*"])
    assert lower.tobytes() == plain.tobytes() == stop.tobytes()


@pytest.mark.parametrize(
    ("sequence", "said"),
    [
        ("MK?A", r"sequence 2 has '\?' at position 3, which is no residue"),
        ("MKJA", "sequence 2 has 'J' at position 3"),
        ("MK-A", "sequence 2 has '-' at position 3, a gap"),
        ("", "sequence 2 has no residues"),
    ],
)
def test_what_is_no_sequence_is_refused_and_named(model: ModelInterface, sequence: str, said: str):
    with pytest.raises(SequenceError, match=said):
        model.embed(["MKTA", sequence])


def test_a_sequence_longer_than_training_had_is_embedded_whole(model: ModelInterface):
    (found,) = model.embed(["MK" * 600], pooling="per_residue")
    assert found.shape == (1200, 32)


def test_one_text_is_no_list_of_sequences(model: ModelInterface):
    with pytest.raises(SequenceError, match=r"one text, not a list of sequences; write embed\(\[SEQUENCE\]\)"):
        model.embed("MKTA")


@pytest.mark.parametrize("layer", [99, 3, -4])
def test_a_layer_that_is_not_there_is_refused(model: ModelInterface, layer: int):
    with pytest.raises(ConfigError, match=f"layer is {layer}, and the model has 2 layers; use -3 to 2"):
        model.embed(["MKTA"], layer=layer)


def test_the_fair_esm_model_has_the_same_weights_and_gives_the_same_numbers(model: ModelInterface):
    esm2, alphabet = model.to_fair_esm()
    assert not esm2.training
    _, _, tokens = alphabet.get_batch_converter()([("a", SEQUENCES[2])])
    with torch.no_grad():
        theirs = esm2(tokens, repr_layers=[2])["representations"][2][0, 1:-1].numpy()
    ours = model.embed([SEQUENCES[2]], pooling="per_residue")[0]
    np.testing.assert_allclose(ours, theirs, atol=5e-6 * np.abs(theirs).max())


def test_weights_that_are_no_model_are_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="model_type 'bert'"):
        ModelInterface("m", weights=tmp_path).embed(["MK"])


def test_contacts_and_logits_are_the_encoders_in_the_order_asked_for(tmp_path: Path):
    tiny = make_checkpoint()
    heads = lm_head(tiny, fair=False) | {f"esm.contact_head.{n}": t for n, t in contact_head(tiny).items()}
    write_folder(canonical(tiny.architecture, trunk(tiny) | heads, "whole"), tmp_path / "whole")
    model = ModelInterface("m", weights=tmp_path / "whole")
    logits, contacts = model.logits(SEQUENCES), model.contacts(SEQUENCES)
    encoder = make_encoder(model.checkpoint)
    for index, sequence in enumerate(SEQUENCES):
        ((_, alone),) = encoder.compute([sequence], Outputs(logits=True, contacts=True))
        assert np.array_equal(logits[index], alone.logits)
        assert logits[index].shape == (len(sequence) + 2, 33)
        assert np.array_equal(contacts[index], alone.contacts)
    with pytest.raises(SequenceError, match=r"contacts was given one text, not a list of sequences; write contacts\("):
        model.contacts("MK")


def test_what_a_model_has_no_head_for_is_an_error(model: ModelInterface):
    with pytest.raises(ModelError, match="no language-model head"):
        model.logits(["MK"])
    with pytest.raises(ModelError, match="no contact head"):
        model.contacts(["MK"])


def test_attention_pooling_weighs_residues_by_the_attention_they_receive(model: ModelInterface):
    (vector,) = model.embed(["MKTAYIAKQR"], pooling="attention")
    ((_, encoded),) = model.encoder().compute(["MKTAYIAKQR"], Outputs(layers=(2,), received=(2,)))
    weights = encoded.received[2].astype(np.float64)
    assert np.allclose(vector, (weights[:, None] * encoded.hidden[2][1:-1]).sum(0) / weights.sum(), rtol=1e-6)
    with pytest.raises(ConfigError, match="layer 0 is before any attention"):
        model.embed(["MK"], layer=0, pooling="attention")
    with pytest.raises(ConfigError, match="pooling is 'median'; use one of mean"):
        model.embed(["MK"], pooling="median")


def test_weights_that_give_no_numbers_are_an_error_and_no_result(tmp_path: Path):
    tiny = make_checkpoint()
    broken = dict(tiny.tensors)
    broken["esm.encoder.layer.0.output.dense.bias"] = torch.full((32,), float("inf"))
    write_folder(canonical(tiny.architecture, broken, "broken"), tmp_path / "broken")
    with pytest.raises(ModelError, match="in fp32, these weights give what is no number"):
        ModelInterface("m", weights=tmp_path / "broken").embed(["MK"])
