"""What every policy keeps to, and each one against a model of it that is too simple to be wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter, OrderedDict
from itertools import pairwise
from random import Random
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.eviction.policies import DEFAULT_POLICY, POLICIES, Cost, Policy, Ttl, make_policy

TTL = 10.0
Event = tuple[str, str, int, float, float]  # verb, key, size, cost, seconds since the event before

every_policy = pytest.mark.parametrize("name", POLICIES)
names = st.sampled_from(list(POLICIES))
verbs = st.sampled_from(["added", "used", "used", "used", "removed", "evicted"])
keys = st.sampled_from("abcdef")
sizes = st.integers(0, 50)
costs = st.floats(0, 100)
logs = st.lists(st.tuples(verbs, keys, sizes, costs, st.sampled_from([0.0, 0.5, 3.0])), max_size=40)
steady_logs = st.lists(st.tuples(verbs, keys, sizes, costs, st.sampled_from([0.5, 3.0])), max_size=40)


def make(name: str) -> Policy[str]:
    return make_policy(name, ttl=TTL if name == "ttl" else None)


def tell(policy: Policy[str], event: Event, time: float) -> None:
    verb, key, size, cost, _ = event
    if verb == "added":
        policy.added(key, size, cost, time)
    elif verb == "used":
        policy.used(key, time)
    elif verb == "removed":
        policy.removed(key)
    else:
        policy.evicted(key)


def replay(policy: Policy[str], log: list[Event]) -> float:
    """Tell a policy all of a log, and return the time after it."""
    time = 0.0
    for event in log:
        time += event[-1]
        tell(policy, event, time)
    return time


def still_here(log: list[Event]) -> dict[str, tuple[int, float]]:
    """Return the keys that a log leaves, with their sizes and when they were added, in the order they were added."""
    here: dict[str, tuple[int, float]] = {}
    time = 0.0
    for verb, key, size, _, seconds in log:
        time += seconds
        if verb != "used":
            here.pop(key, None)
        if verb == "added":
            here[key] = (size, time)
    return here


def test_the_choices():
    assert list(POLICIES) == ["lru", "lfu", "fifo", "ttl", "cost"]
    assert type(make_policy()) is POLICIES[DEFAULT_POLICY] is POLICIES["lru"]


@pytest.mark.parametrize(
    ("name", "ttl", "expected"),
    [
        ("mru", None, ("eviction policy 'mru' is not known", "use one of lru, lfu, fifo, ttl, cost")),
        ("LRU", None, ("'LRU' is not known",)),
        ("", None, ("'' is not known",)),
        (None, None, ("None is not known",)),
        (["lru"], None, ("['lru'] is not known",)),
        ("ttl", None, ("'ttl' has no time to live", "seconds")),
        ("ttl", 0, ("ttl=0", "above 0")),
        ("ttl", -1.0, ("ttl=-1.0", "above 0")),
        ("ttl", math.nan, ("ttl=nan", "above 0")),
        ("ttl", True, ("ttl=True", "above 0")),
        ("ttl", "60", ("ttl='60'", "above 0")),
        ("lru", 60.0, ("'lru' has no ttl", "leave ttl out")),
    ],
)
def test_a_choice_that_can_not_be_is_refused_in_one_line(name: object, ttl: object, expected: tuple[str, ...]):
    with pytest.raises(ConfigError) as caught:
        make_policy(name, ttl=ttl)
    message = str(caught.value)
    assert caught.value.remedy
    assert len(message.splitlines()) == 1
    for part in expected:
        assert part in message


# The contract


@every_policy
def test_a_new_policy_has_nothing_to_evict(name: str):
    assert list(make(name).order()) == []
    assert make(name).expired(1e9) == []


@every_policy
def test_equals_go_in_the_order_they_were_added(name: str):
    policy = make(name)
    for key in "cabd":
        policy.added(key, 10, 2.0, 5.0)
    assert list(policy.order()) == list("cabd")
    for key in "bdac":
        policy.used(key, 6.0)
    assert list(policy.order()) == list("cabd")


@every_policy
def test_a_key_that_is_added_again_starts_anew(name: str):
    policy = make(name)
    for key in "cabd":
        policy.added(key, 10, 2.0, 5.0)
    policy.used("c", 5.0)
    policy.added("c", 20, 4.0, 5.0)
    assert list(policy.order()) == list("abdc")
    assert policy.size("c") == 20


@every_policy
def test_a_key_that_grew_stands_where_it_stood(name: str):
    policy = make(name)
    for key in "cab":
        policy.added(key, 10, 2.0, 5.0)
    before = list(policy.order())
    policy.resized("a", 99)
    policy.resized("z", 1)
    assert (policy.size("a"), policy.size("c"), list(policy.order())) == (99, 10, before)


@every_policy
def test_a_key_that_is_not_here_changes_nothing(name: str):
    policy = make(name)
    policy.added("a", 10, 2.0, 1.0)
    policy.added("b", 20, 2.0, 2.0)
    before = list(policy.order())
    policy.used("z", 3.0)
    policy.removed("z")
    policy.evicted("z")
    assert list(policy.order()) == before


@every_policy
@pytest.mark.parametrize(
    ("size", "cost", "time"),
    [
        (-1, 1.0, 1.0),
        (math.nan, 1.0, 1.0),
        (1, -0.5, 1.0),
        (1, math.nan, 1.0),
        (1, math.inf, 1.0),
        (1, 1.0, math.nan),
        (1, 1.0, -math.inf),
    ],
)
def test_what_has_no_place_in_an_order_is_refused(name: str, size: int, cost: float, time: float):
    policy = make(name)
    policy.added("a", 7, 2.0, 0.0)
    with pytest.raises(ValueError, match="can't be put in order"):
        policy.added("a", size, cost, time)
    assert list(policy.order()) == ["a"]
    assert policy.size("a") == 7


@every_policy
def test_an_order_is_that_of_its_call(name: str):
    policy = make(name)
    for second, key in enumerate("abc"):
        policy.added(key, 10, 2.0, float(second))
    order = policy.order()
    policy.used("a", 9.0)
    policy.removed("b")
    policy.added("d", 1, 50.0, 9.0)
    assert list(order) == list("abc")


@given(names, logs)
def test_the_order_holds_what_is_here_once_and_nothing_that_was_removed(name: str, log: list[Event]):
    policy = make(name)
    time = replay(policy, log)
    here = still_here(log)
    order = list(policy.order())
    assert sorted(order) == sorted(here)
    assert {key: policy.size(key) for key in order} == {key: size for key, (size, _) in here.items()}
    assert set(policy.expired(time)) <= set(here)


@given(names, logs)
def test_a_log_gives_the_same_order_each_time_it_is_replayed(name: str, log: list[Event]):
    once, again, asked = make(name), make(name), make(name)
    replay(once, log)
    replay(again, log)
    time = 0.0
    for event in log:  # asking is no use
        time += event[-1]
        tell(asked, event, time)
        list(asked.order())
        asked.expired(time)
    assert list(once.order()) == list(again.order()) == list(asked.order())
    assert once.expired(time) == again.expired(time)


@given(names, st.lists(keys, unique=True), st.lists(st.tuples(keys, st.floats(0, 100))), st.randoms())
def test_uses_may_come_in_any_order(name: str, added: list[str], uses: list[tuple[str, float]], random: Random):
    shuffled = list(uses)
    random.shuffle(shuffled)
    orders = []
    for told in (uses, shuffled):
        policy = make(name)
        for key in added:
            policy.added(key, ord(key), 1.0, 0.0)
        for key, time in told:
            policy.used(key, time)
        orders.append(list(policy.order()))
    assert orders[0] == orders[1]


@every_policy
def test_a_hundred_thousand_keys_are_no_trouble(name: str):
    policy: Policy[int] = make_policy(name, ttl=TTL if name == "ttl" else None)
    random = Random(5)
    start = perf_counter()
    for key in range(100_000):
        policy.added(key, random.randrange(1, 10**9), random.random(), float(key))
    for second in range(100_000):
        policy.used(random.randrange(100_000), 1e5 + second)
    order = policy.order()
    for _ in range(1000):
        policy.evicted(next(order))
    assert perf_counter() - start < 20  # it takes about one; in squares, it would be hours
    assert len(list(policy.order())) == 99_000


# Each against its model


@given(steady_logs)
def test_lru_is_an_ordered_dict(log: list[Event]):
    policy, model = make("lru"), OrderedDict[str, None]()
    replay(policy, log)
    for verb, key, *_ in log:
        if verb in {"removed", "evicted"}:
            model.pop(key, None)
        elif verb == "added" or key in model:
            model[key] = None
            model.move_to_end(key)
    assert list(policy.order()) == list(model)


@given(logs)
def test_lfu_is_a_stable_sort_by_counts(log: list[Event]):
    policy, counts = make("lfu"), Counter[str]()
    replay(policy, log)
    for verb, key, *_ in log:
        counts[key] = 1 if verb == "added" else counts[key] + 1
    assert list(policy.order()) == sorted(still_here(log), key=lambda key: counts[key])


@given(logs)
def test_fifo_and_ttl_are_the_order_of_adding(log: list[Event]):
    fifo, ttl = make("fifo"), make("ttl")
    replay(fifo, log)
    time = replay(ttl, log)
    here = still_here(log)
    assert list(fifo.order()) == list(ttl.order()) == list(here)
    assert fifo.expired(time + 1e9) == []
    for later in (time, time + TTL / 2, time + TTL):
        assert ttl.expired(later) == [key for key, (_, added) in here.items() if later - added >= TTL]


def test_ttl_counts_from_the_adding_to_the_second():
    policy: Ttl[str] = Ttl(60)
    policy.added("b", 1, 1.0, 100.0)
    policy.added("a", 1, 1.0, 90.0)
    policy.used("a", 149.0)
    assert policy.expired(149.9) == []
    assert policy.expired(150.0) == ["a"]
    assert policy.expired(160.0) == ["a", "b"]
    policy.added("a", 1, 1.0, 155.0)
    assert policy.expired(160.0) == ["b"]


def test_lru_takes_the_latest_time_of_a_log_that_is_out_of_order():
    policy = make("lru")
    policy.added("a", 1, 1.0, 0.0)
    policy.added("b", 1, 1.0, 1.0)
    policy.used("a", 9.0)
    policy.used("b", 5.0)
    policy.used("a", 3.0)
    assert list(policy.order()) == ["b", "a"]


def test_cost_by_hand():
    policy: Cost[str] = Cost()
    policy.added("a", 100, 50.0, 0.0)  # 0 + 1 * 50 / 100 = 0.5
    policy.added("b", 200, 200.0, 1.0)  # 0 + 1 * 200 / 200 = 1
    policy.added("c", 400, 100.0, 2.0)  # 0 + 1 * 100 / 400 = 0.25
    assert list(policy.order()) == ["c", "a", "b"]
    policy.used("c", 3.0)
    policy.used("c", 4.0)  # 0 + 3 * 100 / 400 = 0.75
    assert list(policy.order()) == ["a", "c", "b"]

    policy.evicted("a")
    assert policy.clock == 0.5
    policy.added("a", 100, 50.0, 5.0)  # 0.5 + 1 * 50 / 100 = 1, after b: added later
    assert list(policy.order()) == ["c", "b", "a"]
    policy.used("c", 6.0)  # 0.5 + 4 * 100 / 400 = 1.5
    assert list(policy.order()) == ["b", "a", "c"]

    policy.evicted("c")  # b and a were protected: the clock is ahead of them now
    assert policy.clock == 1.5
    policy.evicted("b")  # and is not set back
    assert policy.clock == 1.5
    policy.added("d", 1000, 10.0, 7.0)  # 1.5 + 1 * 10 / 1000 = 1.51
    assert list(policy.order()) == ["a", "d"]


def test_a_cost_that_is_removed_raises_no_clock():
    policy: Cost[str] = Cost()
    policy.added("a", 1, 1000.0, 0.0)
    policy.removed("a")
    policy.added("b", 1, 1000.0, 1.0)
    policy.added("b", 1, 1.0, 2.0)
    assert policy.clock == 0
    policy.evicted("a")  # which is gone already
    assert policy.clock == 0
    policy.evicted("b")
    assert policy.clock == 1


def test_cost_takes_an_item_of_no_bytes_and_one_of_no_cost():
    policy: Cost[str] = Cost()
    policy.added("empty", 0, 3.0, 0.0)
    policy.added("free", 10, 0.0, 1.0)
    assert list(policy.order()) == ["free", "empty"]


@given(logs)
def test_cost_is_its_formula_and_its_clock_never_falls(log: list[Event]):
    policy: Cost[str] = Cost()
    clock, time, clocks = 0.0, 0.0, [0.0]
    model: dict[str, tuple[float, int, int, float]] = {}  # priority, uses, size, cost
    for event in log:
        time += event[-1]
        tell(policy, event, time)
        clocks.append(policy.clock)
        verb, key, size, cost, _ = event
        old = model.get(key)
        if verb == "added":
            model.pop(key, None)
            model[key] = (clock + 1 * cost / max(size, 1), 1, size, cost)
        elif verb == "used" and old:
            _, uses, size, cost = old
            model[key] = (clock + (uses + 1) * cost / max(size, 1), uses + 1, size, cost)
        elif verb != "used" and old:
            del model[key]
            clock = max(clock, old[0]) if verb == "evicted" else clock
    assert policy.clock == clock
    assert all(earlier <= later for earlier, later in pairwise(clocks))
    assert list(policy.order()) == sorted(model, key=lambda key: model[key][0])


def test_cost_lets_what_nobody_uses_grow_old():
    policy: Cost[str] = Cost()
    policy.added("once popular", 1, 1.0, 0.0)
    for second in range(20):
        policy.used("once popular", float(second))
    for turn in range(40):  # each comes, and is the only other one
        policy.added(f"new {turn}", 1, 1.0, 100.0 + turn)
        first = next(policy.order())
        policy.evicted(first)
        if first == "once popular":
            break
    assert 15 < turn < 25


def test_it_is_pure():
    code = "import json, sys, proteus_pipeline.eviction.budget; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "proteus_pipeline.eviction.policies" in loaded
    assert {name for name in loaded if name.startswith("proteus_pipeline.")} == {
        "proteus_pipeline.errors",
        "proteus_pipeline.eviction",
        "proteus_pipeline.eviction.budget",
        "proteus_pipeline.eviction.policies",
    }
    assert not {"numpy", "torch", "zarr", "dvc"} & loaded
