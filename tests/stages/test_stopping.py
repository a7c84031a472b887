"""A run that is told to stop: the stage is told too, and nothing is left behind, whoever was told and however often."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

RUN = """
import subprocess, sys
from proteus_pipeline.cli.interrupts import interruptions
from proteus_pipeline.stages.pipeline import _ended
with interruptions():
    try:
        with subprocess.Popen([sys.executable, "dvc.py"]) as dvc:
            print("ended by itself", _ended(dvc), flush=True)
    except KeyboardInterrupt as error:
        print(type(error).__name__, dvc.poll(), flush=True)
"""
# As DVC does: Ctrl-C is the stage's to honour, SIGTERM ends it, and a stage is a command of the user's shell.
DVC = """
import os, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.exit(subprocess.run([os.environ["SHELL"], "-c", f"{sys.executable} stage.py; exit $?"]).returncode)
"""
STAGE = """
import os, signal, sys, time
from pathlib import Path
def told(number, frame):
    Path("told").write_text(signal.Signals(number).name)
    sys.exit(7)
signal.signal(signal.SIGTERM, told)
Path("pid.new").write_text(str(os.getpid()))
Path("pid.new").rename("pid")
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("signals", "ended"),
    [
        ([signal.SIGTERM], "Terminated 7"),
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGTERM], "Terminated 7"),
        ([signal.SIGTERM, signal.SIGINT], "Terminated 7"),
        ([signal.SIGINT, signal.SIGTERM], "KeyboardInterrupt 7"),
    ],
)
def test_a_stage_is_told_what_only_the_run_was(signals: list[signal.Signals], ended: str, tmp_path: Path):
    shell = shutil.copy(shutil.which("dash") or "/bin/sh", tmp_path / "some_shell")
    for name, program in (("dvc.py", DVC), ("stage.py", STAGE)):
        (tmp_path / name).write_text(program)
    root = str(Path(__file__).parents[2])
    env = os.environ | {"SHELL": str(shell), "PYTHONPATH": os.pathsep.join((root, os.environ.get("PYTHONPATH", "")))}
    # Ctrl-C is ignored by what a shell runs in the background, and so by what such a test runs.
    restored = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    run = subprocess.Popen(
        [sys.executable, "-c", restored + RUN], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stage = psutil.Process(int((tmp_path / "pid").read_text()))
        for number in signals:
            run.send_signal(number)
            time.sleep(0.3)
        out, _ = run.communicate(timeout=30)
    finally:
        run.kill()
    assert out.split("\n")[0] == ended
    assert (tmp_path / "told").read_text() == "SIGTERM"
    assert not stage.is_running()


def test_a_run_that_nobody_stops_returns_its_code(tmp_path: Path):
    (tmp_path / "dvc.py").write_text("import sys; sys.exit(3)")
    done = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "ended by itself 3"
