"""``proteus monitor``: the metrics, as Prometheus text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.cli.verbs import home, print_json
from proteus_pipeline.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from proteus_pipeline.stages.monitoring import Monitor

PORT = 9750
_LAST_PORT = 65535
_EPILOG = """\
docs/monitoring.md explains each metric; docs/grafana-dashboard.json and docs/alert-rules.yml are for Grafana and Prometheus.
"""


def add_to(verbs: Any) -> None:
    this = verbs.add_parser(
        "monitor",
        help="the metrics, as Prometheus text",
        description="Versions, caches, and what commands and stages counted: as Prometheus text on stdout.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    this.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, such as cache.path=PATH")
    this.add_argument("--home", help="the registry, where it is not this project's")
    way = this.add_mutually_exclusive_group()
    way.add_argument("--json", action="store_true", help="print JSON")
    way.add_argument(
        "--textfile", type=Path, metavar="PATH", help="write a file for node_exporter's textfile collector"
    )
    way.add_argument(
        "--serve",
        nargs="?",
        const=str(PORT),
        metavar="PORT",
        help=f"answer scrapes on 127.0.0.1 alone (default {PORT}; 0 for any that is free)",
    )
    this.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    words = [word for word in args.overrides if "=" not in word]
    if words:
        raise ConfigError(f"{words[0]!r} is no KEY=VALUE", "write --serve PORT or --textfile PATH, or see --help")
    port = None if args.serve is None else _port(args.serve)
    if args.textfile is not None and args.textfile.suffix != ".prom":
        raise ConfigError(f"--textfile {args.textfile} does not end in .prom", "node_exporter reads no other files")
    from proteus_pipeline.stages.monitoring import Monitor

    monitor = Monitor(home(args), args.overrides)
    if port is not None:
        return _serve(monitor, port)
    readings, errors = monitor.measure()
    if args.textfile is not None:
        from proteus_pipeline.stores.files import write_atomic

        # node_exporter runs as a user of its own.
        write_atomic(args.textfile, readings.text().encode(), mode=0o644)
    elif args.json:
        print_json({"home": str(monitor.home), "metrics": readings.to_json()})
    else:
        print(readings.text(), end="")
    # What there is has been said; the first error says the rest, and is this command's.
    for error in errors[1:]:
        _warn(error)
    if errors:
        raise errors[0]
    return 0


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text.lstrip("0")[:6] or 0) > _LAST_PORT:
        raise ConfigError(f"--serve {text!r} is no port", f"use a number from 0, for any that is free, to {_LAST_PORT}")
    return int(text.lstrip("0") or 0)


class _Collector:
    """Measures at each scrape; what can't be measured is said once, until it can again."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._said: set[str] = set()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of this moment."""
        readings, errors = self._monitor.measure()
        now = {str(error): error for error in errors}
        for text in now.keys() - self._said:
            _warn(now[text])
        self._said = set(now)
        return readings.families()


def _serve(monitor: Monitor, port: int) -> int:
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(monitor))
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise StorageError(f"cannot listen at 127.0.0.1:{port}: {why}", "choose another: --serve PORT") from error
    try:
        print(f"http://127.0.0.1:{server.server_port}/metrics", flush=True)
        thread.join()
    except KeyboardInterrupt:
        print("stopped")
    finally:
        server.shutdown()
        server.server_close()
    return 0


def _warn(error: Exception) -> None:
    print(f"warning: {' '.join(str(error).split())}", file=sys.stderr)
