"""How fast is the embedding cache beside what people keep embeddings in?

The same data, all sides in every round. Per residue: hidden states of real proteins, fp16, width 1280: written with a flush to
disk, one read, read in random order, and scanned; beside fair-esm's .pt a sequence, an HDF5 dataset a sequence, tensorstore and
zarr-python on our own segments, and a raw memory map. Pooled: random vectors, and one at a time, beside a memory map, LMDB and
HDF5. Every read of ours is checked against its content hash; .pt, HDF5, LMDB and the memory map check nothing.

Each round writes fresh files and reads them, once to warm up and once by the clock, the sides in an order by chance. A figure is
the median of the rounds' ratios, with the least and the greatest: a disk or a neighbour that is slow for a minute slows all
sides of a round.
``python benchmarks/cache_store.py --fasta DB.fasta.gz`` takes the proteins from a file.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import lmdb
import numpy as np
import tensorstore
import torch
import zarr
from _figures import Taken, one_round, parsed, said
from _proteins import arguments, choose, real_weights

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.index import Attestation
from proteus_pipeline.embeddings.recipe import Recipe
from proteus_pipeline.identity import digests
from proteus_pipeline.models.encoder import Outputs, make_encoder

WIDTH, LAYER, TRUNK = 1280, 33, "0" * 32
LAYERS = (3, 4, 5, 6)
ASKED, SINGLES = 10_000, 300
Arrays = dict[str, np.ndarray]
Sides = dict[str, Callable[[], Any]]
HERE = Attestation("cpu/benchmark", "", "2026-01-01T00:00:00+00:00", 1.0, 1)


def hidden_states(proteins: list[tuple[str, str]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return each protein's residues and start token, by key: the 8M model's last layers, side by side to a width of 1280."""
    encoder = make_encoder(real_weights())
    computed = {}
    for number, encoded in encoder.compute([sequence for _, sequence in proteins], Outputs(layers=LAYERS)):
        rows = np.concatenate([encoded.hidden[layer][:-1] for layer in LAYERS], axis=1).astype("<f2")
        computed[digests.of_bytes(str(number).encode())] = rows[1:].copy(), rows[0].copy()
    return computed


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


def write_hdf5(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    with path.open("rb") as file:
        os.fsync(file.fileno())


def per_residue(proteins: list[tuple[str, str]], folder: Path, rounds: int) -> None:
    recipe = Recipe(layer=LAYER, pooling="per_residue", stored="fp16")
    computed = hidden_states(proteins)
    arrays = {key: array for key, (array, _) in computed.items()}
    raw = sum(a.nbytes for a in arrays.values())
    print(f"per residue: {len(arrays)} entries, {raw / 1e6:.0f} MB of fp16, width {WIDTH}, {rounds} rounds")
    taken, order = Taken(), random.Random(0)
    for number in range(rounds + 1):
        here = folder / str(number)
        here.mkdir()
        writing: Sides = {
            ".pt written": lambda here=here: write_pt(here / "pt", arrays),
            "ours written": lambda here=here: write_ours(here / "ours", computed, recipe),
            "HDF5 written": lambda here=here: write_hdf5(here / "hdf5" / "all.h5", arrays),
        }
        seconds = one_round(writing, order)
        seconds |= one_round(readers(arrays, here), order, warm_up=True)
        on_disk = sum(p.stat().st_size for p in (here / "ours").rglob("*") if p.is_file())
        shutil.rmtree(here)
        if number:  # the first warms up
            taken.add(seconds)
    print(f"  {taken}")
    print("  flushed: " + ", ".join(f"{n} {raw / taken.median(n) / 1e6:.0f} MB/s" for n in writing))
    said("write, our speed over .pt's", taken.ratio(".pt written", "ours written"), 1.5)
    said("write, our speed over HDF5's", taken.ratio("HDF5 written", "ours written"))
    # Ours hold the start tokens' vectors too, as .pt does not.
    held = raw + sum(start.nbytes for _, start in computed.values())
    said("bytes over raw", on_disk / held, 0.87, least=False)
    said("one read, our time over .pt's", taken.ratio("ours one", ".pt one"), 0.65, least=False)
    said("one read, our time over HDF5's", taken.ratio("ours one", "HDF5 one"))
    said("random order, our speed over tensorstore's", taken.ratio("tensorstore", "ours"), 1.1)
    said(
        "random order, our speed over tensorstore's, every array opened before",
        taken.ratio("tensorstore, opened before", "ours"),
    )
    said("random order, our speed over zarr-python's", taken.ratio("zarr", "ours"), 2)
    said("random order, our speed over .pt's", taken.ratio(".pt", "ours"))
    said("random order, our speed over HDF5's", taken.ratio("HDF5", "ours"))
    said("scan, our time over a memory map's", taken.ratio("ours scan", "memmap scan"), 5, least=False)


def readers(arrays: Arrays, here: Path) -> Sides:
    """Return what is timed of reading: of fresh files, each opened before."""
    pt, ours, raw = here / "pt", here / "ours", here / "raw.bin"
    cache, keys = EmbeddingCache(ours), list(arrays)
    random.Random(1).shuffle(keys)
    some = keys[:SINGLES]
    raw.write_bytes(b"".join(a.tobytes() for a in arrays.values()))
    ends = np.cumsum([a.size for a in arrays.values()])
    where = {k: (int(e) - a.size, a.shape) for (k, a), e in zip(arrays.items(), ends, strict=True)}
    mapped = np.memmap(raw, dtype="<f2", mode="r")
    hdf5 = h5py.File(here / "hdf5" / "all.h5")
    place = {key: found[0].segment for key, found in cache.candidates(keys).items()}
    groups = {
        s: zarr.open_group(zarr.storage.ZipStore(ours / "seg" / s, mode="r"), mode="r") for s in {*place.values()}
    }
    opened = {key: tensorstore.open(_spec(ours, place[key], key)).result() for key in keys}

    def one_pt(key: str) -> torch.Tensor:
        return torch.load(pt / f"{key}.pt", weights_only=True)["representations"][LAYER]

    def by_tensorstore() -> list[np.ndarray]:
        futures = [opened[key].read() for key in keys]
        return [f.result() for f in futures]

    def by_tensorstore_opening() -> list[np.ndarray]:
        futures = [tensorstore.open(_spec(ours, place[key], key)) for key in keys]
        return [f.result().read().result() for f in futures]

    def from_map(start: int, shape: tuple[int, int]) -> np.ndarray:
        return np.array(mapped[start : start + shape[0] * shape[1]].reshape(shape))

    first = keys[0]
    for side in (
        cache.find_one(first)[1],
        one_pt(first).numpy(),
        hdf5[first][:],
        by_tensorstore()[0],
        from_map(*where[first]),
    ):
        assert np.array_equal(side, arrays[first])
    return {
        ".pt one": lambda: [one_pt(key) for key in some],
        "ours one": lambda: [cache.find_one(key)[1] for key in some],
        "HDF5 one": lambda: [hdf5[key][:] for key in some],
        ".pt": lambda: [one_pt(key) for key in keys],
        "ours": lambda: [array for _, array in cache.find(keys)],
        "HDF5": lambda: [hdf5[key][:] for key in keys],
        "tensorstore": by_tensorstore_opening,
        "tensorstore, opened before": by_tensorstore,
        "zarr": lambda: [groups[place[key]][key][:] for key in keys],
        "memmap": lambda: [from_map(*where[key]) for key in keys],
        "ours scan": lambda: [float(array[0, 0]) for _, array in cache.find(arrays)],
        "memmap scan": lambda: [from_map(*found) for found in where.values()],
    }


def _spec(ours: Path, segment: str, key: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {
            "driver": "zip",
            "base": {"driver": "file", "path": str(ours / "seg" / segment)},
            "path": f"{key}/",
        },
    }


def pooled(folder: Path, rounds: int, entries: int) -> None:
    values = np.random.default_rng(0).standard_normal((entries, WIDTH), dtype=np.float32).astype("<f2")
    keys = [digests.of_bytes(f"p{i}".encode()) for i in range(entries)]
    print(f"pooled: {entries:,} entries, {values.nbytes / 1e6:.0f} MB of fp16, width {WIDTH}, {rounds} rounds")
    taken, order = Taken(), random.Random(0)
    for number in range(rounds + 1):
        here = folder / f"pooled{number}"
        here.mkdir()
        seconds = one_round(pooled_readers(here, keys, values), order, warm_up=True)
        shutil.rmtree(here)
        if number:  # the first warms up
            taken.add(seconds)
    print(f"  {taken}")
    said("10,000 random vectors, our time over a memory map's", taken.ratio("ours", "memmap"), 8, least=False)
    said("10,000 random vectors, our time over HDF5's", taken.ratio("ours", "HDF5"))
    said("one vector, our time over LMDB's", taken.ratio("ours, one at a time", "LMDB, one at a time"), 2, least=False)


def pooled_readers(here: Path, keys: list[str], values: np.ndarray) -> Sides:
    """Write vectors as each side has them, and return what is timed of reading them."""
    recipe = Recipe(layer=LAYER, stored="fp16")
    for start in range(0, len(keys), 20_000):
        some = slice(start, start + 20_000)
        EmbeddingCache(here / "p").publish(
            keys[some], list(values[some]), [100] * len(keys[some]), trunk=TRUNK, recipe=recipe, attestation=HERE
        )
    (here / "p.bin").write_bytes(values.tobytes())
    mapped = np.memmap(here / "p.bin", dtype="<f2", mode="r", shape=values.shape)
    with h5py.File(here / "p.h5", "w") as file:
        file["vectors"] = values
    hdf5 = h5py.File(here / "p.h5")["vectors"]
    environment = lmdb.open(str(here / "lmdb"), map_size=4 << 30)
    with environment.begin(write=True) as transaction:
        for key, value in zip(keys, values, strict=True):
            transaction.put(bytes.fromhex(key), value.tobytes())
    cache = EmbeddingCache(here / "p")
    chosen = random.Random(2).sample(range(len(keys)), min(ASKED, len(keys)))
    asked = [keys[i] for i in chosen]

    def one_lmdb(key: str) -> np.ndarray:
        with environment.begin() as transaction:
            return np.frombuffer(transaction.get(bytes.fromhex(key)), dtype="<f2").astype(np.float32)

    assert np.array_equal(cache.vectors(asked)[:], values[chosen])
    assert np.array_equal(cache.get(asked[0]), one_lmdb(asked[0]))
    return {
        "memmap": lambda: np.array(mapped[chosen]),
        "ours": lambda: cache.vectors(asked),
        "HDF5": lambda: [hdf5[i] for i in chosen],
        "ours, one at a time": lambda: [cache.get(key) for key in asked],
        "LMDB, one at a time": lambda: [one_lmdb(key) for key in asked],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(count=1000)
    parser.add_argument("--entries", type=int, default=100_000, help="pooled vectors")
    args = parsed(parser, count=100, rounds=3, entries=20_000)
    torch.set_num_threads(args.threads)
    proteins = choose(args.fasta, args.count)
    with tempfile.TemporaryDirectory(prefix="cache-store-") as name:
        per_residue(proteins, Path(name), args.rounds)
        pooled(Path(name), args.rounds, args.entries)


if __name__ == "__main__":
    main()
