"""How fast is the embedding cache beside what people keep embeddings in? The same data, all sides in one run, in turn.

Per residue: hidden states of real proteins, fp16, width 1280: written with a flush to disk, one read, read in random order, and
scanned; beside fair-esm's .pt a sequence, tensorstore and zarr-python on our own segments, and a raw memory map. Pooled: random
vectors, and one at a time, beside a memory map and LMDB. Every read of ours is checked against its content hash.
``python benchmarks/cache_store.py --fasta DB.fasta.gz`` takes the proteins from a file.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb
import numpy as np
import tensorstore
import torch
import zarr
from _proteins import arguments, choose, real_weights

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.identity import digests
from proteus_pipeline.models.encoder import Outputs, make_encoder

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, LAYER, TRUNK = 1280, 33, "0" * 32
LAYERS = (3, 4, 5, 6)
POOLED, ASKED, SINGLES = 100_000, 10_000, 300
HERE = Attestation("cpu/benchmark", "", "2026-01-01T00:00:00+00:00", 1.0, 1)


def hidden_states(proteins: list[tuple[str, str]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return each protein's residues and start token, by key: the 8M model's last layers, side by side to a width of 1280."""
    encoder = make_encoder(real_weights())
    computed = {}
    for number, encoded in encoder.compute([sequence for _, sequence in proteins], Outputs(layers=LAYERS)):
        rows = np.concatenate([encoded.hidden[layer][:-1] for layer in LAYERS], axis=1).astype("<f2")
        computed[digests.of_bytes(str(number).encode())] = rows[1:].copy(), rows[0].copy()
    return computed


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return each side's median seconds, taken in turn; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            seconds = timed(work)
            if number:
                taken[name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def said(what: str, ratio: float, bar: float, *, least: bool) -> None:
    held = ratio >= bar if least else ratio <= bar
    print(f"  {what}: {ratio:.3g} (bar: at {'least' if least else 'most'} {bar}) {'holds' if held else 'MISSED'}")


def write_pt(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    for key, array in arrays.items():
        with (folder / f"{key}.pt").open("wb") as file:
            torch.save({"label": key, "representations": {LAYER: torch.from_numpy(array)}}, file)
            file.flush()
            os.fsync(file.fileno())


def write_ours(folder: Path, computed: dict[str, tuple[np.ndarray, np.ndarray]], recipe: Recipe) -> None:
    cache = EmbeddingCache(folder)
    publication, nbytes = cache.begin(TRUNK, recipe), 0
    for key, (array, start) in computed.items():
        publication.add(key, array, len(array), start)
        nbytes += array.nbytes
        if nbytes > 128 << 20:
            publication.publish(HERE)
            publication, nbytes = cache.begin(TRUNK, recipe), 0
    publication.publish(HERE)


def per_residue(proteins: list[tuple[str, str]], folder: Path, rounds: int) -> None:
    recipe = Recipe(layer=LAYER, pooling="per_residue", stored="fp16")
    computed = hidden_states(proteins)
    arrays = {key: array for key, (array, _) in computed.items()}
    raw = sum(a.nbytes for a in arrays.values())
    print(f"per residue: {len(arrays)} entries, {raw / 1e6:.0f} MB of fp16, width {WIDTH}")
    turns = iter(range(1000))
    seconds = compare(
        {
            ".pt": lambda: write_pt(folder / f"pt{next(turns)}", arrays),
            "ours": lambda: write_ours(folder / f"ours{next(turns)}", computed, recipe),
        },
        2,
    )
    print("  written and flushed: " + ", ".join(f"{n} {raw / s / 1e6:.0f} MB/s" for n, s in seconds.items()))
    said("write, our speed over .pt's", seconds[".pt"] / seconds["ours"], 1.5, least=True)
    pt, ours = (min(folder.glob(f"{name}*")) for name in ("pt", "ours"))
    on_disk = sum(p.stat().st_size for p in ours.rglob("*") if p.is_file())
    # Ours hold the start tokens' vectors too, as .pt does not.
    held = raw + sum(start.nbytes for _, start in computed.values())
    said("bytes over raw", on_disk / held, 0.87, least=False)
    read(arrays, pt, ours, folder / "raw.bin", rounds)


def read(arrays: dict[str, np.ndarray], pt: Path, ours: Path, raw: Path, rounds: int) -> None:
    cache, keys = EmbeddingCache(ours), list(arrays)
    random.Random(1).shuffle(keys)
    some = keys[:SINGLES]
    raw.write_bytes(b"".join(a.tobytes() for a in arrays.values()))
    ends = np.cumsum([a.size for a in arrays.values()])
    where = {k: (int(e) - a.size, a.shape) for (k, a), e in zip(arrays.items(), ends, strict=True)}
    mapped = np.memmap(raw, dtype="<f2", mode="r")
    place = {key: found[0].segment for key, found in cache.candidates(keys).items()}
    groups = {
        s: zarr.open_group(zarr.storage.ZipStore(ours / "seg" / s, mode="r"), mode="r") for s in {*place.values()}
    }

    def one_pt(key: str) -> torch.Tensor:
        return torch.load(pt / f"{key}.pt", weights_only=True)["representations"][LAYER]

    def one_ours(key: str) -> np.ndarray:
        return cache.find_one(key)[1]

    opened = {key: tensorstore.open(_spec(ours, place[key], key)).result() for key in keys}

    def by_tensorstore() -> list[np.ndarray]:
        futures = [opened[key].read() for key in keys]
        return [f.result() for f in futures]

    def by_tensorstore_opening() -> list[np.ndarray]:
        futures = [tensorstore.open(_spec(ours, place[key], key)) for key in keys]
        return [f.result().read().result() for f in futures]

    assert np.array_equal(one_ours(keys[0]), one_pt(keys[0]).numpy())
    assert np.array_equal(by_tensorstore()[3], arrays[keys[3]])
    seconds = compare(
        {
            ".pt one": lambda: [one_pt(key) for key in some],
            "ours one": lambda: [one_ours(key) for key in some],
            ".pt": lambda: [one_pt(key) for key in keys],
            "ours": lambda: [array for _, array in cache.find(keys)],
            "tensorstore": by_tensorstore_opening,
            "tensorstore, opened before": by_tensorstore,
            "zarr": lambda: [groups[place[key]][key][:] for key in keys],
            "memmap": lambda: [np.array(mapped[s : s + h * w].reshape(h, w)) for s, (h, w) in map(where.get, keys)],
            "ours scan": lambda: [float(array[0, 0]) for _, array in cache.find(arrays)],
            "memmap scan": lambda: [np.array(mapped[s : s + h * w].reshape(h, w)) for s, (h, w) in where.values()],
        },
        rounds,
    )
    print("  " + ", ".join(f"{n} {1e3 * s:.0f} ms" for n, s in seconds.items()))
    said("one read, our time over .pt's", seconds["ours one"] / seconds[".pt one"], 0.65, least=False)
    said("random order, our speed over tensorstore's", seconds["tensorstore"] / seconds["ours"], 1.1, least=True)
    opened_ratio = seconds["tensorstore, opened before"] / seconds["ours"]
    print(f"  and over tensorstore's with every array opened before: {opened_ratio:.2f}")
    said("random order, our speed over zarr-python's", seconds["zarr"] / seconds["ours"], 2, least=True)
    said("scan, our time over a memory map's", seconds["ours scan"] / seconds["memmap scan"], 5, least=False)


def _spec(ours: Path, segment: str, key: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {
            "driver": "zip",
            "base": {"driver": "file", "path": str(ours / "seg" / segment)},
            "path": f"{key}/",
        },
    }


def pooled(folder: Path, rounds: int) -> None:
    recipe = Recipe(layer=LAYER, stored="fp16")
    values = np.random.default_rng(0).standard_normal((POOLED, WIDTH), dtype=np.float32).astype("<f2")
    keys = [digests.of_bytes(f"p{i}".encode()) for i in range(POOLED)]
    print(f"pooled: {POOLED:,} entries, {values.nbytes / 1e6:.0f} MB of fp16, width {WIDTH}")
    for start in range(0, POOLED, 20_000):
        EmbeddingCache(folder / "p").publish(
            keys[start : start + 20_000], list(values[start : start + 20_000]), [100] * 20_000,
            trunk=TRUNK, recipe=recipe, attestation=HERE,
        )  # fmt: skip
    (folder / "p.bin").write_bytes(values.tobytes())
    mapped = np.memmap(folder / "p.bin", dtype="<f2", mode="r", shape=values.shape)
    environment = lmdb.open(str(folder / "lmdb"), map_size=4 << 30)
    with environment.begin(write=True) as transaction:
        for key, value in zip(keys, values, strict=True):
            transaction.put(bytes.fromhex(key), value.tobytes())
    cache = EmbeddingCache(folder / "p")
    chosen = random.Random(2).sample(range(POOLED), ASKED)
    asked = [keys[i] for i in chosen]

    def one_lmdb(key: str) -> np.ndarray:
        with environment.begin() as transaction:
            return np.frombuffer(transaction.get(bytes.fromhex(key)), dtype="<f2").astype(np.float32)

    assert np.array_equal(cache.vectors(asked)[:], values[chosen])
    assert np.array_equal(cache.get(asked[0]), one_lmdb(asked[0]))
    seconds = compare(
        {
            "memmap": lambda: np.array(mapped[chosen]),
            "ours": lambda: cache.vectors(asked),
            "ours, one at a time": lambda: [cache.get(key) for key in asked],
            "LMDB, one at a time": lambda: [one_lmdb(key) for key in asked],
        },
        rounds,
    )
    print("  " + ", ".join(f"{n} {1e3 * s:.0f} ms" for n, s in seconds.items()))
    said("10,000 random vectors, our time over a memory map's", seconds["ours"] / seconds["memmap"], 8, least=False)
    one = seconds["ours, one at a time"] / seconds["LMDB, one at a time"]
    said("one vector, our time over LMDB's", one, 2, least=False)


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(count=1000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    proteins = choose(args.fasta, args.count)
    with tempfile.TemporaryDirectory(prefix="cache-store-") as name:
        per_residue(proteins, Path(name), args.rounds)
        pooled(Path(name), args.rounds)


if __name__ == "__main__":
    main()
