"""A group's registry under races, kill -9 and servers that die or hang: one wins, nothing is half there, everything ends."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import redis
from conftest import git, make_checkpoint
from groups import Group
from redis_server import RedisServer, redis_server
from registering import Given
from s3 import BUCKET

from proteus_pipeline.errors import ProteusError, StorageError, VersionConflictError
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry import bucket
from proteus_pipeline.registry.hints import TRUSTED_S

TORTURE = os.environ.get("PROTEUS_TORTURE") == "1"
ROUNDS = 20 if TORTURE else 1
KILLS = 20 if TORTURE else 2
RACERS, CLONES = 6, 3
FORK = multiprocessing.get_context("fork")  # what a race or a kill is about is not the import of torch


@cache
def weights(seed: int) -> Checkpoint:
    return make_checkpoint(layers=1, width=16, heads=2, seed=seed)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path / "redis") as made:
        yield made


@dataclass(frozen=True)
class Outcome:
    round: int
    racer: int
    kind: str
    said: str


def race(group: Group, folder: Path, disturb: Callable[[], None] = lambda: None) -> list[Outcome]:
    """Have every racer register its own weights, round after round, all at the same moment; two work in each clone."""
    barrier, results = FORK.Barrier(RACERS), FORK.Queue()

    def run(racer: int) -> None:
        for turn in range(ROUNDS):
            barrier.wait(120)
            manager = group.clone(folder / f"clone-{racer % CLONES}")
            while True:
                try:
                    won = manager.register_version(Given("m", weights(racer)), f"1.{turn}.0")
                    results.put(Outcome(turn, racer, "won", won.version))
                except StorageError as error:
                    if "can't be reached" in str(error) or "DVC remote" in str(error):
                        continue  # S3 is away for a moment: its user would run the command again
                    results.put(Outcome(turn, racer, type(error).__name__, str(error)))
                except ProteusError as error:
                    results.put(Outcome(turn, racer, type(error).__name__, str(error)))
                break

    for racer in range(RACERS):
        weights(racer)
    racers = [FORK.Process(target=run, args=(racer,)) for racer in range(RACERS)]
    for process in racers:
        process.start()
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + 60 + 30 * ROUNDS
    while len(outcomes) < RACERS * ROUNDS and time.monotonic() < deadline:
        disturb()
        with suppress(queue.Empty):
            outcomes.append(results.get(timeout=random.uniform(0.5, 2)))
    for process in racers:
        process.join(60)
    assert [process.exitcode for process in racers] == [0] * RACERS
    return outcomes


def assert_no_orphan(group: Group, clones: list[Path]) -> None:
    """Every tag that is visible anywhere is the remote's, and has all of its weights on S3, whole."""
    published, stored = group.published(), group.objects()
    for root in clones:
        local = git(root, "for-each-ref", "--format=%(refname:strip=2) %(objectname)", "refs/tags").splitlines()
        assert dict(line.split(" ") for line in local).items() <= published.items()
        ledger = git(root, "for-each-ref", "--format=%(refname) %(objectname)", "refs/proteus/ledger").splitlines()
        assert {line.removeprefix("refs/proteus/ledger/") for line in ledger} == set(local)
    client = group.s3.client()
    for tag in published:
        if "#" in tag or "%" in tag:
            continue
        message = git(group.hub, "cat-file", "tag", tag).partition("\n\n")[2]
        md5 = json.loads(message[message.index("{") : message.rindex("}") + 1])["weights"]["md5"]
        listing = client.get_object(Bucket=BUCKET, Key=f"{group.prefix}/files/md5/{md5[:2]}/{md5[2:]}")["Body"].read()
        assert {entry["md5"] for entry in json.loads(listing)} <= stored.keys(), tag


def assert_decided(group: Group, folder: Path, outcomes: list[Outcome]) -> None:
    """In each round one has won, all others know by whom, and a newcomer gets the winner's weights."""
    newcomer = group.clone(folder / "newcomer")
    for turn in range(ROUNDS):
        mine = [outcome for outcome in outcomes if outcome.round == turn]
        [winner] = [outcome for outcome in mine if outcome.kind == "won"]
        losers = [outcome for outcome in mine if outcome is not winner]
        assert [loser.kind for loser in losers] == ["VersionConflictError"] * (RACERS - 1), losers
        digest = weights(winner.racer).model_digest
        assert all(digest in loser.said for loser in losers), losers
        assert newcomer.get_version("m", f"1.{turn}.0").checkpoint.model_digest == digest
    assert [e.sequence for e in newcomer.history("m").events] == list(range(1, ROUNDS + 1))


@pytest.mark.torture
def test_of_six_who_race_in_three_clones_one_wins_while_redis_hangs(group: Group, server: RedisServer, tmp_path: Path):
    group = replace(group, redis_url=server.url)
    server.pause()
    outcomes = race(group, tmp_path)
    assert_decided(group, tmp_path, outcomes)
    assert_no_orphan(group, [tmp_path / f"clone-{number}" for number in range(CLONES)])


@pytest.mark.torture
def test_of_six_who_race_one_wins_while_s3_dies_and_comes_back(group: Group, tmp_path: Path):
    def kill_and_start() -> None:
        group.s3.kill()
        group.s3.start()

    outcomes = race(group, tmp_path, kill_and_start)
    assert_decided(group, tmp_path, outcomes)
    assert_no_orphan(group, [tmp_path / f"clone-{number}" for number in range(CLONES)])


@pytest.mark.torture
def test_a_registration_that_is_killed_is_whole_or_absent_and_the_same_command_completes_it(
    group: Group, tmp_path: Path
):
    root, second = tmp_path / "clone", group.clone(tmp_path / "second")
    began = time.monotonic()
    group.clone(root).register_version(Given("m", weights(0)), "1.0.0")
    took = time.monotonic() - began
    killed = 0
    for turn in range(1, KILLS + 1):
        number = f"1.{turn}.0"
        weights(turn)

        def register(turn: int = turn, number: str = number) -> None:
            os.setsid()
            group.clone(root).register_version(Given("m", weights(turn)), number)

        process = FORK.Process(target=register)
        process.start()
        process.join(random.uniform(0.05, 1.1) * took)
        if process.is_alive():
            killed += 1
            try:
                os.killpg(process.pid or 0, signal.SIGKILL)  # with the git that it may be running
            except ProcessLookupError:
                process.kill()  # before it had a group of its own
        process.join()
        assert_no_orphan(group, [])
        if number in {v.version for v in second.list_versions("m")}:
            assert second.get_version("m", number).checkpoint.model_digest == weights(turn).model_digest
        assert group.clone(root).register_version(Given("m", weights(turn)), number).version == number
        assert second.get_version("m", number).checkpoint.model_digest == weights(turn).model_digest
        assert_no_orphan(group, [root, second.root])
    assert killed or not TORTURE
    assert group.clone(root).verify() == []


def test_s3_that_hangs_ends_in_an_error_and_nothing_is_registered(
    group: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bucket, "_READ_S", "1")
    manager, second = group.clone(tmp_path / "clone"), group.clone(tmp_path / "second")
    manager.register_version(Given("m", weights(0)), "1.0.0")
    group.s3.pause()
    try:
        for use in (
            lambda: manager.register_version(Given("m", weights(1)), "1.1.0"),
            lambda: second.get_version("m", "1.0.0").checkpoint,
        ):
            began = time.monotonic()
            with pytest.raises(StorageError, match="Read timeout") as caught:
                use()
            assert time.monotonic() - began < 60
            assert "\n" not in str(caught.value)
    finally:
        group.s3.resume()
    assert list(group.published()) == ["m@v1.0.0"]
    assert manager.register_version(Given("m", weights(1)), "1.1.0").version == "1.1.0"
    assert second.get_version("m", "1.0.0").checkpoint.model_digest == weights(0).model_digest


# Redis


def test_redis_changes_nothing_but_the_time(
    group: Group, server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Alive, flushed, poisoned, replayed, hung or dead: what a clone sees is what was published."""
    group = replace(group, redis_url=server.url)
    one, two = group.clone(tmp_path / "one"), group.clone(tmp_path / "two")
    client = redis.Redis.from_url(server.url)
    kept: dict[bytes, bytes] = {}

    def poison() -> None:
        for key in client.scan_iter("*"):
            client.delete(key)
            client.set(key, b"\x00 what nobody wrote")

    def replay() -> None:
        for key, value in kept.items():
            client.set(key, value)

    disturbances = [
        lambda: None,
        client.flushall,
        poison,
        replay,
        server.pause,
        server.resume,
        server.kill,
        server.start,
    ]
    for turn, disturb in enumerate(disturbances):
        disturb()
        began = time.monotonic()
        one.register_version(Given("m", weights(turn)), f"1.{turn}.0")
        assert two.resolve("m").version == f"1.{turn}.0"
        assert two.resolve("m@latest").version == f"1.{turn}.0"
        assert time.monotonic() - began < 60
        if turn == 0:
            kept = {key: client.get(key) for key in client.scan_iter("*") if client.type(key) == b"string"}
            assert kept
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([line for line in said if "going on without it" in line]) <= 2, "each member's client warns once"


def test_a_hint_spares_looks_and_what_came_past_redis_shows_after_a_moment(
    group: Group, server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hinted = replace(group, redis_url=server.url).clone(tmp_path / "hinted")
    without = group.clone(tmp_path / "without")
    looks = []
    asked = hinted._git.remote_refs
    monkeypatch.setattr(hinted._git, "remote_refs", lambda: looks.append(1) or asked())
    without.register_version(Given("m", weights(0)), "1.0.0")
    assert hinted.resolve("m").version == "1.0.0"
    before = len(looks)
    assert {hinted.resolve("m").version for _ in range(20)} == {"1.0.0"}
    assert len(looks) - before <= 1 + 20 * 0.5 / TRUSTED_S
    stamp = hinted.stamp("m")
    without.register_version(Given("m", weights(1)), "1.1.0")  # by a member who has no Redis
    time.sleep(TRUSTED_S)
    assert hinted.stamp("m") != stamp
    assert hinted.resolve("m").version == "1.1.0"
    assert without.stamp("m") is None, "nobody tells: each look-up looks"
    with pytest.raises(VersionConflictError):
        hinted.register_version(Given("m", weights(2)), "1.0.0")
    assert (hinted.counted("proteus_version_conflicts_total"), without.counted("conflict")) == (1, None)
