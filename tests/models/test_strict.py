"""strict: the same bits alone, in shuffled batches, with other thread counts, in other processes. All of it by make torture."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from proteus_pipeline.identity import digests
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.models.encoder import Outputs, make_encoder
from proteus_pipeline.models.reading import read_checkpoint

COUNT, SHUFFLES = (200, 20) if os.environ.get("PROTEUS_TORTURE") == "1" else (10, 4)
# All six layers in fp32; two of bf16, which is slow where a CPU has no instructions for it.
LAYERS = {"fp32": 6, "mixed": 2, "bf16": 2}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits(weights: Path | Checkpoint, sequences: list[str], precision: str, budget: int, count: int) -> list[str]:
    """The digest of each sequence's hidden states and of the attention its residues receive."""
    torch.set_num_threads(count)
    checkpoint = weights if isinstance(weights, Checkpoint) else read_checkpoint(weights)
    layer = LAYERS[precision]
    found = {}
    for index, encoded in make_encoder(checkpoint, precision=precision).compute(
        sequences, Outputs(layers=(layer,), received=(layer,)), budget
    ):
        data = encoded.hidden[layer].tobytes() + encoded.received[layer].tobytes()
        found[index] = digests.of_bytes(data)
    return [found[i] for i in range(len(sequences))]


def proteins_of(proteins: dict[str, str], count: int) -> list[str]:
    """Real proteins, and the first halves of some."""
    whole = list(proteins.values())
    return (whole + [s[: len(s) // 2] for s in whole])[:: 200 // count]


@pytest.mark.torture
@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_no_company_order_thread_or_process_changes_a_bit(
    weights: Path, checkpoint: Checkpoint, proteins: dict[str, str], precision: str
):
    sequences = proteins_of(proteins, COUNT)
    assert len(sequences) == COUNT
    alone = [bits(checkpoint, [s], precision, 2048, 1)[0] for s in sequences]
    rng = np.random.default_rng(0)
    exceptions = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, context) as processes:
        for number in range(SHUFFLES):
            order = rng.permutation(COUNT).tolist()
            budget, threads = int(rng.integers(300, 6000)), 1 + number % 2
            shares = [order] if number % 4 < 2 else [order[i::3] for i in range(3)]
            if len(shares) == 1:
                got = [bits(checkpoint, [sequences[i] for i in order], precision, budget, threads)]
            else:
                arguments = [(weights, [sequences[i] for i in share], precision, budget, threads) for share in shares]
                got = list(processes.map(bits, *zip(*arguments, strict=True)))
            for share, found in zip(shares, got, strict=True):
                exceptions += [(number, i) for i, bit in zip(share, found, strict=True) if bit != alone[i]]
    assert exceptions == []


def test_a_shuffle_that_changes_a_residue_is_noticed(checkpoint: Checkpoint, proteins: dict[str, str]):
    (sequence, *_) = sorted(proteins.values(), key=len)
    other = sequence[:-1] + ("A" if sequence[-1] != "A" else "G")
    one, two = bits(checkpoint, [sequence, other], "mixed", 2048, 1)
    assert one != two
