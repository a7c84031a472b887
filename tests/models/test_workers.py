from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from proteus_pipeline.models.workers import Alone, Steps, do_all, thread_count, with_one_thread, workers


def test_each_thread_computes_with_one_and_torch_has_as_many_as_before_afterwards():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[tuple[str, int, bool]] = []
    gate = threading.Barrier(2, timeout=10)

    def look(_: int) -> None:
        gate.wait()
        seen.append((threading.current_thread().name, torch.get_num_threads(), torch.is_inference_mode_enabled()))

    try:
        with workers(2) as pool:
            pool.share(look, range(2))
        assert {(threads, inferring) for _, threads, inferring in seen} == {(1, True)}
        assert len({name for name, _, _ in seen}) == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_results_come_in_order_while_no_more_than_some_are_in_flight():
    running, most = 0, 0
    lock = threading.Lock()

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01 * (number % 3))
        with lock:
            running -= 1
        return number

    with workers(2) as pool:
        assert list(pool.ahead(work, range(20))) == list(range(20))
    assert most == 2


def test_pieces_are_taken_as_they_are_wanted():
    taken = 0

    def endless() -> Iterator[int]:
        nonlocal taken
        while True:
            taken += 1
            yield taken

    with workers(2) as pool:
        results = pool.ahead(lambda n: n, endless())
        assert [next(results) for _ in range(5)] == [1, 2, 3, 4, 5]
        assert taken <= 5 + 3


def test_the_first_error_is_raised_once_none_is_running():
    done: list[int] = []

    def work(number: int) -> None:
        if number == 1:
            raise ValueError("one")
        time.sleep(0.05)
        done.append(number)

    with workers(2) as pool:
        with pytest.raises(ValueError, match="one"):
            pool.share(work, range(4))
        assert sorted(done) == [0, 2, 3]
        with pytest.raises(ValueError, match="one"):
            list(pool.ahead(work, range(4)))


def test_alone_is_in_turn():
    seen: list[int] = []
    Alone().share(seen.append, range(3))
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("pieces", range(6))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_work_in_steps_is_done_whole_by_one_thread_or_step_by_step_by_all(count: int, pieces: int):
    done: list[tuple[int, int, str]] = []

    def work(piece: int) -> Steps:
        for step in range(3):
            assert sum(1 for number, _, _ in done if number == piece) == 4 * step  # all of the steps before
            yield [lambda step=step: done.append((piece, step, threading.current_thread().name))] * 4

    with workers(count) as pool:
        do_all(pool, work, range(pieces))
    assert sorted((piece, step) for piece, step, _ in done) == [
        (p, s) for p in range(pieces) for s in (0, 1, 2) for _ in "1234"
    ]
    assert not {name for _, _, name in done} & {threading.current_thread().name}
    for piece in range(pieces - pieces % count):
        assert len({name for number, _, name in done if number == piece}) == 1


def test_the_pieces_of_a_step_are_done_at_once():
    gate = threading.Barrier(2, timeout=10)
    with workers(2) as pool:
        do_all(pool, lambda _: iter([[gate.wait, gate.wait]] * 3), [0])


def mkl_threads() -> int:
    found = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return int(found[1]) if found else 1


def test_a_call_that_ends_raises_no_threads_in_one_that_goes_on_and_leaves_none_lost():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    begun, end = threading.Barrier(2, timeout=10), threading.Event()
    seen: list[int] = []

    def outlasts() -> int:
        count = thread_count()
        with workers(2) as pool:
            begun.wait()
            end.wait(10)
            pool.share(lambda _: seen.append(mkl_threads()), range(4))
        return count

    try:
        with ThreadPoolExecutor(1) as other:
            with workers(2) as pool:
                pool.share(lambda _: None, range(2))
                going_on = other.submit(outlasts)  # a new thread, while one call is under way
                begun.wait()
            end.set()
            assert going_on.result() == 2
        assert set(seen) == {1}
        assert (torch.get_num_threads(), thread_count()) == (2, 2)
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_with_one_thread_leaves_the_callers_number():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert with_one_thread(torch.get_num_threads) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
