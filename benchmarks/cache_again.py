"""What does a second run cost, with ten new proteins among many known ones?

The proteins of a file are embedded by the real 8M model, per residue and as means, each into a cache of its own; then the same
file with ten more. Printed: both times, their ratio, and what was computed. Then the means are asked for by other weights, and
by the first ones again, as a rollback and back would. A file of too few proteins is enlarged by shuffled ones.
``python benchmarks/cache_again.py --fasta DB.fasta.gz --count 20000``.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from _figures import parsed, said
from _proteins import arguments, choose, enlarged, real_weights

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.embedder import Outcome, embed
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.models.device import attested
from proteus_pipeline.models.encoder import make_encoder

if TYPE_CHECKING:
    from proteus_pipeline.models.checkpoint import Checkpoint

BAR, NEW = 0.03, 10


def run(cache: EmbeddingCache, checkpoint: Checkpoint, recipe: Recipe, sequences: list[str], trunk: str) -> Outcome:
    return embed(
        sequences,
        trunk=trunk,
        recipe=recipe,
        cache=cache,
        encoder=lambda: make_encoder(checkpoint),
        attest=lambda: attested("cpu"),
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pooling", nargs="+", default=["mean", "per_residue"])
    parser.set_defaults(count=2000)
    args = parsed(parser, count=700, pooling=["mean"])
    torch.set_num_threads(args.threads)
    checkpoint = real_weights()
    trunk = checkpoint.trunk_digest
    sequences = [s for _, s in enlarged(choose(args.fasta, args.count), args.count)]
    rng = random.Random(1)
    more = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=len(s))) for s in rng.sample(sequences, NEW)]
    with tempfile.TemporaryDirectory(prefix="cache-again-") as folder:
        for pooling in args.pooling:
            recipe = Recipe(layer=checkpoint.architecture.layers, pooling=pooling)
            path = Path(folder, pooling)
            began = time.perf_counter()
            first = run(EmbeddingCache(path), checkpoint, recipe, sequences, trunk)
            once = time.perf_counter()
            second = run(EmbeddingCache(path), checkpoint, recipe, [*sequences, *more], trunk)
            took = once - began, time.perf_counter() - once
            share = took[1] / took[0]
            print(
                f"{pooling}: {len(sequences):,} proteins, {first.computed:,} computed in {took[0]:.1f} s; with {NEW} more, "
                f"{second.computed} computed in {took[1]:.2f} s"
            )
            said(f"{pooling}: the second run's seconds over the first one's", share, BAR, least=False)
            said(f"{pooling}: computed in it beyond the new ones", second.computed - NEW, 0, least=False)
            if pooling == "mean":
                some = sequences[:100]
                other = run(EmbeddingCache(path), checkpoint, recipe, some, "f" * 32)
                back = run(EmbeddingCache(path), checkpoint, recipe, some, trunk)
                print(f"  other weights compute {other.computed}, and the first ones again {back.computed}")
                print(f"  why: {other.misses}; {dataclasses.asdict(back)['hits']} hits")


if __name__ == "__main__":
    main()
