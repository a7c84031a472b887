"""Dask clusters: processes on this machine, a scheduler that runs already, or SLURM jobs; encrypted unless told otherwise.

A plain scheduler runs whatever it is sent, by whoever reaches its port, as the user who started it. So all traffic is over
TLS, by certificates that are made for one run (``local``, ``slurm``) or given (``scheduler``).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from proteus_pipeline.errors import ClusterError, ConfigError
from proteus_pipeline.serving.settings import GB, CacheSettings
from proteus_pipeline.stores.files import storage_error

if TYPE_CHECKING:
    from distributed import Client, Security

KINDS = ("local", "scheduler", "slurm")
_ADDRESS = re.compile(r"(tls|tcp)://([\w.-]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}", re.ASCII)
_WORD = re.compile(r"[\w.:,@/+-]+", re.ASCII)
# SLURM takes a number alone for minutes, and YAML takes 10:00:00 for a number of seconds.
_WALLTIME = re.compile(r"\d+-\d+(:\d\d){0,2}|\d+(:\d\d){1,2}", re.ASCII)
_MEMORY = re.compile(r"\d+(\.\d+)? ?[kKMGT]i?B?", re.ASCII)
# In a job script these mean something else; what writes the script does not quote.
_UNSAFE_PATH = re.compile(r"[^\w./+=@:,~-]")
_ANSWERS_S = 15.0
_SBATCH_S = 30.0


@dataclass(frozen=True)
class ClusterOptions:
    """Which cluster; see conf/cluster/default.yaml.

    Raises
    ------
    ConfigError
        For a value that is unknown or out of range, or would be something else in a job script.

    """

    kind: str = "local"
    workers: int = 2
    threads: int | None = None
    shard_tokens: int = 32768
    wait_minutes: float = 60.0
    scheduler: str | None = None
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    insecure: bool = False
    queue: str | None = None
    account: str | None = None
    walltime: str = "0-01:00:00"
    cores: int = 4
    memory: str = "8GB"
    interface: str | None = None
    directives: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"cluster.kind is {self.kind!r}", f"use one of {', '.join(KINDS)}")
        for name in ("workers", "threads", "shard_tokens", "cores"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"cluster.{name} is {value}", "use 1 or more")
        if not 0 < self.wait_minutes < float("inf"):
            raise ConfigError(f"cluster.wait_minutes is {self.wait_minutes}", "use a number of minutes above 0")
        for name in ("queue", "account", "interface"):
            value = getattr(self, name)
            if value is not None and not _WORD.fullmatch(value):
                raise ConfigError(f"cluster.{name} is {value!r}", "use one word of letters, digits and . : , @ / + -")
        if not _WALLTIME.fullmatch(self.walltime):
            raise ConfigError(f"cluster.walltime is {self.walltime!r}", "use D-HH:MM:SS, as 0-04:00:00")
        if not _MEMORY.fullmatch(self.memory):
            raise ConfigError(f"cluster.memory is {self.memory!r}", "use a number and a unit, as 8GB")
        for line in self.directives:
            if not line.startswith("-") or not line.isprintable():
                raise ConfigError(f"cluster.directives has {line!r}", "give options of sbatch, as --gres=gpu:1")
        if self.kind == "scheduler":
            self._check_scheduler()

    def _check_scheduler(self) -> None:
        if self.scheduler is None:
            raise ConfigError("cluster.kind=scheduler and cluster.scheduler has no value", "set it to tls://HOST:PORT")
        if not _ADDRESS.fullmatch(self.scheduler):
            # It is not repeated: it may hold a password.
            raise ConfigError("cluster.scheduler is no address of a scheduler", "write it as tls://HOST:PORT")
        if self.scheduler.startswith("tcp:") and not self.insecure:
            raise ConfigError(
                f"cluster.scheduler is {self.scheduler}: without TLS, whoever reaches that port can run code as you",
                "start it with certificates and use tls://, or set cluster.insecure=true on a network that you trust",
            )
        if self.scheduler.startswith("tls:"):
            for name in ("tls_ca", "tls_cert", "tls_key"):
                path = getattr(self, name)
                if path is None:
                    raise ConfigError(
                        f"cluster.{name} has no value", "name the file: the scheduler's address is tls://"
                    )

    def check_usable(self) -> None:
        """Make sure that this machine can use such a cluster; nothing is started.

        Raises
        ------
        ConfigError
            When a library, a command or a file is missing.

        """
        needs = {"distributed": "distributed"} | ({"dask_jobqueue": "dask-jobqueue"} if self.kind == "slurm" else {})
        for module, library in needs.items():
            if importlib.util.find_spec(module) is None:
                raise ConfigError(
                    f"engine=dask needs {library}, which is not installed", "pip install 'proteus_pipeline[cluster]'"
                )
        if self.kind == "slurm" and shutil.which("sbatch") is None:
            raise ConfigError(
                "cluster.kind=slurm needs sbatch, which is not here",
                "run this on a node that may submit jobs, or use cluster.kind=local",
            )
        if self.kind == "scheduler" and str(self.scheduler).startswith("tls:"):
            for name in ("tls_ca", "tls_cert", "tls_key"):
                path = getattr(self, name)
                if not os.access(path, os.R_OK):
                    raise ConfigError(f"cluster.{name}: {path} can't be read", "name the file, in PEM")

    @property
    def threads_each(self) -> int | None:
        """Threads that a worker computes with; None where the worker knows."""
        if self.threads is not None:
            return self.threads
        if self.kind == "local":
            return max(1, len(os.sched_getaffinity(0)) // self.workers)
        return self.cores if self.kind == "slurm" else None

    def memory_each(self, max_memory_gb: float | None) -> float | None:
        """Return what models may take in a worker, in 10^9 bytes: on one machine, the workers share what there is."""
        if self.kind != "local":
            return max_memory_gb
        return CacheSettings(max_memory_gb).host_limit()[0] / GB / self.workers


class Running(NamedTuple):
    """A cluster: its client, what asks anew for the workers that it lost, and what to call it."""

    client: Client
    mend: Callable[[], None]
    name: str


@contextmanager
def running(options: ClusterOptions, folder: Path) -> Iterator[Running]:
    """Start a cluster, or connect to one, until the body ends, however it ends.

    Parameters
    ----------
    options
        Which.
    folder
        For logs and certificates of jobs; every node sees it by this name.

    Raises
    ------
    ConfigError
        When this machine can't use such a cluster.
    ClusterError
        When there is none.

    """
    options.check_usable()
    with _quiet():
        if options.kind == "scheduler":
            with _client(options, str(options.scheduler), _given(options)) as client:
                yield Running(client, lambda: None, str(options.scheduler))
        elif options.kind == "local":
            with _local(options) as (cluster, security), _client(options, cluster, security) as client:
                yield Running(client, lambda: None, "this machine's cluster")
        else:
            with _slurm(options, folder) as (cluster, security), _client(options, cluster, security) as client:
                yield Running(client, lambda: cluster.scale(options.workers), "the SLURM cluster")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Dask's own words back: they tell of what is mended here, and of each worker that is stopped at the end."""
    import distributed

    logger = logging.getLogger(distributed.__name__)
    handlers, propagate = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = [logging.NullHandler()], False
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate


@contextmanager
def _client(options: ClusterOptions, where: Any, security: Security | None) -> Iterator[Client]:
    from distributed import Client

    try:
        client = Client(where, security=security, timeout=_ANSWERS_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(
            f"no scheduler answers at {options.scheduler} ({_line(error)})",
            "look whether it runs there, and takes these certificates",
        ) from error
    try:
        with client.as_current():
            yield client
    finally:
        client.close(timeout=5)


def _given(options: ClusterOptions) -> Security | None:
    from distributed import Security

    if str(options.scheduler).startswith("tcp:"):
        return None
    return Security(
        tls_ca_file=options.tls_ca,
        tls_client_cert=options.tls_cert,
        tls_client_key=options.tls_key,
        require_encryption=True,
    )


@contextmanager
def _local(options: ClusterOptions) -> Iterator[tuple[Any, Security]]:
    import dask
    from distributed import LocalCluster, Security

    security = Security.temporary()
    with (
        tempfile.TemporaryDirectory(prefix="proteus-dask-", ignore_cleanup_errors=True) as scratch,
        dask.config.set(_OF_ONE_RUN),
        _environment_kept([*(dask.config.get("distributed.nanny.pre-spawn-environ") or ()), "PYTHONHASHSEED"]),
        _started(
            LocalCluster,
            n_workers=options.workers,
            threads_per_worker=1,
            host="127.0.0.1",
            protocol="tls://",
            security=security,
            dashboard_address=_NO_PAGES,
            silence_logs=logging.CRITICAL,
            memory_limit=None,
            local_directory=scratch,
        ) as cluster,
    ):
        yield cluster, security


@contextmanager
def _environment_kept(names: Iterable[str]) -> Iterator[None]:
    """Give variables back as they were: Dask sets here, and leaves, that what is started computes with one thread."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_NO_PAGES = "127.0.0.1:0"  # Dask's web pages can't be left out, only be empty
_OF_ONE_RUN: dict[str, Any] = {
    # A shard whose worker died comes back at once: the run counts its attempts, and gives a worker one at a time.
    "distributed.scheduler.allowed-failures": 0,
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
}


@contextmanager
def _slurm(options: ClusterOptions, folder: Path) -> Iterator[tuple[Any, Security]]:
    import dask

    cluster_class = _slurm_class()
    for path in (folder, Path(sys.executable)):
        if _UNSAFE_PATH.search(str(path)):
            raise ConfigError(f"{path} has a character that a job script would read otherwise", "use a path without it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        certificates = tempfile.TemporaryDirectory(dir=folder, prefix=".tls-")  # only its owner may look into it
        security = _written(Path(certificates.name))
    except OSError as error:
        raise storage_error("write", folder, error) from error
    with (
        certificates,
        dask.config.set(_OF_ONE_RUN),
        _started(
            cluster_class,
            cores=1,  # Dask's threads: one shard at a time, which has all of the job's cores
            job_cpu=options.cores,
            processes=1,
            memory=options.memory,
            queue=options.queue,
            account=options.account,
            walltime=options.walltime,
            job_name="proteus",
            job_extra_directives=list(options.directives),
            python=shlex.quote(sys.executable),
            worker_extra_args=["--no-dashboard", "--memory-limit", "0"],  # the job's own limit is SLURM's to keep
            job_script_prologue=["export DASK_DISTRIBUTED__WORKER__HTTP__ROUTES='[]'"],
            log_directory=str(folder),
            security=security,
            protocol="tls://",
            interface=options.interface,
            scheduler_options={"dashboard_address": _NO_PAGES},
            silence_logs="critical",
        ) as cluster,
    ):
        _try_script(cluster.job_script())
        cluster.scale(options.workers)
        yield cluster, security


def _slurm_class() -> Any:
    """Import dask-jobqueue's cluster and keep what Ctrl-C does: 0.9.0 sets on import that it exits, with 0 (its issue 696)."""
    before = signal.getsignal(signal.SIGINT)
    try:
        from dask_jobqueue import SLURMCluster
    except ValueError as error:
        if threading.current_thread() is threading.main_thread():
            raise
        raise ConfigError(
            "cluster.kind=slurm can't be used first in another thread than the main one", "call this in the main thread"
        ) from error
    if before is not None and signal.getsignal(signal.SIGINT) is not before:
        signal.signal(signal.SIGINT, before)
    return SLURMCluster


def _started(cluster: Callable[..., Any], **options: Any) -> Any:
    try:
        return cluster(**options)
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        raise ClusterError(
            f"no cluster could be started ({_line(error)})", "correct cluster.*, or free what it needs"
        ) from error


def _written(folder: Path) -> Security:
    """Return certificates of one run, in files: the jobs read them there, and their command lines hold no more than names."""
    from distributed import Security

    made = Security.temporary().get_tls_config_for_role("worker")
    for name in ("ca_file", "cert", "key"):
        (folder / f"{name}.pem").write_text(made[name], encoding="ascii")
    roles = ("client", "scheduler", "worker")
    files = {f"tls_{role}_{name}": str(folder / f"{name}.pem") for role in roles for name in ("cert", "key")}
    return Security(tls_ca_file=str(folder / "ca_file.pem"), require_encryption=True, **files)


def _try_script(script: str) -> None:
    """Ask SLURM whether it would take such a job: what Dask submits later fails where nobody sees it."""
    try:
        done = subprocess.run(
            ["sbatch", "--test-only"],
            input=script,
            capture_output=True,
            text=True,
            timeout=_SBATCH_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"sbatch does not answer ({_line(error)})", "look at sinfo") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit {done.returncode}"
        raise ClusterError(
            f"SLURM does not take such a job: {said}", "correct cluster.*: queue, account, cores, memory, ..."
        )


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
