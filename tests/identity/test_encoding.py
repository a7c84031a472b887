"""The encoding can be read back, so no two values share one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.identity.encoding import encode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def decode(data: bytes) -> object:
    """Read an encoding back: a second opinion, written from the table in the module's docstring."""
    value, rest = _decode(data)
    assert rest == b""
    return value


def _decode(data: bytes) -> tuple[object, bytes]:
    tag, data = data[:1], data[1:]
    if tag in b"NTF":
        return {b"N": None, b"T": True, b"F": False}[tag], data
    number, data = data.split(b":", 1)
    size = int(number)
    if tag in b"isb":
        part, data = data[:size], data[size:]
        assert len(part) == size
        return {b"i": int, b"s": bytes.decode, b"b": bytes}[tag](part), data
    items = []
    for _ in range(size * (2 if tag == b"d" else 1)):
        item, data = _decode(data)
        items.append(item)
    if tag == b"l":
        return items, data
    assert tag == b"d"
    assert items[::2] == sorted(items[::2])
    return dict(zip(items[::2], items[1::2], strict=True)), data


def typed(value: object) -> object:
    """Return a value that equals another's only where types are equal too: Python's True is 1."""
    if isinstance(value, list):
        return [typed(v) for v in value]
    if isinstance(value, dict):
        return {k: typed(v) for k, v in value.items()}
    return type(value), value


@given(VALUES)
def test_an_encoding_reads_back_as_the_value(value: object):
    assert typed(decode(encode(value))) == typed(value)


@given(st.lists(st.tuples(st.text(), st.integers()), unique_by=lambda pair: pair[0]), st.randoms())
def test_the_order_in_which_a_mapping_was_filled_does_not_enter(pairs: list[tuple[str, int]], rng: object):
    assert encode(dict(rng.sample(pairs, len(pairs)))) == encode(dict(pairs))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["ab", "c"], ["a", "bc"]),
        (["a", ["b"]], [["a"], "b"]),
        (1, True),
        (0, False),
        (0, None),
        ("1", 1),
        ("a", b"a"),
        ("", None),
        ([], {}),
        ([[]], []),
        ({"a": None}, {}),
        ("é", "e\u0301"),
        (["s1:a"], ["a"]),
    ],
)
def test_values_that_look_alike_differ(one: object, two: object):
    assert encode(one) != encode(two)


def test_kinds_of_sequences_and_of_bytes_are_one():
    assert encode((1, 2)) == encode([1, 2]) == encode(range(1, 3))
    assert encode(b"ab") == encode(bytearray(b"ab")) == encode(memoryview(b"xabx")[1:3])


def test_the_bytes_are_these():
    assert encode({"b": [True, False, None, -12], "a": "é", "c": b"\x00"}) == (
        b"d3:s1:as2:\xc3\xa9s1:bl4:TFNi3:-12s1:cb1:\x00"
    )


@pytest.mark.parametrize("value", [1.0, float("nan"), [1, 0.5], {"a": 1e-5}, {1}, object(), 1j])
def test_other_types_are_refused(value: object):
    with pytest.raises(TypeError, match="has no canonical bytes"):
        encode(value)


def test_keys_that_are_no_strings_are_refused():
    for value in ({1: 2}, {b"a": 1}, {None: 1}):
        with pytest.raises(TypeError, match="keys must be strings"):
            encode(value)


def test_a_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="surrogates"):
        encode("\udc80")
