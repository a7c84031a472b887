"""A value is opened under the key it was sealed for, whole, and by who knows the secret; by nobody else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.errors import ConfigError
from proteus_pipeline.stores.sealed import Seal

SECRET = "a secret of a lab, by chance 7301"
SEALS = [Seal(), Seal(SECRET)]
GOLDEN = Path(__file__).with_name("sealed_golden.json")


def test_the_format_is_as_it_was() -> None:
    golden = json.loads(GOLDEN.read_text())
    for seal, name in zip(SEALS, ("checksum", "secret"), strict=True):
        assert seal.seal(b"proteus:1:vector:a", b"payload").hex() == golden[name]


@pytest.mark.parametrize("seal", SEALS)
@given(key=st.binary(max_size=40), payload=st.binary(max_size=200), other=st.binary(max_size=40))
def test_a_value_opens_under_its_own_key_alone(seal: Seal, key: bytes, payload: bytes, other: bytes) -> None:
    value = seal.seal(key, payload)
    opened = seal.open(key, value)
    assert opened is not None and bytes(opened) == payload
    assert other == key or seal.open(other, value) is None


@pytest.mark.parametrize("seal", SEALS)
@given(payload=st.binary(max_size=100), at=st.integers(0), bit=st.integers(0, 7))
def test_no_flipped_bit_and_no_cut_gets_through(seal: Seal, payload: bytes, at: int, bit: int) -> None:
    value = bytearray(seal.seal(b"k", payload))
    at %= len(value)
    assert seal.open(b"k", bytes(value[:at])) is None
    assert seal.open(b"k", bytes(value) + b"x") is None
    value[at] ^= 1 << bit
    assert seal.open(b"k", bytes(value)) is None


def test_only_who_knows_the_secret_makes_values_that_open() -> None:
    plain, secret, another = Seal(), Seal(SECRET), Seal(SECRET + "!")
    for maker in (plain, another):
        assert secret.open(b"k", maker.seal(b"k", b"poison")) is None
    assert plain.open(b"k", secret.seal(b"k", b"payload")) is None


def test_a_secret_that_could_be_guessed_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="has 5 characters") as refused:
        Seal("short")
    assert "short" not in str(refused.value)
