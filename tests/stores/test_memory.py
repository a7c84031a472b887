"""Memory that is lent and used again: never while anybody looks at it, and no more of it kept than was said."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest

from proteus_pipeline.stores import memory
from proteus_pipeline.stores.memory import Buffers

SIZE = 1 << 16


def looks(lent: np.ndarray, chosen: random.Random) -> Any:
    """Return some way to look at a piece of what was lent; nothing else of it is left."""
    start = chosen.randrange(0, SIZE // 2, 8)
    some = lent[start : start + 1024]
    ways = (
        lambda: some,
        lambda: some[64:][:512],
        lambda: some.view("<u4").reshape(-1, 8),
        lambda: some.view("<f2").reshape(-1, 16).T[1:],
        lambda: memoryview(some)[8:520],
        lambda: np.frombuffer(memoryview(lent)[start : start + 1024], "<u8"),
    )
    return chosen.choice(ways)()


def as_bytes(view: Any) -> bytes:
    return np.ascontiguousarray(np.asarray(view)).tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_what_anybody_looks_at_is_never_lent_again(seed: int):
    buffers, chosen = Buffers(SIZE, 8), random.Random(seed)
    kept: list[tuple[Any, bytes]] = []
    for turn in range(300):
        lent = buffers.lend()
        lent[:] = turn % 251
        view = looks(lent, chosen)
        del lent
        kept.append((view, as_bytes(view)))
        if chosen.random() < 0.6:
            kept.pop(chosen.randrange(len(kept)))
        assert all(as_bytes(view) == before for view, before in kept)


def test_what_nobody_looks_at_is_used_again_up_to_a_number():
    buffers = Buffers(SIZE, 3)
    places = {id(buffers.lend().base) for _ in range(20)}
    assert len(places) == 1
    many = [buffers.lend() for _ in range(10)]
    assert len({one.ctypes.data for one in many}) == 10
    del many
    assert len(buffers._free) == 3


def test_what_is_long_unused_is_let_go(monkeypatch: pytest.MonkeyPatch):
    buffers = Buffers(SIZE, 8)
    many = [buffers.lend() for _ in range(5)]
    del many
    assert len(buffers._free) == 5
    monkeypatch.setattr(memory, "_IDLE_SECONDS", -1.0)
    one = buffers.lend()
    assert len(buffers._free) == 0
    del one


def test_threads_that_lend_and_let_go_never_share():
    buffers, wrong = Buffers(SIZE, 4), []

    def work(mark: int) -> None:
        held: list[np.ndarray] = []
        for _ in range(200):
            lent = buffers.lend()
            lent[:] = mark
            held.append(lent[100:200])
            del lent
            if len(held) > 3:
                wrong.extend(0 for one in held if not (one == mark).all())
                del held[:2]

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_huge_pages_it_is_memory_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE", raising=False)
    buffers = Buffers(SIZE, 2)
    first = buffers.lend()
    first[:] = 7
    view = first[10:20]
    del first
    buffers.lend()[:] = 8
    assert (view == 7).all()
    assert buffers.lend().shape == (SIZE,)
