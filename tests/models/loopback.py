"""A real HTTP server on the loopback, which can be told to misbehave."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Served:
    """One server: what it holds, how it behaves, and which requests it saw.

    `faults` are used up one a request: ("status", code), ("cut", bytes to send before hanging up), ("length", n),
    ("headers", {name: value}), ("stall", seconds).
    """

    files: dict[str, bytes] = field(default_factory=dict)
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    chunked: bool = False
    length: bool = True
    faults: list[tuple[str, object]] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    port: int = 0

    def url(self, path: str, userinfo: str = "") -> str:
        return f"http://{userinfo}127.0.0.1:{self.port}/{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        served = self.server.served
        served.requests.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
        kind, value = served.faults.pop(0) if served.faults else ("none", None)
        data = served.files.get(self.path.partition("?")[0].removeprefix("/"))
        self.close_connection = True
        if kind == "stall":
            self.server.stop.wait(value)
            return
        status = value if kind == "status" else 404 if data is None else 200
        if status >= 400:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._send(data, kind, value)

    def _send(self, data: bytes, kind: str, value) -> None:
        served = self.server.served
        start, asked = 0, self.headers.get("Range")
        if asked and served.ranges and self.headers.get("If-Range") in {None, served.etag, served.modified}:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(206 if start else 200)
        validators = {"ETag": served.etag, "Last-Modified": served.modified}
        headers = {name: text for name, text in validators.items() if text}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if served.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif served.length:
            headers["Content-Length"] = str(value if kind == "length" else len(data) - start)
        headers |= value if kind == "headers" else {}
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        body = data[start:][: value if kind == "cut" else None]
        served.sent.append(len(body))
        self.wfile.write(b"%x\r\n%b\r\n" % (len(body), body) if served.chunked else body)
        if served.chunked and kind != "cut":
            self.wfile.write(b"0\r\n\r\n")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    served: Served
    stop: threading.Event


@contextmanager
def serving() -> Iterator[Served]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.stop = threading.Event()
        server.served = Served(port=server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.served
        finally:
            server.stop.set()
            server.shutdown()
            thread.join()
