"""A mapped folder serves what its record vouches for, tensor by tensor, and nothing else."""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import contact_head, lm_head, trunk, write_hf

from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.models import mapped
from proteus_pipeline.models.checkpoint import EMBEDDING, Checkpoint, FilesInUse, canonical, component_digests
from proteus_pipeline.models.encoder import Outputs, make_encoder
from proteus_pipeline.models.fair_esm import to_fair_esm
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.models.mapped import open_mapped
from proteus_pipeline.models.reading import DIGESTS, INDEX, read_checkpoint

QUERY = "esm.encoder.layer.1.attention.self.query.weight"
SHARD = "model-layer-1.safetensors"


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    """A small model with every head a published one has."""
    tiny = make_checkpoint()
    heads = lm_head(tiny, fair=False) | {f"esm.contact_head.{n}": t for n, t in contact_head(tiny).items()}
    return canonical(tiny.architecture, trunk(tiny) | heads, "whole")


@pytest.fixture(scope="module")
def stored(model: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, for tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("stored") / "m"
    write_folder(model, folder)
    return folder


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    """Its folder, for tests that damage it."""
    return shutil.copytree(stored, tmp_path / "m")


def opened(folder: Path, model: Checkpoint) -> Checkpoint:
    files = {p.name: p for p in folder.iterdir()}
    return open_mapped(files, model.digests, "m@v1.0.0", "fetch it again")


def refused(folder: Path, model: Checkpoint, name: str | None = None) -> str:
    """Return the one line with which a folder is refused: when it is opened, or when the tensor `name` is touched."""
    checkpoint = opened(folder, model) if name else None
    for _ in range(2):  # what was refused once is not kept
        with pytest.raises(IntegrityError) as caught:
            checkpoint.tensors[name] if checkpoint and name else opened(folder, model)
    line = str(caught.value)
    assert line.startswith("m@v1.0.0 is damaged (")
    assert line.endswith("); fetch it again")
    assert "\n" not in line
    assert name is None or name in line
    return line


def served(folder: Path, model: Checkpoint) -> dict[str, torch.Tensor]:
    """Return what a folder gives, tensor by tensor; what it refuses is left out."""
    found = {}
    try:
        checkpoint = opened(folder, model)
    except IntegrityError:
        return found
    for name in checkpoint.tensors:
        with suppress(IntegrityError):
            found[name] = checkpoint.tensors[name]
    return found


def test_tensors_and_digests_are_those_that_were_written(stored: Path, model: Checkpoint):
    checkpoint = opened(stored, model)
    assert checkpoint.architecture == model.architecture
    assert checkpoint.tensor_digests == model.tensor_digests
    assert (checkpoint.digests, checkpoint.model_digest) == (model.digests, model.model_digest)
    assert checkpoint.tensors.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor)
        assert checkpoint.tensors[name] is checkpoint.tensors[name]
    with pytest.raises(KeyError):
        checkpoint.tensors["esm.encoder.layer.9.output.dense.weight"]


def touched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that each tensor's name is added to when it is read."""
    seen: list[str] = []
    whole = mapped.MappedTensors._map
    monkeypatch.setattr(mapped.MappedTensors, "_map", lambda self, name: seen.append(name) or whole(self, name))
    return seen


def test_digests_names_and_membership_read_no_tensor_and_a_layer_reads_its_own(
    stored: Path, model: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    seen = touched(monkeypatch)
    checkpoint = opened(stored, model)
    assert (checkpoint.trunk_digest, checkpoint.model_digest) == (model.trunk_digest, model.model_digest)
    assert EMBEDDING in checkpoint.tensors
    assert "lm_head.decoder.weight" not in checkpoint.tensors
    assert len(list(checkpoint.tensors)) == len(checkpoint.tensors) == len(model.tensors)
    assert seen == []
    layer = checkpoint.layer(1)
    assert layer.keys() == model.layer(1).keys()
    assert len(layer) == len(model.layer(1))
    assert seen == []
    assert all(torch.equal(tensor, model.layer(1)[name]) for name, tensor in layer.items())
    assert sorted(seen) == [name for name in model.tensors if name.startswith("esm.encoder.layer.1.")]


def test_the_encoder_fair_esm_and_the_writer_take_a_mapped_model(stored: Path, model: Checkpoint, tmp_path: Path):
    checkpoint = opened(stored, model)
    sequences = ["MKTAYIAKQR", "GAVLI"]
    ours, theirs = (dict(make_encoder(c).encode(sequences, [2])) for c in (checkpoint, model))
    assert all(np.array_equal(ours[i][2], theirs[i][2]) for i in theirs)
    state, expected = (to_fair_esm(c)[0].state_dict() for c in (checkpoint, model))
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    write_folder(checkpoint, tmp_path / "again")
    for path in stored.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_threads_that_touch_one_tensor_get_one_that_is_checked(stored: Path, model: Checkpoint):
    for _ in range(20):
        checkpoint = opened(stored, model)
        start, got = threading.Barrier(4), []

        def touch(checkpoint: Checkpoint = checkpoint, start: threading.Barrier = start, got: list = got) -> None:
            start.wait()
            got.append([checkpoint.tensors[name] for name in checkpoint.tensors])

        threads = [threading.Thread(target=touch) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 4
        for name, *tensors in zip(model.tensors, *got, strict=True):
            assert all(t is tensors[0] for t in tensors)
            assert torch.equal(tensors[0], model.tensors[name])


@settings(max_examples=150)
@given(data=st.data())
def test_a_flipped_bit_of_any_file_gives_the_written_tensors_or_none(
    stored: Path, model: Checkpoint, data: st.DataObject
):
    path = data.draw(st.sampled_from(sorted(stored.iterdir())))
    whole = path.read_bytes()
    # The first bytes as often as the others: lengths, names and offsets stand there.
    place = data.draw(st.one_of(st.integers(0, min(200, len(whole) - 1)), st.integers(0, len(whole) - 1)))
    changed = bytearray(whole)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(changed)
        for name, tensor in served(stored, model).items():
            assert torch.equal(tensor, model.tensors[name])
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_flipped_bit_of_a_shard_costs_the_tensor_it_is_in_and_no_other(folder: Path, model: Checkpoint, place: str):
    for shard in sorted(folder.glob("*.safetensors")):
        whole = shard.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        names = [n for n in json.loads(whole[8:header]) if n != "__metadata__"]
        changed = bytearray(whole)
        changed[header if place == "first" else -1] ^= 0x40
        shard.write_bytes(changed)
        hit = names[0 if place == "first" else -1]
        line = refused(folder, model, hit)
        assert shard.name in line
        assert f"recorded {model.tensor_digests[hit]}" in line
        assert served(folder, model).keys() == model.tensors.keys() - {hit}
        shard.write_bytes(whole)


@pytest.mark.parametrize("left", [0, 4, 8, 100, -1])
def test_a_truncated_shard_serves_nothing(folder: Path, model: Checkpoint, left: int):
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:left])
    assert served(folder, model) == {}
    assert SHARD in refused(folder, model, QUERY)


def test_a_shard_cut_while_it_is_open_ends_in_an_error_and_a_mended_one_is_served(folder: Path, model: Checkpoint):
    checkpoint = opened(folder, model)
    assert torch.equal(checkpoint.layer(1)["LayerNorm.bias"], model.layer(1)["LayerNorm.bias"])
    shard = folder / SHARD
    whole = shard.read_bytes()
    fresh = opened(folder, model)
    assert fresh.tensors["esm.encoder.layer.1.LayerNorm.bias"] is not None
    os.truncate(shard, 5000)
    with pytest.raises(IntegrityError, match="it is no longer the file that was opened"):
        fresh.tensors[QUERY]
    shard.unlink()
    shard.write_bytes(whole)
    assert torch.equal(fresh.tensors[QUERY], model.tensors[QUERY])


def test_a_missing_shard_is_named(folder: Path, model: Checkpoint):
    checkpoint = opened(folder, model)
    (folder / SHARD).unlink()
    with pytest.raises(IntegrityError, match=rf"{QUERY} in {SHARD}: No such file"):
        checkpoint.tensors[QUERY]
    assert torch.equal(checkpoint.tensors[EMBEDDING], model.tensors[EMBEDDING])
    assert f"names {SHARD}, which is not there" in refused(folder, model)


def test_a_shard_that_cant_be_read_is_named(folder: Path, model: Checkpoint):
    (folder / SHARD).unlink()
    (folder / SHARD).mkdir()
    assert SHARD in refused(folder, model, QUERY)


def test_swapped_shards_serve_nothing(folder: Path, model: Checkpoint):
    zero, one = (folder / f"model-layer-{i}.safetensors" for i in (0, 1))
    bytes_of_zero = zero.read_bytes()
    zero.write_bytes(one.read_bytes())
    one.write_bytes(bytes_of_zero)
    assert not any(name.startswith("esm.encoder.layer.") for name in served(folder, model))
    assert "does not contain tensor" in refused(folder, model, QUERY)


def test_another_models_shard_of_the_same_names_serves_nothing(folder: Path, model: Checkpoint, tmp_path: Path):
    write_folder(make_checkpoint(seed=1), tmp_path / "other")
    shutil.copy(tmp_path / "other" / SHARD, folder / SHARD)
    # Whoever replaces the digests too has the record against them.
    refused(folder, model, QUERY)
    shutil.copy(tmp_path / "other" / DIGESTS, folder / DIGESTS)
    refused(folder, model)


def rewrite(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v["tensors"].update({QUERY: "0" * 32}), "(trunk)"),
        (lambda v: v["tensors"].update({"lm_head.bias": "0" * 32}), "(lm_head)"),
        (lambda v: v["tensors"].update({QUERY: v["tensors"][EMBEDDING], EMBEDDING: v["tensors"][QUERY]}), "(trunk)"),
        (lambda v: v["tensors"].pop(QUERY), f"{QUERY} is in one of {INDEX} and {DIGESTS} only"),
        (lambda v: v["tensors"].update({"classifier.weight": "0" * 32}), "classifier.weight is in one of"),
        (lambda v: v["tensors"].update({QUERY: 1}), "has no tensors' digests"),
        (lambda v: v["tensors"].update({QUERY: "g" * 32}), "has no tensors' digests"),
        (lambda v: v.pop("tensors"), "has no tensors' digests"),
        (lambda v: v.update(tensors=[]), "has no tensors' digests"),
        (lambda v: v.pop("schema"), "is of schema None"),
        (lambda v: v.update(schema=2), "is of schema 2, and this proteus reads 1"),
    ],
)
def test_digests_that_are_not_the_records_are_refused(folder: Path, model: Checkpoint, change, said: str):
    rewrite(folder / DIGESTS, change)
    assert said in refused(folder, model)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff"])
def test_digests_that_are_no_json_object_are_refused(folder: Path, model: Checkpoint, text: str):
    for name in (DIGESTS, INDEX, "config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        assert name in refused(folder, model)
        (folder / name).write_bytes(whole)


def test_a_tensor_that_no_record_knows_is_not_served(folder: Path, model: Checkpoint):
    for name, added in ((DIGESTS, "0" * 32), (INDEX, SHARD)):
        key = "tensors" if name == DIGESTS else "weight_map"
        rewrite(folder / name, lambda v, key=key, added=added: v[key].update({"classifier.weight": added}))
    assert "(classifier)" in refused(folder, model)


@pytest.mark.parametrize("outside", ["../outside.safetensors", "absolute", "model-layer-7.safetensors"])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(folder: Path, model: Checkpoint, outside: str):
    shutil.copy(folder / SHARD, folder.parent / "outside.safetensors")  # there, and still not to be read
    name = str(folder.parent / "outside.safetensors") if outside == "absolute" else outside
    rewrite(folder / INDEX, lambda v: v["weight_map"].update({QUERY: name}))
    assert "which is not there" in refused(folder, model)


def test_an_index_that_names_another_shard_serves_nothing_from_it(folder: Path, model: Checkpoint):
    rewrite(folder / INDEX, lambda v: v["weight_map"].update({QUERY: "model-layer-0.safetensors"}))
    refused(folder, model, QUERY)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 8},
        {"layer_norm_eps": 1e-12},
        {"token_dropout": False},
        {"num_hidden_layers": 1},
        {"hidden_size": "wide"},
        {"num_hidden_layers": 1e400},
        {"model_type": "bert"},
    ],
)
def test_another_architecture_is_refused(folder: Path, model: Checkpoint, change: dict[str, object]):
    rewrite(folder / "config.json", lambda v: v.update(change))
    refused(folder, model)


def test_another_vocabulary_or_none_is_refused(folder: Path, model: Checkpoint):
    vocab = folder / "vocab.txt"
    vocab.write_text(vocab.read_text().replace("L\nA\n", "A\nL\n"))
    assert "trunk" in refused(folder, model)
    vocab.write_text("")
    assert "vocab.txt" in refused(folder, model)
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder, model)


def test_a_record_of_other_components_is_refused(stored: Path, model: Checkpoint):
    files = {p.name: p for p in stored.iterdir()}
    for components in ({}, {"trunk": model.trunk_digest}, model.digests | {"classifier": "0" * 32}):
        with pytest.raises(IntegrityError, match="is damaged"):
            open_mapped(files, components, "m@v1.0.0", "fetch it again")


@pytest.mark.parametrize("form", ["ours", "safetensors", "sharded", "bin"])
def test_a_folder_without_digests_is_read_whole_and_checked(tiny: Checkpoint, tmp_path: Path, form: str):
    folder = tmp_path / "m"
    if form == "ours":
        write_folder(tiny, folder)
        (folder / DIGESTS).unlink()
    else:
        write_hf(tiny, folder, form)
    whole = read_checkpoint(folder)
    assert opened(folder, whole).model_digest == whole.model_digest
    with pytest.raises(IntegrityError, match=r"damaged \(.*trunk\)"):
        opened(folder, make_checkpoint(seed=1))
    held = tiny.tensors[QUERY].numpy().tobytes()
    (path,) = (p for p in folder.iterdir() if held in p.read_bytes())
    data = bytearray(path.read_bytes())
    data[data.index(held)] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        opened(folder, whole)


def test_digests_in_the_folder_fold_to_the_components(stored: Path, model: Checkpoint):
    value = json.loads((stored / DIGESTS).read_text())
    assert list(value) == ["schema", "tensors"]
    assert list(value["tensors"]) == sorted(model.tensors)
    assert component_digests(model.architecture, value["tensors"]) == model.digests


MEMORY = """
import sys, torch
from pathlib import Path
from proteus_pipeline.models.mapped import open_mapped
from proteus_pipeline.models.checkpoint import EMBEDDING
def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
files = {p.name: p for p in Path(sys.argv[1]).iterdir()}
before = anonymous()
tensors = open_mapped(files, {"trunk": sys.argv[2]}, "m", "").tensors
for tensor in tensors.values():
    pass
print(anonymous() - before)
"""


def test_touched_tensors_are_pages_of_their_files_and_no_copies(tmp_path: Path):
    model = make_checkpoint(layers=2, width=512, heads=8)
    write_folder(model, tmp_path / "m")
    size = sum(t.nbytes for t in model.tensors.values()) // 1024
    assert size > 20_000
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "m"), model.trunk_digest]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < size / 4


OUTPUT = "esm.encoder.layer.1.output.dense.weight"


@pytest.fixture
def kept(folder: Path) -> Path:
    """The folder as DVC's cache has it: nobody may write to its files."""
    for path in folder.iterdir():
        path.chmod(0o444)
    return folder


def used(folder: Path, model: Checkpoint, name: str = OUTPUT) -> torch.Tensor | None:
    tensors = opened(folder, model).tensors
    assert isinstance(tensors, mapped.MappedTensors)
    return tensors.in_place(name, FilesInUse())


def mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_a_tensor_is_used_where_it_lies_as_long_as_somebody_holds_it(kept: Path, model: Checkpoint):
    checkpoint = opened(kept, model)
    assert isinstance(checkpoint.tensors, mapped.MappedTensors)
    tensor = checkpoint.tensors.in_place(OUTPUT, FilesInUse())
    assert tensor is not None
    checkpoint.let_go()
    assert mappings(kept / SHARD)
    assert torch.equal(tensor, model.tensors[OUTPUT])
    assert tensor.data_ptr() % 64 == 0
    del tensor
    assert mappings(kept / SHARD) == 0


def test_what_may_change_or_go_or_lies_badly_is_copied(kept: Path, model: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    assert used(kept, model) is not None
    for mode in (0o644, 0o464, 0o446):
        (kept / SHARD).chmod(mode)
        assert used(kept, model) is None
    (kept / SHARD).chmod(0o444)
    with monkeypatch.context() as patch:
        patch.setattr(mapped, "stays_mapped", lambda _: False)
        assert used(kept, model) is None
    # As another program, or an earlier writer, lays it.
    whole = (kept / SHARD).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    (kept / SHARD).unlink()
    (kept / SHARD).write_bytes(
        (length + 8).to_bytes(8, "little") + whole[8 : 8 + length] + b" " * 8 + whole[8 + length :]
    )
    (kept / SHARD).chmod(0o444)
    assert used(kept, model) is None
    assert torch.equal(opened(kept, model).tensors[OUTPUT], model.tensors[OUTPUT])
    gone = opened(kept, model)
    (kept / SHARD).unlink()
    with pytest.raises(IntegrityError, match="No such file"):
        make_encoder(gone)


def test_no_more_files_stay_open_than_leave_others_some(kept: Path, model: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    gc.collect()
    monkeypatch.setattr(mapped, "_MOST_LYING", len(mapped._LYING) + 1)
    one = make_encoder(opened(kept, model))
    assert sum(mappings(path) > 0 for path in kept.iterdir()) == 1
    before = dict(make_encoder(model).encode(["MKTAYIAKQR"], [2]))[0][2]
    assert np.array_equal(dict(one.encode(["MKTAYIAKQR"], [2]))[0][2], before)
    del one
    assert used(kept, model) is not None
    assert len(mapped._LYING) == mapped._MOST_LYING - 1  # closed with who used it


def test_a_mapping_that_is_refused_is_a_copy(kept: Path, model: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    import safetensors

    def no_room(*_: object, **__: object) -> object:
        raise RuntimeError("unable to mmap 100 bytes: Cannot allocate memory (12)")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "safe_open", no_room)
        assert used(kept, model) is None


def test_a_file_that_is_replaced_as_it_is_opened_is_copied(
    kept: Path, model: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    import safetensors

    real, whole = safetensors.safe_open, (kept / SHARD).read_bytes()

    def replacing(path: Path, **options: str) -> object:
        found = real(path, **options)
        (kept / SHARD).unlink()
        (kept / SHARD).write_bytes(whole)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "safe_open", replacing)
        assert used(kept, model) is None


@pytest.mark.parametrize("shift", [0, 3])
def test_a_flipped_bit_is_not_used_in_place(kept: Path, model: Checkpoint, shift: int):
    whole = bytearray((kept / SHARD).read_bytes())
    place = bytes(whole).index(mapped.tensor_bytes(model.tensors[OUTPUT]))
    whole[place + shift] ^= 0x40
    (kept / SHARD).chmod(0o644)
    (kept / SHARD).write_bytes(whole)
    (kept / SHARD).chmod(0o444)
    with pytest.raises(IntegrityError, match=rf"{OUTPUT} in {SHARD}: its digest is"):
        used(kept, model)
    with pytest.raises(IntegrityError, match=r"m@v1.0.0 is damaged"):
        make_encoder(opened(kept, model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_copied_and_hashed_once(
    model: Checkpoint, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    halves = canonical(model.architecture, {n: t.to(dtype) for n, t in model.tensors.items()}, "halves")
    write_folder(halves, tmp_path / "m")
    for path in (tmp_path / "m").iterdir():
        path.chmod(0o444)
    hashed: list[int] = []
    real = mapped.digests.of_tensor
    monkeypatch.setattr(mapped.digests, "of_tensor", lambda *a: hashed.append(len(a[2])) or real(*a))
    lying = make_encoder(opened(tmp_path / "m", halves))
    monkeypatch.undo()
    assert sum(hashed) <= sum(tensor.nbytes for tensor in halves.tensors.values())
    ours, theirs = (dict(e.encode(["MKTAYIAKQR"], [2]))[0][2] for e in (lying, make_encoder(halves)))
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_weights_in_place_and_copied_give_the_same_bits(kept: Path, model: Checkpoint, precision: str):
    sequences = ["MKTAYIAKQR", "GAVLI" * 30, "W"]
    lying, copied = (make_encoder(c, precision=precision) for c in (opened(kept, model), model))
    assert bool(mappings(kept / SHARD)) == (precision != "bf16")
    ours, theirs = (dict(e.encode(sequences, [0, 1, 2])) for e in (lying, copied))
    assert all(np.array_equal(ours[i][layer], theirs[i][layer]) for i in theirs for layer in (0, 1, 2))
    in_memory = copied.nbytes - model.heads().nbytes  # heads of a file are copied when they are asked for
    assert lying.nbytes == in_memory
    del lying
    assert mappings(kept / SHARD) == 0


def write_into(path: Path) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    path.chmod(0o444)


@pytest.mark.parametrize("then", ["", "it is removed", "it is mended under its name"])
def test_a_file_that_is_written_to_in_use_gives_no_more_numbers(kept: Path, model: Checkpoint, then: str):
    whole = (kept / SHARD).read_bytes()
    encoder = make_encoder(opened(kept, model))
    again = pickle.loads(pickle.dumps(encoder))
    before = dict(encoder.encode(["MKTAYIAKQR"], [2]))
    write_into(kept / SHARD)
    if then:
        (kept / SHARD).rename(kept / "quarantined")
    if then == "it is mended under its name":
        (kept / SHARD).write_bytes(whole)
    for act in (lambda: list(encoder.encode(["MKTAYIAKQR"], [2])), encoder.check_files, lambda: pickle.dumps(encoder)):
        with pytest.raises(IntegrityError) as caught:
            act()
        said = f"m@v1.0.0 was changed while it was in use ({SHARD}); fetch it again, and load it again"
        assert str(caught.value) == said
    assert np.array_equal(dict(again.encode(["MKTAYIAKQR"], [2]))[0][2], before[0][2])  # it has copies


def test_heads_are_copies(kept: Path, model: Checkpoint):
    encoder = make_encoder(opened(kept, model))
    outputs, nbytes = Outputs(logits=True, contacts=True), encoder.nbytes
    [(_, before)] = encoder.compute(["MKTAYIAKQR"], outputs)
    assert encoder.nbytes > nbytes
    for shard in ("model-lm-head", "model-contact-head", "model-embeddings"):
        write_into(kept / f"{shard}.safetensors")
    [(_, after)] = encoder.compute(["MKTAYIAKQR"], outputs)
    assert np.array_equal(before.logits, after.logits)
    assert np.array_equal(before.contacts, after.contacts)


def test_a_file_that_is_cut_while_it_is_loaded_ends_in_an_error(kept: Path, model: Checkpoint):
    tensors, in_use = opened(kept, model).tensors, FilesInUse()
    assert isinstance(tensors, mapped.MappedTensors)
    assert tensors.in_place("esm.encoder.layer.1.attention.output.dense.weight", in_use) is not None
    (kept / SHARD).chmod(0o644)
    os.truncate(kept / SHARD, 1000)
    (kept / SHARD).chmod(0o444)
    with pytest.raises(IntegrityError, match="it is no longer the file that was opened"):
        tensors.in_place(OUTPUT, in_use)  # a page beyond its end would end the process


def test_a_file_that_is_removed_or_replaced_in_use_stays_what_it_was(kept: Path, model: Checkpoint):
    encoder = make_encoder(opened(kept, model))
    before = dict(encoder.encode(["MKTAYIAKQR"], [2]))[0][2]
    (kept / SHARD).unlink()
    assert np.array_equal(dict(encoder.encode(["MKTAYIAKQR"], [2]))[0][2], before)
    (kept / SHARD).write_bytes(b"another")
    assert np.array_equal(dict(encoder.encode(["MKTAYIAKQR"], [2]))[0][2], before)


def test_a_file_that_changed_between_two_of_its_tensors_is_noticed(kept: Path, model: Checkpoint):
    tensors, in_use = opened(kept, model).tensors, FilesInUse()
    assert isinstance(tensors, mapped.MappedTensors)
    assert tensors.in_place(OUTPUT, in_use) is not None
    in_use.check()
    write_into(kept / SHARD)
    whole = (kept / SHARD).read_bytes()
    (kept / SHARD).unlink()
    (kept / SHARD).write_bytes(whole)
    (kept / SHARD).chmod(0o444)
    other = "esm.encoder.layer.1.intermediate.dense.weight"
    with pytest.raises(IntegrityError, match="it is no longer the file that was opened"):
        tensors.in_place(other, in_use)
    in_use.opened.clear()
    assert tensors.in_place(other, in_use) is not None
    with pytest.raises(IntegrityError, match="was changed while it was in use"):
        in_use.check()


def test_threads_that_load_open_each_file_once(kept: Path, model: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("proteus_pipeline.models.esm2.thread_count", lambda: 2)
    gc.collect()
    before = len(mapped._LYING)
    for _ in range(20):
        encoder = make_encoder(opened(kept, model))
        assert len(mapped._LYING) == before + model.architecture.layers
        del encoder


def test_few_files_stay_open_where_few_may_be(monkeypatch: pytest.MonkeyPatch):
    for soft, most in ((256, 85), (1 << 20, 400), (-1, 400)):
        monkeypatch.setattr("resource.getrlimit", lambda _, soft=soft: (soft, soft))
        assert mapped._most_lying() == most


def test_a_file_whose_state_nobody_can_tell_is_not_vouched_for(
    kept: Path, model: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    encoder = make_encoder(opened(kept, model))

    def stale(_: int) -> os.stat_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "fstat", stale)
    with pytest.raises(IntegrityError, match="was changed while it was in use"):
        encoder.check_files()
