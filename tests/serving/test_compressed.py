"""A packed encoder: bit for bit the same, and no larger on the way than what it is made from."""

from __future__ import annotations

import pytest
import torch
from conftest import make_checkpoint

from proteus_pipeline.models.encoder import make_encoder
from proteus_pipeline.serving.compressed import Packed, _Pickler, measure

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "GLFDIIKKIAESF"]


def bits(encoder: object) -> list[bytes]:
    return [states[2].tobytes() for _, states in sorted(encoder.encode(SEQUENCES, [2]))]  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_it_comes_back_bit_for_bit(precision: str):
    encoder = make_encoder(make_checkpoint(), precision=precision)
    before = bits(encoder)
    packed = Packed(encoder)
    assert 0 < packed.nbytes < packed.raw_bytes * 1.1
    assert bits(packed.unpack()) == bits(packed.unpack()) == before


def test_tensors_are_freed_as_they_are_packed():
    encoder = make_encoder(make_checkpoint())
    tensors = _Pickler.fill(encoder).kept
    assert sum(t.nbytes for t in tensors) > 100_000
    packed = Packed(encoder)
    assert packed.raw_bytes > 100_000
    assert {t.nbytes for t in tensors} == {0}


def test_a_sample_says_what_a_copy_would_take():
    encoder = make_encoder(make_checkpoint())
    share, seconds_a_byte = measure(encoder)
    assert 0.5 < share < 1.05  # random numbers: only their exponents can be packed
    assert 0 < seconds_a_byte < 1e-6
    with torch.inference_mode():
        for tensor in _Pickler.fill(encoder).kept:
            tensor.zero_()
    assert measure(encoder)[0] < 0.05
