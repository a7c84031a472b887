"""Is the memory that embedding takes bounded by the plan, however many proteins there are?

Two processes embed into an empty cache: 100 proteins, and as many as the file has, of which both have the longest. Printed:
the peak of each, and their ratio. One block of the shape of ESM-2 8M, of random weights: what grows with the number of
proteins is the same, and 20,000 of them take minutes. A file of few is enlarged to ``--count`` by shuffled ones. Run it
with ``--fasta DB.fasta.gz`` of Debian's mmseqs2-examples.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from _figures import parsed, said
from _proteins import LONGEST, arguments, choose, enlarged

CHILD = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(int(sys.argv[5]))
from _proteins import LONGEST, SHAPES, random_weights
from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.embedder import embed
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.models.encoder import make_encoder
from proteus_pipeline.sequences.fasta import read_fasta
SHAPES["8M"] = (1, 320, 20)
count = int(sys.argv[3])
sequences = sorted({r.sequence.upper()[:LONGEST] for r in read_fasta(Path(sys.argv[2]))}, key=len, reverse=True)
sequences = sequences[:1] + sequences[1:][:: max(1, len(sequences) // count)][: count - 1] if count else sequences
outcome = embed(
    sequences, trunk="0" * 32, recipe=Recipe(layer=1, pooling=sys.argv[4]), cache=EmbeddingCache(Path(sys.argv[6])),
    encoder=lambda: make_encoder(random_weights("8M")), attest=lambda: ("cpu", torch.__version__),
)
print(outcome.computed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(fasta: Path, count: int, pooling: str, threads: int) -> tuple[int, float]:
    """Return how many proteins were embedded, and the process's peak in MB."""
    with tempfile.TemporaryDirectory() as folder:
        here = str(Path(__file__).parent)
        command = [sys.executable, "-c", CHILD, here, str(fasta), str(count), pooling, str(threads), folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    computed, kilobytes = map(int, done.stdout.split())
    return computed, kilobytes / 1e3


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pooling", default="mean,per_residue")
    parser.set_defaults(count=4000)
    args = parsed(parser, count=1000, pooling="mean")
    print(f"proteins cut at {LONGEST} residues, {args.threads} threads")
    with tempfile.TemporaryDirectory(prefix="encoder-memory-") as folder:
        proteins = choose(args.fasta, 10**9)
        fasta = Path(folder, "proteins.fasta")
        fasta.write_text("".join(f">{i}\n{s}\n" for i, s in enlarged(proteins, max(args.count, len(proteins)))))
        for pooling in args.pooling.split(","):
            few, small = peak(fasta, 100, pooling, args.threads)
            many, large = peak(fasta, 0, pooling, args.threads)
            print(f"{pooling:<12} {few} proteins {small:.0f} MB, {many} proteins {large:.0f} MB")
            said(f"{pooling}: memory of {many:,} proteins over that of {few}", large / small, 1.10, least=False)


if __name__ == "__main__":
    main()
