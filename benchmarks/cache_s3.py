"""How fast is the embedding cache on S3, 20 ms away, beside .pt objects and zarr-python?

The same data, all sides in turn. Hidden states of real proteins per residue, fp16, width 1280, on a real S3 server (SeaweedFS)
behind a proxy that delays what passes. Read: 400 entries in random order, ours with every check, .pt objects by 32 threads of
obstore and of boto3 (the better one counts), zarr-python through obstore, an array a sequence in one chunk, 32 at a time, which is
how many requests ours makes at a time. They are all that each store holds: fewer of many have fewer neighbours, and are read by
more requests. Every side's clients are open before the clock starts, so that none of them pays for connections; ours asks what is
new there, unless it did a second before. Written: our push beside boto3's upload of the same bytes in as many objects.

Server, proxy and reader share this machine's cores, which are what bounds every side: on two, other work ruins the figures.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import obstore.store
import torch
import zarr
from _figures import in_turn, parsed, said
from _proteins import arguments, choose, enlarged
from _s3 import BUCKET, KEY, SECRET, client, delayed, server
from cache_store import LAYER, hidden_states, write_ours

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.recipe import Recipe

LATENCY = 0.020
THREADS = 32


def pt_bytes(key: str, array: np.ndarray) -> bytes:
    out = io.BytesIO()
    torch.save({"label": key, "representations": {LAYER: torch.from_numpy(array)}}, out)
    return out.getvalue()


def from_pt(data: Any) -> np.ndarray:
    return torch.load(io.BytesIO(data), weights_only=True)["representations"][LAYER].numpy()


def obstore_client(endpoint: str) -> obstore.store.S3Store:
    config = {"endpoint": endpoint, "region": "us-east-1", "access_key_id": KEY, "secret_access_key": SECRET}
    return obstore.store.S3Store(BUCKET, config=config, client_options={"allow_http": True})


def read(arrays: dict[str, np.ndarray], folder: Path, direct: str, far: str, rounds: int) -> None:
    near, away, boto = obstore_client(direct), obstore_client(far), client(far)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: near.put(f"pt/{item[0]}.pt", pt_bytes(*item)), arrays.items()))
        # zarr-python's own layout on S3: an array a sequence, a chunk an object.
    group = zarr.open_group(zarr.storage.ObjectStore(obstore.store.S3Store(
        BUCKET, prefix="zarr", config={"endpoint": direct, "region": "us-east-1", "access_key_id": KEY, "secret_access_key": SECRET},
        client_options={"allow_http": True})), mode="w")  # fmt: skip
    compressor = zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")
    for key, array in arrays.items():
        group.create_array(key, data=array, chunks=array.shape, compressors=compressor)
    keys = list(arrays)
    random.Random(1).shuffle(keys)
    os.environ["AWS_ENDPOINT_URL"] = far
    beneath = EmbeddingCache(folder / "reader", shared="s3://proteus/ours")
    pool = ThreadPoolExecutor(THREADS)
    store = zarr.storage.ObjectStore(obstore.store.S3Store(
        BUCKET, prefix="zarr", config={"endpoint": far, "region": "us-east-1", "access_key_id": KEY, "secret_access_key": SECRET},
        client_options={"allow_http": True}), read_only=True)  # fmt: skip

    async def zarr_all() -> list[Any]:
        opened = await zarr.api.asynchronous.open_group(store, mode="r")
        limit = asyncio.Semaphore(THREADS)

        async def one(key: str) -> Any:
            async with limit:
                return await (await opened.getitem(key)).getitem(slice(None))

        return await asyncio.gather(*(one(key) for key in keys))

    def boto_all() -> list[np.ndarray]:
        get = lambda key: from_pt(boto.get_object(Bucket=BUCKET, Key=f"pt/{key}.pt")["Body"].read())  # noqa: E731
        return list(pool.map(get, keys))

    ours = {entry.key: array for entry, array in beneath.find(keys)}
    assert all(np.array_equal(ours[key].view("<f2"), arrays[key]) for key in keys)
    assert np.array_equal(asyncio.run(zarr_all())[3], arrays[keys[3]])
    taken = in_turn(
        {
            "ours": lambda: sum(1 for _ in beneath.find(keys)),
            ".pt, obstore": lambda: list(pool.map(lambda key: from_pt(bytes(away.get(f"pt/{key}.pt").bytes())), keys)),
            ".pt, boto3": boto_all,
            "zarr": lambda: asyncio.run(zarr_all()),
        },
        rounds,
    )
    print(f"  {len(keys)} entries in random order: {taken}")
    best = min((".pt, obstore", ".pt, boto3"), key=taken.median)
    said(f"random order, our speed over .pt objects' ({best})", taken.ratio(best, "ours"), 1.8)
    said("random order, our speed over zarr-python's", taken.ratio("zarr", "ours"), 2.5)


def write(folder: Path, far: str, rounds: int) -> None:
    os.environ["AWS_ENDPOINT_URL"] = far
    boto, turns = client(far), iter(range(1000))
    files = sorted(p for p in (folder / "ours").rglob("*") if p.suffix in {".zip", ".idx"})
    cache = EmbeddingCache(folder / "ours")

    def raw() -> None:
        turn = next(turns)
        for path in files:
            boto.upload_file(str(path), BUCKET, f"raw{turn}/{path.name}")

    taken = in_turn({"boto3": raw, "ours": lambda: cache.push(f"s3://proteus/pushed{next(turns)}")}, rounds)
    print(f"  {sum(p.stat().st_size for p in files) / 1e6:.0f} MB uploaded: {taken}")
    said("upload, our time over boto3's", taken.ratio("ours", "boto3"), 1.3, least=False)


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(count=400)
    args = parsed(parser, rounds=3)
    torch.set_num_threads(args.threads)
    recipe = Recipe(layer=LAYER, pooling="per_residue", stored="fp16")
    proteins = enlarged(choose(args.fasta, args.count), args.count)
    computed = hidden_states(proteins)
    arrays = {key: array for key, (array, _) in computed.items()}
    raw = sum(a.nbytes for a in arrays.values())
    print(f"per residue: {len(arrays)} entries, {raw / 1e6:.0f} MB of fp16, {1e3 * LATENCY:.0f} ms away")
    with tempfile.TemporaryDirectory(prefix="cache-s3-") as name, server(Path(name, "server")) as port:
        folder, direct = Path(name), f"http://127.0.0.1:{port}"
        write_ours(folder / "ours", computed, recipe)
        os.environ["AWS_ENDPOINT_URL"] = direct
        EmbeddingCache(folder / "ours").push("s3://proteus/ours")
        with delayed(port, LATENCY) as far:
            read(arrays, folder, direct, far, args.rounds)
            write(folder, far, args.rounds)


if __name__ == "__main__":
    main()
