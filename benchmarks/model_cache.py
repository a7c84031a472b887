"""Do compression, preload and warm do what they say?

Models of ESM-2's 150M shape with random weights. Compression: a fair-esm file written before torch 1.6, which can't be mapped,
and a registered version, which is; each is loaded, let go, and loaded again, with and without ``compression``: whether a copy was
kept, and how much sooner the model was back. Preload: the time to the first embedding of a model that was preloaded, against one
that was not. Warm: the page faults of the first request after it, against those of a later one, of the first one after preload,
and of one to a cold cache. ``python benchmarks/model_cache.py``
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _figures import parsed, said
from _figures import parser as of
from _proteins import SHAPES, random_weights, save_as_fair_esm
from _registrations import Given

from proteus_pipeline import ModelCacheManager, ModelInterface, ModelVersionManager
from proteus_pipeline.models.fair_esm import to_fair_esm

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 9


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def again(manager: ModelVersionManager, model: ModelInterface, *, compression: bool, rounds: int) -> tuple[float, bool]:
    """Return the median seconds until a model that was let go is back, and whether a compressed copy brought it."""
    times = []
    for _ in range(rounds):
        # Models expire at once, so that what is let go is let go by the policy, as for want of room.
        cache = ModelCacheManager(
            8, "ttl", compression=compression, version_manager=manager, ttl=0.01, tokens_per_batch=1024
        )
        cache.cache_model(model)
        time.sleep(0.02)
        cache.get_cache_stats()
        times.append(seconds(lambda cache=cache: cache.cache_model(model)))
        restored = cache.get_cache_stats()["restored"] > 0
    return statistics.median(times), restored


def faults() -> int:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


@dataclass(frozen=True)
class Requests:
    """Medians of a first request and of the next one: seconds and page faults; and the loads that the first one caused."""

    seconds: float
    faults: float
    later_seconds: float
    later_faults: float
    loads: int


def requests(manager: ModelVersionManager, prepare: str | None, rounds: int) -> Requests:
    rows = []
    for _ in range(rounds):
        cache = ModelCacheManager(8, compression=False, version_manager=manager)
        if prepare:
            getattr(cache, prepare)("mapped")
        loaded = cache.get_cache_stats()["loads"]
        row: list[float] = []
        for _ in range(2):
            before = faults()
            row += [seconds(lambda cache=cache: cache.get_or_load("mapped").embed([PROTEIN])), faults() - before]
        rows.append((*row, cache.get_cache_stats()["loads"] - loaded))
        cache.clear_cache()
    return Requests(*(statistics.median(column) for column in zip(*rows, strict=True)))


def main() -> None:
    parser = of(__doc__)
    parser.add_argument("--shape", default="150M", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    args = parsed(parser, shape="35M", rounds=2)
    with tempfile.TemporaryDirectory(prefix="model-cache-") as name:
        folder = Path(name)
        manager = ModelVersionManager(folder / "home")
        manager.register_version(Given("mapped", random_weights(args.shape), {}), "1.0.0")
        save_as_fair_esm(to_fair_esm(random_weights(args.shape, seed=1))[0], folder / "old.pt")
        torch.save(
            torch.load(folder / "old.pt", weights_only=False), folder / "old.pt", _use_new_zipfile_serialization=False
        )
        models = {"a version, mapped": ModelInterface("mapped", manager)}
        models["an old .pt, read"] = ModelInterface("old", manager, weights=folder / "old.pt")
        for what, model in models.items():
            source, _ = again(manager, model, compression=False, rounds=args.rounds)
            back, restored = again(manager, model, compression=True, rounds=args.rounds)
            chosen = "a compressed copy was kept" if restored else "no copy was kept: it would be no faster"
            print(f"{what}: back from its source in {source:.2f} s, with compression in {back:.2f} s; {chosen}")
            said(f"{what}: back with compression, speed over its source's", source / back)
        cold, loaded, warm = (requests(manager, prepare, args.rounds) for prepare in (None, "preload", "warm"))
        print(
            f"first embedding: cold {cold.seconds:.2f} s, preloaded {loaded.seconds:.2f} s, with {loaded.loads} loads in it"
        )
        said("first embedding, preloaded: speed over a cold one's", cold.seconds / loaded.seconds)
        said("first embedding, preloaded: loads in it", loaded.loads, 0, least=False)
        print(
            f"page faults of the first request: cold {cold.faults:,.0f}, preloaded {loaded.faults:,.0f}, warm {warm.faults:,.0f}"
        )
        said("first request, warm: page faults over the next one's", warm.faults / warm.later_faults)
        said("first request, warm: seconds over the next one's", warm.seconds / warm.later_seconds)


if __name__ == "__main__":
    main()
