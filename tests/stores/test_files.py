from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proteus_pipeline.errors import StorageError
from proteus_pipeline.stores.files import (
    OpenFile,
    atomic_path,
    file_system,
    md5_file,
    replace_atomic,
    sha256_file,
    stays_mapped,
    storage_error,
    write_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@settings(max_examples=20)
@given(data=st.binary(max_size=300_000))
def test_what_is_written_is_read_back_and_nothing_else_is_left(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    folder = tmp_path_factory.mktemp("files")
    write_atomic(folder / "a" / "b.bin", data)
    assert (folder / "a" / "b.bin").read_bytes() == data
    assert names(folder / "a") == ["b.bin"]
    assert sha256_file(folder / "a" / "b.bin") == hashlib.sha256(data).hexdigest()
    assert md5_file(folder / "a" / "b.bin") == hashlib.md5(data).hexdigest()


def test_permissions_are_the_umasks_or_the_ones_asked_for(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "plain", b"x")
        write_atomic(tmp_path / "read_only", b"x", mode=0o444)
    finally:
        os.umask(before)
    assert (tmp_path / "plain").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "read_only").stat().st_mode & 0o777 == 0o444


def test_a_name_of_the_longest_kind_can_be_written(tmp_path: Path):
    write_atomic(tmp_path / ("n" * 255), b"x")
    assert names(tmp_path) == ["n" * 255]


def test_readers_never_see_a_mixture(tmp_path: Path):
    path = tmp_path / "value"
    values = {bytes([letter]) * 200_000 for letter in b"abcd"}
    write_atomic(path, b"a" * 200_000)
    threads = [threading.Thread(target=lambda v=v: [write_atomic(path, v) for _ in range(10)]) for v in values]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        seen.add(path.read_bytes())
    for thread in threads:
        thread.join()
    assert seen
    assert seen <= values
    assert names(tmp_path) == ["value"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_body_that_fails_leaves_the_old_file_alone(tmp_path: Path, error: BaseException):
    path = tmp_path / "a.npz"
    path.write_bytes(b"old")

    def body() -> None:
        with atomic_path(path) as tmp:
            assert tmp.parent == path.parent
            assert tmp.suffix == ".npz"
            tmp.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        body()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.npz"]


def test_a_body_that_writes_nothing_is_an_error(tmp_path: Path):
    with pytest.raises(StorageError, match=r"cannot write .*a\.bin: no such file"), atomic_path(tmp_path / "a.bin"):
        pass


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path):
    # The kernel's own "no space left on device", from /dev/full: a full file system can't be mounted in a test.
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def body() -> None:
        with atomic_path(path) as tmp:
            tmp.symlink_to("/dev/full")
            tmp.write_bytes(b"x")

    with pytest.raises(StorageError) as caught:
        body()
    assert str(caught.value) == (
        f"cannot write {path}: no space left on device; free space there, or choose another location"
    )
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


LIMITED = """
import os, resource, sys
from pathlib import Path
from proteus_pipeline.errors import StorageError
from proteus_pipeline.stores.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_atomic(Path(sys.argv[1]), bytes(1_000_000))
except StorageError as error:
    print(error)
"""


def test_a_write_that_stops_half_way_leaves_the_old_file(tmp_path: Path):
    # RLIMIT_FSIZE cuts a real write_atomic after 100,000 bytes; the errno is EFBIG, the path through the code ENOSPC's.
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"cannot write {path}: file too large; raise the limit on file sizes (ulimit -f), or choose another location\n"
    )
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


FORBIDDEN = """
import os, sys
from pathlib import Path
from proteus_pipeline.errors import StorageError
from proteus_pipeline.stores.files import write_atomic
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
try:
    write_atomic(Path(sys.argv[1]), b"x")
except StorageError as error:
    print(error)
"""


def test_a_folder_without_permission_is_named(tmp_path: Path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    done = subprocess.run([sys.executable, "-c", FORBIDDEN, folder / "a"], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"cannot write {folder / 'a'}: permission denied; ask for permission there, or choose another location\n"
    )


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot write .*file/sub/a: not a directory; .*a part of it is a file"):
        write_atomic(tmp_path / "file" / "sub" / "a", b"x")


def test_a_folder_in_the_files_place_is_named(tmp_path: Path):
    (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match="it is a folder"):
        write_atomic(tmp_path / "a", b"x")
    assert names(tmp_path) == ["a"]


def test_a_replacement_that_fails_keeps_the_callers_file(tmp_path: Path):
    (tmp_path / "part").write_bytes(b"mine")
    with pytest.raises(StorageError, match="cannot write"):
        replace_atomic(tmp_path / "part", tmp_path / "absent" / "a")
    assert (tmp_path / "part").read_bytes() == b"mine"


@pytest.mark.parametrize("digest", [sha256_file, md5_file])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, digest):
    with pytest.raises(StorageError, match=r"cannot read .*absent: no such file or directory; check the path"):
        digest(tmp_path / "absent")


def test_an_unknown_reason_is_still_said():
    assert str(storage_error("read", Path("a"), OSError("odd"))) == "cannot read a: odd; check the location"
    assert "check the disk" in str(storage_error("read", Path("a"), OSError(errno.EIO, "Input/output error")))


def test_the_kind_of_file_system_is_the_mounts(tmp_path: Path):
    here = tmp_path.stat().st_dev
    sample = tmp_path / "mountinfo"
    sample.write_text(
        "22 27 0:21 / /proc rw,relatime - proc proc rw\n"
        f"36 35 {os.major(here)}:{os.minor(here)} / /a\\040b rw,noatime shared:1 master:2 - nfs4 host:/a rw,vers=4.2\n"
    )
    assert file_system(here, sample) == "nfs4"
    assert file_system(os.makedev(0, 21), sample) == "proc"
    assert file_system(os.makedev(99, 99), sample) == ""
    assert file_system(here, tmp_path / "none") == ""
    assert file_system(Path("/proc").stat().st_dev) == "proc"


@pytest.mark.parametrize(
    ("kind", "stays"),
    [
        ("ext4", True),
        ("lustre", True),
        ("", True),
        ("nfs4", False),
        ("cifs", False),
        ("fuse.sshfs", False),
        ("9p", False),
    ],
)
def test_what_is_mapped_stays_on_some_file_systems(kind: str, stays: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("proteus_pipeline.stores.files.file_system", lambda _: kind)
    assert stays_mapped(0) is stays


def test_an_open_file_knows_whether_it_was_written_to_whatever_its_name_is(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"1234")
    os.utime(path, ns=(0, 0))
    file = OpenFile(path)
    assert (file.size, file.is_unchanged(), file.is_at(path)) == (4, True, True)
    path.rename(tmp_path / "b")
    path.write_bytes(b"1234")
    assert (file.is_unchanged(), file.is_at(path)) == (True, False)
    os.utime(path, ns=(0, 0))
    assert not file.is_at(path)  # another file, however like it
    (tmp_path / "b").write_bytes(b"5678")
    assert (file.is_unchanged(), file.is_at(tmp_path / "b")) == (False, False)
    descriptor = file.descriptor
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    with pytest.raises(FileNotFoundError):
        OpenFile(tmp_path / "c")
