"""Batches: each sequence once, within the budget, few tokens wasted."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.models.plan import plan_batches, plan_in_tiles, plan_tiles, tile_of

LENGTHS = st.lists(st.integers(3, 400), max_size=120)
BUDGETS = st.integers(1, 1000)


@given(LENGTHS, BUDGETS)
def test_each_index_is_there_once(lengths: list[int], budget: int):
    assert sorted(i for batch in plan_batches(lengths, budget) for i in batch) == list(range(len(lengths)))


@given(LENGTHS, BUDGETS)
def test_the_budget_holds_but_for_a_sequence_that_is_longer_alone(lengths: list[int], budget: int):
    for batch in plan_batches(lengths, budget):
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1


@given(LENGTHS, BUDGETS)
def test_no_two_batches_would_fit_in_one(lengths: list[int], budget: int):
    loads = sorted(sum(lengths[i] for i in batch) for batch in plan_batches(lengths, budget))
    if len(loads) > 1:
        assert loads[0] + loads[1] > budget
    assert len(loads) <= max(1, 2 * sum(lengths) / budget)


@given(LENGTHS, BUDGETS)
def test_batches_come_longest_member_first(lengths: list[int], budget: int):
    plan = [[lengths[i] for i in batch] for batch in plan_batches(lengths, budget)]
    assert all(batch == sorted(batch, reverse=True) for batch in plan)
    assert all(a[0] >= b[0] for a, b in pairwise(plan))


@given(LENGTHS, BUDGETS, st.randoms(use_true_random=False))
def test_the_lengths_of_the_batches_do_not_depend_on_the_order(lengths: list[int], budget: int, rng: random.Random):
    shuffled = rng.sample(lengths, len(lengths))
    one, two = ([[x[i] for i in batch] for batch in plan_batches(x, budget)] for x in (lengths, shuffled))
    assert one == two
    assert plan_batches(lengths, budget) == plan_batches(lengths, budget)


def test_protein_like_lengths_waste_little():
    rng = random.Random(0)
    lengths = [min(1024, max(30, int(rng.lognormvariate(5.7, 0.6)))) for _ in range(2000)]
    plan = plan_batches(lengths, 4096)
    assert sum(lengths) / (len(plan) * 4096) > 0.99


def test_small_cases():
    assert plan_batches([], 10) == []
    assert plan_batches([5], 1) == [[0]]
    assert plan_batches([4, 4, 4], 8) == [[0, 1], [2]]
    assert plan_batches([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=4, unique=True).map(sorted)


@given(LENGTHS.filter(bool), SIZES)
def test_each_sequence_lies_in_tiles_that_its_own_length_asks_for(lengths: list[int], sizes: list[int]):
    rows, tiles = plan_tiles(lengths, sizes, whole=True)
    covered = sorted(row for part in rows for row in range(part.start, part.stop))
    assert [part.stop - part.start for part in rows] == lengths
    assert len(set(covered)) == len(covered)
    assert [t.start for t in tiles] == [0, *(t.stop for t in tiles[:-1])]
    for length, part in zip(lengths, rows, strict=True):
        alone = plan_tiles([length], sizes, whole=True)[1]
        (size,) = {t.stop - t.start for t in alone}
        assert {t.stop - t.start for t in tiles if t.start < part.stop and t.stop > part.start} == {size}
    assert tiles[-1].stop < sum(lengths) + sum(sizes)


@given(LENGTHS.filter(bool), SIZES)
def test_tiles_that_need_not_be_whole_waste_nothing(lengths: list[int], sizes: list[int]):
    rows, tiles = plan_tiles(lengths, sizes, whole=False)
    assert [part.start for part in rows] == [0, *(part.stop for part in rows[:-1])]
    assert [t.start for t in tiles] == [0, *(t.stop for t in tiles[:-1])]
    assert tiles[-1].stop == rows[-1].stop == sum(lengths)
    assert all(t.stop - t.start == sizes[-1] for t in tiles[:-1])


@given(LENGTHS, BUDGETS, SIZES)
def test_batches_in_tiles_are_of_one_size_each(lengths: list[int], budget: int, sizes: list[int]):
    plan = plan_in_tiles(lengths, budget, sizes)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    for batch in plan:
        assert len({tile_of(lengths[i], sizes) for i in batch}) == 1
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
    assert plan_in_tiles(lengths, budget, sizes[-1:]) == plan_batches(lengths, budget)
