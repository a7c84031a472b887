"""An account of uses that has grown is replaced by what it comes to: nobody's look-ups are lost, and evictions are the same."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import script

from proteus_pipeline.embeddings import usage
from proteus_pipeline.embeddings.usage import LookUps, Use, last_used, record_use, uses
from proteus_pipeline.eviction.policies import POLICIES, Policy, make_policy
from proteus_pipeline.stores import files

TORTURE = os.environ.get("PROTEUS_TORTURE") == "1"
NAMES = [f"{letter}.zip" for letter in "abcde"]
# Says each look-up that was recorded, by a byte; compacts every few dozen lines.
WORKER = """
import os, sys
from pathlib import Path
from proteus_pipeline.embeddings import usage
usage.COMPACT_BYTES = 2000
said = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT)
for n in range(int(sys.argv[2])):
    usage.record_use(Path(sys.argv[1]), 1, 0, 2, {"a.zip": 1, "b.zip": 3}, {"hits": 1})
    os.write(said, b".")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache's folder with five segments."""
    (tmp_path / "seg").mkdir()
    for name in NAMES:
        (tmp_path / "seg" / name).touch()
    return tmp_path


def account(folder: Path) -> dict[str, Any]:
    """What readers make of an account."""
    found = list(uses(folder))
    return {
        "sums": [sum(getattr(use, name) for use in found) for name in ("hits", "derived", "misses")],
        "redis": sum(use.redis.get("hits", 0) for use in found),
        "last": last_used(folder),
        "runs": {name: sum(use.runs for use in found if name in use.segments) for name in NAMES},
        "entries": {name: sum(use.segments.get(name, 0) for use in found) for name in NAMES},
    }


def read_sums(look_ups: LookUps) -> tuple[int, int, int]:
    look_ups.read()
    return look_ups.hits, look_ups.derived, look_ups.misses


def test_it_stays_small_and_says_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch):
    plain, look_ups, chance = folder / "plain", LookUps(folder), random.Random(0)
    (plain / "seg").mkdir(parents=True)
    for number in range(400):
        read = {name: chance.randint(1, 9) for name in chance.sample(NAMES, 2)}
        at = f"2026-01-01T{number // 60:02}:{number % 60:02}:00+00:00"
        monkeypatch.setattr(usage, "now", lambda at=at: at)
        for where, bound in ((plain, 1 << 30), (folder, 3000)):
            monkeypatch.setattr(usage, "COMPACT_BYTES", bound)
            record_use(where, number, 1, 2, read, {"hits": number % 3})
        if number % 7 == 0:
            assert read_sums(look_ups) == (sum(range(number + 1)), number + 1, 2 * number + 2)
    assert account(folder) == account(plain)
    assert read_sums(look_ups) == read_sums(LookUps(folder)) == read_sums(LookUps(plain))
    assert (folder / "uses.jsonl").stat().st_size < 3000 + 2 * 1000 < (plain / "uses.jsonl").stat().st_size


def test_nothing_is_kept_of_segments_that_are_gone(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(usage, "now", lambda: "2026-01-01T00:00:00+00:00")
    record_use(folder, 1, 0, 0, {"a.zip": 1, "gone.zip": 1})
    monkeypatch.setattr(usage, "COMPACT_BYTES", 0)
    record_use(folder, 1, 0, 0, {"a.zip": 1, "gone.zip": 1})
    assert set(last_used(folder)) == {"a.zip"}
    head, line = map(json.loads, (folder / "uses.jsonl").read_text().splitlines())
    assert (head["hits"], head["segments"], line["segments"], line["runs"]) == (2, {}, {"a.zip": 2}, 2)


def test_an_account_of_many_segments_is_not_summed_up_by_each_run(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(usage, "COMPACT_BYTES", 300)
    done: list[int] = []
    compact = usage._compact
    monkeypatch.setattr(usage, "_compact", lambda *given: (done.append(1), compact(*given)))
    (folder / "seg" / ("long" * 30)).touch()
    for number in range(60):
        record_use(folder, 1, 0, 0, dict.fromkeys((*NAMES, "long" * 30), number))
    assert 2 < len(done) < 40


Runs = st.lists(st.tuples(st.integers(0, 9), st.sets(st.sampled_from(NAMES), min_size=1), st.booleans()), max_size=30)


@pytest.mark.parametrize("policy", POLICIES)
@given(runs=Runs)
def test_every_policy_decides_the_same(policy: str, runs: list[tuple[int, set[str], bool]]):
    """Uses of segments that are here; evictions of others, at some of the moments, move the clock of `Cost`."""
    clock = 0
    found: list[Use] = []
    evictions: list[tuple[float, str]] = []
    for later, read, evicts in runs:
        clock += later
        found.append(Use(float(clock), 0, 0, 0, dict.fromkeys(read, 1)))
        if evicts:
            evictions.append((clock + 0.5, f"evicted {len(evictions)}"))
    lines = usage._came_to(found, NAMES).decode().splitlines()
    summed = [use for line in lines if (use := usage._use(line))]
    assert len(summed) == len(lines)
    assert list(replayed(policy, found, evictions).order()) == list(replayed(policy, summed, evictions).order())


def replayed(policy: str, found: list[Use], evictions: list[tuple[float, str]]) -> Policy[str]:
    books: Policy[str] = make_policy(policy, ttl=5.0) if policy == "ttl" else make_policy(policy)
    for number, name in enumerate((*NAMES, *(name for _, name in evictions))):
        books.added(name, size=number % 5 + 1, cost=float(number % 3), time=-1.0)
    steps: list[tuple[float, str, int]] = [(use.time, name, use.runs) for use in found for name in use.segments]
    for when, name, times in sorted([*steps, *((when, name, 0) for when, name in evictions)]):
        if times:
            books.used(name, when, times)
        else:
            books.evicted(name)
    return books


@pytest.mark.parametrize(
    "each",
    [
        150,
        pytest.param(
            5000, marks=[pytest.mark.torture, pytest.mark.skipif(not TORTURE, reason="set PROTEUS_TORTURE=1")]
        ),
    ],
)
def test_processes_of_which_some_are_killed_lose_nothing_that_was_recorded(folder: Path, each: int):
    logs = [folder / "seg" / f"said {number}" for number in range(4)]
    # Those that are to be killed would go on for ever: under load one can't be caught in the middle of a few.
    processes = [script(WORKER, folder, each if number < 2 else 10**6, log) for number, log in enumerate(logs)]
    for process, log in zip(processes[2:], logs[2:], strict=True):
        while not log.exists() or log.stat().st_size < each // 4:
            time.sleep(0.001)
            assert process.poll() is None
        process.kill()
    ended = [process.wait(timeout=240) for process in processes]
    said = [log.stat().st_size for log in logs]
    assert ended == [0, 0, -signal.SIGKILL, -signal.SIGKILL]
    found = account(folder)
    assert said[:2] == [each, each]
    # Of each that was killed, one more may have been recorded, and not been said.
    assert sum(said) <= found["sums"][0] <= sum(said) + 2
    assert found["sums"] == [found["redis"], 0, 2 * found["redis"]]
    assert found["runs"]["a.zip"] == found["redis"] == found["entries"]["a.zip"] == found["entries"]["b.zip"] // 3
    assert (folder / "uses.jsonl").stat().st_size < 20_000


def test_what_a_killed_process_left_goes_and_permissions_stay(folder: Path, monkeypatch: pytest.MonkeyPatch):
    (folder / ".tmp-0123.jsonl").write_text("of a process that was killed")
    record_use(folder, 1, 0, 0, {})
    (folder / "uses.jsonl").chmod(0o664)
    monkeypatch.setattr(usage, "COMPACT_BYTES", 0)
    record_use(folder, 1, 0, 0, {})
    assert sorted(path.name for path in folder.iterdir()) == ["seg", "uses.jsonl"]
    assert stat.S_IMODE((folder / "uses.jsonl").stat().st_mode) == 0o664
    assert account(folder)["sums"] == [2, 0, 0]


def test_an_account_that_can_not_be_read_is_not_replaced_by_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any, **__: Any) -> str:
        raise OSError(errno.EIO, "Input/output error")

    record_use(folder, 5, 0, 0, {})
    monkeypatch.setattr(usage, "COMPACT_BYTES", 0)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", broken)
        record_use(folder, 1, 0, 0, {})
    assert account(folder)["sums"] == [6, 0, 0]


def test_where_there_are_no_locks_lines_are_only_appended(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(usage, "COMPACT_BYTES", 0)
    monkeypatch.setattr(fcntl, "flock", none)
    for _ in range(5):
        record_use(folder, 1, 0, 0, {"a.zip": 1})
    assert len(list(uses(folder))) == 5


def test_who_was_stopped_with_the_lock_stops_no_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    record_use(folder, 1, 0, 0, {})
    with (folder / "uses.jsonl").open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        record_use(folder, 1, 0, 0, {})
    assert "cannot write" in caplog.text
    record_use(folder, 1, 0, 0, {})
    assert account(folder)["sums"] == [2, 0, 0]


def test_a_file_that_was_replaced_by_one_of_its_number_is_read_from_its_begin(folder: Path):
    look_ups, path = LookUps(folder), folder / "uses.jsonl"
    record_use(folder, 5, 0, 0, {})
    assert read_sums(look_ups) == (5, 0, 0)
    path.write_bytes(usage._came_to([Use(1.0, 7, 0, 0), Use(2.0, 1, 0, 0)], ()) + b"\n" * 200)
    assert read_sums(look_ups) == (8, 0, 0)
