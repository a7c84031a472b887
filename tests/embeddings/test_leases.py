from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from proteus_pipeline.embeddings.leases import FOLDER, held, lease

OLD = "00000000000000000001-old.zip"
COMING = "99999999999999999999-new.zip"


def test_what_a_run_names_and_what_comes_after_it_began_is_held(tmp_path: Path):
    assert not held(tmp_path).holds(COMING)
    with lease(tmp_path) as mine:
        assert held(tmp_path).holds(COMING)
        assert not held(tmp_path).holds(OLD)
        mine.add([OLD])
        assert held(tmp_path).holds(OLD)
    assert not held(tmp_path).holds(OLD)
    assert not held(tmp_path).holds(COMING)
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_a_lease_ends_with_an_error_too(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), lease(tmp_path):
        1 / 0  # noqa: B018
    assert held(tmp_path).since is None


def test_a_killed_run_holds_nothing(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from proteus_pipeline.embeddings.leases import lease\n"
        "with lease(Path(sys.argv[1])) as one:\n"
        f"    one.add(['{OLD}']); print('held', flush=True); sys.stdin.readline()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert held(tmp_path).holds(OLD)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not held(tmp_path).holds(OLD)
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_a_lease_that_is_being_written_holds_what_is_published_from_then_on(tmp_path: Path):
    with lease(tmp_path):
        (path,) = (tmp_path / FOLDER).iterdir()
        os.truncate(path, 3)
        assert held(tmp_path).holds(COMING)
        assert not held(tmp_path).holds(OLD)


def test_a_folder_that_cant_be_written_is_no_reason_to_stop(tmp_path: Path):
    (tmp_path / FOLDER).write_text("in its place")
    with lease(tmp_path) as mine:
        mine.add([OLD])
    assert held(tmp_path).since is None


def test_what_one_run_computes_others_leave_to_it(tmp_path: Path):
    with lease(tmp_path) as first, lease(tmp_path) as second:
        assert first.shared()
        assert first.claim(["a", "b"]) == {"a", "b"}
        assert second.claim(["b", "c"]) == {"c"}
        assert first.claim(["c", "d"]) == {"d"}  # though it is the older one
        first.release(["b"])
        assert second.claim(["a", "b"]) == {"b"}
    with lease(tmp_path) as third:
        assert not third.shared()
        assert third.claim(["a", "b", "c"]) == {"a", "b", "c"}


def test_of_two_that_want_the_same_at_once_the_older_has_it(tmp_path: Path):
    """Both have written what they want, and neither has read yet what the other wants."""
    with lease(tmp_path) as older, lease(tmp_path) as younger:
        younger._wants = {"k"}
        younger._write()
        assert older.claim(["k"]) == {"k"}
        older._claims, older._wants = set(), {"k"}
        older._write()
        assert younger.claim(["k"]) == set()


def test_what_a_killed_run_had_claimed_is_anybodys(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from proteus_pipeline.embeddings.leases import lease\n"
        "with lease(Path(sys.argv[1])) as one:\n"
        "    one.claim(['k']); print('claimed', flush=True); sys.stdin.readline()"
    )
    with lease(tmp_path) as mine:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        assert mine.claim(["k"]) == set()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert mine.claim(["k"]) == {"k"}


def test_without_locks_nobody_waits_for_what_may_be_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with lease(tmp_path) as first, lease(tmp_path) as second:
        first.add([OLD])
        assert first.claim(["k"]) == {"k"}

        def no_locks(*_: object) -> None:
            raise OSError(errno.ENOLCK, "no locks available")

        monkeypatch.setattr("fcntl.flock", no_locks)
        assert second.claim(["k"]) == {"k"}
        assert held(tmp_path).holds(OLD)
