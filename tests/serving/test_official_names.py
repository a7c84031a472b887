"""A model by its official name, registered nowhere yet: its weights are fetched when they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from layouts import write_official
from loopback import Served, serving

from proteus_pipeline import ModelInterface, ModelVersionManager
from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError, VersionNotFoundError
from proteus_pipeline.models import download as download_module
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.models.reading import read_checkpoint

NAME = "esm2_t33_650M_UR50D"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The registry outside a project, which nobody has created yet."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("PROTEUS_HOME", str(tmp_path / "a home"))
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PROTEUS_FAIR_ESM_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download_module, "_BACKOFF_S", 0.005)
    return tmp_path / "a home"


@pytest.fixture
def mirror(home: Path, tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A mirror on which the official name is a small model."""
    (tmp_path / "official").mkdir()
    path = write_official(tiny, tmp_path / "official" / f"{NAME}.pt")
    with serving() as served:
        monkeypatch.setenv("PROTEUS_FAIR_ESM_URL", served.url("esm"))
        for file, place in ((path, "models"), (path.with_name(f"{NAME}-contact-regression.pt"), "regression")):
            served.files[f"esm/{place}/{file.name}"] = file.read_bytes()
        yield served


def test_an_official_model_is_registered_by_its_name(home: Path, mirror: Served, tmp_path: Path):
    manager = ModelVersionManager(home)
    model = ModelInterface(name=NAME)
    assert not home.exists()
    assert mirror.requests == []
    version = manager.register_version(model=model, version="1.0.0", metadata={"training_data": "UR50D"})
    assert version.record
    assert version.record.metadata == {"training_data": "UR50D"}
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "official").iterdir()}
    assert version.record.source == {"origin": mirror.url(f"esm/models/{NAME}.pt"), "sha256": sums}
    assert version.record.components == read_checkpoint(tmp_path / "official" / f"{NAME}.pt").digests
    assert len(list((home / ".proteus" / "downloads" / NAME / "1.0.0").rglob("*.pt"))) == 2
    asked = len(mirror.requests)
    found = ModelInterface(NAME)
    assert found.version == version
    assert found.checkpoint.digests == version.record.components
    assert found.source == {}
    assert len(mirror.requests) == asked == 2


@pytest.mark.parametrize("reference", [NAME, f"{NAME}@v1.0.0", f"{NAME}@1.x", f"{NAME}@latest"])
def test_an_official_model_embeds_without_being_registered(mirror: Served, tmp_path: Path, reference: str):
    model = ModelInterface(reference)
    assert model.version is None
    assert mirror.requests == []
    (found,) = model.embed(["MKTAYIAKQR"])
    (expected,) = ModelInterface("m", weights=tmp_path / "official" / f"{NAME}.pt").embed(["MKTAYIAKQR"])
    np.testing.assert_array_equal(found, expected)


def test_an_address_that_cant_be_reached_is_named_with_what_to_do(home: Path):
    with pytest.raises(StorageError) as caught:
        ModelVersionManager(home).register_version(ModelInterface(NAME), "1.0.0")
    line = str(caught.value)
    assert line.startswith(f"cannot reach 127.0.0.1:1 for http://127.0.0.1:1/models/{NAME}.pt: ")
    assert line.endswith(f"or give your own: ModelInterface('{NAME}', weights=PATH)")
    assert "\n" not in line
    assert not isinstance(caught.value, IntegrityError)


def test_what_an_address_refuses_is_named_with_what_to_do(home: Path, mirror: Served):
    mirror.files.clear()
    with pytest.raises(StorageError, match=rf"{NAME}\.pt answered 404.*weights=PATH\)"):
        ModelInterface(NAME).checkpoint  # noqa: B018


@pytest.mark.parametrize("name", ["esm2_t33_650M", "esm1b_t33_650M_UR50S", f"{NAME}@v2.0.0", f"{NAME}@2.x", "lab/m"])
def test_a_name_that_nobody_knows_is_not_found(home: Path, name: str):
    for use in ("version", "checkpoint", "source"):
        with pytest.raises(VersionNotFoundError):
            getattr(ModelInterface(name), use)
    assert not home.exists()


def test_a_projects_catalogue_is_known_by_name(
    repository: Path, tiny: Checkpoint, home: Path, monkeypatch: pytest.MonkeyPatch
):
    conf = repository / "conf" / "model"
    conf.mkdir(parents=True)
    versions = "".join(f'  "{v}": {{source: {{kind: file, path: w/{v}.pt}}}}\n' for v in ("1.0.0", "1.10.0", "1.9.0"))
    (conf / "mine.yaml").write_text(f"name: mine\ndescription: d\nlicence: MIT\nversions:\n{versions}")
    (repository / "w").mkdir()
    path = write_official(tiny, repository / "w" / "1.10.0.pt", contact=False)
    monkeypatch.chdir(conf)  # a relative path is the project's all the same
    model = ModelInterface("mine")
    assert model.checkpoint.trunk_digest == tiny.trunk_digest
    assert model.source == {"origin": path.name, "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}}
    with pytest.raises(StorageError, match=r"w/1\.0\.0\.pt does not exist"):
        ModelInterface("mine@v1.0.0").checkpoint  # noqa: B018
    (conf / "mine.yaml").write_text("name: [")
    with pytest.raises(ConfigError, match=r"mine\.yaml is no YAML"):
        ModelInterface("mine").checkpoint  # noqa: B018
