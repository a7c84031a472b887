"""How many seconds of loading does each eviction policy cost on a recorded trace, and what does `cost` save against `lru`?

The trace (model_trace.csv) was recorded by ``--record``: 32 models of ESM-2's shapes from 8M to 650M, registered versions and
fair-esm files, each loaded by ModelCacheManager at every request, so that a row holds what that load took. The loads are real;
who asks for what is drawn by a seed: a service's requests for four popular models, notebooks that stay with one model for a while,
and comparisons of all models of a shape. It is replayed by the policies and the choice of evictions that the cache uses, at
budgets from what the largest model needs to twice that. Then, live: smaller models in a real cache, the same requests by either
policy in turn, seconds by the clock. ``python benchmarks/model_policies.py``
"""

from __future__ import annotations

import csv
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from _figures import Spread, parsed, said
from _figures import parser as of

from proteus_pipeline import ModelCacheManager, ModelInterface, ModelVersionManager
from proteus_pipeline.eviction.budget import to_evict
from proteus_pipeline.eviction.policies import POLICIES, Policy, make_policy

TRACE = Path(__file__).with_name("model_trace.csv")
BAR = 0.20
SHARES = (0.3, 0.4, 0.5, 0.6)  # with less, the largest model has no room, and no policy can save its loads
REQUESTS, LIVE_REQUESTS = 600, 400
# A group's models: how many of each shape, of which every third is a fair-esm file that nobody registered.
SHAPES = {"650M": 2, "150M": 6, "35M": 12, "8M": 12}
MODELS = tuple((f"{shape}-{n}", shape, n % 3 == 2) for shape, count in SHAPES.items() for n in range(count))
LIVE_BLOCKS = 2  # of each shape, where models are loaded by the hundred
POPULAR = {"650M-0": 3, "150M-0": 2, "35M-0": 1, "35M-1": 1}


@dataclass(frozen=True)
class Request:
    """A row: when, in seconds; which model, of how many bytes; what its load took."""

    at: float
    model: str
    nbytes: int
    seconds: float


def asked(count: int, seed: int = 0) -> list[tuple[float, str]]:
    """Draw who asks for what, and when."""
    dice, names = random.Random(seed), [name for name, _, _ in MODELS]
    events: list[tuple[float, str]] = []
    while len(events) < 0.6 * count:  # the service's
        events.append((dice.uniform(0, count), dice.choices(list(POPULAR), list(POPULAR.values()))[0]))
    while len(events) < 0.8 * count:  # notebooks: one model for a while
        at, model = dice.uniform(0, count), dice.choice(names)
        events += [(at + 3 * i + dice.random(), model) for i in range(dice.randint(4, 12))]
    comparing = 0
    while len(events) < count:  # all of a shape, one after the other, as they are compared on the same proteins
        shape = list(SHAPES)[1 + comparing % 3]
        at = dice.uniform(0, count)
        events += [(at + i, name) for i, name in enumerate(n for n, of, _ in MODELS if of == shape)]
        comparing += 1
    return sorted(events)[:count]


def replay(trace: list[Request], name: str, limit: int) -> tuple[float, int]:
    """Return the seconds of loading and the loads of a policy; a model larger than the limit is loaded and not kept."""
    # Models expire after a quarter of the trace, where the policy asks for a time.
    policy: Policy[str] = make_policy(name, ttl=trace[-1].at / 4 if name == "ttl" else None)
    held: dict[str, int] = {}
    seconds, loads = 0.0, 0
    for request in trace:
        for gone in to_evict(policy, sum(held.values()), limit, time=request.at):
            policy.evicted(gone)
            del held[gone]
        if request.model in held:
            policy.used(request.model, request.at)
            continue
        seconds, loads = seconds + request.seconds, loads + 1
        if request.nbytes > limit:
            continue
        for gone in to_evict(policy, sum(held.values()) + request.nbytes, limit, time=request.at):
            policy.evicted(gone)
            del held[gone]
        policy.added(request.model, request.nbytes, request.seconds, request.at)
        held[request.model] = request.nbytes
    return seconds, loads


def models(folder: Path, *, blocks: int | None = None) -> tuple[ModelVersionManager, dict[str, ModelInterface]]:
    """Write the models, of `blocks` blocks where that is given, and register those that are."""
    import _proteins
    from _registrations import Given

    from proteus_pipeline.models.fair_esm import to_fair_esm

    manager, found = ModelVersionManager(folder / "home"), {}
    for number, (name, shape, loose) in enumerate(MODELS):
        layers, width, heads = _proteins.SHAPES[shape]
        _proteins.SHAPES[name] = (blocks or layers, width, heads)
        checkpoint = _proteins.random_weights(name, seed=number)
        if loose:
            _proteins.save_as_fair_esm(to_fair_esm(checkpoint)[0], folder / f"{name}.pt")
            found[name] = ModelInterface(name, manager, weights=folder / f"{name}.pt")
        else:
            manager.register_version(Given(name, checkpoint, {}), "1.0.0")
            found[name] = ModelInterface(name, manager)
    return manager, found


def record(path: Path) -> None:
    """Load a model at every request, and write what it took."""
    with tempfile.TemporaryDirectory(prefix="model-trace-") as folder:
        manager, found = models(Path(folder))
        cache = ModelCacheManager(None, version_manager=manager, compression=False)
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["at_seconds", "model", "bytes", "load_seconds"])
            for at, name in asked(REQUESTS):
                began = time.perf_counter()
                cache.cache_model(found[name])
                seconds = time.perf_counter() - began
                rows.writerow(
                    [f"{at:.2f}", name, next(iter(cache.get_cache_stats()["models"].values())), f"{seconds:.4f}"]
                )
                cache.clear_cache()


def live(folder: Path, requests: int, rounds: int) -> dict[str, float]:
    """Return the seconds of loading by either policy in a real cache, as its own statistics have them."""
    manager, found = models(folder, blocks=LIVE_BLOCKS)
    whole = ModelCacheManager(None, version_manager=manager, compression=False, tokens_per_batch=64)
    whole.preload(*found.values())
    limit = sum(whole.get_cache_stats()["models"].values()) * 0.4
    room = whole.get_cache_stats()["devices"]["cpu"]["calls_bytes"]
    del whole
    seconds: dict[str, list[float]] = {"lru": [], "cost": []}
    for _ in range(rounds):
        for policy, taken in seconds.items():
            cache = ModelCacheManager(
                (limit + room) / 1e9, policy, compression=False, version_manager=manager, tokens_per_batch=64
            )
            total = 0.0
            for _, name in asked(requests, seed=1):
                before = cache.get_cache_stats()["loads"]
                began = time.perf_counter()
                cache.get_or_load(found[name])
                if cache.get_cache_stats()["loads"] > before:
                    total += time.perf_counter() - began
            taken.append(total)
    return {policy: statistics.median(taken) for policy, taken in seconds.items()}


def main() -> None:
    parser = of(__doc__)
    parser.add_argument("--record", action="store_true", help="write the trace anew: some minutes and 12 GB of /tmp")
    parser.add_argument("--requests", type=int, default=LIVE_REQUESTS, help="of the live part")
    parser.add_argument("--rounds", type=int, default=3, help="of the live part")
    args = parsed(parser, requests=150, rounds=1)
    if args.record:
        record(TRACE)
    with TRACE.open() as file:
        trace = [
            Request(float(r["at_seconds"]), r["model"], int(r["bytes"]), float(r["load_seconds"]))
            for r in csv.DictReader(file)
        ]
    total = sum({r.model: r.nbytes for r in trace}.values())
    print(f"{len(trace)} requests for {len({r.model for r in trace})} models of {total / 1e9:.1f} GB in all")
    saved = []
    for share in SHARES:
        results = {name: replay(trace, name, int(share * total)) for name in POLICIES}
        told = ", ".join(f"{name} {seconds:.0f} s ({loads} loads)" for name, (seconds, loads) in results.items())
        saved.append(1 - results["cost"][0] / results["lru"][0])
        print(f"a budget of {share:3.0%}: {told}; cost saves {saved[-1]:.0%} of lru's")
    said("share of lru's seconds that cost saves", Spread(statistics.median(saved), min(saved), max(saved)), BAR)
    with tempfile.TemporaryDirectory(prefix="model-live-") as folder:
        seconds = live(Path(folder), args.requests, args.rounds)
    share = 1 - seconds["cost"] / seconds["lru"]
    print(f"live, {args.requests} requests: lru {seconds['lru']:.2f} s, cost {seconds['cost']:.2f} s")
    said("live: share of lru's seconds that cost saves", share)


if __name__ == "__main__":
    sys.exit(main())
