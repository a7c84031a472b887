"""What every place for immutable files promises, and what a folder promises beyond. A new place is a row in PLACES."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from proteus_pipeline.errors import StorageError
from proteus_pipeline.stores import files, store
from proteus_pipeline.stores.s3 import S3Store
from proteus_pipeline.stores.s3_access import QUICK
from proteus_pipeline.stores.store import LocalStore, Store


def in_a_bucket(path: Path) -> Store:
    # A prefix of each test's own; a server takes no time to answer here.
    return S3Store(f"s3://proteus/stores/{path.parent.parent.name}/{path.parent.name}", patience=QUICK)


PLACES: dict[str, Callable[[Path], Store]] = {"local": LocalStore, "s3": in_a_bucket}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Open one and the same place, as another process would, each time that it is called."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    return lambda: PLACES[request.param](tmp_path / "place")


@pytest.fixture
def here(place: Callable[[], Store]) -> Store:
    return place()


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "place")


def everything(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir())


# The contract.


def test_a_place_that_does_not_exist_is_empty(here: Store):
    assert here.names("seg") == set()
    assert here.unchanged("seg", here.mark("seg")) in {True, False}


def test_what_is_written_is_listed_and_read_by_everyone(place: Callable[[], Store]):
    mine, theirs = place(), place()
    data = random.Random(0).randbytes(300_000)
    mine.write("seg/a.bin", data)
    mine.write("seg/b.bin", b"b")
    mine.write("index/a.bin", b"")
    for store_ in (mine, theirs):
        assert store_.names("seg") == {"a.bin", "b.bin"}
        assert store_.names("index") == {"a.bin"}
        assert store_.size("seg/a.bin") == 300_000
        assert store_.read("seg/a.bin") == data
        assert bytes(store_.map("seg/a.bin")) == data
        assert store_.read("index/a.bin") == bytes(store_.map("index/a.bin")) == b""


@pytest.mark.parametrize(
    ("offset", "nbytes", "expected"),
    [
        (0, 3, b"012"),
        (7, 3, b"789"),
        (7, 4, b"789"),  # fewer where it ends
        (10, 4, b""),
        (11, 1, b""),
        (4, None, b"456789"),
        (10, None, b""),
        (3, 0, b""),
        (2, 1 << 62, b"23456789"),  # what a damaged index may ask for
        (1 << 62, 8, b""),
        ((1 << 64) - 1, (1 << 64) - 1, b""),
    ],
)
def test_a_part_is_read_as_far_as_there_is_one(here: Store, offset: int, nbytes: int | None, expected: bytes):
    here.write("seg/a", b"0123456789")
    assert here.read("seg/a", offset, nbytes) == expected


def test_many_parts_are_read_and_each_that_is_short_is_named(here: Store):
    here.write("seg/a", b"0123456789")
    offsets, sizes = [8, 0, 9, 3, 10, 1 << 63, 5], [2, 3, 2, 0, 1, 4, 5]
    buffers = [bytearray(size) for size in sizes]
    whole = here.read_many("seg/a", offsets, [memoryview(b) for b in buffers])
    assert [bool(w) for w in whole][:3] + [bool(w) for w in whole][4:] == [True, True, False, False, False, True]
    assert [bytes(b) for b, w in zip(buffers, whole, strict=True) if w and b] == [b"89", b"012", b"56789"]
    assert here.read_many("seg/a", [], []) == []


def test_a_name_that_is_not_there_is_not_found(here: Store):
    here.write("seg/other", b"x")
    for name in ("seg/gone", "never/gone"):
        for attempt in (
            lambda name=name: here.read(name),
            lambda name=name: here.read(name, 0, 4),
            lambda name=name: here.read_many(name, [0], [memoryview(bytearray(1))]),
            lambda name=name: here.map(name),
            lambda name=name: here.size(name),
        ):
            with pytest.raises(FileNotFoundError):
                attempt()
        here.remove(name)  # is removed already


def test_an_unfinished_file_is_nobodys_to_see(place: Callable[[], Store]):
    here = place()
    unfinished = here.begin("seg/a.zip")
    unfinished.path.write_bytes(b"half")
    for store_ in (here, place()):
        assert store_.names("seg") == set()
        with pytest.raises(FileNotFoundError):
            store_.read("seg/a.zip")
    unfinished.path.write_bytes(b"whole")
    unfinished.publish()
    for store_ in (here, place()):
        assert store_.names("seg") == {"a.zip"}
        assert store_.read("seg/a.zip") == b"whole"
    unfinished.discard()  # does nothing by now
    assert place().read("seg/a.zip") == b"whole"
    assert not unfinished.path.exists()


def test_a_file_of_this_machine_is_sent_as_it_is_or_has_to_be_copied(here: Store, tmp_path: Path):
    near = LocalStore(tmp_path / "near")
    near.write("seg/a.zip", b"whole" * 1000)
    unfinished = here.begin("seg/b.zip")
    with near.at_hand("seg/a.zip") as path:
        assert path is not None
        near.remove("seg/a.zip")  # by another process: who has it open has it still
        if isinstance(here, LocalStore):
            assert not unfinished.take(path)
            unfinished.path.write_bytes(path.read_bytes())
        else:
            assert unfinished.take(path)
        unfinished.publish()
        assert here.read("seg/b.zip") == b"whole" * 1000
        unfinished.discard()
        assert path.read_bytes() == b"whole" * 1000
    with pytest.raises(FileNotFoundError), near.at_hand("seg/a.zip"):
        pass


def test_a_bucket_has_no_file_at_hand(s3: object, tmp_path: Path):
    with in_a_bucket(tmp_path / "place").at_hand("seg/a.zip") as path:
        assert path is None


def test_what_is_discarded_leaves_nothing(place: Callable[[], Store], tmp_path: Path):
    here = place()
    begun, written = here.begin("seg/a.zip"), here.begin("seg/a.zip")
    written.path.write_bytes(b"half")
    assert begun.path != written.path
    for unfinished in (begun, written, written):
        unfinished.discard()
    assert place().names("seg") == set()
    assert everything(tmp_path) == []


def test_a_publication_of_nothing_is_an_error_and_leaves_nothing(place: Callable[[], Store], tmp_path: Path):
    unfinished = place().begin("seg/a.zip")
    with pytest.raises(StorageError, match=r"a\.zip"):
        unfinished.publish()
    unfinished.discard()
    assert place().names("seg") == set()
    assert everything(tmp_path) == []


def test_a_file_removed_while_it_is_read_is_gone_for_who_asks_again(place: Callable[[], Store]):
    mine, theirs = place(), place()
    mine.write("seg/a", b"0123456789")
    mapped = mine.map("seg/a")
    assert mine.read("seg/a", 0, 4) == theirs.read("seg/a", 0, 4) == b"0123"
    mine.remove("seg/a")
    assert bytes(mapped) == b"0123456789"  # an index stays readable for who has it
    with pytest.raises(FileNotFoundError):
        mine.read("seg/a", 0, 4)
    with pytest.raises(FileNotFoundError):
        place().read("seg/a", 0, 4)
    assert mine.names("seg") == theirs.names("seg") == set()
    with suppress(FileNotFoundError):
        assert theirs.read("seg/a", 0, 4) == b"0123"  # as it was, or not at all
    mine.write("seg/a", b"other")
    assert mine.read("seg/a", 0, 5) == b"other"


def test_a_file_that_appears_after_a_listing_is_never_missed(place: Callable[[], Store]):
    """However soon it appears: in the same tick of the clock that dates folders, too."""
    reader, writer = place(), place()
    chance = random.Random(1)
    writer.write("index/first", b"")
    for number in range(60):
        if number % 10 == 0:
            time.sleep(0.06)  # until a mark may be believed
        mark = reader.mark("index")
        seen = reader.names("index")
        time.sleep(chance.choice([0, 0, 0.001, 0.005]))
        writer.write(f"index/{number}", b"")
        assert f"{number}" not in seen
        assert not reader.unchanged("index", mark)
        if number % 3 == 0:
            time.sleep(0.051)
            mark = reader.mark("index")
            seen = reader.names("index")
            writer.remove(f"index/{number}")
            assert not reader.unchanged("index", mark)


def test_a_listing_that_others_write_into_is_never_believed_to_be_whole(place: Callable[[], Store]):
    """Readers poll as a cache does, while a writer publishes; each name is seen by the first listing after it."""
    written: list[str] = []
    over = threading.Event()

    def write() -> None:
        writer, chance = place(), random.Random(2)
        for number in range(40):
            writer.write(f"index/{number}", b"")
            written.append(f"{number}")
            time.sleep(chance.choice([0, 0.002, 0.03, 0.07]))
        over.set()

    def poll() -> int:
        reader = place()
        mark: object = None
        seen: set[str] = set()
        listings = 0
        while not over.is_set():
            must = set(written)
            if mark is None or not reader.unchanged("index", mark):
                mark = reader.mark("index")
                seen = reader.names("index")
                listings += 1
            assert must <= seen
        return listings

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(poll) for _ in range(2)]
        pool.submit(write).result()
        assert all(reader.result() > 1 for reader in readers)


def test_threads_read_more_files_than_are_kept_open(place: Callable[[], Store], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "_OPEN_FILES", 4)
    here = place()
    for number in range(32):
        here.write(f"seg/{number}", b"%08d" % number)

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(400 if isinstance(here, LocalStore) else 20):
            number = chance.randrange(32)
            assert here.read(f"seg/{number}", 4, 4) == b"%04d" % number
            buffer = bytearray(8)
            assert here.read_many(f"seg/{number}", [0], [memoryview(buffer)]) == [True]
            assert buffer == b"%08d" % number

    before = open_files()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert open_files() <= before + (4 if isinstance(here, LocalStore) else 32)  # of connections


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0


# A folder.


def test_a_quiet_folder_is_not_listed_again(folder: LocalStore):
    """Or each look-up would list every index."""
    nothing = folder.mark("index")
    assert folder.unchanged("index", nothing)
    folder.write("index/a", b"")
    assert not folder.unchanged("index", nothing)
    assert not folder.unchanged("index", folder.mark("index"))  # too fresh to be believed
    time.sleep(0.06)
    mark = folder.mark("index")
    assert folder.unchanged("index", mark)
    folder.write("seg/b", b"")
    assert folder.unchanged("index", mark)
    assert not folder.unchanged("index", None)


def test_a_file_that_appears_in_the_tick_of_a_listing_is_not_missed(folder: LocalStore):
    """Folders' times move in steps on most systems: here in steps of 10 ms, whatever this one's do."""
    for number in range(40):
        folder.write(f"index/{number}", b"")
        step(folder.root / "index")
        mark = folder.mark("index")
        assert f"{number}b" not in folder.names("index")
        folder.write(f"index/{number}b", b"")
        step(folder.root / "index")
        assert not folder.unchanged("index", mark)


def step(path: Path) -> None:
    now = time.time_ns() // 10_000_000 * 10_000_000
    os.utime(path, ns=(now, now))


def failing(number: int) -> Callable[[Path], None]:
    """Return a flush that fails the given time, from 1."""
    calls = []

    def fsync(path: Path) -> None:
        calls.append(path)
        if len(calls) == number:
            raise OSError(errno.EIO, "Input/output error")

    return fsync


@pytest.mark.parametrize("number", [1, 2], ids=["flushing the file", "flushing its folder"])
@pytest.mark.parametrize("way", ["write", "publish"])
def test_what_may_not_survive_a_crash_is_not_there(
    folder: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int, way: str
):
    folder.write("seg/old", b"old")
    unfinished = folder.begin("seg/new")
    unfinished.path.write_bytes(b"new")
    if way == "write":
        unfinished.discard()
    monkeypatch.setattr(files, "_fsync", failing(number))
    with pytest.raises(StorageError, match=r"cannot write .*seg/new: input/output error; check the disk"):
        unfinished.publish() if way == "publish" else folder.write("seg/new", b"new")
    assert everything(folder.root) == ["seg/old"]
    unfinished.discard()
    assert everything(folder.root) == ["seg/old"]


def test_a_file_in_a_folders_place_is_named(folder: LocalStore):
    folder.root.mkdir()
    (folder.root / "seg").write_bytes(b"")
    attempts: list[Callable[[], Any]] = [
        lambda: folder.names("seg"),
        lambda: folder.read("seg/a"),
        lambda: folder.read("seg/a", 0, 1),
        lambda: folder.read_many("seg/a", [0], [memoryview(bytearray(1))]),
        lambda: folder.map("seg/a"),
        lambda: folder.size("seg/a"),
        lambda: folder.write("seg/a", b""),
        lambda: folder.begin("seg/a"),
        lambda: folder.remove("seg/a"),
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match=r"^cannot \w+ .*/place/seg.*; check the (path|location)"):
            attempt()
    assert folder.mark("seg/a") is None
    assert not folder.unchanged("seg/a", folder.mark("seg/a"))


def test_a_folder_in_a_files_place_is_named(folder: LocalStore):
    (folder.root / "seg" / "a").mkdir(parents=True)
    attempts: list[Callable[[], Any]] = [
        lambda: folder.read("seg/a"),
        lambda: folder.read("seg/a", 0, 1),
        lambda: folder.read_many("seg/a", [0], [memoryview(bytearray(1))]),
        lambda: folder.map("seg/a"),
        lambda: folder.write("seg/a", b""),
        lambda: folder.remove("seg/a"),
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match=r"^cannot \w+ .*/place/seg/a: is a directory; check the path: it is a"):
            attempt()
    assert (folder.root / "seg" / "a").is_dir()


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A folder whose `seg` nobody may enter and whose root can't be written; root becomes nobody for the test."""
    root = Path(tempfile.mkdtemp())  # pytest's own folders let nobody else in
    for name in ("seg", "index"):
        (root / name).mkdir()
        (root / name / "a").write_bytes(b"a")
    (root / "index" / "a").chmod(0)
    (root / "index").chmod(0o555)
    (root / "seg").chmod(0)
    root.chmod(0o555)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield root
    finally:
        os.seteuid(was)
        for path in (root, root / "seg", root / "index"):
            path.chmod(0o755)
        shutil.rmtree(root)


def test_what_is_not_permitted_is_one_line_that_says_so(forbidden: Path):
    here = LocalStore(forbidden)
    attempts: list[Callable[[], Any]] = [
        lambda: here.names("seg"),
        lambda: here.size("seg/a"),
        lambda: here.write("seg/b", b""),
        lambda: here.write("runs/b", b""),
        lambda: here.begin("runs/b"),
        lambda: here.write("index/b", b""),
        lambda: here.remove("index/a"),
    ]
    for name in ("seg/a", "index/a"):
        attempts += [
            lambda name=name: here.read(name),
            lambda name=name: here.read(name, 0, 1),
            lambda name=name: here.read_many(name, [0], [memoryview(bytearray(1))]),
            lambda name=name: here.map(name),
        ]
    for attempt in attempts:
        with pytest.raises(StorageError) as caught:
            attempt()
        said = str(caught.value)
        assert said.startswith(("cannot read ", "cannot write ", "cannot remove ")), said
        assert str(forbidden) in said
        assert said.endswith(": permission denied; ask for permission there, or choose another location")
        assert "\n" not in said
    assert here.names("index") == {"a"}
    assert not here.unchanged("seg/deeper", here.mark("seg/deeper"))
    unfinished = here.begin("index/b")
    with pytest.raises(PermissionError):
        unfinished.path.write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        unfinished.publish()
    unfinished.discard()


def test_on_nfs_a_mapped_file_may_be_removed_by_another_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = LocalStore(tmp_path)
    store.write("a/b", b"bytes")
    assert isinstance(store.map("a/b"), mmap.mmap)
    monkeypatch.setattr("proteus_pipeline.stores.files.file_system", lambda _: "nfs4")
    read = store.map("a/b")
    (tmp_path / "a" / "b").write_bytes(b"")  # where it were mapped, this would kill whoever looks at it
    assert bytes(read) == b"bytes"
