"""The zip that segments are written as: zipfile's own bytes, and what it does when the disk fails."""

from __future__ import annotations

import errno
import io
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import xxhash

from proteus_pipeline.embeddings import archive
from proteus_pipeline.embeddings.archive import StoredZip

MEMBERS = {"a/zarr.json": b"{}", "a/c/0/0": np.random.default_rng(0).bytes(5000), "empty": b""}


def made(path: Path, members: dict[str, bytes]) -> dict[str, int]:
    """Write members, and return where the data of each begins."""
    out = StoredZip(path)
    places = {name: out.add(name, data, zlib.crc32(data) if len(data) % 2 else None) for name, data in members.items()}
    out.finish()
    assert (out.nbytes, out.digest) == (path.stat().st_size, xxhash.xxh3_128_hexdigest(path.read_bytes()))
    return places


def add_many(out: StoredZip) -> None:
    for number in range(10_000):
        out.add(f"{number}", bytes(5000))


def by_zipfile(members: dict[str, bytes]) -> bytes:
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
            for name, data in members.items():
                file.writestr(zipfile.ZipInfo(name), data)
        return out.getvalue()


@pytest.mark.parametrize("count", [0, 3, 70_000])
def test_its_bytes_are_those_of_zipfile(tmp_path: Path, count: int):
    """70,000 members are more than a directory without 64 bits can count."""
    members = dict(list(MEMBERS.items())[:count]) if count < 10 else {f"{i}": b"%d" % i for i in range(count)}
    places = made(tmp_path / "s.zip", members)
    data = (tmp_path / "s.zip").read_bytes()
    assert data == by_zipfile(members)
    assert all(data[at : at + len(members[name])] == members[name] for name, at in places.items())


def test_places_beyond_32_bits_are_written_as_zipfile_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive, "_LIMIT", 1000)
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    members = {f"{i}": b"x" * 900 for i in range(4)}  # each below the limit
    made(tmp_path / "s.zip", members)
    assert (tmp_path / "s.zip").read_bytes() == by_zipfile(members)
    with zipfile.ZipFile(tmp_path / "s.zip") as file:
        assert file.testzip() is None


def test_what_the_disk_refuses_while_it_is_flushed_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The system says it once, to whoever flushes: here a thread."""

    def refused(_: int) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(archive, "_FLUSH_BYTES", 4096)
    monkeypatch.setattr(os, "fdatasync", refused)
    out = StoredZip(tmp_path / "s.zip")
    out.add("a", bytes(5000))
    with pytest.raises(OSError, match="no"):
        out.finish()
    out.discard()
    again = StoredZip(tmp_path / "t.zip")
    with pytest.raises(OSError, match="no"):
        add_many(again)
    again.discard()


def test_a_file_is_flushed_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flushed: list[int] = []
    monkeypatch.setattr(archive, "_FLUSH_BYTES", 4096)
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    made(tmp_path / "s.zip", {f"{number}": bytes(5000) for number in range(100)})
    assert flushed
    with zipfile.ZipFile(tmp_path / "s.zip") as file:
        assert file.testzip() is None
        assert len(file.namelist()) == 100


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path):
    (tmp_path / "s.zip").write_bytes(b"kept")
    with pytest.raises(FileExistsError):
        StoredZip(tmp_path / "s.zip")
    assert (tmp_path / "s.zip").read_bytes() == b"kept"
