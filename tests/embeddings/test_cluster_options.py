"""Which clusters are refused before anything is started."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proteus_pipeline.embeddings.cluster import ClusterOptions, running
from proteus_pipeline.errors import ConfigError
from proteus_pipeline.serving.settings import memory_bytes

TLS = {"tls_ca": "ca.pem", "tls_cert": "cert.pem", "tls_key": "key.pem"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "kubernetes"}, "cluster.kind is 'kubernetes'; use one of local, scheduler, slurm"),
        ({"workers": 0}, "cluster.workers is 0"),
        ({"threads": 0}, "cluster.threads is 0"),
        ({"cores": -1}, "cluster.cores is -1"),
        ({"shard_tokens": 0}, "cluster.shard_tokens is 0"),
        ({"wait_minutes": 0.0}, "cluster.wait_minutes is 0.0"),
        ({"wait_minutes": float("nan")}, "cluster.wait_minutes is nan"),
        ({"wait_minutes": float("inf")}, "cluster.wait_minutes is inf"),
        ({"queue": "a b"}, "cluster.queue is 'a b'"),
        ({"queue": "main\nrm -rf ~"}, "cluster.queue is"),
        ({"account": "$(id)"}, "cluster.account is"),
        ({"interface": ""}, "cluster.interface is ''"),
        ({"walltime": "3600"}, "cluster.walltime is '3600'; use D-HH:MM:SS, as 0-04:00:00"),
        ({"walltime": "1:00\n#SBATCH -x"}, "cluster.walltime is"),
        ({"memory": "8"}, "cluster.memory is '8'; use a number and a unit"),
        ({"memory": "lots"}, "cluster.memory is 'lots'"),
        ({"directives": ["gres=gpu:1"]}, "cluster.directives has 'gres=gpu:1'"),
        ({"directives": ["--gres=gpu:1\nrm"]}, "cluster.directives has"),
        ({"kind": "scheduler"}, "cluster.scheduler has no value"),
        ({"kind": "scheduler", "scheduler": "here"}, "is no address of a scheduler; write it as tls://HOST:PORT"),
        ({"kind": "scheduler", "scheduler": "tls://me:secret@host:1"}, "is no address of a scheduler"),
        ({"kind": "scheduler", "scheduler": "tls://host:1", **TLS, "tls_key": None}, "cluster.tls_key has no value"),
        ({"kind": "scheduler", "scheduler": "tcp://host:1"}, "whoever reaches that port can run code as you"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_in_one_line(values: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        ClusterOptions(**values)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"walltime": "12:00:00", "memory": "1.5 GiB", "queue": "gpu,long", "directives": ["--gres=gpu:1"]},
        {"kind": "scheduler", "scheduler": "tls://[::1]:8786", **TLS},
        {"kind": "scheduler", "scheduler": "tcp://host:8786", "insecure": True},
    ],
)
def test_right_values_are_taken(values: dict[str, Any]):
    assert ClusterOptions(**values)


@pytest.mark.parametrize(
    ("options", "absent", "said"),
    [
        (ClusterOptions(), "distributed", "engine=dask needs distributed, which is not installed; pip install 'proteus"),
        (ClusterOptions("slurm"), "dask_jobqueue", "engine=dask needs dask-jobqueue, which is not installed"),
        (ClusterOptions("slurm"), "", "cluster.kind=slurm needs sbatch, which is not here"),
        (ClusterOptions("scheduler", scheduler="tls://h:1", **TLS), "", "cluster.tls_ca: ca.pem can't be read"),
    ],
)  # fmt: skip
def test_what_is_missing_on_this_machine_is_named(
    options: ClusterOptions, absent: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else there(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught, running(options, tmp_path):
        pass
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_a_job_script_would_read_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(ConfigError, match="a folder has a character"),
        running(ClusterOptions("slurm"), tmp_path / "a folder"),
    ):
        pass


INTERRUPTED = """
import os, signal
from proteus_pipeline.embeddings import cluster
cluster._try_script = lambda _: os.kill(os.getpid(), signal.SIGINT)
try:
    with cluster.running(cluster.ClusterOptions("slurm", workers=1), cluster.Path("jobs")):
        pass
except KeyboardInterrupt:
    print("interrupted")
"""
FROM_A_THREAD = """
import threading
from proteus_pipeline.embeddings import cluster
def use():
    try:
        with cluster.running(cluster.ClusterOptions("slurm"), cluster.Path("jobs")):
            pass
    except cluster.ConfigError as error:
        print(error)
thread = threading.Thread(target=use)
thread.start()
thread.join()
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [(INTERRUPTED, "interrupted"), (FROM_A_THREAD, "call this in the main thread")],
    ids=["interrupted", "from a thread"],
)
def test_ctrl_c_stays_what_it_was_where_dask_jobqueue_is_imported(program: str, said: str, tmp_path: Path):
    # 0.9.0 sets on import that Ctrl-C exits with 0: what asked for a cluster would count as done.
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said in done.stdout, done.stderr
    assert done.returncode == 0


def test_threads_are_shared_between_local_workers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert ClusterOptions(workers=3).threads_each == 2
    assert ClusterOptions(workers=30).threads_each == 1
    assert ClusterOptions(workers=3, threads=7).threads_each == 7
    assert ClusterOptions("slurm", cores=5).threads_each == 5
    assert ClusterOptions("scheduler", scheduler="tls://h:1", **TLS).threads_each is None


def test_local_workers_share_the_memory():
    assert ClusterOptions(workers=4).memory_each(2.0) == 0.5
    assert 0 < ClusterOptions(workers=4).memory_each(None) * 4e9 <= 1.01 * memory_bytes()
    assert ClusterOptions("slurm").memory_each(2.0) == 2.0
    assert ClusterOptions("slurm").memory_each(None) is None
