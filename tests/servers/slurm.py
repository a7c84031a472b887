"""A real SLURM on the loopback, in a folder of its own: munged, slurmctld and one slurmd.

Debian's packages slurm-wlm and munge, and root: slurmd starts jobs as whoever submitted them. Nothing of the system's own
SLURM is read or written: all names, ports and the key are of this folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemons import Server, free_port

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue", "setpriv")


def missing() -> str:
    """Return why there can be no SLURM here; nothing where there can."""
    absent = [name for name in COMMANDS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root"


def _path() -> str:
    return os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


class Slurm:
    """One node of `cpus` processors: fewer or more than there are, as the test needs."""

    def __init__(self, folder: Path, cpus: int = 2) -> None:
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        host = socket.gethostname().partition(".")[0]
        self.conf = folder / "slurm.conf"
        self.environment = {"SLURM_CONF": str(self.conf), "PATH": _path()}
        key, munge = folder / "munge.key", folder / "munge.socket"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        values = {
            "ClusterName": "loopback",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={munge}",
            "CryptoType": "crypto/munge",
            "SlurmctldPort": free_port(),
            "SlurmdPort": free_port(),
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd.pid",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool",
            "SlurmdParameters": "config_overrides",  # as many processors as said here
            "ProctrackType": "proctrack/linuxproc",  # no control groups: a container has none to give
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU",
            "ReturnToService": 2,
            "SchedulerParameters": "sched_interval=1,batch_sched_delay=0",
            "KillWait": 10,
            "AccountingStorageType": "accounting_storage/none",
            "JobAcctGatherType": "jobacct_gather/none",
        }
        lines = [f"{name}={value}" for name, value in values.items()]
        lines.append(f"NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=8000 State=UNKNOWN")
        lines.append(f"PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP")
        self.conf.write_text("\n".join(lines) + "\n")
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}"]
        munged += [f"--pid-file={folder / 'munge.pid'}", f"--seed-file={folder / 'munge.seed'}"]
        munged += [f"--log-file={folder / 'munged.own.log'}"]
        self._servers = [
            Server(munged, folder / "munged.log", munge.exists, self.environment),
            Server(
                ["slurmctld", "-D", "-f", str(self.conf)], folder / "slurmctld.log", self._answers, self.environment
            ),
            Server(
                ["slurmd", "-D", "-N", host, "-f", str(self.conf)], folder / "slurmd.log", self._idle, self.environment
            ),
        ]

    def ask(self, *command: str) -> str:
        """Run one of SLURM's commands."""
        env = os.environ | self.environment
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    def _answers(self) -> bool:
        return self._succeeds("scontrol", "ping")

    def _idle(self) -> bool:
        return (
            self._succeeds("sinfo", "--noheader", "--format=%t")
            and self.ask("sinfo", "--noheader", "-o", "%t") == "idle"
        )

    def _succeeds(self, *command: str) -> bool:
        env = os.environ | self.environment
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode == 0 and "DOWN" not in done.stdout

    def jobs(self, *states: str) -> list[str]:
        """Return the ids of jobs in these states; of all that are not over where none is given."""
        wanted = [f"--states={','.join(states)}"] if states else []
        return self.ask("squeue", "--noheader", "--format=%i", *wanted).split()

    def start(self) -> None:
        for server in self._servers:
            server.start()

    def kill(self) -> None:
        """Cancel what runs, and kill -9 the daemons."""
        if jobs := self.jobs():
            self.ask("scancel", "--signal=KILL", "--full", *jobs)
        for server in reversed(self._servers):
            server.kill()


@contextmanager
def slurm(folder: Path, cpus: int = 2) -> Iterator[Slurm]:
    cluster = Slurm(folder, cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.kill()
