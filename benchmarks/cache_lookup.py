"""How long does it take to look keys up in a large cache, and how much memory does it hold?

Index files of 10^5, 10^6 and 10^7 made-up entries, merged as a cache merges them, and an LMDB with the same keys and values of
an index record's 56 bytes. 100,000 random keys, all of them there, then every second one, through ``EmbeddingCache.look_up`` and
through LMDB's ``get`` in one transaction, in turn. Then, in processes of their own, what memory looking up and merging take.

It takes 4 GB of a temporary folder, and about three minutes; ``--quick`` leaves the largest out.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lmdb
import numpy as np
from _figures import Spread, Taken, in_turn, parsed, parser, said

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.index import INDEXES, RECORD, RUNS, Attestation, SegmentHeader, encode_index
from proteus_pipeline.embeddings.keys import KEY, key_strings
from proteus_pipeline.embeddings.merging import MERGE_AT, to_merge

SIZES, SIZES_QUICK = (10**5, 10**6, 10**7), (10**5, 10**6)
ASKED, IN_SEGMENT, ROUNDS = 100_000, 10_000, 7
HERE = Attestation("cpu/benchmark", "", "2026-01-01T00:00:00+00:00", 1.0, 1)
MB = 1e6


def layout(segments: int, in_segment: int) -> list[int]:
    """Return of how many segments each file speaks, when as many were published one after another; indexes are of one."""
    new, runs = 0, {}
    for _ in range(segments):
        new += 1
        if new == MERGE_AT:
            chosen = to_merge({str(n): in_segment for n in range(new)}, runs)
            runs[f"run{len(runs)}-{sum(runs.values())}"] = new * in_segment + sum(runs.pop(c, 0) for c in chosen)
            new = 0
    return [size // in_segment for size in runs.values()] + [1] * new


def build(folder: Path, entries: int, in_segment: int = IN_SEGMENT) -> np.ndarray:
    """Write the index files of a cache, and return all keys."""
    rng = np.random.default_rng(entries)
    keys = np.empty(entries, dtype=KEY)
    for half in ("high", "low"):
        keys[half] = rng.integers(0, 1 << 64, entries, dtype=np.uint64)
    for kind in (INDEXES, RUNS):
        (folder / kind).mkdir(parents=True)
    first = 0
    for number, segments in enumerate(layout(entries // in_segment, in_segment)):
        count = segments * in_segment
        records = np.zeros(count, dtype=RECORD)
        records["segment"] = np.repeat(np.arange(segments), in_segment)
        records["row"] = np.tile(np.arange(in_segment), segments)
        records["offset"], records["nbytes"], records["length"] = 5120 * records["row"], 5120, 300
        headers = [
            SegmentHeader(
                f"{number:010d}{s:010d}-benchmark.zip", 5120 * in_segment, "pooled", "fp32", 1280, "0" * 32,
                {"layer": 33}, HERE, in_segment,
            )
            for s in range(segments)
        ]  # fmt: skip
        name = f"{INDEXES}/{number}.idx" if segments == 1 else f"{RUNS}/{number}.run"
        (folder / name).write_bytes(encode_index(headers, keys[first : first + count], records))
        first += count
    return keys


def build_lmdb(path: Path, keys: np.ndarray) -> lmdb.Environment:
    environment = lmdb.open(str(path), map_size=8 << 30, sync=False)
    ordered = keys[np.lexsort((keys["low"], keys["high"]))]
    value = bytes(RECORD.itemsize)
    with environment.begin(write=True) as transaction:
        for start in range(0, len(ordered), IN_SEGMENT):
            some = [(bytes.fromhex(key), value) for key in key_strings(ordered[start : start + IN_SEGMENT])]
            transaction.cursor().putmulti(some, append=True)
    return environment


def look_up(folder: Path, keys: np.ndarray) -> Taken:
    """Time looking up random keys here, all there and half there, and the same keys in LMDB."""
    environment = build_lmdb(folder / "lmdb", keys)
    cache = EmbeddingCache(folder)
    rng = np.random.default_rng(1)
    there = key_strings(keys[rng.choice(len(keys), ASKED, replace=False)])
    half = [rng.bytes(16).hex() if i % 2 else key for i, key in enumerate(there)]
    raw = {name: [bytes.fromhex(key) for key in asked] for name, asked in (("all", there), ("half", half))}

    def get(asked: list[bytes]) -> int:
        with environment.begin() as transaction:
            return sum(transaction.get(key) is not None for key in asked)

    for name, asked in (("all", there), ("half", half)):
        assert cache.look_up(asked)[0].hits == get(raw[name]) >= ASKED // 2
    taken = in_turn(
        {
            "all there": lambda: cache.look_up(there),
            "LMDB, all there": lambda: get(raw["all"]),
            "half there": lambda: cache.look_up(half),
            "LMDB, half there": lambda: get(raw["half"]),
        },
        ROUNDS,
    )
    files = ", ".join(str(len(index.high)) for index in cache.visible.indexes)
    print(f"{len(keys):,} entries (in files of {files}): {taken}")
    environment.close()
    return taken


CHILD = """
import sys, time
import numpy as np
from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.keys import key_strings

def memory(field):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))

keys = key_strings(np.load(sys.argv[2]))
EmbeddingCache(sys.argv[1] + "-none").look_up(keys)  # what is imported on the way
before, began = memory("VmRSS"), time.perf_counter()
cache = EmbeddingCache(sys.argv[1])
if sys.argv[3] == "look_up":
    for _ in range(3):
        found = cache.look_up(keys)[0]
    assert found.hits == len(keys)
else:
    cache.refresh()
    cache.visible.merge(everything=True)
    assert len(cache.visible.indexes) == 1
    assert cache.look_up(keys)[0].hits == len(keys)
print(memory("VmRSS") - before, memory("VmHWM") - before, memory("VmHWM"), time.perf_counter() - began)
"""


def memory(folder: Path, keys: np.ndarray, what: str) -> None:
    """Print what a fresh process holds when it has looked keys up, or merged everything, and its most."""
    np.save(folder / "keys.npy", np.random.default_rng(2).choice(keys, ASKED, replace=False))
    command = (sys.executable, "-c", CHILD, str(folder), str(folder / "keys.npy"), what)
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    grown, most_grown, most, seconds = (float(value) for value in answer.split())
    print(
        f"  {what}, a process of its own: {grown / MB:.0f} MB more afterwards, {most_grown / MB:.0f} MB at most, ",
        end="",
    )
    print(f"{most / MB:.0f} MB in all at most, {seconds:.1f} s")
    said(f"{what} of {len(keys):,}: the process's memory at most, MB", most / MB, 500, least=False)


def main() -> None:
    sizes = SIZES_QUICK if parsed(parser(__doc__)).quick else SIZES
    taken = []
    for entries in sizes:
        with tempfile.TemporaryDirectory(prefix="cache-lookup-") as name:
            folder = Path(name)
            began = time.perf_counter()
            keys = build(folder, entries)
            taken.append(look_up(folder, keys))
            for what in ("look_up", "merge"):
                memory(folder, keys, what)
            print(f"  (built and measured in {time.perf_counter() - began:.0f} s)")
    for name in ("all there", "half there"):
        ratio: Spread = taken[-1].ratio(name, f"LMDB, {name}")
        said(f"{ASKED:,} keys among {sizes[-1]:,}, {name}: our time over LMDB's", ratio, 0.5, least=False)
        growth = taken[-1].median(name) / taken[0].median(name)
        said(f"{name}: {sizes[-1] // sizes[0]} times the entries take", growth, 4, least=False)


if __name__ == "__main__":
    main()
