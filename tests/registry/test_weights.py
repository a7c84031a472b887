from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from proteus_pipeline.errors import IntegrityError, StorageError
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.weights import DvcCache
from proteus_pipeline.stores.files import sha256_file

FILES = {
    "config.json": b"{}",
    "model-layer-0.bin": bytes(range(256)) * 50,
    "sub/a.txt": b"a",
    "sub.txt": b"",
    "Z": b"z",
}


def dvc(root: Path, *args: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *args], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_folder(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    for name, data in (files or FILES).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def put_listing(cache: DvcCache, entries: object) -> Pointer:
    """Store a directory object whose name is its digest, whatever it says."""
    data = json.dumps(entries).encode()
    md5 = hashlib.md5(data).hexdigest() + ".dir"
    cache.object(md5).parent.mkdir(parents=True, exist_ok=True)
    cache.object(md5).write_bytes(data)
    return Pointer(md5, 1, 1, "m")


def test_the_pointer_and_the_objects_are_those_of_dvc_add_and_dvc_checks_them_out(repository: Path, tmp_path: Path):
    stored = DvcCache(repository).add_folder(make_folder(tmp_path / "m"), "models/m")
    ours = contents(repository / ".dvc" / "cache")
    shutil.rmtree(repository / ".dvc" / "cache")
    make_folder(repository / "models" / "m")
    dvc(repository, "add", "models/m")
    assert stored.pointer.text() == (repository / "models" / "m.dvc").read_text()
    assert contents(repository / ".dvc" / "cache") == ours

    shutil.rmtree(repository / ".dvc" / "cache")
    shutil.rmtree(repository / "models" / "m")
    assert DvcCache(repository).add_folder(tmp_path / "m", "models/m") == stored
    dvc(repository, "checkout", "models/m.dvc")
    assert contents(repository / "models" / "m") == FILES


@pytest.mark.parametrize(
    "name", ["esm2_t6-8M", "123", "3B", "1e5", "1_0", "2024-01-01", "null", "True", "no", "y", "0x1F"]
)
def test_a_name_that_reads_as_a_number_is_quoted_as_dvc_quotes_it(name: str):
    from dvc.utils.serialize import dumps_yaml

    pointer = Pointer("0" * 32 + ".dir", 10, 2, name)
    fields = {"md5": pointer.md5, "size": 10, "nfiles": 2, "hash": "md5", "path": name}
    assert pointer.text() == dumps_yaml({"outs": [fields]})
    assert Pointer.parse(pointer.text(), "m.dvc") == pointer


def test_objects_are_read_only_and_kept_when_they_are_whole(repository: Path, tmp_path: Path):
    cache = DvcCache(repository)
    stored = cache.add_folder(make_folder(tmp_path / "m"), "m")
    files = cache.files(stored.pointer)
    assert files is not None
    assert {name: path.read_bytes() for name, path in files.items()} == FILES
    objects = [cache.object(stored.pointer.md5), *files.values()]
    assert {p.stat().st_mode & 0o777 for p in objects} == {0o444}
    before = [p.stat().st_ino for p in objects]
    assert cache.add_folder(tmp_path / "m", "m") == stored
    assert [p.stat().st_ino for p in objects] == before


def test_the_sha256_is_over_the_files_own(repository: Path, tmp_path: Path):
    folder = make_folder(tmp_path / "m")
    lines = sorted(f"{name}\0{sha256_file(folder / name)}" for name in FILES)
    expected = "".join(f"{digest}  {name}\n" for name, digest in (line.split("\0") for line in lines))
    stored = DvcCache(repository).add_folder(folder, "m")
    assert stored.sha256 == hashlib.sha256(expected.encode()).hexdigest()


def test_adding_again_mends_damaged_objects_the_directory_too(repository: Path, tmp_path: Path):
    cache = DvcCache(repository)
    stored = cache.add_folder(make_folder(tmp_path / "m"), "m")
    files = cache.files(stored.pointer)
    assert files is not None
    for path in (files["model-layer-0.bin"], cache.object(stored.pointer.md5)):
        data = bytearray(path.read_bytes())
        data[7] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)
        path.chmod(0o444)
    cache.add_folder(tmp_path / "m", "m")
    again = cache.files(stored.pointer)
    assert again is not None
    assert {name: path.read_bytes() for name, path in again.items()} == FILES


def test_a_missing_object_is_none(repository: Path, tmp_path: Path):
    cache = DvcCache(repository)
    pointer = cache.add_folder(make_folder(tmp_path / "m"), "m").pointer
    files = cache.files(pointer)
    assert files is not None
    files["config.json"].unlink()
    assert cache.files(pointer) is None
    cache.object(pointer.md5).unlink()
    assert cache.files(pointer) is None


def test_a_damaged_directory_object_is_an_error(repository: Path, tmp_path: Path):
    cache = DvcCache(repository)
    pointer = cache.add_folder(make_folder(tmp_path / "m"), "m").pointer
    listing = cache.object(pointer.md5)
    listing.chmod(0o644)
    listing.write_bytes(listing.read_bytes().replace(b"config.json", b"config.jsom"))
    with pytest.raises(IntegrityError, match="is damaged"):
        cache.files(pointer)


@pytest.mark.parametrize(
    "entry",
    [
        {"relpath": "../outside", "md5": "0" * 32},
        {"relpath": "/etc/outside", "md5": "0" * 32},
        {"relpath": "a/../../outside", "md5": "0" * 32},
        {"relpath": "a", "md5": "00/../../../../../../etc/hostname"},
        {"relpath": "a", "md5": "0" * 31},
        {"relpath": "a", "md5": "0" * 32 + ".dir"},
    ],
)
def test_a_directory_object_that_leads_elsewhere_is_refused(repository: Path, entry: dict[str, str], tmp_path: Path):
    cache = DvcCache(repository)
    pointer = put_listing(cache, [entry])
    with pytest.raises(IntegrityError, match="outside its folder or the cache"):
        cache.files(pointer)
    with pytest.raises(IntegrityError):
        cache.checkout(pointer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("entries", [{"relpath": "a"}, [{"relpath": "a"}], ["a"], [{"relpath": 1, "md5": "0" * 32}], 3])
def test_a_directory_object_of_another_form_is_refused(repository: Path, entries: object):
    cache = DvcCache(repository)
    with pytest.raises(IntegrityError):
        cache.files(put_listing(cache, entries))


def test_checkout_gives_the_folder_once_and_leaves_what_is_there(repository: Path, tmp_path: Path):
    cache = DvcCache(repository)
    pointer = cache.add_folder(make_folder(tmp_path / "m"), "m").pointer
    cache.checkout(pointer, tmp_path / "out")
    assert contents(tmp_path / "out") == FILES
    (tmp_path / "out" / "mine").write_bytes(b"kept")
    cache.checkout(pointer, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_bytes() == b"kept"


def test_checkouts_at_once_agree_and_leave_nothing_behind(repository: Path, tmp_path: Path):
    cache = DvcCache(repository)
    pointer = cache.add_folder(make_folder(tmp_path / "m"), "m").pointer
    out = tmp_path / "here" / "out"
    out.parent.mkdir()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.checkout(pointer, out), range(24)))
    assert contents(out) == FILES
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_checkout_of_what_is_not_there_makes_nothing(repository: Path, tmp_path: Path):
    DvcCache(repository).checkout(Pointer("0" * 32 + ".dir", 1, 1, "m"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["../with, comma # and hash", "~/cache of mine"])
def test_the_cache_folder_is_the_one_dvc_uses(repository: Path, tmp_path: Path, value: str):
    dvc(repository, "config", "cache.dir", value)
    stored = DvcCache(repository).add_folder(make_folder(tmp_path / "m"), "m")
    (repository / "models").mkdir()
    (repository / "models" / "m.dvc").write_text(stored.pointer.text())
    expected = (repository / Path(value).expanduser()).resolve() / "files" / "md5"
    assert DvcCache(repository).object("ab" + "c" * 30) == expected / "ab" / ("c" * 30)
    assert not (repository / ".dvc" / "cache" / "files").exists()
    dvc(repository, "checkout", "models/m.dvc")
    assert contents(repository / "models" / "m") == FILES


def test_config_local_comes_before_config(repository: Path, tmp_path: Path):
    (repository / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {tmp_path / 'local'}\n")
    (repository / ".dvc" / "config").write_text(
        f"[cache]\n    dir = {tmp_path / 'shared'}\n['remote \"a\"']\n url = %x\n"
    )
    assert DvcCache(repository).object("ab" + "c" * 30) == tmp_path / "local" / "files" / "md5" / "ab" / ("c" * 30)
    (repository / ".dvc" / "config.local").unlink()
    assert DvcCache(repository).object("ab" + "c" * 30) == tmp_path / "shared" / "files" / "md5" / "ab" / ("c" * 30)


@pytest.mark.parametrize(
    ("level", "variable"),
    [("--global", ""), ("--global", "XDG_CONFIG_HOME"), ("--global", "DVC_GLOBAL_CONFIG_DIR"), ("--system", "XDG_CONFIG_DIRS"),
     ("--system", "DVC_SYSTEM_CONFIG_DIR")],
)  # fmt: skip
def test_the_cache_of_the_user_or_the_machine_is_the_one_dvc_uses(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, variable: str
):
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / "settings"))
    dvc(repository, "config", level, "cache.dir", str(tmp_path / "shared"))
    stored = DvcCache(repository).add_folder(make_folder(tmp_path / "m"), "m")
    assert DvcCache(repository).object("ab" + "c" * 30) == tmp_path / "shared" / "files" / "md5" / "ab" / ("c" * 30)
    (repository / "models").mkdir()
    (repository / "models" / "m.dvc").write_text(stored.pointer.text())
    if not variable:
        dvc(repository, "checkout", "models/m.dvc")
        assert contents(repository / "models" / "m") == FILES


def test_the_repository_comes_before_the_user_and_the_user_before_the_machine(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, folder in (("DVC_GLOBAL_CONFIG_DIR", "user"), ("DVC_SYSTEM_CONFIG_DIR", "machine")):
        monkeypatch.setenv(name, str(tmp_path / folder))
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config").write_text("[cache]\n    dir = beside\n")
    (repository / ".dvc" / "config").write_text(f"[cache]\n    dir = {tmp_path / 'ours'}\n")
    for config, cache in (
        (repository / ".dvc" / "config", tmp_path / "ours"),
        (tmp_path / "user" / "config", tmp_path / "user" / "beside"),
        (tmp_path / "machine" / "config", tmp_path / "machine" / "beside"),
    ):
        assert DvcCache(repository).object("ab" + "c" * 30) == cache / "files" / "md5" / "ab" / ("c" * 30)
        config.unlink()
    assert DvcCache(repository).object("ab" + "c" * 30) == repository / ".dvc" / "cache" / "files" / "md5" / "ab" / (
        "c" * 30
    )


def test_a_config_that_cant_be_read_is_named(repository: Path):
    (repository / ".dvc" / "config").write_text("no section\n")
    with pytest.raises(StorageError, match="config can't be read"):
        DvcCache(repository)


def test_a_cache_that_cant_be_written_is_one_error(repository: Path, tmp_path: Path):
    (repository / ".dvc" / "cache").touch()
    with pytest.raises(StorageError, match="cannot write"):
        DvcCache(repository).add_folder(make_folder(tmp_path / "m"), "m")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "outs: []\n",
        "outs:\n- md5: 0123456789abcdef0123456789abcdef\n  size: 1\n  hash: md5-dos2unix\n  path: file.bin\n",
        "outs: {}\n",
        "- 1\n",
        "outs:\n- [\n",
        "outs:\n- md5: ../../etc.dir\n  size: 1\n  nfiles: 1\n  hash: md5\n  path: m\n",
        "outs:\n- md5: 0123456789abcdef0123456789abcdef.dir\n  size: much\n  nfiles: 1\n  hash: md5\n  path: m\n",
    ],
)
def test_what_is_no_pointer_is_refused(text: str):
    with pytest.raises(IntegrityError, match=r"^models/m\.dvc"):
        Pointer.parse(text, "models/m.dvc")


@pytest.mark.parametrize("md5", ["..//tmp/victim", "../../x", "", "AB" * 16, "ab" * 16 + ".dir/x", "ab" * 17])
def test_no_name_leads_out_of_the_cache(repository: Path, md5: str):
    for use in (DvcCache(repository).object, DvcCache(repository).remove, DvcCache(repository).is_sound):
        with pytest.raises(IntegrityError, match="is no MD5 of an object"):
            use(md5)
