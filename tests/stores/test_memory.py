"""Memory that is lent and used again: never while anybody looks at it, and no more of it kept than was said."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from typing import Any

import numpy as np
import pytest

from proteus_pipeline.stores import memory
from proteus_pipeline.stores.memory import Memory

SIZE = 1 << 18


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
    lender, chosen = Memory(8 * SIZE), random.Random(seed)
    kept: list[tuple[Any, bytes]] = []
    for turn in range(300):
        lent = lender.lend(chosen.choice((SIZE, SIZE - 1000, 2 * SIZE)))
        lent[:] = turn % 251
        view = looks(lent, chosen)
        del lent
        kept.append((view, as_bytes(view)))
        if chosen.random() < 0.6:
            kept.pop(chosen.randrange(len(kept)))
        assert all(as_bytes(view) == before for view, before in kept)
    kept.clear()
    del view
    assert 0 < lender.kept <= 8 * SIZE


def test_what_nobody_looks_at_is_used_again_up_to_a_number():
    lender = Memory(3 * SIZE)
    places = {lender.lend(SIZE - n).ctypes.data for n in range(20)}
    assert len(places) == 1
    many = [lender.lend(SIZE) for _ in range(10)]
    assert len({one.ctypes.data for one in many}) == 10
    del many
    assert lender.kept == 3 * SIZE
    assert lender.lend(SIZE + 1).nbytes == SIZE + 1


def test_small_and_very_large_arrays_are_anybody_elses():
    lender = Memory(1 << 30)
    for nbytes in (0, 1, 1000, (8 << 20) + 1):
        assert lender.lend(nbytes).shape == (nbytes,)
    assert lender.kept == 0


def test_an_array_keeps_no_more_than_its_own():
    lender = Memory(1 << 30)
    kept = [lender.lend(300_000) for _ in range(50)]
    assert all(len(one.base) <= 300_000 + SIZE for one in kept)


def test_what_is_long_unused_is_let_go_by_itself(monkeypatch: pytest.MonkeyPatch):
    lender = Memory(8 * SIZE)
    for _ in range(3):
        lender._watched = True  # nobody watches yet, however slow this machine is
        many = [lender.lend(SIZE) for _ in range(5)]
        del many
        assert lender.kept == 5 * SIZE
        lender._watched = False
        monkeypatch.setattr(memory, "_IDLE_SECONDS", 0.05)
        lender.lend(SIZE)
        deadline = time.monotonic() + 10
        while lender.kept and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lender.kept == 0
        monkeypatch.undo()


def test_threads_that_lend_and_let_go_never_share():
    lender, wrong = Memory(4 * SIZE), []

    def work(mark: int) -> None:
        held: list[np.ndarray] = []
        for _ in range(200):
            lent = lender.lend(SIZE)
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


def test_who_comes_back_while_another_is_lent_is_let_go():
    lender = Memory(8 * SIZE)
    lent = lender.lend(SIZE)
    with lender._lock:  # as where the collector runs in the middle of `lend`
        del lent
    assert lender.kept == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_begins_anew():
    lender = Memory(8 * SIZE)
    mine = lender.lend(SIZE)
    mine[:] = 1
    with lender._lock:
        child = os.fork()
        if not child:
            code = 1
            try:
                theirs = lender.lend(SIZE)
                theirs[:] = 2
                code = 0 if (mine == 1).all() else 2
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (mine == 1).all()


def test_without_room_for_a_mapping_numpy_says_whether_there_is_memory(monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, "no map left")

    monkeypatch.setattr(memory.mmap, "mmap", full)
    lender = Memory(2 * SIZE)
    first = lender.lend(SIZE)
    first[:] = 7
    view = first[10:20]
    del first
    lender.lend(SIZE)[:] = 8
    assert (view == 7).all()
    assert lender.lend(SIZE).shape == (SIZE,)
