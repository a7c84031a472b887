from __future__ import annotations

import random
from dataclasses import replace

import pytest
import semver
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.registry.events import Event, History, fold, greatest, parse_tag

VERSIONS = ["0.9.0", "1.0.0", "1.0.1", "1.10.0", "1.9.0", "2.0.0-rc.1", "2.0.0"]


def registered(version: str, sequence: int | None = None, time: int = 0, commit: str = "") -> Event:
    return Event("registered", "m", version, f"m@v{version}", commit or f"c{version}", time, sequence=sequence)


def deleted(version: str, time: int = 0, count: int | None = None) -> Event:
    counter = f"#{count}" if count else ""
    return Event("deleted", "m", version, f"m@v{version}!{counter}", f"c{version}", time)


def made_current(version: str, sequence: int, time: int = 0) -> Event:
    return Event("made current", "m", None, f"m#current#{sequence}", f"c{version}", time, sequence=sequence)


def folded(*events: Event) -> History:
    return fold("m", events)


@pytest.mark.parametrize(
    ("tag", "parsed"),
    [
        ("m@v1.2.3", ("registered", "m", "1.2.3", None)),
        ("group/m-1_x@v1.2.3-rc.1+b.2", ("registered", "group/m-1_x", "1.2.3-rc.1+b.2", None)),
        ("m@v1.0.0#2", ("registered", "m", "1.0.0", 2)),
        ("m@v1.0.0!", ("deleted", "m", "1.0.0", None)),
        ("m@v1.0.0!#2", ("deleted", "m", "1.0.0", 2)),
        ("m@v1.0.0%3123456", ("unknown", "m", "1.0.0", 3123456)),
        ("m#current#12", ("made current", "m", None, 12)),
        ("m#current!#13", ("no longer current", "m", None, 13)),
        ("m#current!", None),
        ("m@v1.0.0!%3", None),
        ("m@v1.0.0%", None),
        ("m@v1.0.0%3#3", None),
        ("m#current", None),
        ("m#prod#1", None),
        ("m@deprecated", None),
        ("v1.0.0", None),
        ("m@1.0.0", None),
        ("m@v1.0", None),
        ("m@v01.0.0", None),
        ("m@v1.0.0-01", None),
        ("m@v1.0.0-", None),
        ("m@v1.0.0-a..b", None),
        ("-m@v1.0.0", None),
        ("m@v1.0.0 ", None),
    ],
)
def test_tags_of_the_grammar_and_no_others(tag: str, parsed: object):
    assert parse_tag(tag) == parsed


@given(st.from_regex(r"[a-z]{1,3}@v[0-9a-z.+-]{1,12}(!?(#\d)?|%\d)", fullmatch=True))
def test_a_tag_that_parses_has_a_version_that_can_be_ordered(tag: str):
    parsed = parse_tag(tag)
    assert parsed is None or semver.Version.is_valid(parsed[2] or "")


def test_live_versions_are_in_semver_order_whatever_order_they_came_in():
    history = folded(*(registered(v, i + 1) for i, v in enumerate(VERSIONS)))
    assert list(history.live) == ["0.9.0", "1.0.0", "1.0.1", "1.9.0", "1.10.0", "2.0.0-rc.1", "2.0.0"]


def test_nothing_is_current_of_nothing():
    assert folded() == History("m", (), {}, None)


def test_a_greater_release_becomes_current_and_neither_a_back_port_nor_a_pre_release_does():
    events = [registered("1.9.0", 1), registered("1.10.0", 2), registered("1.9.1", 3), registered("2.0.0-rc.1", 4)]
    assert [folded(*events[:n]).current for n in (1, 2, 3, 4)] == ["1.9.0", "1.10.0", "1.10.0", "1.10.0"]


def test_the_sequence_decides_and_not_the_time():
    """A clock that was wrong: the rollback came after both, whatever the tags' times say."""
    events = [registered("1.0.0", 1, time=900), registered("2.0.0", 2, time=500), made_current("1.0.0", 3, time=100)]
    history = folded(*reversed(events))
    assert history.events == tuple(events)
    assert history.current == "1.0.0"


def test_a_rollback_lasts_until_a_greater_release_than_it_comes():
    back = [registered("1.0.0", 1), registered("2.0.0", 2), made_current("1.0.0", 3)]
    assert folded(*back).current == "1.0.0"
    assert folded(*back, registered("0.9.9", 4)).current == "1.0.0"
    assert folded(*back, registered("2.0.1", 4)).current == "2.0.1"
    assert folded(*back, made_current("2.0.0", 4)).current == "2.0.0"


def test_a_tag_without_a_record_takes_its_place_by_time():
    events = [registered("1.0.0", 1, time=100), registered("1.5.0", None, time=150), registered("1.2.0", 2, time=200)]
    history = folded(*events)
    assert [e.version for e in history.events] == ["1.0.0", "1.5.0", "1.2.0"]
    assert history.current == "1.5.0"


def test_a_deleted_version_is_not_live_and_the_greatest_release_takes_over():
    events = [registered("1.0.0", 1), registered("1.1.0", 2), registered("2.0.0-rc.1", 3), registered("1.2.0", 4)]
    history = folded(*events, deleted("1.2.0", time=9))
    assert list(history.live) == ["1.0.0", "1.1.0", "2.0.0-rc.1"]
    assert history.current == "1.1.0"
    assert folded(*events, deleted("1.0.0", time=9)).current == "1.2.0"


@pytest.mark.parametrize("sequence", [1, None])
def test_a_deletion_by_a_clock_that_is_behind_still_deletes(sequence: int | None):
    history = folded(registered("1.0.0", sequence, time=1000), deleted("1.0.0", time=10))
    assert history.live == {}
    assert history.current is None


def test_a_version_that_gto_registered_again_is_live():
    again = replace(registered("1.0.0", None, time=30), tag="m@v1.0.0#3")
    assert list(folded(registered("1.0.0", None, time=10), deleted("1.0.0", time=20), again).live) == ["1.0.0"]


def test_made_current_at_a_commit_of_no_live_version_changes_nothing():
    events = [registered("1.0.0", 1), registered("2.0.0", 2), made_current("9.9.9", 3)]
    assert folded(*events).current == "2.0.0"


@pytest.mark.parametrize(
    ("versions", "best"),
    [([], None), (["1.9.0", "1.10.0", "2.0.0-rc.1"], "1.10.0"), (["2.0.0-rc.1", "2.0.0-rc.2"], "2.0.0-rc.2")],
)
def test_the_greatest_is_a_release_where_there_is_one(versions: list[str], best: str | None):
    assert greatest(versions) == best


events_of_a_model = st.lists(
    st.one_of(
        st.builds(registered, st.sampled_from(VERSIONS), st.none() | st.integers(1, 5), st.integers(0, 3)),
        st.builds(deleted, st.sampled_from(VERSIONS), st.integers(0, 3), st.none() | st.integers(1, 2)),
        st.builds(made_current, st.sampled_from(VERSIONS), st.integers(1, 5), st.integers(0, 3)),
    ),
    max_size=12,
    unique_by=lambda event: event.tag,
)


@given(events_of_a_model, st.randoms())
def test_any_order_of_the_same_events_folds_to_the_same(events: list[Event], chance: random.Random):
    shuffled = events.copy()
    chance.shuffle(shuffled)
    assert folded(*shuffled) == folded(*events)


@given(events_of_a_model)
def test_the_current_version_is_live_and_there_is_one_when_any_is(events: list[Event]):
    history = folded(*events)
    assert (history.current in history.live) if history.live else history.current is None
    dead = {e.version for e in events if e.kind == "deleted"} - {e.version for e in events if e.kind == "registered"}
    assert not dead & set(history.live)
