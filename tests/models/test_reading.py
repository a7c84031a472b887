"""Every layout of one model reads as one model, and nothing in a file is run."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import hf_config, lm_head, trunk, write_hf, write_official

from proteus_pipeline.errors import ModelError, ProteusError, StorageError
from proteus_pipeline.models.architecture import ESM2_TOKENS
from proteus_pipeline.models.checkpoint import Checkpoint, canonical
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.models.reading import fair_esm_to_hf, read_checkpoint

FORMS = ("bin", "safetensors", "sharded")


def refused(path: Path, kind: type[ProteusError] = ModelError) -> str:
    """Return the one line with which a path is refused."""
    with pytest.raises(kind) as caught:
        read_checkpoint(path)
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.remedy
    return line


@pytest.mark.parametrize("lm", [False, True])
@pytest.mark.parametrize("contact", [False, True])
def test_every_layout_has_one_trunk_digest_whatever_heads_it_carries(
    tiny: Checkpoint, tmp_path: Path, lm: bool, contact: bool
):
    read = [read_checkpoint(write_official(tiny, tmp_path / "esm2.pt", lm=lm, contact=contact))]
    read += [read_checkpoint(write_hf(tiny, tmp_path / form, form, lm=lm, contact=contact)) for form in FORMS]
    write_folder(read[0], tmp_path / "ours")
    read.append(read_checkpoint(tmp_path / "ours"))
    assert {c.trunk_digest for c in read} == {tiny.trunk_digest}
    components = {"trunk"} | ({"lm_head"} if lm else set()) | ({"contact_head"} if contact else set())
    assert all(set(c.digests) == components for c in read)
    assert len({c.model_digest for c in read}) == 1


def test_the_official_layout_here_is_one_that_fair_esm_itself_loads(tiny: Checkpoint, tmp_path: Path):
    import esm

    path = write_official(tiny, tmp_path / "esm2_tiny.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        model, _ = esm.pretrained.load_model_and_alphabet_local(path)
    read = read_checkpoint(path)
    state = model.state_dict()
    assert len(state) >= len(read.tensors)
    assert all(
        torch.equal(state[name], read.tensors[fair_esm_to_hf(name)]) for name in state if name != "lm_head.weight"
    )


def test_the_real_model_has_one_trunk_digest_in_fair_esms_layout(checkpoint: Checkpoint, tmp_path: Path):
    read = read_checkpoint(write_official(checkpoint, tmp_path / "esm2_t6_8M.pt", contact=False))
    assert read.trunk_digest == checkpoint.trunk_digest


def test_a_weight_file_is_read_with_the_config_beside_it(tiny: Checkpoint, tmp_path: Path):
    for form, name in (("bin", "pytorch_model.bin"), ("safetensors", "model.safetensors")):
        folder = write_hf(tiny, tmp_path / form, form)
        assert read_checkpoint(folder / name).trunk_digest == tiny.trunk_digest
        (folder / "config.json").unlink()
        assert "has no config.json" in refused(folder / name)


def test_a_pickle_of_the_old_kind_without_zip_is_read(tiny: Checkpoint, tmp_path: Path):
    folder = write_hf(tiny, tmp_path / "old", "bin")
    torch.save(trunk(tiny), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert read_checkpoint(folder).trunk_digest == tiny.trunk_digest


def test_names_without_the_esm_prefix_are_the_same_tensors(tiny: Checkpoint, tmp_path: Path):
    folder = write_hf(tiny, tmp_path / "bare", "bin")
    torch.save({n.removeprefix("esm."): t for n, t in trunk(tiny).items()}, folder / "pytorch_model.bin")
    assert read_checkpoint(folder).trunk_digest == tiny.trunk_digest


def test_a_model_saved_by_transformers_is_the_same_model(tiny: Checkpoint, tmp_path: Path):
    from transformers import EsmForMaskedLM

    with_heads = read_checkpoint(write_hf(tiny, tmp_path / "given", "safetensors"))
    write_folder(with_heads, tmp_path / "ours")
    model, info = EsmForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    model.save_pretrained(tmp_path / "theirs")
    assert read_checkpoint(tmp_path / "theirs").digests == with_heads.digests


def test_the_names_that_transformers_5_saves_are_understood(tiny: Checkpoint):
    rounded = torch.tensor([1.0, 0.1, 0.01, 0.001]).half().float()
    tail = "attention.self.rotary_embeddings.inv_freq"
    plain = {n: rounded if "inv_freq" in n else t for n, t in trunk(tiny).items()}
    saved = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in plain.items() if "inv_freq" not in n}
    saved = {n.replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in saved.items()}
    assert any(n.endswith(".gamma") for n in saved)
    for prefix in ("esm.", ""):
        read = canonical(tiny.architecture, saved | {f"{prefix}encoder.layer.*.{tail}": rounded.half()}, "saved")
        assert read.digests == canonical(tiny.architecture, plain, "plain").digests


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, bytes]]:
    """Each kind of weight file, and its bytes."""
    root, model = tmp_path_factory.mktemp("whole"), make_checkpoint(layers=1, width=8, heads=2)
    old = write_hf(model, root / "old", "bin") / "pytorch_model.bin"
    torch.save(trunk(model), old, _use_new_zipfile_serialization=False)
    paths = {
        "pt": write_official(model, root / "esm2.pt"),
        "bin": write_hf(model, root / "bin", "bin") / "pytorch_model.bin",
        "old": old,
        "safetensors": write_hf(model, root / "st", "safetensors") / "model.safetensors",
        "config": root / "bin" / "config.json",
        "index": write_hf(model, root / "sharded", "sharded") / "model.safetensors.index.json",
    }
    return {kind: (path, path.read_bytes()) for kind, path in paths.items()}


@pytest.mark.parametrize("kind", ["pt", "bin", "old", "safetensors", "config", "index"])
@settings(max_examples=15)
@given(part=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_a_model_error(whole: dict[str, tuple[Path, bytes]], kind: str, part: float):
    path, data = whole[kind]
    asked = path.parent if kind in {"config", "index"} else path
    assert read_checkpoint(asked)
    try:
        path.write_bytes(data[: int(part * len(data))])
        refused(asked)
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["pt", "bin", "old", "safetensors"])
def test_a_file_of_something_else_is_a_model_error(whole: dict[str, tuple[Path, bytes]], kind: str):
    path, data = whole[kind]
    others = (b"", b"\n", b">protein\nMKV\n", b"\x80\x04N.", bytes(100), pickle.dumps([1, 2]), b"\xff" * 64)
    try:
        for other in others:
            path.write_bytes(other)
            refused(path)
    finally:
        path.write_bytes(data)


def test_a_path_that_is_not_there_is_a_storage_error(tmp_path: Path):
    for name in ("absent.pt", "absent", "absent.safetensors"):
        assert f"{tmp_path / name} does not exist" in refused(tmp_path / name, StorageError)


def changed_config(tiny: Checkpoint, folder: Path, **changes: object) -> Path:
    write_hf(tiny, folder, "safetensors")
    config = {k: v for k, v in (hf_config(tiny) | changes).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bert"}, "model_type 'bert', not 'esm'"),
        ({"position_embedding_type": "absolute"}, "absolute positions"),
        ({"position_embedding_type": ...}, "absolute positions"),  # transformers' default
        ({"is_folding_model": True}, "ESMFold"),
        ({"vocab_size": 34}, "says 34 tokens, and the vocabulary has 33"),
        ({"num_hidden_layers": 3}, "lacks 16 of ESM-2's tensors"),
        ({"num_hidden_layers": 1}, "tensors ESM-2 does not know, esm.encoder.layer.1."),
        ({"num_hidden_layers": -1}, "no ESM-2 can have"),
        ({"hidden_size": 64}, "has shape"),
        ({"num_attention_heads": 0}, "no ESM-2 can have"),
        ({"num_attention_heads": 5}, "no ESM-2 can have"),
        ({"num_attention_heads": 8}, "rotary_embeddings.inv_freq has shape"),
        ({"num_attention_heads": "four"}, "wrong type"),
        ({"hidden_size": [32]}, "wrong type"),
        ({"rope_theta": 500000.0}, "rope_theta 500000.0"),
    ],
)
def test_a_config_of_another_model_is_named(tiny: Checkpoint, tmp_path: Path, changes: dict[str, object], said: str):
    assert said in refused(changed_config(tiny, tmp_path / "m", **changes))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff", '{"model_type": "esm"'])
def test_a_config_that_is_no_json_object_is_a_model_error(tiny: Checkpoint, tmp_path: Path, text: str):
    folder = write_hf(tiny, tmp_path / "m", "safetensors")
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "config.json" in refused(folder)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (b"\xff\xfe", "is no text file"),
        (" ".join(ESM2_TOKENS[:-1]).encode(), "has no <mask>"),
        (" ".join(("A", *ESM2_TOKENS[1:])).encode(), "has no <cls>"),
        (" ".join(ESM2_TOKENS).replace("U", "X").encode(), "names a token twice"),
        (" ".join((*ESM2_TOKENS, "Z2")).encode(), "says 33 tokens, and the vocabulary has 34"),
    ],
)
def test_a_wrong_vocabulary_is_a_model_error(tiny: Checkpoint, tmp_path: Path, tokens: bytes, said: str):
    folder = write_hf(tiny, tmp_path / "m", "safetensors")
    (folder / "vocab.txt").write_bytes(tokens)
    assert said in refused(folder)


def test_letters_in_another_order_are_another_trunk(tiny: Checkpoint, tmp_path: Path):
    folder = write_hf(tiny, tmp_path / "m", "safetensors")
    swapped = [{"L": "A", "A": "L"}.get(token, token) for token in ESM2_TOKENS]
    (folder / "vocab.txt").write_text("\n".join(swapped))
    assert read_checkpoint(folder).trunk_digest != tiny.trunk_digest


def test_every_architecture_field_changes_the_trunk_digest(tiny: Checkpoint, tmp_path: Path):
    found = {tiny.trunk_digest}
    for number, change in enumerate([{"token_dropout": False}, {"token_dropout": ...}, {"layer_norm_eps": 1e-12}]):
        found.add(read_checkpoint(changed_config(tiny, tmp_path / str(number), **change)).trunk_digest)
    assert len(found) == 3  # token_dropout left out is False


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../x", "'../x'"),
        ("esm.encoder.layer.0/../../x", "rename it"),
        ("a b", "rename it"),
        ("é", "rename it"),
        ("lm_head.\n", "rename it"),
        ("", "rename it"),
        ("esm.encoder.layer.0.attention.self.query.lora_A.weight", "does not know"),
        ("esm.encoder.layer.7.output.dense.bias", "does not know"),
        ("esm.embeddings.layer_norm.weight", "does not know"),
    ],
)
@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_tensor_that_does_not_belong_is_named(tiny: Checkpoint, tmp_path: Path, name: str, said: str, form: str):
    from safetensors.torch import save_file

    folder = write_hf(tiny, tmp_path / "m", form)
    tensors = trunk(tiny) | {name: torch.ones(2)}
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    assert said in refused(folder)


def test_one_tensor_under_two_names_is_refused(tiny: Checkpoint):
    name = "esm.encoder.layer.0.LayerNorm.weight"
    for other in (name.removeprefix("esm."), name.replace("weight", "gamma")):
        with pytest.raises(ModelError, match="twice, under two names"):
            canonical(tiny.architecture, trunk(tiny) | {other: torch.ones(32)}, "it")


def test_a_damaged_index_is_a_model_error(tiny: Checkpoint, tmp_path: Path):
    folder = write_hf(tiny, tmp_path / "m", "sharded")
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    some = min(good)
    shutil.copy(folder / good[some], tmp_path / "outside.safetensors")  # there, and still not to be read
    for weight_map, said in (
        (None, "no weight_map"),
        ([], "no weight_map"),
        ({}, "no weight_map"),
        (good | {some: ["a"]}, "no weight_map"),
        (good | {some: "absent.safetensors"}, "names absent.safetensors, which is not there"),
        (good | {some: "../outside.safetensors"}, "names ../outside.safetensors, which is not there"),
        (good | {"esm.encoder.ghost": good[some]}, "esm.encoder.ghost is not in the shard"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert said in refused(folder)


def test_a_missing_shard_is_named(tiny: Checkpoint, tmp_path: Path):
    folder = write_hf(tiny, tmp_path / "m", "sharded")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "names model-00002-of-00003.safetensors, which is not there" in refused(folder)


def test_a_folder_without_weights_is_named(tiny: Checkpoint, tmp_path: Path):
    folder = write_hf(tiny, tmp_path / "m", "bin")
    (folder / "pytorch_model.bin").unlink()
    assert "has no model.safetensors" in refused(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cfg": None}, "is no ESM-2 checkpoint of fair-esm"),
        ({"model": None}, "is no ESM-2 checkpoint of fair-esm"),
        ({"cfg": {}}, "its cfg is not an ESM-2's"),
        (
            {"cfg": {"model": argparse.Namespace(layers=33, arch="roberta_large")}},
            "its cfg is not an ESM-2's",
        ),  # ESM-1b
        ({"model": {}}, "lacks 35 of ESM-2's tensors"),
    ],
)
def test_a_pt_of_another_model_is_named(tiny: Checkpoint, tmp_path: Path, change: dict[str, object], said: str):
    path = write_official(tiny, tmp_path / "m.pt")
    torch.save(torch.load(path, weights_only=False) | change, path)
    assert said in refused(path)


@pytest.mark.parametrize("content", [[], {"model": None}, {"weights": {}}])
def test_a_regression_file_of_something_else_is_named(tiny: Checkpoint, tmp_path: Path, content: object):
    path = write_official(tiny, tmp_path / "m.pt")
    torch.save(content, tmp_path / "m-contact-regression.pt")
    assert "m-contact-regression.pt holds" in refused(path)


def test_a_language_head_that_is_tied_is_kept_once_and_an_untied_one_is_kept(tiny: Checkpoint):
    head = lm_head(tiny, fair=False)
    tied = canonical(tiny.architecture, trunk(tiny) | head, "tied")
    assert "lm_head.decoder.weight" not in tied.tensors
    twice = canonical(tiny.architecture, trunk(tiny) | head | {"lm_head.decoder.bias": head["lm_head.bias"]}, "twice")
    assert twice.digests == tied.digests
    head["lm_head.decoder.weight"][3, 3] += 1
    untied = canonical(tiny.architecture, trunk(tiny) | head, "untied")
    assert "lm_head.decoder.weight" in untied.tensors
    assert untied.digests["lm_head"] != tied.digests["lm_head"]
    assert untied.trunk_digest == tied.trunk_digest
