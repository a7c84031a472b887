"""Counts of several processes in one file: none of an acknowledged one is lost, whoever is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from proteus_pipeline.errors import StorageError
from proteus_pipeline.metrics.lines import increments, series
from proteus_pipeline.stores import counts, files
from proteus_pipeline.stores.counts import NAME, CountsFile, add, collecting, count, counting

TOKENS = "proteus_embedding_tokens_total"
KEY = series(TOKENS, {})
ONE = increments(TOKENS, 1, {})
# Says each count that was acknowledged, by a byte; compacts every few dozen lines.
WORKER = """
import os, sys
from pathlib import Path
from proteus_pipeline.metrics.lines import increments
from proteus_pipeline.stores import counts
counts.COMPACT_BYTES = int(sys.argv[3])
file, one = counts.CountsFile(Path(sys.argv[1])), increments("proteus_embedding_tokens_total", 1, {})
os.write(1, b"r")
sys.stdin.read(1)
for _ in range(int(sys.argv[2])):
    file.add(one)
    os.write(1, b".")
"""


def total(folder: Path) -> float:
    return CountsFile(folder).totals().get(KEY, 0)


def worker(folder: Path, number: int, compact: int = 4000) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WORKER, str(folder), str(number), str(compact)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    "each", [400, pytest.param(20_000, marks=[pytest.mark.torture, pytest.mark.skipif(
        "PROTEUS_TORTURE" not in os.environ, reason="set PROTEUS_TORTURE=1 for the full count")])]
)  # fmt: skip
def test_8_processes_of_which_4_are_killed_lose_nothing_that_was_acknowledged(tmp_path: Path, each: int):
    # Those that are to be killed would go on for ever: under load one can't be caught in the middle of a few.
    workers = [worker(tmp_path, each if number >= 4 else 10**9) for number in range(8)]
    acknowledged, falls, over = [0] * 8, [], threading.Event()

    def listen(number: int) -> None:
        stdout = workers[number].stdout
        assert stdout is not None
        while said := os.read(stdout.fileno(), 65536):
            acknowledged[number] += len(said)

    def watch() -> None:
        last = 0.0
        while not over.is_set():
            now = total(tmp_path)
            falls.extend([(last, now)] if now < last else [])
            last = now

    for process in workers:
        assert process.stdout is not None and process.stdout.read(1) == b"r"
    threads = [threading.Thread(target=listen, args=(n,)) for n in range(8)]
    watcher = threading.Thread(target=watch)
    for thread in (*threads, watcher):
        thread.start()
    for process in workers:
        assert process.stdin is not None
        process.stdin.write(b"g")
        process.stdin.close()
    dice = random.Random(7)
    for number in range(4):
        while acknowledged[number] < each * dice.uniform(0.1, 0.6):
            time.sleep(0.001)
        workers[number].send_signal(signal.SIGKILL)
    for process in workers:
        process.wait(timeout=300)
    for thread in threads:
        thread.join()
    over.set()
    watcher.join()
    assert [process.returncode for process in workers] == [-signal.SIGKILL] * 4 + [0] * 4
    assert acknowledged[4:] == [each] * 4
    # Of each that was killed, one more may have been counted, and its acknowledgement not been said.
    assert sum(acknowledged) <= total(tmp_path) <= sum(acknowledged) + 4
    assert falls == [], "a counter never falls"
    CountsFile(tmp_path).add(ONE)
    assert sum(1 for _ in tmp_path.iterdir()) <= 2, "one file, and what a kill left at most until the next compaction"


def test_a_file_that_grew_is_replaced_by_its_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(counts, "COMPACT_BYTES", 2000)
    file = CountsFile(tmp_path)
    (tmp_path / ".tmp-0123.log").write_text("of a process that was killed")
    for number in range(300):
        file.add(increments(TOKENS, 0.1 * number, {}))
        assert file.path.stat().st_size < 2200
    expected = 0.0
    for number in range(300):
        expected += 0.1 * number
    assert file.totals() == {KEY: expected}
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_a_compaction_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise StorageError("cannot write: no space left on device")

    monkeypatch.setattr(counts, "COMPACT_BYTES", 500)
    monkeypatch.setattr(counts, "write_atomic", full)
    for _ in range(40):
        CountsFile(tmp_path).add(ONE)
    assert total(tmp_path) == 40


def test_without_locks_counts_are_added_and_nothing_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(counts, "COMPACT_BYTES", 500)
    monkeypatch.setattr(fcntl, "flock", none)
    for _ in range(40):
        CountsFile(tmp_path).add(ONE)
    assert total(tmp_path) == 40
    assert (tmp_path / NAME).stat().st_size > 40 * 40


def test_who_was_stopped_with_the_lock_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    CountsFile(tmp_path).add(ONE)
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(StorageError, match=r"cannot write .*counts-1.log"):
        CountsFile(tmp_path).add(ONE)
    with counting(lambda: tmp_path):
        count(TOKENS)
    os.close(holder)
    CountsFile(tmp_path).add(ONE)
    assert total(tmp_path) == 2


def test_damage_costs_the_lines_that_it_hit(tmp_path: Path):
    file = CountsFile(tmp_path)
    for _ in range(3):
        file.add(ONE)
    data = bytearray(file.path.read_bytes())
    data[len(data) // 2] ^= 1
    file.path.write_bytes(bytes(data) + b"\0\xff\n" + b"0" * 100)
    file.add(ONE)
    assert total(tmp_path) == 3


def test_what_can_not_be_written_or_read_is_said_and_costs_a_command_nothing(tmp_path: Path):
    (tmp_path / "file").touch()
    file = CountsFile(tmp_path / "file")
    with pytest.raises(StorageError, match="cannot write"):
        file.add(ONE)
    with pytest.raises(StorageError, match="cannot read"):
        file.totals()
    (tmp_path / NAME).mkdir()
    with pytest.raises(StorageError, match="is a directory"):
        CountsFile(tmp_path).add(ONE)
    with counting(lambda: tmp_path):
        count(TOKENS)


def test_nothing_is_written_through_a_link_or_into_a_pipe(tmp_path: Path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / NAME).symlink_to(tmp_path / "mine")
    with pytest.raises(StorageError, match="cannot write"):
        CountsFile(tmp_path).add(ONE)
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / NAME).unlink()
    os.mkfifo(tmp_path / NAME)
    with pytest.raises(StorageError, match="cannot write"):
        CountsFile(tmp_path).add(ONE)


def test_a_process_counts_only_where_it_was_told_to(tmp_path: Path):
    count(TOKENS)
    with counting(lambda: tmp_path / "outer"):
        count(TOKENS, 2)
        with counting(lambda: tmp_path / "inner"):
            count(TOKENS, 3)
        count(TOKENS, 4)
    count(TOKENS, 5)
    assert (total(tmp_path / "outer"), total(tmp_path / "inner")) == (6, 3)
    assert total(tmp_path / "never") == 0


def test_what_is_collected_is_kept_by_who_adds_it(tmp_path: Path):
    """As a cluster's worker counts, and the run that it works for keeps; two threads of one worker lose nothing."""
    tokens = ("proteus_embedding_tokens_total", ())
    with counting(lambda: tmp_path):
        first, second = collecting(), collecting()
        one = first.__enter__()
        count("proteus_embedding_tokens_total", 1)
        two = second.__enter__()
        count("proteus_embedding_tokens_total", 2)
        first.__exit__(None, None, None)
        count("proteus_embedding_tokens_total", 4)
        second.__exit__(None, None, None)
        assert CountsFile(tmp_path).totals() == {}
        assert (one, two) == ({tokens: 1}, {tokens: 6})
        add(one)
        add(two)
        add({})
        count("proteus_embedding_tokens_total", 8)
    assert CountsFile(tmp_path).totals() == {tokens: 15}
    add(one)  # nobody keeps it: nothing happens
    assert CountsFile(tmp_path).totals() == {tokens: 15}
