"""What is counted of the caches that others share: requests by what came of them, and bytes to and from far away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import make_checkpoint
from daemons import free_port
from entries import HERE, THERE, TRUNK
from redis_server import redis_server
from s3 import S3Server

from proteus_pipeline.embeddings import shared as shared_module
from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.embedder import embed
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.metrics.lines import by_name
from proteus_pipeline.models.encoder import Encoder, make_encoder
from proteus_pipeline.stores.counts import CountsFile, counting
from proteus_pipeline.stores.redis import RedisClient
from proteus_pipeline.stores.s3_access import Patience

RECIPE = Recipe(layer=2)
SEQUENCES = [("MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 3)[i : i + 10 + 2 * i] for i in range(12)]
# The vectors' own numbers; what is said of each comes to them.
VECTOR_BYTES = 4 * make_checkpoint().architecture.width * len(SEQUENCES)


@pytest.fixture(scope="module")
def real() -> Encoder:
    return make_encoder(make_checkpoint())


@dataclass
class Counted:
    """Runs of one project, and what they counted: by cache and result, and by cache and direction."""

    folder: Path
    encoder: Encoder

    def run(self, cache: EmbeddingCache, sequences: list[str] = SEQUENCES, device_class: str = HERE) -> None:
        def attest() -> tuple[str, str]:
            return device_class, "2.13.0"

        with counting(lambda: self.folder):
            embed(sequences, trunk=TRUNK, recipe=RECIPE, cache=cache, encoder=lambda: self.encoder, attest=attest)

    def requests(self, cache: str) -> Mapping[str, float]:
        found = by_name(CountsFile(self.folder).totals())
        name = "proteus_cache_requests_total"
        return {labels["result"]: n for of, labels, n in found if of == name and labels["cache"] == cache}

    def nbytes(self, cache: str, direction: str) -> float:
        found = by_name(CountsFile(self.folder).totals())
        name = f"proteus_cache_{direction}_bytes_total"
        return sum(n for of, labels, n in found if (of, labels) == (name, {"cache": cache}))


@pytest.fixture
def counted(tmp_path: Path, real: Encoder) -> Counted:
    return Counted(tmp_path / "metrics", real)


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with redis_server(tmp_path / "redis") as server:
        yield server.url


def test_a_shared_folder_is_asked_for_what_is_not_here(counted: Counted, tmp_path: Path):
    group = EmbeddingCache(tmp_path / "group")
    counted.run(group, SEQUENCES[:5])
    assert counted.requests("shared") == {}
    mine = EmbeddingCache(tmp_path / "mine", shared=tmp_path / "group")
    counted.run(mine)
    assert counted.requests("shared") == {"hit": 5, "miss": 7}
    counted.run(mine)
    assert counted.requests("shared") == {"hit": 10, "miss": 7}, "what is here is asked of nobody"
    assert counted.nbytes("shared", "fetched") == counted.nbytes("shared", "sent") == 0


def test_bytes_to_and_from_a_bucket_are_counted_and_looks_that_fail(
    counted: Counted, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url = s3.url(f"metrics/{tmp_path.name}")
    counted.run(EmbeddingCache(tmp_path / "a", shared=url, write_back=True))
    assert counted.requests("shared") == {"miss": 12}
    assert VECTOR_BYTES < counted.nbytes("shared", "sent") < 10 * VECTOR_BYTES
    before = counted.nbytes("shared", "fetched")
    counted.run(EmbeddingCache(tmp_path / "b", shared=url))
    assert counted.requests("shared") == {"hit": 12, "miss": 12}
    assert counted.nbytes("shared", "fetched") - before >= VECTOR_BYTES
    monkeypatch.setattr(shared_module, "QUICK", Patience(connect=1.0, stall=1.0, request=3.0, retries=0, retrying=1.0))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    counted.run(EmbeddingCache(tmp_path / "c", shared=url), SEQUENCES[:3])
    assert counted.requests("shared") == {"hit": 12, "miss": 12, "failed": 3}


def test_redis_has_what_it_has_or_is_refused_or_can_not_be_asked(counted: Counted, redis_url: str, tmp_path: Path):
    def machine(name: str, url: str = redis_url, **options: str) -> EmbeddingCache:
        return EmbeddingCache(tmp_path / name, redis=RedisClient(url), device_class=lambda: HERE, **options)  # type: ignore[arg-type]

    counted.run(machine("a"), SEQUENCES[:5], THERE)
    assert counted.requests("redis") == {"miss": 5}
    assert counted.nbytes("redis", "sent") > VECTOR_BYTES * 5 / 12
    assert counted.nbytes("redis", "fetched") == 0
    counted.run(machine("b"), SEQUENCES[:6])
    assert counted.requests("redis") == {"hit": 5, "miss": 6}
    assert counted.nbytes("redis", "fetched") > VECTOR_BYTES * 5 / 12
    counted.run(machine("c", accept="same_class"), SEQUENCES[:5])
    assert counted.requests("redis") == {"hit": 5, "miss": 6, "refused": 5}
    counted.run(machine("d", url=f"redis://127.0.0.1:{free_port()}/0"), SEQUENCES[:4])
    assert counted.requests("redis") == {"hit": 5, "miss": 6, "refused": 5, "failed": 4}


def test_what_a_redis_that_fails_midway_was_not_asked_is_a_failure():
    client = RedisClient(f"redis://127.0.0.1:{free_port()}/0")
    assert client.get_many("vector", [f"{n}" for n in range(700)]) == {}
    assert client.unanswered == 700
