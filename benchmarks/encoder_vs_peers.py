"""How much faster than fair-esm's own extract loop, and than transformers, is the encoder, on the same weights and proteins?

All sides in one process, in turn: FASTA in memory to mean-pooled vectors. The peers get the batches of fair-esm's
extract.py: sorted by length, at most 4,096 tokens, padded. Printed beside the ratios: what share of this machine's measured
matrix products each reaches, which is a bound on any encoder's ratio; the cost of strict; and how near vectors and residues
are. Run it in a project, after ``make repro``: ``python benchmarks/encoder_vs_peers.py --fasta DB.fasta.gz``.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from _figures import Spread, parsed, said
from _proteins import (
    arguments,
    choose,
    real_weights,
    to_transformers,
    with_fair_esm,
    with_transformers,
)

from proteus_pipeline.models.encoder import Encoder, Outputs, make_encoder
from proteus_pipeline.models.fair_esm import to_fair_esm
from proteus_pipeline.models.pooling import pool
from proteus_pipeline.stages.drift import drift

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = {"fp32 strict": ("fp32", "strict"), "fp32 tolerant": ("fp32", "tolerant"), "mixed strict": ("mixed", "strict")}


def with_ours(encoder: Encoder, proteins: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    last = encoder.architecture.layers
    done = encoder.compute([s for _, s in proteins], Outputs(layers=(last,)))
    return {proteins[i][0]: pool(e.hidden[last], "mean") for i, e in done}


def cosine(exact: Encoder, rough: Encoder, proteins: list[tuple[str, str]]) -> float:
    """The least cosine of a residue's two vectors."""
    last, sequences = exact.architecture.layers, [s for _, s in proteins]
    one, two = dict(exact.encode(sequences, [last])), dict(rough.encode(sequences, [last]))
    order = sorted(one)
    drifts = drift([proteins[i][0] for i in order], [one[i][last] for i in order], [two[i][last] for i in order])
    return min(d.cosine for d in drifts)


def main() -> None:
    args = parsed(arguments(__doc__), count=32, rounds=3)
    torch.set_num_threads(args.threads)
    proteins, checkpoint = choose(args.fasta, args.count), real_weights()
    fair, alphabet = to_fair_esm(checkpoint)
    encoders = {name: make_encoder(checkpoint, precision=p, numerics=n) for name, (p, n) in OURS.items()}
    sides: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "fair-esm": partial(with_fair_esm, fair, alphabet, proteins),
        "transformers sdpa": partial(with_transformers, to_transformers(checkpoint), alphabet, proteins),
        **{name: partial(with_ours, encoder, proteins) for name, encoder in encoders.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    vectors = {}
    for round_ in range(args.rounds + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            vectors[name] = side()
            if round_:  # the first warms all up
                seconds[name].append(time.perf_counter() - began)
    exact = encoders["fp32 strict"]
    flops, peak = sum(exact.flops(len(s)) for _, s in proteins), exact.peak()
    tokens = sum(len(s) + 2 for _, s in proteins)
    print(
        f"{len(proteins)} proteins, {tokens} tokens, {torch.get_num_threads()} threads; peak {peak / 1e9:.0f} GFLOP/s fp32"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        ratios = [a / b for a, b in zip(seconds["fair-esm"], times, strict=True)]
        worst = max(np.abs(vectors[name][i] - vectors["fair-esm"][i]).max() for i, _ in proteins)
        print(
            f"{name:<18} {median:6.2f} s {tokens / median:7,.0f} tokens/s  {flops / median / peak:4.0%} of the peak  "
            f"{statistics.median(ratios):.2f} x fair-esm  vectors apart {worst:.1e}"
        )

    def ratio(other: str, name: str) -> Spread:
        ratios = [a / b for a, b in zip(seconds[other], seconds[name], strict=True)]
        return Spread(statistics.median(ratios), min(ratios), max(ratios))

    said("fp32 strict, our speed over fair-esm's", ratio("fair-esm", "fp32 strict"), 4)
    said("mixed strict, our speed over fair-esm's", ratio("fair-esm", "mixed strict"), 7)
    said("the whole peak's speed over fair-esm's", peak / (flops / statistics.median(seconds["fair-esm"])))
    said("fp32 strict, our speed over transformers'", ratio("transformers sdpa", "fp32 strict"), 1.3)
    said("strict's time over tolerant's", ratio("fp32 strict", "fp32 tolerant"), 1.08, least=False)
    least = cosine(exact, encoders["mixed strict"], proteins)
    said("mixed: the least cosine of a residue to fp32's", least, 0.9999)


if __name__ == "__main__":
    main()
