"""A scheduler and workers of Dask as a group keeps them: processes of their own, with certificates."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemons import Server, free_port

TLS = ("tls_ca", "tls_cert", "tls_key")


def certificates(folder: Path) -> dict[str, str]:
    """Write one certificate for all, and return the settings that name it."""
    from distributed import Security

    made = Security.temporary().get_tls_config_for_role("client")
    folder.mkdir(parents=True)
    paths = {name: folder / f"{name}.pem" for name in TLS}
    for name, key in zip(TLS, ("ca_file", "cert", "key"), strict=True):
        paths[name].write_text(made[key])
    return {name: str(path) for name, path in paths.items()}


class DaskCluster:
    """A scheduler and some workers, of one thread each."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.tls = certificates(folder / "certificates")
        self.port = free_port()
        self.address = f"tls://127.0.0.1:{self.port}"
        files = [
            "--tls-ca-file",
            self.tls["tls_ca"],
            "--tls-cert",
            self.tls["tls_cert"],
            "--tls-key",
            self.tls["tls_key"],
        ]
        dask = [sys.executable, "-m", "distributed.cli.dask_"]
        common = [*files, "--dashboard-address", "127.0.0.1:0", "--no-dashboard"]
        scheduler = [
            *dask[:2],
            f"{dask[2]}scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--protocol",
            "tls",
        ]
        worker = [*dask[:2], f"{dask[2]}worker", self.address, "--nthreads", "1", "--memory-limit", "0"]
        worker += ["--local-directory", str(folder / "scratch")]
        self.scheduler = Server([*scheduler, *common], folder / "scheduler.log", self._answers)
        self.workers = [Server([*worker, *common], folder / f"{n}.log", lambda: True) for n in range(workers)]

    def _answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True

    def start(self) -> None:
        """Start all; workers join when they are ready."""
        self.scheduler.start()
        for worker in self.workers:
            worker.start()

    def kill(self) -> None:
        """Kill -9 all of it."""
        for server in (*self.workers, self.scheduler):
            server.kill()


@contextmanager
def dask_cluster(folder: Path, workers: int = 2) -> Iterator[DaskCluster]:
    cluster = DaskCluster(folder, workers)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.kill()
