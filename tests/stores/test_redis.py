"""Redis may die, hang, forget or lie at any moment: what asks it goes on, soon, and with nothing wrong."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis_server import RedisServer, redis_server

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.stores.redis import FIRST_PAUSE_S, MOST_BYTES, RedisClient
from proteus_pipeline.stores.redis_connection import TRIP_S
from proteus_pipeline.stores.sealed import Seal

# What a call may take: a round trip at its longest, and what a busy machine adds.
BOUND_S = TRIP_S + 1.0
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "redis.md"
(RULES,) = re.findall(r"^user proteus on >PASSWORD (.*)$", DOCUMENT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def client(server: RedisServer) -> Iterator[RedisClient]:
    raw(server).flushall()
    client = RedisClient(server.url)
    yield client
    client.close()


def raw(server: RedisServer) -> redis.Redis:
    return redis.Redis.from_url(server.url)


def all_of(client: RedisClient) -> dict[str, object]:
    """What each method says, each within its bound."""
    calls = {
        "get": lambda: client.get_many("v", ["a"]),
        "put": lambda: client.put_many("v", {"a": b"1"}, ttl=60),
        "delete": lambda: client.delete("v", ["a"]),
        "increment": lambda: client.increment("c", {"x": 1}),
        "counters": lambda: client.counters("c", ["x"]),
        "generation": lambda: client.generation("g"),
        "generations": lambda: client.generations(["g"]),
        "advance": lambda: client.advance("g"),
        "lease": lambda: lease(client),
        "answers": lambda: client.answers,
    }
    said = {}
    for name, call in calls.items():
        began = time.monotonic()
        said[name] = call()
        assert time.monotonic() - began < BOUND_S, name
    return said


def lease(client: RedisClient) -> bool:
    with client.lease("l", seconds=5) as held:
        return held


NOTHING = {
    "get": {},
    "put": 0,
    "delete": False,
    "increment": False,
    "counters": {},
    "generation": None,
    "generations": {},
    "advance": None,
    "lease": False,
    "answers": False,
}


def test_thousands_of_values_come_back(client: RedisClient) -> None:
    values = {f"{i:032x}": bytes([i % 256]) * (i % 700) for i in range(2000)}
    assert client.put_many("vector", values, ttl=60) == 2000
    assert client.get_many("vector", [*values, "absent"]) == values
    assert client.delete("vector", list(values))
    assert client.get_many("vector", list(values)) == {}


def test_a_value_is_forgotten_in_its_time(client: RedisClient, server: RedisServer) -> None:
    client.put_many("v", {"a": b"1"}, ttl=100)
    assert 90 < int(raw(server).ttl("proteus:1:v:a")) <= 100  # type: ignore[arg-type]


def test_values_that_are_too_large_go_neither_in_nor_out(client: RedisClient, server: RedisServer) -> None:
    assert client.put_many("v", {"large": bytes(MOST_BYTES), "a": b"1"}, ttl=60) == 1
    raw(server).set("proteus:1:v:large", Seal().seal(b"proteus:1:v:large", bytes(2 * MOST_BYTES)))
    assert client.get_many("v", ["large", "a"]) == {"a": b"1"}
    assert client.rejected == 1
    # More than a round trip may bring: nothing of it is believed, and memory stays bounded.
    raw(server).mset({f"proteus:1:v:{i}": bytes(20 << 20) for i in range(3)})
    assert client.get_many("v", ["0", "1", "2"]) == {}
    raw(server).flushall()


def test_what_somebody_else_put_there_is_refused_and_counted(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """An attacker who knows the format, the key and all, but not the secret."""
    client, forger = RedisClient(server.url, seal=Seal("s" * 16)), Seal("t" * 16)
    names = [f"{i:032x}" for i in range(1000)]
    client.put_many("vector", {name: name.encode() for name in names}, ttl=60)
    here = raw(server)
    for i, name in enumerate(names):
        key = f"proteus:1:vector:{name}"
        if i % 3 == 0:  # swapped: sound, and another one's
            here.set(key, here.get(f"proteus:1:vector:{names[i - 1]}") or b"")
        elif i % 3 == 1:
            here.set(key, (forger if i % 2 else Seal()).seal(key.encode(), b"poison"))
    found = client.get_many("vector", names)
    assert found == {name: name.encode() for i, name in enumerate(names) if i % 3 == 2}
    assert client.rejected == 667
    assert len(caplog.records) == 1 and "not what was put" in caplog.text


def test_counters_and_generations_that_somebody_spoiled_are_nothing_or_new(
    client: RedisClient, server: RedisServer
) -> None:
    assert client.increment("cache", {"hits": 2, "misses": 1}) and client.increment("cache", {"hits": 3})
    assert client.counters("cache", ["hits", "misses", "other"]) == {"hits": 5, "misses": 1, "other": 0}
    raw(server).hset("proteus:1:counters:cache", "hits", "many")
    assert client.counters("cache", ["hits"]) == {"hits": 0}
    raw(server).set("proteus:1:generation:g", "../../etc/passwd")
    assert client.generations(["g"]) == {"g": ""}
    new = client.generation("g")
    assert new and client.generations(["g"]) == {"g": new}


def test_a_generation_is_one_for_all_until_it_is_advanced_or_lost(client: RedisClient, server: RedisServer) -> None:
    other = RedisClient(server.url)
    assert client.generations(["g"]) == {"g": ""}
    first = client.generation("g")
    assert first and other.generation("g") == first
    second = other.advance("g")
    assert second != first and client.generation("g") == second
    raw(server).flushall()
    assert client.generation("g") not in {first, second, None}


def test_a_lease_has_one_holder_and_a_wait_has_an_end(client: RedisClient, server: RedisServer) -> None:
    other = RedisClient(server.url)
    with client.lease("load", seconds=30) as held:
        began = time.monotonic()
        with other.lease("load", seconds=30, wait=0.3) as too:
            assert held and not too
        assert 0.3 <= time.monotonic() - began < BOUND_S
    with other.lease("load", seconds=0.1), client.lease("load", seconds=30, wait=5) as held:
        assert held  # the other's time was over; and giving its lease back now does not take this one
    with other.lease("load", seconds=30) as held:
        assert held


@pytest.mark.parametrize("how", ["killed", "paused"])
def test_a_dead_and_a_hung_server_cost_one_wait_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    with redis_server(tmp_path) as server:
        client = RedisClient(server.url)
        before = all_of(client)
        assert before["put"] == 1 and before["answers"] and client.failures == 0
        server.kill() if how == "killed" else server.pause()
        assert all_of(client) == NOTHING
        began = time.monotonic()
        for _ in range(200):
            client.get_many("v", ["a"])
        assert time.monotonic() - began < 0.5  # it is not asked again so soon
        server.start() if how == "killed" else server.resume()
        time.sleep(FIRST_PAUSE_S)
        deadline = time.monotonic() + 20
        while not client.answers and time.monotonic() < deadline:
            time.sleep(0.1)
        assert client.put_many("v", {"a": b"2"}, ttl=60) == 1
        assert client.get_many("v", ["a"]) == {"a": b"2"}
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    assert "same results" in caplog.text


def test_pauses_grow_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    client = RedisClient(f"redis://127.0.0.1:{unused_port()}/0")
    pauses = []
    for _ in range(9):
        asked = client.failures
        began = now[0]
        while client.failures == asked:
            client.get_many("v", ["a"])
            now[0] += 0.5
        pauses.append(now[0] - began)
    assert pauses[:5] == [0.5, 1.0, 2.0, 4.0, 8.0] and pauses[-1] == 60.0


def test_a_server_that_drips_is_slow_too(caplog: pytest.LogCaptureFixture) -> None:
    """A byte at a time keeps a socket's timeout from ever ending; the round trip ends all the same."""
    with drip(b"$100000\r\n" + b"x" * 100_000, 0.05) as port:
        client = RedisClient(f"redis://127.0.0.1:{port}/0")
        began = time.monotonic()
        assert client.get_many("v", ["a"]) == {}
        assert time.monotonic() - began < BOUND_S
    assert "in time" in caplog.text


def test_a_handshake_of_tls_that_drips_ends_too(caplog: pytest.LogCaptureFixture) -> None:
    with drip(b"\x16\x03\x03\x40\x00" + bytes(1000), 0.1) as port:
        client = RedisClient(f"rediss://127.0.0.1:{port}/0")
        began = time.monotonic()
        assert client.get_many("v", ["a"]) == {}
        assert time.monotonic() - began < BOUND_S
    assert client.failures == 1


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"*-7\r\n", b":" * 4000, b"*2\r\n+a\r\n", b""])
def test_what_is_no_redis_is_nothing(answer: bytes) -> None:
    with drip(answer, 0) as port:
        client = RedisClient(f"redis://127.0.0.1:{port}/0")
        assert client.get_many("v", ["a"]) == {}
        assert client.failures == 1


def test_passwords_and_acl_users_work_and_are_never_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    rules = ["--user", "default", "off", "--user", "ada", "on", ">hunter2/@", *RULES.split()]
    with redis_server(tmp_path, rules) as server:
        address = server.url.removeprefix("redis://")
        client = RedisClient(f"redis://ada:hunter2%2F%40@{address}")
        said = all_of(client)
        assert client.failures == 0 and said["lease"] and said["answers"] and said["advance"]
        wrong = RedisClient(f"redis://ada:wrong-hunter2@{address}")
        assert all_of(wrong) == NOTHING
        assert "refuses this user or password" in caplog.text
        with pytest.raises(redis.exceptions.NoPermissionError):
            redis.Redis.from_url(f"redis://ada:hunter2%2F%40@{address}").get("other:key")
    for shown in (caplog.text, repr(client), repr(vars(client)), str(client.place), repr(client._redis)):
        assert "hunter2" not in shown


def test_a_server_that_refuses_to_write_is_still_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with redis_server(tmp_path, ["--maxmemory", "3mb", "--maxmemory-policy", "noeviction"]) as server:
        client = RedisClient(server.url)
        assert client.put_many("v", {"a": b"1"}, ttl=60) == 1
        for i in range(40):
            client.put_many("v", {f"{i}": bytes(100_000)}, ttl=60)
        assert client.failures and "OutOfMemoryError" in caplog.text and len(caplog.records) == 1
        assert client.get_many("v", ["a"]) == {"a": b"1"}


def test_threads_that_ask_at_once_get_each_its_own(client: RedisClient) -> None:
    wrong = []

    def work(number: int) -> None:
        for i in range(100):
            name, value = f"{number}-{i}", f"{number}.{i}".encode()
            client.put_many("v", {name: value}, ttl=60)
            if client.get_many("v", [name]) != {name: value}:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not client.failures


def test_without_the_library_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proteus_pipeline.stores.redis.find_spec", lambda name: None if name == "redis" else 1)
    with pytest.raises(ConfigError, match=r"pip install 'proteus_pipeline\[redis\]'"):
        RedisClient("redis://localhost")


def test_the_module_itself_loads_no_library() -> None:
    code = (
        "import sys; from proteus_pipeline.stores.redis import RedisClient; RedisClient('redis://127.0.0.1');"
        "sys.exit('redis' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class drip:  # noqa: N801 - reads as a context
    """A server that sends the same to whoever asks, in pieces, and closes."""

    def __init__(self, answer: bytes, pause: float) -> None:
        self._answer, self._pause = answer, pause
        self._listener = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> int:
        threading.Thread(target=self._serve, daemon=True).start()
        return int(self._listener.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(4096)
                    if not self._pause:
                        connection.sendall(self._answer)
                    for byte in self._answer if self._pause else b"":
                        connection.sendall(bytes([byte]))
                        time.sleep(self._pause)
                except OSError:
                    continue
