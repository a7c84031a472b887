from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, git

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry import refs
from proteus_pipeline.registry.git import Git, GitError
from proteus_pipeline.registry.refs import LEDGER, enter, exclusive, publish, put_back, read_ledger


def tag(here: Git, name: str, message: str = "x\n") -> str:
    head = here.head()
    assert head
    return here.make_tag(name, head, message, 1_700_000_000)


def test_a_tag_is_published_once_with_its_ledger_entry(repository: Path):
    here = Git(repository)
    first, second = tag(here, "m@v1.0.0"), tag(here, "m@v1.0.0", "another\n")
    assert publish(here, {"m@v1.0.0": first})
    assert not publish(here, {"m@v1.0.0": second})
    assert git(repository, "rev-parse", "m@v1.0.0") == first
    assert read_ledger(here) == {"m@v1.0.0": first}


def test_several_refs_are_published_all_or_none(repository: Path):
    here = Git(repository)
    head = here.head()
    assert head
    publish(here, {"a@v1.0.0": tag(here, "a@v1.0.0")})
    before = git(repository, "for-each-ref")
    assert not publish(here, {"b@v1.0.0": tag(here, "b@v1.0.0"), "a@v1.0.0": tag(here, "a@v1.0.0", "y\n")})
    assert git(repository, "for-each-ref") == before
    child = here.commit_files({"x": "1\n"}, "x\n", head)
    with pytest.raises(StorageError, match="refs/heads/main moved while"):
        publish(here, {"b@v1.0.0": tag(here, "b@v1.0.0")}, ("refs/heads/main", child, child))
    assert git(repository, "for-each-ref") == before
    assert publish(here, {"b@v1.0.0": tag(here, "b@v1.0.0")}, ("refs/heads/main", child, head))
    assert git(repository, "rev-parse", "main") == child


def test_a_lock_of_somebody_else_is_an_error_that_stays(repository: Path):
    lock = repository / ".git" / "refs" / "tags" / "m@v1.0.0.lock"
    lock.touch()
    here = Git(repository)
    with pytest.raises(GitError, match="cannot lock ref") as caught:
        publish(here, {"m@v1.0.0": tag(here, "m@v1.0.0")})
    assert "\n" not in str(caught.value)
    assert lock.exists()
    assert read_ledger(here) == {}


def test_what_a_killed_process_left_is_cleared(repository: Path):
    here, folder = Git(repository), repository / ".git"
    (folder / "refs" / "tags" / "m@v1.0.0.lock").touch()
    (folder / "proteus-index-0123").touch()
    (folder / "proteus.journal").write_text(
        "refs/proteus/ledger/m@v1.0.0\nrefs/tags/m@v1.0.0\n../outside\nrefs/../../outside"
    )
    outside = repository / "outside.lock"
    outside.touch()
    assert publish(here, {"m@v1.0.0": tag(here, "m@v1.0.0")})
    assert outside.exists(), "a journal leads to refs and to nothing else"
    assert not list(folder.glob("proteus-index*"))
    assert not (folder / "proteus.journal").exists()


def test_only_one_is_in_it_at_a_time_whatever_object_it_uses(repository: Path):
    inside, most = 0, 0
    shared = Git(repository)

    def enter_and_count(number: int) -> None:
        nonlocal inside, most
        with exclusive(shared if number % 2 else Git(repository)):
            inside += 1
            most = max(most, inside)
            time.sleep(0.005)
            inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter_and_count, range(32)))
    assert most == 1


def test_a_thread_that_is_in_it_may_enter_again(repository: Path):
    here = Git(repository)
    with exclusive(here), exclusive(here):
        assert here.head()
    with exclusive(here):
        assert here.held


def test_a_process_that_ends_lets_go_however_it_ends(repository: Path):
    code = (
        "import sys, time; from pathlib import Path; from proteus_pipeline.registry.git import Git;"
        "from proteus_pipeline.registry.refs import exclusive\n"
        "with exclusive(Git(Path(sys.argv[1]))):\n    print('in', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(repository)], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout
    assert child.stdout.readline() == b"in\n"
    entered = threading.Event()

    def wait() -> None:
        with exclusive(Git(repository)):
            entered.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not entered.wait(0.3)
    child.kill()
    child.communicate()
    assert entered.wait(20)
    waiting.join()


def test_who_waits_too_long_is_told(repository: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refs, "_PATIENCE_S", 0.1)
    with exclusive(Git(repository)), ThreadPoolExecutor(1) as pool:

        def enter_too() -> None:
            with exclusive(Git(repository)):
                raise AssertionError("two were in it")

        with pytest.raises(StorageError, match="another process has been changing the registry"):
            pool.submit(enter_too).result()


def test_a_tag_from_elsewhere_is_entered_once_and_can_be_put_back(repository: Path):
    here = Git(repository)
    first, second = tag(here, "m@v1.0.0"), tag(here, "m@v1.0.0", "y\n")
    git(repository, "update-ref", "refs/tags/m@v1.0.0", first)
    enter(here, "m@v1.0.0", first)
    enter(here, "m@v1.0.0", second)
    assert read_ledger(here) == {"m@v1.0.0": first}
    git(repository, "update-ref", "refs/tags/m@v1.0.0", second)
    put_back(here, "m@v1.0.0", first)
    assert git(repository, "rev-parse", "m@v1.0.0") == first


def test_a_withdrawn_tag_goes_with_its_entry_as_the_new_one_comes(repository: Path):
    here = Git(repository)
    oid = tag(here, "m@v1.0.0!#1")
    assert publish(here, {"m@v1.0.0!#1": oid})
    git(repository, "pack-refs", "--all")
    assert publish(here, {"m@v1.0.0%2": oid}, withdrawn={"m@v1.0.0!#1": oid})
    assert git(repository, "tag") == "m@v1.0.0%2"
    assert read_ledger(here) == {"m@v1.0.0%2": oid}


def test_a_withdrawal_that_a_kill_cut_short_is_completed(repository: Path):
    here = Git(repository)
    oid = tag(here, "m@v1.0.0!#1")
    assert publish(here, {"m@v1.0.0!#1": oid, "m@v1.0.0%2": oid})
    folder = repository / ".git"
    lines = [
        f"{LEDGER}m@v1.0.0%2 {oid}",
        f"refs/tags/m@v1.0.0%2 {oid}",
        f"{LEDGER}m@v1.0.0!#1 -{oid}",
        f"refs/tags/m@v1.0.0!#1 -{oid}",
    ]
    (folder / "proteus.journal").write_text("\n".join(lines))
    (folder / "packed-refs.lock").touch()
    (folder / "packed-refs.new").touch()
    with exclusive(here):
        pass
    assert git(repository, "tag") == "m@v1.0.0%2"
    assert read_ledger(here) == {"m@v1.0.0%2": oid}
    assert not list(folder.glob("packed-refs.*"))


def test_a_withdrawal_that_a_kill_stopped_before_it_began_is_not_made(repository: Path):
    here = Git(repository)
    oid = tag(here, "m@v1.0.0!#1")
    assert publish(here, {"m@v1.0.0!#1": oid})
    (repository / ".git" / "proteus.journal").write_text(f"refs/tags/m@v1.0.0%2 {oid}\nrefs/tags/m@v1.0.0!#1 -{oid}")
    with exclusive(here):
        pass
    assert git(repository, "tag") == "m@v1.0.0!#1"
