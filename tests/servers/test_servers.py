"""The servers that other tests lean on are real: they keep what was acknowledged, and come back after kill -9."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import redis
from redis_server import redis_server
from s3 import BUCKET, S3Server


def test_what_s3_acknowledged_is_there_after_kill_9(s3: S3Server) -> None:
    client = s3.client()
    client.put_object(Bucket=BUCKET, Key="servers/a", Body=b"abc", IfNoneMatch="*")
    s3.kill()
    s3.start()
    assert client.get_object(Bucket=BUCKET, Key="servers/a")["Body"].read() == b"abc"
    with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=BUCKET, Key="servers/a", Body=b"b", IfNoneMatch="*")


def test_redis_answers_dies_and_comes_back_empty(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        client = redis.Redis.from_url(server.url)
        client.set("a", b"b")
        server.kill()
        with pytest.raises(redis.exceptions.ConnectionError):
            client.get("a")
        server.start()
        assert client.get("a") is None


def test_no_setting_of_the_machine_reaches_a_test() -> None:
    assert not [name for name in os.environ if name.startswith(("AWS_", "PROTEUS_S3", "PROTEUS_REDIS"))]
