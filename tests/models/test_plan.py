"""Batches: each sequence once, within the budget, few tokens wasted."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.models.plan import plan_batches

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
