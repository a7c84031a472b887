"""Races, kill -9, full disks and the locks of others: with real processes, real git and real signals."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from conftest import git, make_checkpoint
from registering import Given
from test_versions import make_untidy

from proteus_pipeline.errors import ProteusError, StorageError
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry import committing, home
from proteus_pipeline.registry import weights as registry_weights
from proteus_pipeline.registry.backups import Backups
from proteus_pipeline.registry.committing import touched
from proteus_pipeline.registry.git import TEMPORARY_INDEX, Git
from proteus_pipeline.registry.verification import DAMAGED
from proteus_pipeline.registry.version import ModelVersion
from proteus_pipeline.registry.versions import ModelVersionManager
from proteus_pipeline.registry.weights import DvcCache
from proteus_pipeline.stores.files import TEMPORARY_PREFIX

TORTURE = os.environ.get("PROTEUS_TORTURE") == "1"
RACERS = 8
ROUNDS = 25 if TORTURE else 4
KILLS = 20 if TORTURE else 2  # of each operation, and as many again with git
FORK = multiprocessing.get_context("fork")  # what a race or a kill is about is not the import of torch


@cache
def weights(seed: int) -> Checkpoint:
    """One of any number of models."""
    return make_checkpoint(layers=1, width=16, heads=2, seed=seed)


def registry(root: Path) -> ModelVersionManager:
    return ModelVersionManager(root, max_versions=None)


# Races


@dataclass(frozen=True)
class Outcome:
    """What became of one racer's registration: the version, or the error's kind and words."""

    round: int
    racer: int
    kind: str
    said: str


def race(root: Path, number: str) -> list[Outcome]:
    """Have every racer register its own weights, round after round, all at the same moment; `number` is a pattern."""
    barrier, results = FORK.Barrier(RACERS), FORK.Queue()

    def run(racer: int) -> None:
        for turn in range(ROUNDS):
            barrier.wait(60)
            # Anew each time: in the first round a home may not exist yet.
            manager = registry(root)
            try:
                won = manager.register_version(Given("m", weights(racer)), number.format(turn=turn, racer=racer))
                results.put(Outcome(turn, racer, "won", won.version))
            except ProteusError as error:
                results.put(Outcome(turn, racer, type(error).__name__, str(error)))

    for racer in range(RACERS):
        weights(racer)
    racers = [FORK.Process(target=run, args=(racer,)) for racer in range(RACERS)]
    for process in racers:
        process.start()
    outcomes = [results.get(timeout=120) for _ in range(RACERS * ROUNDS)]
    for process in racers:
        process.join(60)
    assert [process.exitcode for process in racers] == [0] * RACERS
    return outcomes


def holds(version: ModelVersion, checkpoint: Checkpoint) -> bool:
    """Say whether a version's tensors are those of a checkpoint, to the bit; each is checked against its record too."""
    there, mine = version.checkpoint.tensors, checkpoint.tensors
    return there.keys() == mine.keys() and all(torch.equal(there[name], mine[name]) for name in mine)


def assert_sound(root: Path) -> None:
    """Neither git nor the registry finds anything wrong."""
    complaints = git(root, "fsck", "--strict", "--no-progress").splitlines()
    assert [line for line in complaints if not line.startswith("dangling ")] == []
    assert registry(root).verify() == []


@pytest.mark.torture
@pytest.mark.parametrize("place", ["a project", "a home that nobody has made"])
def test_of_those_who_race_for_a_version_one_wins_and_the_others_are_told(repository: Path, place: str):
    root = repository if place == "a project" else Path.home() / ".proteus" / "versions"
    outcomes = race(root, "1.{turn}.0")
    for turn in range(ROUNDS):
        mine = [outcome for outcome in outcomes if outcome.round == turn]
        [winner] = [outcome for outcome in mine if outcome.kind == "won"]
        losers = [outcome for outcome in mine if outcome is not winner]
        assert [loser.kind for loser in losers] == ["VersionConflictError"] * (RACERS - 1), losers
        digest = weights(winner.racer).model_digest
        assert all(digest in o.said and weights(o.racer).model_digest in o.said for o in losers), losers
        assert holds(registry(root).get_version("m", f"1.{turn}.0"), weights(winner.racer))
    assert registry(root).metrics().conflicts == ROUNDS * (RACERS - 1)
    assert git(root, "status", "--porcelain") == ""
    assert [p.name for p in root.parent.iterdir()] == [root.name], "of those who made a home, one has left anything"
    assert_sound(root)


@pytest.mark.torture
def test_those_who_race_with_versions_of_their_own_all_succeed(repository: Path):
    outcomes = race(repository, "{racer}.{turn}.0")
    assert {o.kind for o in outcomes} == {"won"}, [o for o in outcomes if o.kind != "won"]
    manager = registry(repository)
    history = manager.history("m")
    assert sorted(e.sequence or 0 for e in history.events) == list(range(1, RACERS * ROUNDS + 1))
    for turn, racer in itertools.product(range(ROUNDS), range(RACERS)):
        assert holds(manager.get_version("m", f"{racer}.{turn}.0"), weights(racer)), (turn, racer)
    assert git(repository, "status", "--porcelain") == ""
    assert_sound(repository)


# kill -9


def weights_of(name: str, number: str) -> Checkpoint:
    """The weights that are registered as a version: whoever finds it knows them."""
    return weights(zlib.crc32(f"{name}@v{number}".encode()))


@dataclass(frozen=True)
class Ground:
    """A repository with uncommitted work in it."""

    root: Path

    @property
    def manager(self) -> ModelVersionManager:
        return registry(self.root)

    def register(self, name: str, number: str, *, on_branch: bool = False) -> None:
        self.manager.register_version(Given(name, weights_of(name, number)), number, on_branch=on_branch)

    def users(self, own: tuple[str, ...] = ()) -> dict[str, Any]:
        """What is the user's here: all but the registry's own folders, and the files that a registration changes."""
        folders = {".git", "cache", ".proteus"}
        files = {p.relative_to(self.root).as_posix(): p for p in self.root.rglob("*") if p.is_file()}
        staged = git(self.root, "ls-files", "--stage").splitlines()
        return {
            "branch": git(self.root, "symbolic-ref", "HEAD"),
            "branches": len(git(self.root, "for-each-ref", "refs/heads").splitlines()),
            "index": [line for line in staged if not line.endswith(own)] if own else staged,
            "files": {n: p.read_bytes() for n, p in files.items() if not folders & set(Path(n).parts) and n not in own},
            "status": git(self.root, "status", "--porcelain=v2"),
        }

    def assert_whole_or_absent(self) -> None:
        """Every version that is there has all its weights, and every deleted one could be brought back."""
        manager, cache, backups = self.manager, DvcCache(self.root), Backups(self.root)
        assert [finding for finding in manager.verify() if finding.kind == DAMAGED] == []
        for history in manager.histories():
            for number in history.known:
                version = manager.version_of(history, number)
                if number in history.live:
                    assert holds(version, weights_of(version.name, number))
                    continue
                backup = backups.find(version.reference)
                assert backup
                lost = [m for m in backup.objects if not backups.objects.is_sound(m) and not cache.is_sound(m)]
                assert lost == []

    def leftovers(self) -> list[str]:
        """What belongs to a process that is no more."""
        found = [p for p in (self.root / ".git").rglob("*.lock") if p.name != "proteus.lock"]
        names = (TEMPORARY_PREFIX, TEMPORARY_INDEX, "proteus.journal")
        found += [p for p in self.root.rglob("*") if p.name.startswith(names) or p.parent.name == "scratch"]
        backups = Backups(self.root)
        needed = {backups.objects.object(md5) for backup in backups.list() for md5 in backup.objects}
        found += [p for p in backups.objects.folder.rglob("*") if p.is_file() and p not in needed]
        return sorted({str(p.relative_to(self.root)) for p in found})


@dataclass
class Operation:
    """One command in a numbered round: what must be so before it, the command, and what is so after it."""

    ground: Ground
    turn: int
    own: tuple[str, ...] = ()

    def prepare(self) -> None:
        raise NotImplementedError

    def perform(self) -> None:
        raise NotImplementedError

    def assert_done(self) -> None:
        raise NotImplementedError

    @property
    def manager(self) -> ModelVersionManager:
        return self.ground.manager


class Register(Operation):
    def prepare(self) -> None:
        self.number = f"2.0.{self.turn}"
        weights_of("m", self.number)  # made before anybody measures

    def perform(self) -> None:
        self.ground.register("m", self.number)

    def assert_done(self) -> None:
        assert self.manager.history("m").current == self.number


class RegisterOnBranch(Operation):
    def prepare(self) -> None:
        self.name = f"n{self.turn}"  # another model each time, so that all three files change
        self.own = touched(self.name)
        self.head = git(self.ground.root, "rev-parse", "HEAD")
        weights_of(self.name, "1.0.0")

    def perform(self) -> None:
        self.ground.register(self.name, "1.0.0", on_branch=True)

    def assert_done(self) -> None:
        root, commit = self.ground.root, self.manager.get_version(self.name, "1.0.0").commit
        assert git(root, "rev-parse", "HEAD", "HEAD^").split() == [commit, self.head]
        assert set(git(root, "diff", "--name-only", "HEAD^", "HEAD").split()) == set(self.own)
        assert git(root, "status", "--porcelain", "--", *self.own) == ""


class OneEvent(Operation):
    """An operation that adds one event to a model's history, however often it is begun."""

    def prepare(self) -> None:
        self.before = len(self.manager.history("m").events)

    def assert_done(self) -> None:
        assert len(self.manager.history("m").events) == self.before + 1


class Rollback(OneEvent):
    def prepare(self) -> None:
        self.manager.rollback("m", f"1.{(self.turn + 1) % 2}.0")
        super().prepare()

    def perform(self) -> None:
        self.manager.rollback("m", f"1.{self.turn % 2}.0")

    def assert_done(self) -> None:
        super().assert_done()
        assert self.manager.history("m").current == f"1.{self.turn % 2}.0"


class Delete(OneEvent):
    def prepare(self) -> None:
        self.manager.restore_version("m", "1.1.0")
        super().prepare()

    def perform(self) -> None:
        self.manager.delete_version("m", "1.1.0")

    def assert_done(self) -> None:
        super().assert_done()
        assert "1.1.0" not in self.manager.history("m").live
        assert self.manager.plan_deletion("m", "1.1.0").drops == ()
        assert Backups(self.ground.root).is_verified("m@v1.1.0")


class Restore(OneEvent):
    def prepare(self) -> None:
        self.manager.delete_version("m", "1.1.0")
        super().prepare()

    def perform(self) -> None:
        self.manager.restore_version("m", "1.1.0")

    def assert_done(self) -> None:
        super().assert_done()
        assert "1.1.0" in self.manager.history("m").live
        assert Backups(self.ground.root).find("m@v1.1.0") is None


OPERATIONS = (Register, RegisterOnBranch, Rollback, Delete, Restore)


@pytest.fixture
def ground(repository: Path) -> Ground:
    make_untidy(repository)
    made = Ground(repository)
    for minor in range(3):
        made.register("m", f"1.{minor}.0")
    return made


@dataclass
class Victim:
    """A process of a group of its own that waits for a word, and then performs an operation."""

    process: Any
    here: Connection

    @classmethod
    def start(cls, perform: Callable[[], None]) -> Victim:
        here, there = FORK.Pipe()

        def run() -> None:
            os.setsid()
            there.send("ready")
            there.recv()
            perform()
            there.send("done")

        process = FORK.Process(target=run)
        process.start()
        there.close()
        assert here.recv() == "ready"
        return cls(process, here)

    def run(self) -> float:
        """Have it perform the operation to its end; return the seconds."""
        began = time.perf_counter()
        self.here.send("go")
        assert self.here.recv() == "done"
        took = time.perf_counter() - began
        self.process.join()
        return took

    def kill_after(self, seconds: float, *, with_git: bool) -> bool:
        """Have it begin, and kill it; return whether that was before it ended."""
        self.here.send("go")
        self.here.poll(seconds)
        (os.killpg if with_git else os.kill)(self.process.pid, signal.SIGKILL)
        self.process.join()
        try:
            return bool(self.here.recv() != "done")
        except (EOFError, ConnectionResetError):  # the latter where it had not read the word yet
            return True


@pytest.mark.torture
@pytest.mark.parametrize("with_git", [False, True], ids=["its git lives on", "its git dies with it"])
@pytest.mark.parametrize("kind", OPERATIONS)
def test_whatever_a_killed_command_left_the_same_command_completes(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, kind: type[Operation], *, with_git: bool
):
    rng = random.Random(7)
    took, killed = 0.0, 0
    for turn in range(2 + 4 * KILLS):
        operation = kind(ground, turn)
        operation.prepare()
        if turn == 0:
            operation.perform()  # what it imports, the next ones find
            continue
        if turn == 1:
            took = Victim.start(operation.perform).run()
            continue
        before, moment = ground.users(operation.own), rng.uniform(0, took)
        if Victim.start(operation.perform).kill_after(moment, with_git=with_git):
            killed += 1
        else:
            took = moment  # or less: it had ended
        ground.assert_whole_or_absent()
        operation.perform()
        operation.assert_done()
        assert ground.users(operation.own) == before
        assert ground.manager.verify() == []
        if killed == KILLS:
            break
    assert killed == KILLS, "most kills came too late"
    monkeypatch.setattr(home, "_YOUNG_S", 0)
    monkeypatch.setattr(registry_weights, "_ABANDONED_S", 0)
    ground.register("last", "1.0.0")
    ground.manager.delete_version("m", "1.2.0", force=True)
    assert ground.leftovers() == []
    git(ground.root, "gc", "--quiet", "--prune=now")
    assert "garbage: 0" in git(ground.root, "count-objects", "-v")
    ground.assert_whole_or_absent()
    assert_sound(ground.root)


def dies(within: str, after: int) -> None:
    """Have this process die within a step: after so many of the refs that git was to write, or of the files put back."""
    run, move, replace = Git.run, shutil.move, Path.replace
    done = 0

    def die(root: Path, rest: list[str]) -> None:
        for line in rest:  # git dies with it, and leaves the locks that it holds
            _, ref, oid = [*line.split(), ""][:3]
            lock = root / ".git" / f"{ref}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            lock.write_text(f"{oid}\n" if oid else "")
            if ref.startswith("refs/heads/"):
                (root / ".git" / "HEAD.lock").touch()
            if not oid:  # a deletion, for which git rewrites the packed refs
                (root / ".git" / "packed-refs.lock").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    def run_partly(self: Git, *args: str, data: str | None = None, **more: Any) -> str:
        if args != ("update-ref", "--stdin"):
            return run(self, *args, data=data, **more)
        lines = (data or "").splitlines(keepends=True)
        run(self, *args, data="".join(lines[:after]))
        die(self.root, lines[after:])
        raise AssertionError("dead")

    def count() -> None:
        nonlocal done
        if done == after:
            die(Path(), [])
        done += 1

    def move_partly(source: Path, target: Path) -> Path:
        count()
        return Path(move(source, target))

    def replace_partly(self: Path, target: Path) -> Path:
        if target.name == "index":
            count()
        return replace(self, target)

    if within == "refs":
        Git.run = run_partly  # type: ignore[method-assign]
    else:
        committing.shutil.move = move_partly  # type: ignore[assignment]
        Path.replace = replace_partly  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    ("kind", "within", "steps"),
    [*((kind, "refs", 2) for kind in OPERATIONS if kind not in {RegisterOnBranch, Restore}),
     (Restore, "refs", 6), (RegisterOnBranch, "refs", 3), (RegisterOnBranch, "tree", 3)],
)  # fmt: skip
def test_what_git_had_written_in_part_is_completed(ground: Ground, kind: type[Operation], within: str, steps: int):
    for after in range(steps + 1):
        operation = kind(ground, after)
        operation.prepare()
        before = ground.users(operation.own)

        def perform(operation: Operation = operation, after: int = after) -> None:
            dies(within, after)
            operation.perform()

        victim = Victim.start(perform)
        assert victim.kill_after(10, with_git=False), "it died before"
        ground.assert_whole_or_absent()
        operation.perform()
        operation.assert_done()
        assert ground.users(operation.own) == before
        assert ground.manager.verify() == []
        later = (".proteus/scratch/", ".git/proteus.journal")  # the next change clears these away
        assert [name for name in ground.leftovers() if not name.startswith(later)] == []


# Others at work


@pytest.mark.parametrize("locked", ["refs/tags/m@v2.0.0", "refs/proteus/ledger/m@v2.0.0", "refs/heads/main", "index"])
def test_the_lock_of_a_living_git_is_respected(ground: Ground, locked: str):
    folder = ground.root / ".git"
    head = git(ground.root, "rev-parse", "HEAD")
    # As a killed registration left it, a minute ago: what it names is somebody else's by now.
    journal = folder / "proteus.journal"
    journal.write_text(f"refs/heads/main {'1' * 40}\nHEAD ")
    os.utime(journal, (time.time() - 60, time.time() - 60))
    command = ["update-index", "--add", "--stdin"] if locked == "index" else ["update-ref", "--stdin"]
    theirs = subprocess.Popen(["git", "-C", str(ground.root), *command], stdin=PIPE, stdout=PIPE, text=True)
    assert theirs.stdin
    assert theirs.stdout
    lock = folder / f"{locked}.lock"
    if locked == "index":
        until = time.monotonic() + 60
        while not lock.exists():
            assert time.monotonic() < until
    else:
        theirs.stdin.write(f"start\nupdate {locked} {git(ground.root, 'rev-parse', 'm@v1.0.0^{commit}')}\nprepare\n")
        theirs.stdin.flush()
        assert [theirs.stdout.readline() for _ in range(2)] == ["start: ok\n", "prepare: ok\n"]
    before, refs = ground.users(), git(ground.root, "for-each-ref")
    with pytest.raises(StorageError, match="lock") as caught:
        ground.register("m", "2.0.0", on_branch=True)
    assert "\n" not in str(caught.value)
    assert lock.exists()
    assert theirs.poll() is None
    assert (ground.users(), git(ground.root, "for-each-ref")) == (before, refs)
    theirs.communicate()
    assert theirs.returncode == 0
    assert ground.leftovers() == []
    ground.register("m", "2.0.0", on_branch=True)
    assert git(ground.root, "rev-parse", "HEAD^") == head


def test_an_edit_that_was_made_while_weights_were_stored_is_not_written_over(ground: Ground):
    manager, edited = ground.manager, ground.root / "dvc.yaml"
    store = manager.store_weights

    def store_slowly(*args: Any) -> Any:
        edited.write_text("# mine\n")
        return store(*args)

    manager.store_weights = store_slowly  # type: ignore[method-assign]
    refs = git(ground.root, "for-each-ref")
    with pytest.raises(StorageError, match=r"dvc\.yaml has changes that are not committed"):
        manager.register_version(Given("m", weights_of("m", "2.0.0")), "2.0.0", on_branch=True)
    assert edited.read_text() == "# mine\n"
    assert git(ground.root, "for-each-ref") == refs


def test_weights_that_are_deleted_with_another_version_while_they_are_registered_are_kept(ground: Ground):
    manager, shared = ground.manager, weights_of("m", "1.1.0")
    store = manager.store_weights

    def store_and_delete(*args: Any) -> Any:
        stored = store(*args)
        if "1.1.0" in manager.history("m").live:
            ModelVersionManager(ground.root, backup_enabled=False).delete_version("m", "1.1.0")
            assert DvcCache(ground.root).files(stored[0]) is None
        return stored

    manager.store_weights = store_and_delete  # type: ignore[method-assign]
    manager.register_version(Given("m", shared), "2.0.0")
    assert holds(ground.manager.get_version("m", "2.0.0"), shared)
    assert ground.manager.verify() == []


# Full disks


def apart(run: Callable[[], None]) -> str:
    """Run something in a process of its own, and return how it failed; empty when it did not."""
    here, there = FORK.Pipe()

    def report() -> None:
        try:
            run()
            there.send("")
        except BaseException:  # noqa: BLE001 - told to the parent, which fails
            there.send(traceback.format_exc())

    process = FORK.Process(target=report)
    process.start()
    there.close()
    said = str(here.recv())
    process.join()
    return said


def mount_small(folder: Path) -> None:
    """Give this process, and nobody else, a small file system at a folder; it goes when the process does."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private = 0x20000, 0x10000000, 0x44000
    user, group = os.getuid(), os.getgid()
    if libc.unshare(new_mounts | (new_user if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    for source, target, kind, flags, options in (
        (b"none", b"/", None, private, None),
        (b"small", os.fsencode(folder), b"tmpfs", 0, b"size=8m,nr_inodes=4000,mode=0755"),
    ):
        if libc.mount(source, target, kind, flags, options):
            raise OSError(ctypes.get_errno(), "mount")


@contextmanager
def pages_left(root: Path, number: int) -> Iterator[None]:
    """Fill the disk but for some pages."""
    filler = root.parent / "filler"
    disk = os.statvfs(root)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (disk.f_bavail - number) * disk.f_frsize)
    yield
    filler.unlink()


@contextmanager
def names_left(root: Path, number: int) -> Iterator[None]:
    """Have a disk on which only so many files can be made."""
    filler = root.parent / "filler"
    filler.mkdir()
    for index in range(os.statvfs(root).f_favail - number):
        (filler / str(index)).touch()
    yield
    shutil.rmtree(filler)


@contextmanager
def short_files(root: Path, number: int) -> Iterator[None]:
    """Have every file end after so many half kilobytes; git is killed when it writes more."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number * 512, most))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def can_mount() -> bool:
    return apart(lambda: mount_small(Path(tempfile.gettempdir()))) == ""


# A limit of the process works everywhere; a small file system where this user may mount one.
DISKS = [short_files, *([pages_left, names_left] if can_mount() else [])]


def exhaust(root: Path, kind: type[Operation], disk: Callable[[Path, int], Any]) -> None:
    """Perform an operation with more and more room, until it succeeds; each time before, nothing has happened."""
    make_untidy(root)
    ground = Ground(root)
    for minor in range(3):
        ground.register("m", f"1.{minor}.0")
    operation = kind(ground, 1)
    operation.prepare()
    before, refs = ground.users(), git(root, "for-each-ref")
    said: list[str] = []
    for left in itertools.count(step=1 if TORTURE else 9):
        with disk(root, left):
            try:
                operation.perform()
                break
            except StorageError as error:
                said.append(str(error))
            ground.assert_whole_or_absent()
        assert (ground.users(), git(root, "for-each-ref")) == (before, refs)
        assert ground.leftovers() == []
    assert said
    assert [
        words for words in said if "\n" in words or not re.match(r"cannot write |git |.* can't be written", words)
    ] == []
    operation.assert_done()
    assert_sound(root)


@pytest.mark.torture
@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("kind", OPERATIONS)
def test_a_full_disk_changes_nothing(repository: Path, kind: type[Operation], disk: Callable[[Path, int], Any]):
    def run() -> None:
        small = repository.parent / "small disk"
        small.mkdir()
        if disk is not short_files:
            mount_small(small)
        shutil.copytree(repository, small / "project")
        exhaust(small / "project", kind, disk)

    assert apart(run) == ""
