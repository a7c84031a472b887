from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proteus_pipeline.errors import ConfigError, MetadataError
from proteus_pipeline.registry.metadata import SHIPPED, check_metadata, load_schema

MISSION = {"training_data": "UR50D", "architecture": "transformer", "parameters": "650M"}
json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


def said(metadata: dict[str, Any], schema: str | dict[str, Any] = SHIPPED) -> str:
    """What is said of metadata that breaks a schema."""
    with pytest.raises(MetadataError) as caught:
        check_metadata(metadata, load_schema(schema))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def field(schema: dict[str, Any]) -> dict[str, Any]:
    return {"properties": {"x": schema}}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"parameters": 650_000_000},
        {"parameters": "8M"},
        {"parameters": "7500000"},
        {"parameters": "1.5B"},
        {"max_length": 1022},
        {"max_length": "1022"},
        {"licence": "MIT", "citation": "doi:10.1/x", "description": "", "url": "https://example.org/m"},
        {"anything": {"else": [1, None]}},
    ],
)
def test_the_shipped_schema_allows(more: dict[str, Any]):
    check_metadata(MISSION | more, load_schema(SHIPPED))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {"max_length": "long"},
            "metadata.max_length is 'long', not an integer and no match of ^[1-9][0-9]*$; give --meta max_length=... (the",
        ),
        ({"max_length": 0}, "metadata.max_length is 0, less than 1 and not a text; give --meta max_length=..."),
        ({"max_length": True}, "metadata.max_length is true, not an integer and not a text; "),
        ({"parameters": "many"}, "metadata.parameters is 'many', not an integer and no match of ^[0-9]+"),
        (
            {"training_data": ["UR50D"]},
            'metadata.training_data is ["UR50D"], not a text; give --meta training_data=...',
        ),
        ({"licence": ""}, "metadata.licence is '', of length below 1; give --meta licence=... (the licence"),
        ({"url": "example.org"}, "metadata.url is 'example.org', no match of ^https?://"),
        ({"url": "javascript:x\nhttps://a"}, "metadata.url is 'javascript:x\\nhttps://a', no match of ^https?://"),
        ({"architecture": 3, "url": 4}, "metadata.architecture is 3, not a text (and 1 more); give --meta"),
    ],
)
def test_the_shipped_schema_says_what_it_allows(more: dict[str, Any], expected: str):
    assert said(MISSION | more).startswith(expected)


def test_a_missing_field_is_named_with_how_to_add_it():
    assert said({"training_data": "UR50D", "parameters": "8M"}) == (
        "metadata.architecture is missing; add --meta architecture=... (the kind of network, such as transformer)"
    )
    assert said({}).startswith("metadata.architecture is missing (and 2 more); add --meta architecture=...")
    assert said({}, {"required": ["licence"]}) == "metadata.licence is missing; add --meta licence=..."


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": ["integer", "null"]}, "a", "metadata.x is 'a', not an integer or null"),
        ({"enum": ["a", 1, None]}, "b", "metadata.x is 'b', not one of 'a', 1, null"),
        ({"const": "a"}, 1.5, "metadata.x is 1.5, not 'a'"),
        ({"maximum": 3}, 4, "metadata.x is 4, more than 3"),
        ({"exclusiveMinimum": 3}, 3, "metadata.x is 3, not more than 3"),
        ({"minItems": 2}, [1], "metadata.x is [1], of length below 2"),
        ({"items": {"type": "string"}}, ["a", 1], "metadata.x.1 is 1, not a text; correct it"),
        ({"items": {"type": "null"}}, [0] * 11, "metadata.x.0 is 0, not null (and 10 more)"),
        ({"properties": {"a.b": False}}, {"a.b": 1}, "metadata.x: False schema does not allow 1"),
        ({"required": ["y"]}, {}, "metadata.x.y is missing; add it"),
        ({"additionalProperties": False, "properties": {"a": {}}}, {"a": 1, "b": 2}, "metadata.x.b is no field of"),
        (
            {"additionalProperties": False, "patternProperties": {"^a": {}}},
            {"a": 1, "c\nd": 2},
            "metadata.x.'c\\nd' is no",
        ),
        ({"not": {}}, "a", "metadata.x: 'a' should not be valid under {}"),
        ({"oneOf": [{}, True]}, "a", "metadata.x: 'a' is valid under each of"),
        ({"anyOf": [{"required": ["a"]}, {"type": "null"}]}, {}, "metadata.x: {} is not valid under any of"),
        ({"anyOf": [{"properties": {"a": {"type": "null"}}}]}, {"a": 1}, "metadata.x: {'a': 1} is not valid under any"),
        ({"dependentRequired": {"a": ["b"]}}, {"a": 1}, "metadata.x: 'b' is a dependency of 'a'"),
        ({"type": "null"}, "long" * 100, "metadata.x is 'longlong"),
    ],
)
def test_what_is_wrong_is_said_in_words(schema: dict[str, Any], value: object, expected: str):
    line = said({"x": value}, field(schema))
    assert line.startswith(expected)
    assert len(line) < 300


def test_without_a_schema_nothing_is_asked():
    assert load_schema(None) is None
    check_metadata({"anything": 1}, None)


def test_a_schema_is_a_mapping_or_a_file_of_json_or_yaml(tmp_path: Path):
    schema = {"required": ["licence"]}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    (tmp_path / "s.yaml").write_text("required: [licence]\n")
    (tmp_path / "s.yml").write_text("required: [licence]\n")
    given: list[Any] = [
        schema,
        MappingProxyType(schema),
        tmp_path / "s.json",
        str(tmp_path / "s.yaml"),
        tmp_path / "s.yml",
    ]
    assert all(load_schema(one) == schema for one in given)


def test_metadata_may_be_any_mapping():
    check_metadata(MappingProxyType(MISSION), load_schema(SHIPPED))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("s.json", None, r"can't be read \(No such file or directory\)"),
        ("s.json", "{", "is no JSON or YAML file"),
        ("s.json", "[" * 100_000, "is no JSON or YAML file"),
        ("s.json", "required: [a]", "is no JSON or YAML file"),
        ("s.json", "[]", "holds no mapping"),
        ("s.json", "true", "holds no mapping"),
        ("s.yaml", "a: [", "is no JSON or YAML file"),
        ("s.yaml", "const: 2024-01-01", "is not JSON-like"),
        ("s.json", '{"const": NaN}', "is not JSON-like"),
        ("s.json", '{"type": "strin"}', "is no JSON Schema: 'strin' .*, at type"),
    ],
)
def test_a_file_that_is_no_schema(tmp_path: Path, name: str, text: str | None, expected: str):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_schema(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text_and_a_folder(tmp_path: Path):
    (tmp_path / "s.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is no JSON or YAML file"):
        load_schema(tmp_path / "s.json")
    with pytest.raises(ConfigError, match="can't be read"):
        load_schema(tmp_path)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"properties": []}, "is no JSON Schema: .*, at properties"),
        ({"properties": {"a": {"pattern": "("}}}, "at properties.a.pattern"),
        (
            {"$schema": "https://example.org/my-own"},
            "is of an unknown kind, 'https://example.org/my-own'; use https://",
        ),
        ({"$schema": 5}, "is of an unknown kind"),
        (
            {"properties": {"a": {"$ref": "#/$defs/none"}}},
            r"refers to '#/\$defs/none', which is not in it; put it under",
        ),
        ({"x": object()}, "is not JSON-like"),
    ],
)
def test_a_mapping_that_is_no_schema(schema: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected):
        load_schema(schema)


@pytest.mark.parametrize("keyword", ["$ref", "$dynamicRef"])
@pytest.mark.parametrize("place", ["http://{}/s.json", "file:///etc/hostname"])
def test_nothing_outside_the_schema_is_fetched(keyword: str, place: str):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        schema = field({keyword: place.format(f"127.0.0.1:{server.getsockname()[1]}")})
        with pytest.raises(ConfigError, match="which is not in it"):
            load_schema(schema)
        with pytest.raises(ConfigError, match="which is not in it"):
            check_metadata({"x": 1}, schema)  # one that load_schema never saw
        with pytest.raises(TimeoutError):
            server.accept()


def test_references_within_the_schema_are_followed():
    schema = {
        "$defs": {"tree": {"type": "object", "additionalProperties": {"$ref": "#/$defs/tree"}}},
        "properties": {"x": {"$ref": "#/$defs/tree"}, "$ref": {"type": "integer"}},
        "const": {"x": {"a": {}}, "$ref": 1},
    }
    check_metadata({"x": {"a": {}}, "$ref": 1}, load_schema(schema))
    assert said({"x": {"a": {"b": 1}}, "$ref": 1}, schema).startswith("metadata is {")


def test_a_schema_without_end_is_said():
    schema = load_schema({"$ref": "#"})
    with pytest.raises(ConfigError, match="refers to itself without end"):
        check_metadata({}, schema)


def test_an_older_draft_is_read_as_it_says():
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {"type": "null"}}}
    assert said({"x": 1}, schema | field({"$ref": "#/definitions/a"})).startswith("metadata.x is 1, not null")


def test_metadata_that_json_can_not_hold_is_refused():
    with pytest.raises(ConfigError, match="the metadata is not JSON-like"):
        check_metadata({"x": float("nan")}, load_schema(SHIPPED))


@given(st.dictionaries(st.sampled_from([*MISSION, "max_length", "url", "x\ny"]), json_like))
def test_any_metadata_passes_or_is_refused_in_one_line_whatever_its_order(metadata: dict[str, Any]):
    schema = load_schema(SHIPPED)
    lines = []
    for ordered in (metadata, dict(reversed(metadata.items()))):
        try:
            check_metadata(ordered, schema)
        except MetadataError as error:
            lines.append(str(error))
            assert "\n" not in lines[-1] and lines[-1].startswith("metadata.")
    assert len(lines) in {0, 2} and len(set(lines)) <= 1


def test_the_library_is_imported_when_a_schema_is_used():
    code = (
        "import sys, proteus_pipeline.registry.metadata as m; m.load_schema(None); m.check_metadata({}, None);"
        "print('jsonschema' in sys.modules, 'referencing' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
