"""A real Prometheus on the loopback, from Debian's packages."""

from __future__ import annotations

import json
import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from daemons import Server, free_port

installed = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed: apt-get install prometheus",
)
# Seconds between scrapes, and longest a scrape may take.
EVERY = 2
_CONFIG = """\
global: {{scrape_interval: {every}s, scrape_timeout: {every}s, evaluation_interval: {every}s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: proteus
    static_configs: [{{targets: ["{target}"]}}]
"""


class PrometheusServer(Server):
    """A server that scrapes one target, and evaluates a file of rules."""

    def __init__(self, folder: Path, target: str, rules: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.address = f"127.0.0.1:{free_port()}"
        (folder / "prometheus.yml").write_text(_CONFIG.format(every=EVERY, rules=json.dumps(str(rules)), target=target))
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        super().__init__(
            ["prometheus", *options, f"--web.listen-address={self.address}"], folder / "prometheus.log", self._ready_now
        )

    def _ready_now(self) -> bool:
        return self._get("-/ready").startswith(b"Prometheus")

    def _get(self, path: str) -> bytes:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"http://{self.address}/{path}", timeout=10
        ) as answer:
            return bytes(answer.read())

    def api(self, path: str, **parameters: str) -> Any:
        """Return what the server's API says, or fail with its words."""
        said = json.loads(self._get(f"api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
        assert said["status"] == "success", said
        return said["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return what an expression comes to now: labels and a number each."""
        found = self.api("query", query=expression)["result"]
        return [(sample["metric"], float(sample["value"][1])) for sample in found]


@contextmanager
def prometheus_server(folder: Path, target: str, rules: Path) -> Iterator[PrometheusServer]:
    server = PrometheusServer(folder, target, rules)
    server.start()
    try:
        yield server
    finally:
        server.kill()
