from __future__ import annotations

import fcntl
import gc
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from proteus_pipeline.stores.counts import announcement, counting
from proteus_pipeline.stores.live import FOLDER, Announcement, announced

SAYS = """
import sys, time
from pathlib import Path
from proteus_pipeline.stores.live import Announcement
mine = Announcement(Path(sys.argv[1]))
mine.say({"cpu models": 7})
print("said", flush=True)
time.sleep(60)
"""


def test_what_a_process_says_is_true_until_it_is_killed(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", SAYS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "said\n"
        mine = Announcement(tmp_path)
        mine.say({"cpu models": 1, "cpu limit": 1e12})
        mine.say({"cpu models": 2})
        assert sorted(map(str, announced(tmp_path))) == ["{'cpu models': 2.0}", "{'cpu models': 7.0}"]
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert announced(tmp_path) == [{"cpu models": 2}]
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    del mine
    gc.collect()
    assert announced(tmp_path) == []


def test_what_dead_processes_left_goes_with_the_next_one(tmp_path: Path):
    (tmp_path / FOLDER).mkdir()
    for number in range(5):
        (tmp_path / FOLDER / f"{number}.json").write_text("{}")
    mine = Announcement(tmp_path)
    assert len(list((tmp_path / FOLDER).iterdir())) == 1
    mine.say({})
    assert announced(tmp_path) == [{}]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": "x"}', '{"a": null}', '{"a": 1e999, "b": "x"}', "\0\0"])
def test_what_makes_no_sense_is_passed_over(tmp_path: Path, text: str):
    (tmp_path / FOLDER).mkdir()
    with (tmp_path / FOLDER / "1.json").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(text)
        file.flush()
        assert announced(tmp_path) == []


def test_a_folder_that_can_not_be_written_is_nobodys_fault(tmp_path: Path):
    (tmp_path / FOLDER).touch()
    Announcement(tmp_path).say({"cpu models": 1})
    assert announced(tmp_path) == announced(tmp_path / "none") == []
    assert announcement() is None
    with counting(lambda: tmp_path / "here"):
        assert announcement() is not None
