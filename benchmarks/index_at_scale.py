"""What do index, runs and merging cost when a cache grows to 10^8 entries, and where does the design end?

First a simulation: segments published one after another, merged when a cache would merge them, by the cache's own rule
(``to_merge``). It counts files, bytes written and read again, and what a run's header holds; it takes no disk and scales to any
number. Then the same with real files: made-up keys, up to ``--keys`` of them, opened and searched by the cache's own code; the
simulation's bytes are set beside the real ones. 64 bytes of a temporary folder and 16 of memory a key: ``--keys 100000000`` would
take 6.4 GB. docs/scale.md has the simulation up to 10^8 and real files up to 10^6, the default; ``--quick`` takes 10^5.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from _figures import parsed, said
from _figures import parser as of
from cache_lookup import CHILD, HERE, build

from proteus_pipeline.embeddings.index import INDEXES, RECORD, RUNS, SegmentHeader
from proteus_pipeline.embeddings.keys import key_strings
from proteus_pipeline.embeddings.merging import MERGE_AT, to_merge

ENTRY_BYTES = 8 + RECORD.itemsize
_HEADER = SegmentHeader("0" * 20 + "-" + "0" * 12 + ".zip", 1 << 27, "pooled", "fp32", 1280, "0" * 32, {}, HERE, 200)
_RECIPE = {
    "layer": 33,
    "pooling": "mean",
    "precision": "mixed",
    "numerics": "strict",
    "stored": "fp16",
    "windows": None,
    "engine": 3,
}
# What a run's header says of one segment: JSON, as encode_index writes it.
HEADER_BYTES = len(json.dumps(asdict(_HEADER) | {"recipe": _RECIPE, "digest": "0" * 32}, sort_keys=True)) + 2
ASKED = 100_000
# About 128 MB of vectors of 1,280 numbers, and of proteins of 300 residues, in fp16.
SHAPES = (("vectors", 50_000), ("per residue", 200))


@dataclass
class Grown:
    """What a cache of so many entries came to.

    `written` and `read` are bytes of indexes and runs, all merges together; `headers` the JSON of all files that are left.
    """

    entries: int
    segments: int
    files: int
    kept: int
    written: int
    read: int
    merges: int
    largest: int
    headers: int


def grow(entries: int, in_segment: int) -> Grown:
    """Publish segments until there are so many entries, merging as a cache does."""

    def size(count: int) -> int:
        return count * ENTRY_BYTES + -(-count // in_segment) * HEADER_BYTES

    segments = -(-entries // in_segment)
    runs: dict[str, int] = {}
    new = written = read = merges = 0
    for number in range(segments):
        new += 1
        written += size(in_segment)
        if new < MERGE_AT:
            continue
        chosen = to_merge({f"new{n}": in_segment for n in range(new)}, runs)
        total = new * in_segment + sum(runs.pop(name) for name in chosen if name in runs)
        runs[f"run{number}"] = total
        read, written, merges, new = read + 2 * size(total), written + size(total), merges + 1, 0
    sizes = [*runs.values(), *[in_segment] * new]
    return Grown(
        entries,
        segments,
        len(sizes),
        sum(size(n) for n in sizes),
        written,
        read,
        merges,
        max(size(n) for n in sizes),
        segments * HEADER_BYTES,
    )


def show(grown: Grown) -> None:
    again = grown.written / grown.kept
    print(
        f"{grown.entries:>13,} {grown.segments:>9,} {grown.files:>6} {grown.kept / 1e9:>8.2f} {grown.largest / 1e9:>8.2f}"
        f" {again:>8.1f} {grown.read / 1e9:>9.1f} {grown.headers / 1e6:>9.1f}"
    )


def measure(entries: int, in_segment: int) -> None:
    """Make the files that so many entries would be in, and search them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = build(folder, entries, in_segment)
        files = [f for kind in (INDEXES, RUNS) for f in (folder / kind).iterdir()]
        real = sum(f.stat().st_size for f in files)
        expected = grow(entries, in_segment)
        asked = keys[np.random.default_rng(1).choice(entries, ASKED, replace=False)]
        np.save(folder / "asked.npy", asked)
        del keys
        # In a process of its own: what opening and three look-ups of 100,000 keys take, and hold.
        command = [sys.executable, "-c", CHILD, str(folder), str(folder / "asked.npy"), "look_up"]
        grew, peak, _, _ = map(
            float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        )
        began = time.perf_counter()
        from proteus_pipeline.embeddings.cache import EmbeddingCache

        cache = EmbeddingCache(folder)
        cache.refresh()
        opened = time.perf_counter() - began
        text = key_strings(asked)
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            found = cache.look_up(text)[0]
            seconds.append(time.perf_counter() - began)
            assert found.hits == ASKED
        print(
            f"{entries:>13,} {len(files):>6} {real / 1e9:>8.2f} {real / expected.kept:>10.3f} {1e3 * opened:>9.0f}"
            f" {1e3 * float(np.median(seconds)):>9.0f} {grew / 1e6:>8.0f} {peak / 1e6:>8.0f}",
            flush=True,
        )
        said(f"{entries:,} entries, {in_segment:,} a segment: real bytes over the simulation's", real / expected.kept)


def main() -> None:
    parser = of(__doc__)
    parser.add_argument("--keys", type=int, default=10**6, help="the largest cache that is really made")
    most = parsed(parser, keys=10**5).keys
    for what, in_segment in SHAPES:
        print(f"simulated: {what}, {in_segment:,} a segment")
        print(
            "      entries  segments  files  GB kept  largest  written  GB read  MB headers   (written: times what is kept)"
        )
        for exponent in range(5, 9):
            show(grow(10**exponent, in_segment))
    for what, in_segment in SHAPES:
        print(f"\nreal files: {what}, {in_segment:,} a segment; look-up of {ASKED:,} keys")
        print("      entries  files       GB  of simul.   open ms  look-up ms   MB held  MB peak")
        for exponent in range(5, len(str(most))):
            measure(10**exponent, in_segment)


if __name__ == "__main__":
    main()
