"""Does the time that the encoder takes grow with a protein's length as the count of operations says?

A token takes layers (24 D^2 + 4 L D) floating-point operations: the first part in products of whole tiles, the second in
attention, with an exponential for each pair of residues and head. Printed for each length: tokens a second, and what they are
of the formula's prediction, whose one constant, operations a second, is midway between the lengths' extremes. Blocks of the shapes of
ESM-2 8M and 650M, of random weights; four of the latter's, since each of the 33 takes as long; ``--quick`` leaves those out.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace

import torch
from _figures import Spread, parsed, said
from _proteins import arguments, random_weights

from proteus_pipeline.models.encoder import make_encoder

LENGTHS = (50, 100, 200, 400, 800, 1600, 4000)
TOKENS = {"8M": 8192, "650M": 2048}
BLOCKS = {"8M": 6, "650M": 4}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(TOKENS), choices=list(TOKENS))
    args = parsed(parser, rounds=2, shapes=["8M"])
    torch.set_num_threads(args.threads)
    letters = random.Random(0)
    for shape in args.shapes:
        tokens = TOKENS[shape]
        checkpoint = random_weights(shape)
        encoder = make_encoder(replace(checkpoint, architecture=replace(checkpoint.architecture, layers=BLOCKS[shape])))
        work = {
            length: ["".join(letters.choices("ACDEFGHIKLMNPQRSTVWY", k=length))] * max(1, tokens // (length + 2))
            for length in LENGTHS
        }
        seconds: dict[int, list[float]] = {length: [] for length in LENGTHS}
        for _ in range(args.rounds):
            for length, sequences in work.items():
                began = time.perf_counter()
                list(encoder.encode(sequences, [BLOCKS[shape]]))
                seconds[length].append(time.perf_counter() - began)
        rates = {n: len(work[n]) * encoder.flops(n) / statistics.median(seconds[n]) for n in LENGTHS}
        typical = (min(rates.values()) * max(rates.values())) ** 0.5
        print(f"{shape}: {typical / 1e9:.0f} GFLOP/s is typical, and {encoder.peak() / 1e9:.0f} the peak of products")
        for length, rate in rates.items():
            done = len(work[length]) * (length + 2) / statistics.median(seconds[length])
            print(f"  {length:5} residues {done:9,.0f} tokens/s, {rate / typical - 1:+4.0%} of the prediction")
        off = [abs(rate / typical - 1) for rate in rates.values()]
        said(f"{shape}: furthest from the prediction, of it", Spread(max(off), min(off), max(off)), 0.25, least=False)


if __name__ == "__main__":
    main()
