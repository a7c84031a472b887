"""Eight processes fill one cache with overlapping work, through the real model."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from processes import ends_well, script

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.embedder import embed
from proteus_pipeline.embeddings.keys import key_strings
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.models.encoder import make_encoder
from proteus_pipeline.models.reading import read_checkpoint

SEQUENCES = 600 if os.environ.get("PROTEUS_TORTURE") == "1" else 48
RECIPE = Recipe(6, "mean", stored="fp16")
TWICE = 0.05  # of the sequences, at most, may be computed by two of them

# Forked when the weights are read and nothing is computed yet: eight imports of torch would take longer than the test.
EIGHT = """
import json, os, random, sys
os.environ["OMP_NUM_THREADS"] = "1"  # OpenMP's threads do not survive a fork, and whoever waits for them waits for ever
from pathlib import Path
from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.embedder import embed
from proteus_pipeline.models.encoder import make_encoder
from proteus_pipeline.models.reading import read_checkpoint
from test_many_processes import RECIPE, sequences
path, weights, each = sys.argv[1:4]
checkpoint = read_checkpoint(Path(weights))
encoder, trunk = make_encoder(checkpoint), checkpoint.trunk_digest
start, go = os.pipe()
children = []
for number in range(8):
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(start, 1)  # all at once, when the other end is closed
        some = random.Random(number).sample(sequences(), int(each))
        outcome = embed(
            some, trunk=trunk, recipe=RECIPE, cache=EmbeddingCache(path),
            encoder=lambda: encoder, attest=lambda: ("cpu/test", "2.0.0"), token_budget=512,
        )
        assert len(outcome.entries) == outcome.unique == int(each)
        contents = {e.key: e.content for e in outcome.entries}
        said = {"hits": outcome.hits, "computed": outcome.computed, "seconds": outcome.seconds, "contents": contents}
        Path(path).with_name(f"{number}.json").write_text(json.dumps(said))
        os._exit(0)
    children.append(child)
os.close(go)
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""


def sequences() -> list[str]:
    """Return distinct sequences of 20 to 50 residues."""
    chance = random.Random(0)
    return ["".join(chance.choices("ACDEFGHIKLMNPQRSTVWY", k=chance.randint(20, 50))) for _ in range(SEQUENCES)]


@pytest.mark.torture
@pytest.mark.parametrize("overlap", ["half", "all"])
def test_eight_processes_fill_one_cache(tmp_path: Path, weights: Path, overlap: str):
    asked = sequences()
    assert len(set(asked)) == SEQUENCES
    path = tmp_path / "cache"
    each = SEQUENCES // 2 if overlap == "half" else SEQUENCES
    ends_well(script(EIGHT, path, weights, each), timeout=400)
    said = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(8)]
    contents: dict[str, str] = {}
    for one in said:
        for key, content in one["contents"].items():
            assert contents.setdefault(key, content) == content
    cache = EmbeddingCache(path)
    found = {entry.key: entry for entry, _ in cache.find(contents)}
    assert {key: entry.content for key, entry in found.items()} == contents
    assert len(contents) > 0.9 * SEQUENCES
    stored = Counter(key for index in cache.visible.indexes for key in key_strings(index.keys()))
    assert set(stored) == set(contents)
    # And they are right: as one process computes them, alone.
    checkpoint = read_checkpoint(weights)
    alone = embed(
        [s for s in asked if RECIPE.key(checkpoint.trunk_digest, s) in contents],
        trunk=checkpoint.trunk_digest,
        recipe=RECIPE,
        cache=EmbeddingCache(tmp_path / "alone"),
        encoder=lambda: make_encoder(checkpoint),
        attest=lambda: ("cpu/test", "2.0.0"),
    )
    assert {e.key: e.content for e in alone.entries} == contents
    computed = sum(one["computed"] for one in said)
    print(f"{len(contents)} sequences, {computed} computed, {computed / len(contents) - 1:.0%} of them more than once")
