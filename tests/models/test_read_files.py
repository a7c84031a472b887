"""Files are read by their names, wherever they lie; and a pickle that would run code is run on no path."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layouts import hf_config, trunk, write_hf, write_official

from proteus_pipeline.errors import ModelError, ProteusError
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.models.mapped import open_mapped
from proteus_pipeline.models.reading import read_checkpoint, read_files


def as_objects(folder: Path, cache: Path) -> dict[str, Path]:
    """Move a folder's files under names that say nothing, as in DVC's cache; return their places."""
    cache.mkdir()
    files = {}
    for number, path in enumerate(sorted(folder.iterdir())):
        files[path.name] = path.rename(cache / f"{number:030x}")
    return files


def refused(files: dict[str, Path]) -> str:
    with pytest.raises(ModelError) as caught:
        read_files(files, "m@v1.0.0")
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize("form", ["bin", "safetensors", "sharded", "ours"])
def test_a_folder_in_the_cache_is_read_as_the_folder(tiny: Checkpoint, tmp_path: Path, form: str):
    folder = tmp_path / "m"
    write_folder(tiny, folder) if form == "ours" else write_hf(tiny, folder, form)
    expected = read_checkpoint(folder).digests
    assert read_files(as_objects(folder, tmp_path / "cache"), "m").digests == expected


@pytest.mark.parametrize("contact", [False, True])
def test_an_official_file_in_the_cache_is_read_with_its_regression(tiny: Checkpoint, tmp_path: Path, contact: bool):
    (tmp_path / "m").mkdir()
    expected = read_checkpoint(write_official(tiny, tmp_path / "m" / "esm2.pt", contact=contact))
    files = as_objects(tmp_path / "m", tmp_path / "cache")
    read = read_files(files, "m")
    assert read.digests == expected.digests
    assert ("contact_head" in read.digests) == contact
    # A regression of another name is another model's.
    files["other-contact-regression.pt"] = files.pop("esm2-contact-regression.pt", files["esm2.pt"])
    assert "holds several models' weights (esm2.pt, other-contact-regression.pt); name one" in refused(files)


@pytest.mark.parametrize(("form", "name"), [("bin", "weights.bin"), ("safetensors", "tuned.safetensors")])
def test_one_weight_file_of_any_name_is_read_with_its_config(tiny: Checkpoint, tmp_path: Path, form: str, name: str):
    folder = write_hf(tiny, tmp_path / "m", form)
    expected = read_checkpoint(folder).digests
    (weights,) = (p for p in folder.iterdir() if p.suffix == f".{form}")
    weights.rename(folder / name)
    assert read_checkpoint(folder).digests == expected
    files = as_objects(folder, tmp_path / "cache")
    assert read_files(files, "m").digests == expected
    assert "m@v1.0.0 has no config.json" in refused({n: p for n, p in files.items() if n != "config.json"})
    assert "holds several models' weights" in refused({**files, "another.bin": files[name]})


def test_a_folder_of_one_official_file_is_that_model(tiny: Checkpoint, tmp_path: Path):
    (tmp_path / "m").mkdir()
    path = write_official(tiny, tmp_path / "m" / "esm2.pt")
    assert read_checkpoint(tmp_path / "m").digests == read_checkpoint(path).digests


def test_files_that_hold_no_weights_are_named(tiny: Checkpoint, tmp_path: Path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(hf_config(tiny)))
    assert "m@v1.0.0 has no config.json" in refused({})
    assert "m@v1.0.0 has no model.safetensors" in refused({"config.json": config})
    # What lies in a folder of its own is not the folder's model.
    nested = write_hf(tiny, tmp_path / "checkpoint-500", "bin") / "pytorch_model.bin"
    assert "has no model.safetensors" in refused({"config.json": config, "checkpoint-500/pytorch_model.bin": nested})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_checkpoint(tmp_path / "empty")


class _Command:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def write_hostile(path: Path, form: str, ran: Path) -> None:
    """Write a pickle that makes the file `ran` where it is run, and see that it does."""
    payload = {"model": {}, "cfg": {"model": _Command(f"touch {ran}")}}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(payload))
        pickle.loads(path.read_bytes())
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "zip")
        torch.load(path, weights_only=False)
    ran.unlink()  # so the file is armed


def read_by_path(files: dict[str, Path], _: Path) -> None:
    weights = next((p for n, p in files.items() if n.endswith((".pt", ".bin")) and "regression" not in n))
    read_checkpoint(weights)


def read_by_folder(files: dict[str, Path], _: Path) -> None:
    read_checkpoint(next(iter(files.values())).parent)


def read_as_objects(files: dict[str, Path], cache: Path) -> None:
    read_files(as_objects(next(iter(files.values())).parent, cache), "m")


def open_as_version(files: dict[str, Path], _: Path) -> None:
    open_mapped(files, {"trunk": "0" * 32}, "m@v1.0.0", "fetch it again")


@pytest.mark.parametrize("read", [read_by_path, read_by_folder, read_as_objects, open_as_version])
@pytest.mark.parametrize("form", ["zip", "old", "plain pickle"])
@pytest.mark.parametrize("name", ["esm2.pt", "esm2-contact-regression.pt", "pytorch_model.bin", "weights.bin"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    tiny: Checkpoint, tmp_path: Path, read: Callable[[dict[str, Path], Path], None], form: str, name: str
):
    folder = tmp_path / "m"
    folder.mkdir()
    if name == "esm2-contact-regression.pt":
        write_official(tiny, folder / "esm2.pt")
    elif name.endswith(".bin"):
        (folder / "config.json").write_text(json.dumps(hf_config(tiny)))
    ran = tmp_path / "ran"
    write_hostile(folder / name, form, ran)
    with pytest.raises(ProteusError) as caught:
        read({p.name: p for p in folder.iterdir()}, tmp_path / "cache")
    if read is not open_as_version:
        assert isinstance(caught.value, ModelError)
        assert "without running its code" in caught.value.what
    assert not ran.exists()


def test_the_one_class_that_is_let_through_runs_nothing(tiny: Checkpoint, tmp_path: Path):
    """fair-esm's files hold a Namespace: what it carries is read weights-only too."""
    ran = tmp_path / "ran"
    path = tmp_path / "esm2.pt"
    arguments = argparse.Namespace(encoder_layers=_Command(f"touch {ran}"))
    torch.save({"cfg": {"model": arguments}, "model": trunk(tiny)}, path)
    with pytest.raises(ModelError, match="without running its code"):
        read_checkpoint(path)
    assert not ran.exists()
