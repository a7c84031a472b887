"""The official models without a project: the catalogue in code, a mirror, and torch hub's cache."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loopback import Served, serving

from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.models import download as download_module
from proteus_pipeline.models.mirrors import FAIR_ESM, mirrored
from proteus_pipeline.models.official import catalogue_at, official_catalogue
from proteus_pipeline.models.sources import FairEsmSource, FileSource, fetch, load_catalogue

ROOT = Path(__file__).parents[2]
NAME = "esm2_t6_8M_UR50D"
FILES = (f"{NAME}.pt", f"{NAME}-contact-regression.pt")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def official(**digests: str) -> FairEsmSource:
    source = official_catalogue()[NAME].versions["1.0.0"]
    assert isinstance(source, FairEsmSource)
    return replace(source, **digests)


@pytest.fixture(autouse=True)
def nobodys_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_HOME", "XDG_CACHE_HOME", "PROTEUS_FAIR_ESM_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download_module, "_BACKOFF_S", 0.005)
    with serving() as served:
        monkeypatch.setenv("PROTEUS_FAIR_ESM_URL", served.url("esm/"))
        served.files |= {f"esm/models/{FILES[0]}": b"weights", f"esm/regression/{FILES[1]}": b"regression"}
        yield served


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch hub's cache with both files; whoever asks the network all the same fails at once."""
    monkeypatch.setenv("PROTEUS_FAIR_ESM_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for name, data in zip(FILES, (b"weights", b"regression"), strict=True):
        (folder / name).write_bytes(data)
    return folder


def test_the_official_models_are_those_of_the_committed_catalogue(monkeypatch: pytest.MonkeyPatch):
    committed = {name: e for name, e in load_catalogue(ROOT / "conf" / "model").items() if name.endswith("_UR50D")}
    for mirror in ("", "http://mirror.example.org/esm"):
        monkeypatch.setenv("PROTEUS_FAIR_ESM_URL", mirror)
        found = official_catalogue()
        assert {name: replace(entry, path=committed[name].path) for name, entry in found.items()} == committed
    assert len(found) == 6


def test_a_projects_own_catalogue_comes_first(tmp_path: Path):
    assert catalogue_at(tmp_path) == official_catalogue()
    folder = tmp_path / "conf" / "model"
    folder.mkdir(parents=True)
    text = 'name: {}\ndescription: d\nlicence: MIT\nversions: {{"2.0.0": {{source: {{kind: file, path: x.pt}}}}}}\n'
    for name in ("mine", NAME):
        (folder / f"{name}.yaml").write_text(text.format(name))
    found = catalogue_at(tmp_path)
    assert found.keys() == official_catalogue().keys() | {"mine"}
    assert found[NAME].versions == {"2.0.0": FileSource(Path("x.pt"))}


def test_a_mirror_stands_in_for_fair_esms_address_and_for_no_other(mirror: Served, tmp_path: Path):
    found = fetch(official(), tmp_path)
    assert found.path.read_bytes() == b"weights"
    assert found.sha256 == {FILES[0]: sha256(b"weights"), FILES[1]: sha256(b"regression")}
    assert found.origin == mirror.url(f"esm/models/{FILES[0]}")
    assert fetch(official(), tmp_path) == found
    assert len(mirror.requests) == 2
    for url in ("https://example.org/fair-esm/models/x.pt", f"{FAIR_ESM}-other/x.pt", "https://x.org/x.pt"):
        assert mirrored(url) == url
    with pytest.raises(IntegrityError, match="expected " + "a" * 64):
        fetch(official(sha256="a" * 64), tmp_path)


def test_secrets_in_a_mirrors_address_stay_out_of_the_origin(
    mirror: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PROTEUS_FAIR_ESM_URL", mirror.url("esm", "me:password@"))
    assert fetch(official(), tmp_path).origin == mirror.url(f"esm/models/{FILES[0]}")
    assert mirror.requests[0]["authorization"].startswith("Basic ")


@pytest.mark.parametrize("address", ["ftp://h/esm", "mirror", "/srv/esm"])
def test_a_mirror_that_is_no_address_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str):
    monkeypatch.setenv("PROTEUS_FAIR_ESM_URL", address)
    with pytest.raises(ConfigError, match=rf"^PROTEUS_FAIR_ESM_URL: '{address}' is no URL to download from; write"):
        fetch(official(), tmp_path)


@pytest.mark.parametrize("digests", [{}, {"sha256": sha256(b"weights"), "regression_sha256": sha256(b"regression")}])
def test_what_torch_hub_has_is_not_downloaded(hub: Path, tmp_path: Path, digests: dict[str, str]):
    found = fetch(official(**digests), tmp_path / "downloads")
    assert found.path.read_bytes() == b"weights"
    assert found.sha256 == {FILES[0]: sha256(b"weights"), FILES[1]: sha256(b"regression")}
    assert found.path.samefile(hub / FILES[0])  # a link: 11 GB are not stored twice
    folder = found.path.parent
    records = {p.name: p.read_text() for p in folder.glob("*.sha256")}
    assert records == ({} if digests else {f"{n}.sha256": f"{d}  {n}\n" for n, d in found.sha256.items()})
    assert {p.name for p in folder.iterdir()} == {*FILES, *records}
    # From now on it is as if it had been downloaded.
    for name in FILES:
        (hub / name).unlink()
    assert fetch(official(**digests), tmp_path / "downloads") == found


def test_the_default_place_of_torch_hub_is_known(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCH_HOME")
    for number, (variable, place) in enumerate((("HOME", ".cache/torch/hub"), ("XDG_CACHE_HOME", "torch/hub"))):
        base = tmp_path / variable
        monkeypatch.setenv(variable, str(base))
        (base / place).parent.mkdir(parents=True)
        (base / place).symlink_to(hub.parent)
        assert Path(torch.hub.get_dir()) == base / place
        assert fetch(official(), tmp_path / str(number)).path.read_bytes() == b"weights"


def test_a_link_in_torch_hub_is_followed_and_another_file_system_gets_a_copy(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (hub / FILES[0]).rename(tmp_path / "elsewhere.pt")
    (hub / FILES[0]).symlink_to(tmp_path / "elsewhere.pt")
    found = fetch(official(), tmp_path / "one").path
    assert not found.is_symlink()
    assert found.samefile(tmp_path / "elsewhere.pt")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    found = fetch(official(), tmp_path / "two").path
    assert found.read_bytes() == b"weights"
    assert not found.samefile(tmp_path / "elsewhere.pt")


def test_a_file_in_torch_hub_that_is_not_the_known_one_is_passed_over(
    hub: Path, mirror: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (hub / FILES[0]).write_bytes(b"cut")
    found = fetch(official(sha256=sha256(b"weights")), tmp_path / "known")
    assert found.path.read_bytes() == b"weights"
    assert [r["path"] for r in mirror.requests] == [f"/esm/models/{FILES[0]}"]
    # What was recorded when it first came is known too.
    (hub / FILES[0]).write_bytes(b"weights")
    first = fetch(official(), tmp_path / "recorded")
    first.path.unlink()
    (hub / FILES[0]).write_bytes(b"cut")
    assert fetch(official(), tmp_path / "recorded") == first
    assert first.path.read_bytes() == b"weights"
    assert not list((tmp_path / "known").rglob(".tmp-*"))


def test_torch_hub_is_not_asked_for_anothers_file_of_the_same_name(hub: Path, tmp_path: Path):
    source = FairEsmSource(f"http://127.0.0.1:1/models/{FILES[0]}")
    with pytest.raises(StorageError, match="cannot reach"):
        fetch(source, tmp_path / "downloads")


def test_what_torch_hub_lacks_is_downloaded(hub: Path, mirror: Served, tmp_path: Path):
    (hub / FILES[1]).unlink()
    (hub / FILES[1]).mkdir()
    assert fetch(official(), tmp_path).sha256[FILES[1]] == sha256(b"regression")
    assert [r["path"] for r in mirror.requests] == [f"/esm/regression/{FILES[1]}"]
