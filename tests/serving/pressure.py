"""What `test_pressure` runs in a process of its own: only there is its memory the cache's."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from proteus_pipeline import CacheMemoryError, ModelCacheManager, ModelInterface, ModelVersionManager

BUDGET_GB, THREADS = 0.1, 32
PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(root: Path, count: int) -> dict[str, object]:
    """Do `count` operations on each thread; return what was seen."""
    import torch

    torch.set_num_threads(1)
    manager = ModelVersionManager(root)
    names = sorted(manager.list_models())
    expected = {name: ModelInterface(name, manager).embed([PROTEIN])[0].tobytes() for name in names}
    cache = ModelCacheManager(
        BUDGET_GB, version_manager=manager, patience=60.0, tokens_per_batch=256, eviction_policy="cost"
    )
    cache.warm(names[0])
    cache.clear_cache()
    before, peak, done = resident_bytes(), 0, threading.Event()
    over = 0

    def watch() -> None:
        nonlocal peak, over
        while not done.wait(0.002):
            peak = max(peak, resident_bytes())
            stats = cache.get_cache_stats()
            over = max(over, stats["bytes"] - stats["limit_bytes"])

    def work(seed: int) -> tuple[int, int]:
        dice, wrong, refused = random.Random(seed), 0, 0
        weights = [1 / (1 + i) for i in range(len(names))]
        for _ in range(count):
            (name,) = dice.choices(names, weights)
            if dice.random() < 0.9:
                found = cache.get_cached_model(name)
                wrong += found is not None and found.name != name
                continue
            try:
                with cache.lease(name) as model:
                    wrong += model.embed([PROTEIN])[0].tobytes() != expected[name]
            except CacheMemoryError:
                refused += 1
        return wrong, refused

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(work, range(THREADS)))
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    stats = cache.get_cache_stats()
    return {
        "wrong": sum(w for w, _ in results),
        "refused": sum(r for _, r in results),
        "grown": peak - before,
        "over": over,
        "leases": stats["leases"],
        "loads": stats["loads"],
        "evictions": sum(stats["evictions"].values()),
        "failures": stats["load_failures"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), int(sys.argv[2]))))
