"""What is chosen so that the rest fits."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.eviction.budget import to_evict
from proteus_pipeline.eviction.policies import POLICIES, Policy, make_policy

TTL = 10.0
every_policy = pytest.mark.parametrize("name", POLICIES)
items = st.lists(st.tuples(st.integers(0, 50), st.floats(0, 100), st.floats(0, 30)), max_size=12)


def make(name: str, content: list[tuple[int, float, float]]) -> Policy[int]:
    policy: Policy[int] = make_policy(name, ttl=TTL if name == "ttl" else None)
    for key, (size, cost, time) in enumerate(content):
        policy.added(key, size, cost, time)
    return policy


@every_policy
def test_nothing_goes_while_all_fits(name: str):
    policy = make(name, [(10, 1.0, 0.0)] * 3)
    assert to_evict(policy, 30, 30, time=1.0) == []
    assert to_evict(policy, 31, 30, time=1.0) == [0]
    assert to_evict(policy, 30, 20, time=1.0) == [0]
    assert to_evict(make(name, []), 0, 0, time=1.0) == []


@every_policy
def test_bytes_that_are_no_items_count(name: str):
    policy = make(name, [(10, 1.0, 0.0)] * 3)
    assert to_evict(policy, 30 + 15, 30, time=1.0) == [0, 1]
    assert to_evict(policy, 30 + 99, 30, time=1.0) == [0, 1, 2]


@every_policy
def test_what_is_protected_stays_even_where_nothing_fits(name: str):
    policy = make(name, [(10, 1.0, 0.0)] * 3)
    assert to_evict(policy, 30, 0, time=99.0, protected={1, 77}) == [0, 2]
    assert to_evict(policy, 30, 10, time=1.0, protected=[0]) == [1, 2]


def test_the_expired_go_where_there_is_room_and_first_where_there_is_none():
    policy = make("ttl", [(10, 1.0, 5.0), (10, 1.0, 0.0), (10, 1.0, 1.0)])
    assert to_evict(policy, 30, 100, time=11.0) == [1, 2]
    assert to_evict(policy, 30, 100, time=11.0, protected={1}) == [2]
    assert to_evict(policy, 30, 5, time=11.0) == [1, 2, 0]
    assert to_evict(policy, 30, 15, time=10.0) == [1, 2]


@given(st.sampled_from(list(POLICIES)), items, st.integers(0, 400), st.integers(0, 100), st.sets(st.integers(0, 12)))
def test_the_rest_fits_or_is_protected_and_nothing_goes_in_vain(
    name: str, content: list[tuple[int, float, float]], limit: int, beside: int, protected: set[int]
):
    policy = make(name, content)
    order = list(policy.order())
    sizes = dict(enumerate(size for size, *_ in content))
    total = sum(sizes.values()) + beside
    chosen = to_evict(policy, total, limit, time=30.0, protected=protected)

    assert len(set(chosen)) == len(chosen)
    assert not set(chosen) & protected
    left = total - sum(sizes[key] for key in chosen)
    assert left <= limit or set(sizes) - set(chosen) <= protected

    free = [key for key in order if key not in protected]
    assert chosen == free[: len(chosen)]
    needed = [key for key in chosen if key not in policy.expired(30.0)]
    assert not needed or left + sizes[needed[-1]] > limit
    assert set(policy.expired(30.0)) - protected <= set(chosen)

    assert list(policy.order()) == order  # the books are as they were
    assert to_evict(policy, total, limit, time=30.0, protected=protected) == chosen


@every_policy
def test_a_cache_that_does_as_it_is_told_keeps_to_its_limit(name: str):
    policy = make(name, [])
    random, limit, here = Random(7), 1000, dict[int, int]()
    for second in range(2000):
        key = random.randrange(60)
        if key in here:
            policy.used(key, float(second))
        else:
            size = 10 + key * 7
            for gone in to_evict(policy, sum(here.values()) + size, limit, time=float(second)):
                policy.evicted(gone)
                del here[gone]
            policy.added(key, size, 1 + key % 5, float(second))
            here[key] = size
        assert sum(here.values()) <= limit
    assert sorted(policy.order()) == sorted(here)
    assert here
