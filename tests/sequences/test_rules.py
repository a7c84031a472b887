from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.errors import ConfigError, SequenceError
from proteus_pipeline.sequences.fasta import Record
from proteus_pipeline.sequences.rules import ALPHABET, Counts, Rules, clean, normalise

LENIENT = Rules(unknown="x", stops="strip", gaps="remove", duplicates="first", long="truncate")

rules = st.builds(
    Rules,
    unknown=st.sampled_from(["error", "x", "drop"]),
    stops=st.sampled_from(["strip", "error"]),
    gaps=st.sampled_from(["error", "remove"]),
    duplicates=st.sampled_from(["error", "first"]),
    long=st.sampled_from(["error", "truncate", "window"]),
    max_length=st.integers(1, 40),
)
letters = st.text(string.ascii_letters + "*-.", max_size=50)
proteins = st.text("ACDEFGHIKLMNPQRSTVWYacdefXBZUOJj", min_size=1, max_size=50)


def refused(sequence: str, chosen: Rules, *expected: str) -> None:
    """Hold that clean and normalise both refuse a sequence, in one line with each expected part."""
    with pytest.raises(SequenceError) as alone:
        normalise(sequence, chosen, "record 'P7'")
    with pytest.raises(SequenceError) as listed:
        clean([Record("P1", "M"), Record("P7", sequence)], chosen)
    message = str(listed.value)
    assert str(alone.value) == message
    for part in ("record 'P7' has", *expected):
        assert part in message
    assert listed.value.remedy
    assert len(message.splitlines()) == 1


def test_the_alphabet_is_every_letter_but_j():
    assert len(ALPHABET) == 25
    assert set(string.ascii_uppercase) - set(ALPHABET) == {"J"}
    assert normalise(ALPHABET.lower(), Rules()) == ALPHABET


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("unknown", "X", "use one of error, x, drop"),
        ("stops", "keep", "use one of strip, error"),
        ("gaps", True, "use one of error, remove"),
        ("duplicates", None, "use one of error, first"),
        ("long", "cut", "use one of error, truncate, window"),
        ("max_length", 0, "1 or more"),
        ("max_length", "1022", "1 or more"),
        ("max_length", True, "1 or more"),
        ("max_length", 10.0, "1 or more"),
    ],
)
def test_a_rule_that_is_not_known_is_refused(field: str, value: object, remedy: str):
    with pytest.raises(ConfigError) as caught:
        replace(Rules(), **{field: value})
    assert f"data.{field}={value!r}" in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("sequence", "chosen", "expected"),
    [
        ("mkv", Rules(), "MKV"),
        ("MKV*", Rules(), "MKV"),
        ("MJjV", Rules(unknown="x"), "MXXV"),
        ("MJV", Rules(unknown="drop"), ""),
        ("-M.K-V-", Rules(gaps="remove"), "MKV"),
        ("MKV*--", Rules(gaps="remove"), "MKV"),
        ("MKVAAL", Rules(long="truncate", max_length=4), "MKVA"),
        ("MKVAAL", Rules(long="window", max_length=4), "MKVAAL"),
        ("MKV-*", Rules(gaps="remove", max_length=3), "MKV"),
    ],
)
def test_each_rule_does_what_it_says(sequence: str, chosen: Rules, expected: str):
    assert normalise(sequence, chosen) == expected


@pytest.mark.parametrize(
    ("sequence", "chosen", "expected"),
    [
        ("MKJV", Rules(), ("'J' at position 3", "data.unknown=x", "data.unknown=drop")),
        ("mkj*", Rules(), ("'j' at position 3", "data.unknown=x")),
        ("M-KJ", Rules(gaps="remove"), ("'J' at position 4", "data.unknown=x")),
        ("MK-V", Rules(), ("'-' at position 3", "data.gaps=remove")),
        ("MK.V", Rules(), ("'.' at position 3", "data.gaps=remove")),
        ("MKV*", Rules(stops="error"), ("'*' at position 4", "data.stops=strip")),
        ("MKV*-", Rules(stops="error", gaps="remove"), ("'*' at position 4", "data.stops=strip")),
        ("MK*V", Rules(), ("'*' at position 3, a stop before the end", "split the sequence")),
        ("*MKV", LENIENT, ("'*' at position 1, a stop before the end", "split the sequence")),
        ("MKV**", LENIENT, ("'*' at position 4, a stop before the end", "split the sequence")),
        ("MK-*-V", LENIENT, ("'*' at position 4, a stop before the end", "split the sequence")),
        ("MKJ*V", Rules(unknown="drop"), ("'*' at position 4", "split the sequence")),
        ("-M1", LENIENT, ("'1' at position 3, which is no residue", "correct the sequence")),
        ("MK V", LENIENT, ("' ' at position 3", "correct the sequence")),
        ("MKV\n", LENIENT, (r"'\n' at position 4", "correct the sequence")),
        ("MK>V", LENIENT, ("'>' at position 3", "correct the sequence")),
        ("MKÉ", LENIENT, ("'É' at position 3", "correct the sequence")),
        ("M\u017f1", LENIENT, ("'\u017f' at position 2", "correct the sequence")),  # upper case: S
        ("Mß1", LENIENT, ("'ß' at position 2", "correct the sequence")),  # upper case: SS
        ("M\u0661", LENIENT, ("'\u0661' at position 2", "correct the sequence")),
        ("", LENIENT, ("no residues", "give its sequence")),
        ("*", LENIENT, ("no residues", "give its sequence")),
        ("-.-", LENIENT, ("no residues", "give its sequence")),
        ("MKVA", Rules(max_length=3), ("4 residues", "data.max_length=3", "data.long=truncate", "data.long=window")),
    ],
)
def test_what_the_rules_do_not_admit_is_refused(sequence: str, chosen: Rules, expected: tuple[str, ...]):
    refused(sequence, chosen, *expected)


def test_a_sequence_of_its_own_is_called_so():
    with pytest.raises(SequenceError, match=r"^sequence has 'J' at position 1"):
        normalise("J", Rules())


def test_an_id_with_two_sequences_is_refused_or_the_first_is_kept():
    records = [Record("P1", "MKV"), Record("P2", "MKV"), Record("P1", "MKA"), Record("P1", "mkv*")]
    with pytest.raises(SequenceError, match=r"'P1' comes twice, with different sequences; .*data.duplicates=first"):
        clean(records, Rules())
    kept, counts = clean(records, Rules(duplicates="first"))
    assert kept == records[:2]
    assert counts == Counts(records=4, kept=2, unique=1, residues=6, repeated=2)


def test_an_id_that_comes_again_with_its_sequence_is_kept_once():
    kept, counts = clean([Record("P1", "MKV", "loc=a"), Record("P1", "mkv*", "loc=b")], Rules())
    assert kept == [Record("P1", "MKV", "loc=a")]
    assert counts == Counts(records=2, kept=1, unique=1, residues=3, repeated=1)


def test_every_count():
    records = [
        Record("P1", "MJV-J"),
        Record("P2", "MKVAALJ"),
        Record("P3", "MKVAAL"),
        Record("P3", "MKVAAL"),
        Record("P4", "MKV"),
    ]
    kept, counts = clean(records, replace(LENIENT, max_length=6))
    assert [record.sequence for record in kept] == ["MXVX", "MKVAAL", "MKVAAL", "MKV"]
    # P2's J is cut off with its end, so it is not among those replaced
    assert counts == Counts(records=5, kept=4, unique=3, residues=19, repeated=1, replaced=2, truncated=1)

    kept, counts = clean(records, Rules(unknown="drop", gaps="remove", long="window", max_length=5))
    assert [record.id for record in kept] == ["P3", "P4"]
    assert counts == Counts(records=5, kept=2, unique=2, residues=9, repeated=1, dropped=2, windowed=1)


def test_dropping_every_record_is_refused():
    with pytest.raises(SequenceError, match=r"data.unknown=drop left no record.*data.unknown=x"):
        clean([Record("P1", "J")], Rules(unknown="drop"))


def test_no_records_give_none():
    assert clean([], Rules()) == ([], Counts())


def test_records_are_taken_one_by_one():
    def records() -> Iterator[Record]:
        yield Record("P1", "M1")
        raise AssertionError("read past a record that is refused")

    with pytest.raises(SequenceError, match="'P1' has '1'"):
        clean(records(), Rules())


@given(st.text(max_size=40) | letters, rules)
def test_normalised_is_in_the_alphabet_and_stays_as_it_is(sequence: str, chosen: Rules):
    try:
        once = normalise(sequence, chosen)
    except SequenceError:
        refused(sequence, chosen)
        return
    if chosen.unknown == "drop" and "J" in sequence.upper():
        assert not once
    else:
        assert once
        assert set(once) <= set(ALPHABET)
        assert normalise(once, chosen) == once


@given(letters)
def test_the_lenient_rules_change_nothing_but_what_they_name(sequence: str):
    bare = sequence.upper().replace("-", "").replace(".", "")
    try:
        found = normalise(sequence, LENIENT)
    except SequenceError:
        assert "*" in bare[:-1] or not bare.strip("*")
    else:
        assert found == bare.removesuffix("*").replace("J", "X")


@given(st.lists(proteins, min_size=1, max_size=8), rules, st.randoms(use_true_random=False))
def test_neither_order_nor_ids_change_a_sequence(sequences: list[str], chosen: Rules, random: Random):
    chosen = replace(chosen, unknown="x" if chosen.unknown == "error" else chosen.unknown)
    chosen = replace(chosen, long="window" if chosen.long == "error" else chosen.long)
    sequences = [*sequences, "MKV"]  # so that one is always kept
    there, counts = clean([Record(f"P{n}", text) for n, text in enumerate(sequences)], chosen)
    order = list(range(len(sequences)))
    random.shuffle(order)
    back, shuffled_counts = clean([Record(f"other{n}", sequences[n]) for n in order], chosen)
    assert {record.id[1:]: record.sequence for record in there} == {
        record.id.removeprefix("other"): record.sequence for record in back
    }
    assert counts == shuffled_counts


@given(st.lists(st.builds(Record, st.sampled_from(["P1", "P2", "P3"]), proteins), max_size=8))
def test_counts_add_up(records: list[Record]):
    chosen = Rules(unknown="drop", duplicates="first")
    kept, counts = clean([*records, Record("P9", "MKV")], chosen)
    assert counts.records == len(records) + 1
    assert counts.records == counts.kept + counts.repeated + counts.dropped
    assert counts.kept == len(kept) == len({record.id for record in kept})
    assert counts.residues == sum(len(record.sequence) for record in kept)
    assert counts.unique == len({record.sequence for record in kept})
