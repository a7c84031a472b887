"""Pooled vectors in Redis: what one machine computed is a hit on another, and nothing that is wrong, old or unwanted is."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from conftest import make_checkpoint
from entries import HERE, THERE
from hypothesis import given
from hypothesis import strategies as st
from redis_server import RedisServer, redis_server

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.embedder import Outcome, embed
from proteus_pipeline.embeddings.hot import TTL_S, Offered, decode, encode
from proteus_pipeline.embeddings.index import Attestation, SegmentHeader
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.embeddings.usage import uses
from proteus_pipeline.models.encoder import Encoder, make_encoder
from proteus_pipeline.stores.redis import RedisClient
from proteus_pipeline.stores.sealed import Seal

RECIPE = Recipe(layer=2)
TRUNK = "f" * 32
SEQUENCES = [("MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 3)[i : i + 10 + 2 * i] for i in range(12)]
GOLDEN = Path(__file__).with_name("golden_hot.json")


@pytest.fixture(scope="module")
def real() -> Encoder:
    return make_encoder(make_checkpoint())


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(one_server: RedisServer) -> RedisServer:
    redis.Redis.from_url(one_server.url).flushall()
    return one_server


class Machine:
    """A cache of its own, a device class of its own, and the Redis that all share."""

    def __init__(
        self, path: Path, encoder: Encoder, url: str, device_class: str = HERE, accept: str = "any", secret: str = ""
    ) -> None:
        self.encoder, self.device_class = encoder, device_class
        self.client = RedisClient(url, seal=Seal(secret or None))
        self.cache = EmbeddingCache(path, redis=self.client, accept=accept, device_class=lambda: device_class)

    def embed(self, sequences: list[str] = SEQUENCES, recipe: Recipe = RECIPE) -> Outcome:
        def attest() -> tuple[str, str]:
            return self.device_class, "2.13.0"

        return embed(
            sequences, trunk=TRUNK, recipe=recipe, cache=self.cache, encoder=lambda: self.encoder, attest=attest
        )

    def arrays(self, recipe: Recipe = RECIPE) -> dict[str, bytes]:
        keys = [recipe.key(TRUNK, s) for s in SEQUENCES]
        return {entry.key: array.tobytes() for entry, array in self.cache.find(keys)}


def all_keys(server: RedisServer) -> list[bytes]:
    return sorted(redis.Redis.from_url(server.url).keys("*"))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("secret", ["", "a secret of this lab"])
@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
def test_what_one_machine_computed_is_a_hit_on_another(
    tmp_path: Path, real: Encoder, server: RedisServer, stored: str, secret: str
):
    recipe = replace(RECIPE, stored=stored)
    first = Machine(tmp_path / "a", real, server.url, HERE, secret=secret)
    second = Machine(tmp_path / "b", real, server.url, THERE, secret=secret)
    assert first.embed(recipe=recipe).computed == len(SEQUENCES)
    outcome = second.embed(recipe=recipe)
    assert (outcome.hits, outcome.from_redis, outcome.computed) == (len(SEQUENCES), len(SEQUENCES), 0)
    assert outcome.saved_seconds > 0
    assert second.arrays(recipe) == first.arrays(recipe)
    # It is this machine's own entry now, computed where it was computed; and Redis is asked no more.
    server.kill()
    assert second.embed(recipe=recipe).hits == len(SEQUENCES)
    assert second.client.failures == 0
    server.start()
    (header,) = second.cache.all_segments()
    (origin,) = first.cache.all_segments()
    assert replace(header.attestation, seconds=0) == replace(origin.attestation, seconds=0)
    assert header.attestation.seconds == pytest.approx(origin.attestation.seconds, abs=1e-3)
    assert header.published == origin.published
    assert second.cache.stats()["redis_hits"] == len(SEQUENCES)
    assert second.cache.stats()["redis_rejected"] == 0
    assert first.cache.stats()["redis_hits"] == 0
    assert next(uses(first.cache.path)).redis == {"put": len(SEQUENCES)}


def test_only_what_is_missing_is_asked_for(tmp_path: Path, real: Encoder, server: RedisServer):
    first, second = Machine(tmp_path / "a", real, server.url), Machine(tmp_path / "b", real, server.url)
    second.embed(SEQUENCES[:4])
    outcome = first.embed(SEQUENCES[2:8])
    assert (outcome.from_redis, outcome.computed) == (2, 4)
    outcome = second.embed()
    assert (outcome.hits, outcome.from_redis, outcome.computed) == (8, 4, 4)


def test_other_device_classes_are_refused_where_they_are_not_accepted(
    tmp_path: Path, real: Encoder, server: RedisServer
):
    Machine(tmp_path / "a", real, server.url, THERE).embed()
    strict = Machine(tmp_path / "b", real, server.url, HERE, accept="same_class")
    assert strict.embed().computed == len(SEQUENCES)
    assert next(uses(strict.cache.path)).redis["foreign"] == len(SEQUENCES)
    # Its own lie there now.
    again = Machine(tmp_path / "c", real, server.url, HERE, accept="same_class")
    assert again.embed().from_redis == len(SEQUENCES)


def test_embeddings_per_residue_and_weights_never_go_there(tmp_path: Path, real: Encoder, server: RedisServer):
    residues = replace(RECIPE, pooling="per_residue")
    machine = Machine(tmp_path / "a", real, server.url)
    machine.embed(recipe=residues)
    assert all_keys(server) == []
    # What follows from stored ones is derived on each machine: it is as old as they are, whatever was invalidated elsewhere.
    assert machine.embed().derived == len(SEQUENCES)
    assert [key for key in all_keys(server) if b":vector:" in key and b":generation:" not in key] == []


def test_values_are_forgotten_in_a_week_and_lie_under_one_prefix(tmp_path: Path, real: Encoder, server: RedisServer):
    Machine(tmp_path / "a", real, server.url).embed()
    here = redis.Redis.from_url(server.url)
    vectors = [key for key in all_keys(server) if key.startswith(b"proteus:1:vector:")]
    assert len(vectors) == len(SEQUENCES) and all(key.startswith(b"proteus:1:") for key in all_keys(server))
    assert all(TTL_S - 60 < int(here.ttl(key)) <= TTL_S for key in vectors)  # type: ignore[arg-type]


def test_short_sequences_are_shared_whatever_the_windows(tmp_path: Path, real: Encoder, server: RedisServer):
    Machine(tmp_path / "a", real, server.url).embed(SEQUENCES)
    windowed = replace(RECIPE, window=20, overlap=5)
    outcome = Machine(tmp_path / "b", real, server.url).embed(recipe=windowed)
    assert outcome.from_redis == sum(len(s) <= 20 for s in SEQUENCES) > 0
    assert outcome.computed == sum(len(s) > 20 for s in SEQUENCES) > 0


def test_an_invalidation_holds_for_every_machine(tmp_path: Path, real: Encoder, server: RedisServer):
    first = Machine(tmp_path / "a", real, server.url)
    first.embed()
    assert first.cache.invalidate(TRUNK, "a broken GPU", layer=2) == len(SEQUENCES)
    assert Machine(tmp_path / "b", real, server.url).embed().computed == len(SEQUENCES)
    # What was computed since is there for all, the one who invalidated included.
    assert first.embed().from_redis == len(SEQUENCES)
    # A dry run, and another trunk, tell nobody.
    first.cache.invalidate(TRUNK, "only asking", dry_run=True)
    first.cache.invalidate("e" * 32, "others")
    assert Machine(tmp_path / "c", real, server.url).embed().from_redis == len(SEQUENCES)


def test_a_run_that_was_computing_when_it_was_invalidated_brings_nothing_back(
    tmp_path: Path, real: Encoder, server: RedisServer
):
    first, second = Machine(tmp_path / "a", real, server.url), Machine(tmp_path / "b", real, server.url)

    class Slow:
        architecture = real.architecture
        flops, peak = staticmethod(real.flops), staticmethod(real.peak)

        def compute(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            second.cache.invalidate(TRUNK, "meanwhile, elsewhere")
            yield from real.compute(*args, **kwargs)

    first.encoder = Slow()  # type: ignore[assignment]
    first.embed()
    assert Machine(tmp_path / "c", real, server.url).embed().computed == len(SEQUENCES)


def test_who_knows_of_an_invalidation_takes_nothing_older_whatever_redis_says(
    tmp_path: Path, real: Encoder, server: RedisServer
):
    """Somebody with access to Redis puts the old generation back: sound values, and a secret does not help."""
    first = Machine(tmp_path / "a", real, server.url)
    first.embed()
    here, name = redis.Redis.from_url(server.url), f"proteus:1:generation:vector:{TRUNK}"
    old = here.get(name)
    first.cache.invalidate(TRUNK, "a broken GPU")
    here.set(name, old)  # type: ignore[arg-type]
    assert first.embed().computed == len(SEQUENCES)
    assert list(uses(first.cache.path))[-1].redis["stale"] == len(SEQUENCES)


def test_an_invalidation_that_redis_was_not_told_of_says_so(
    tmp_path: Path, real: Encoder, server: RedisServer, caplog: pytest.LogCaptureFixture
):
    machine = Machine(tmp_path / "a", real, server.url)
    machine.embed()
    server.kill()
    assert machine.cache.invalidate(TRUNK, "a broken GPU") == len(SEQUENCES)
    assert "was not told of the invalidation" in caplog.text
    server.start()


def test_what_is_fetched_is_hidden_by_an_invalidation_that_comes_later(
    tmp_path: Path, real: Encoder, server: RedisServer
):
    Machine(tmp_path / "a", real, server.url).embed()
    second = Machine(tmp_path / "b", real, server.url)
    second.embed()
    assert second.cache.invalidate(TRUNK, "later") == len(SEQUENCES)
    assert second.embed().computed == len(SEQUENCES)


def test_without_the_secret_nobody_gives_a_machine_anything(
    tmp_path: Path, real: Encoder, server: RedisServer, caplog: pytest.LogCaptureFixture
):
    Machine(tmp_path / "a", real, server.url).embed()
    lab = Machine(tmp_path / "b", real, server.url, secret="sixteen or more.")
    assert lab.embed().computed == len(SEQUENCES)
    assert lab.cache.stats()["redis_rejected"] == len(SEQUENCES)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert Machine(tmp_path / "c", real, server.url, secret="sixteen or more.").embed().from_redis == len(SEQUENCES)


def header(recipe: Recipe = RECIPE, published: int = 1_700_000_000_000_000_000) -> SegmentHeader:
    attestation = Attestation(HERE, "2.13.0", "2026-01-01T00:00:00+00:00", 3.0, 24)
    return SegmentHeader(
        f"{published:020d}-ab.zip", 1, "pooled", recipe.stored, 4, TRUNK, recipe.described(), attestation, 2
    )


VECTOR = Offered("0" * 32, np.arange(4, dtype="<f4"), 10)


def test_the_format_is_as_it_was():
    golden = json.loads(GOLDEN.read_text())["payload"]
    recipe = replace(RECIPE, engine=3)  # when it was written: another revision is another recipe, in the same format
    assert encode(VECTOR, header(), recipe) == bytes.fromhex(golden)
    read = decode(VECTOR.key, bytes.fromhex(golden), TRUNK, recipe, 10)
    assert read is not None and read.array.tobytes() == VECTOR.array.tobytes()
    assert read.attestation == Attestation(HERE, "2.13.0", "2026-01-01T00:00:00+00:00", 1.5, 12)


def test_only_a_vector_of_these_weights_and_this_recipe_and_length_is_one():
    payload = encode(VECTOR, header(), RECIPE)
    assert decode(VECTOR.key, payload, TRUNK, RECIPE, 10) is not None
    assert decode(VECTOR.key, payload, "e" * 32, RECIPE, 10) is None
    assert decode(VECTOR.key, payload, TRUNK, replace(RECIPE, layer=1), 10) is None
    assert decode(VECTOR.key, payload, TRUNK, replace(RECIPE, stored="fp16"), 10) is None
    assert decode(VECTOR.key, payload, TRUNK, RECIPE, 11) is None
    assert decode(VECTOR.key, payload[:-16], TRUNK, RECIPE, 10) is None
    assert decode(VECTOR.key, payload[:-1], TRUNK, RECIPE, 10) is None
    spoiled = replace_array(VECTOR, np.array([1, np.nan, 2, 3], dtype="<f4"))
    assert decode(VECTOR.key, encode(spoiled, header(), RECIPE), TRUNK, RECIPE, 10) is None
    # A time of the future would outlast every invalidation.
    later = header(published=time.time_ns() + 2 * 86400 * 10**9)
    assert decode(VECTOR.key, encode(VECTOR, later, RECIPE), TRUNK, RECIPE, 10) is None


def replace_array(vector: Offered, array: Any) -> Offered:
    return vector._replace(array=array)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    "trunk", "recipe", "length", "published", "device_class", "torch", "time", "origin", "seconds", "tokens",
)  # fmt: skip


@given(data=st.binary(max_size=60), name=st.sampled_from(FIELDS), value=JSON)
def test_nothing_that_somebody_made_up_is_more_than_a_miss(data: bytes, name: str, value: Any):
    assert decode("0" * 32, data, TRUNK, RECIPE, 10) is None
    payload = encode(VECTOR, header(), RECIPE)
    size = int.from_bytes(payload[:2], "little")
    said = json.loads(payload[2 : 2 + size]) | {name: value}
    text = json.dumps(said).encode()
    forged = len(text).to_bytes(2, "little") + text + payload[2 + size :]
    read = decode("0" * 32, forged, TRUNK, RECIPE, 10)
    if read is not None:  # then what was put in says something that may be so
        assert read.array.tobytes() == VECTOR.array.tobytes()
        assert 0 < read.published < time.time_ns() + 2 * 86400 * 10**9
        assert all(isinstance(t, str) for t in (read.attestation.device_class, read.attestation.torch))


def test_vectors_of_two_widths_under_one_recipe_stop_nothing(tmp_path: Path, real: Encoder, server: RedisServer):
    """Without a secret anybody may put a sound value there; it may be wrong, and must not break the run."""
    machine = Machine(tmp_path / "a", real, server.url)
    generation = machine.client.generation(f"vector:{TRUNK}")
    values = {}
    for number, sequence in enumerate(SEQUENCES[:4]):
        array = np.zeros(8 * (1 + number % 2), dtype="<f4")
        vector = Offered(RECIPE.key(TRUNK, sequence), array, len(sequence))
        values[f"{generation}:{vector.key}"] = encode(vector, header(), RECIPE)
    machine.client.put_many("vector", values, ttl=60)
    assert machine.embed().from_redis == 4
