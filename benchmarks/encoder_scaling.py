"""Does the time that the encoder takes grow with a protein's length as the count of operations says?

A token takes layers (24 D^2 + 4 L D) floating-point operations: the first part in products of whole tiles, the second in
attention, with an exponential for each pair of residues and head. Printed for each length: tokens a second, and what they are
of the formula's prediction, whose one constant, operations a second, is midway between the lengths' extremes. Blocks of the shapes of
ESM-2 8M and 650M, of random weights; four of the latter's, since each of the 33 takes as long.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace

import torch
from _proteins import arguments, random_weights

from proteus_pipeline.models.encoder import make_encoder

LENGTHS = (50, 100, 200, 400, 800, 1600, 4000)
TOKENS = {"8M": 8192, "650M": 2048}
BLOCKS = {"8M": 6, "650M": 4}


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    letters = random.Random(0)
    for shape, tokens in TOKENS.items():
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
            print(
                f"  {length:5} residues {done:9,.0f} tokens/s, {rate / typical - 1:+4.0%} of the prediction (bar: 25%)"
            )


if __name__ == "__main__":
    main()
