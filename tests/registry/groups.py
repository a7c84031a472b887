"""A group: an S3 server, a git remote, and any number of clones."""

from __future__ import annotations

import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s3 import BUCKET, S3Server

from proteus_pipeline.registry.distributed import DistributedVersionManager


@dataclass(frozen=True)
class Group:
    """Where the group's versions are: a prefix on S3, and a bare repository."""

    s3: S3Server
    prefix: str
    hub: Path
    redis_url: str | None = None

    @classmethod
    def make(cls, folder: Path, s3: S3Server) -> Group:
        """A group of its own: a prefix that nobody used, and an empty git remote."""
        hub = folder / "the group's.git"
        subprocess.run(["git", "init", "--quiet", "--bare", str(hub)], check=True)
        return cls(s3, f"versions-{secrets.token_hex(4)}", hub)

    @property
    def url(self) -> str:
        return self.s3.url(self.prefix)

    def clone(self, root: Path, **options: Any) -> DistributedVersionManager:
        """A member's manager, of a repository that has nothing in common with the others' but the remote."""
        options = {"max_versions": None, "cache_backend": "redis" if self.redis_url else None} | options
        return DistributedVersionManager(
            storage_path=root, s3_url=self.url, git_remote=str(self.hub), redis_url=self.redis_url, **options
        )

    def published(self) -> dict[str, str]:
        """The remote's tags, as object ids by name."""
        command = ["git", "-C", str(self.hub), "for-each-ref", "--format=%(objectname) %(refname:strip=2)", "refs/tags"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        return {name: oid for oid, name in (line.split(" ", 1) for line in lines)}

    def objects(self) -> dict[str, int]:
        """The bytes of each object on S3, by its MD5."""
        pages = (
            self.s3.client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=BUCKET, Prefix=f"{self.prefix}/files/md5/")
        )
        found = [item for page in pages for item in page.get("Contents", ())]
        return {"".join(item["Key"].split("/")[-2:]): item["Size"] for item in found}
