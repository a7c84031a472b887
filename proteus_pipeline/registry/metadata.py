"""Metadata held to a JSON Schema, so that every version of a model says what its users rely on.

The schema that ships (``protein-model``, `protein_model.schema.json`) asks for training data, architecture and parameters,
knows some fields more, and allows any others. Nothing is fetched: a ``$ref`` that leaves the schema is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import ConfigError, MetadataError
from proteus_pipeline.registry.records import json_like
from proteus_pipeline.sequences.fasta import shown

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError
    from jsonschema.protocols import Validator

SHIPPED = "protein-model"
_NOUNS = {
    "string": "a text",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a mapping",
}
_BOUNDS = {
    "pattern": "no match of {}",
    "minimum": "less than {}",
    "maximum": "more than {}",
    "exclusiveMinimum": "not more than {}",
    "exclusiveMaximum": "not less than {}",
    "minLength": "of length below {}",
    "maxLength": "of length above {}",
    "minItems": "of length below {}",
    "maxItems": "of length above {}",
}
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def load_schema(schema: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return a JSON Schema, checked: of any draft that it names in ``$schema``, else of 2020-12.

    Parameters
    ----------
    schema
        ``protein-model`` for the one that ships; a file, JSON or (by its suffix ``.yaml`` or ``.yml``) YAML; the schema
        itself; or None for none.

    Raises
    ------
    ConfigError
        For a file that can't be read, what is no JSON Schema, and a ``$ref`` to what is not in it.

    """
    if schema is None:
        return None
    if isinstance(schema, Mapping):
        origin, plain = "the metadata schema", json_like(schema, "metadata schema")
    elif schema == SHIPPED:
        origin = SHIPPED
        text = resources.files("proteus_pipeline.registry").joinpath("protein_model.schema.json").read_text("utf-8")
        plain = json.loads(text)
    else:
        origin, plain = f"the metadata schema {schema}", _read(Path(schema).expanduser())
    _check(plain, origin)
    return plain


def _read(path: Path) -> dict[str, Any]:
    import yaml

    remedy = f"give a JSON Schema, in JSON or YAML, or {SHIPPED}"
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if path.suffix in {".yaml", ".yml"} else json.loads(text)
    except OSError as error:
        raise ConfigError(f"the metadata schema {path} can't be read ({error.strerror or error})", remedy) from error
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"the metadata schema {path} is no JSON or YAML file ({reason})", remedy) from error
    if not isinstance(value, dict):
        raise ConfigError(f"the metadata schema {path} holds no mapping", remedy)
    return json_like(value, f"metadata schema {path}")


def _check(schema: dict[str, Any], origin: str) -> None:
    """Refuse what is no schema now, and not at the first registration."""
    from jsonschema.exceptions import SchemaError

    try:
        _validator(schema, origin).check_schema(schema)
        lost = _dangling(schema)
    except SchemaError as error:
        where = ".".join(map(str, error.absolute_path)) or "the top"
        raise ConfigError(
            f"{origin} is no JSON Schema: {error.message[:160]}, at {where}", "see https://json-schema.org"
        ) from error
    except RecursionError as error:
        raise _endless(origin) from error
    if lost is not None:
        raise _outside(origin, lost)


def _validator(schema: Mapping[str, Any], origin: str) -> Validator:
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    named = schema.get("$schema", Draft202012Validator.META_SCHEMA["$id"])
    draft = validator_for({"$schema": named}, default=None) if isinstance(named, str) else None
    if draft is None:
        raise ConfigError(
            f"{origin} is of an unknown kind, {shown(str(named))}",
            f"use {Draft202012Validator.META_SCHEMA['$id']}",
        )
    # Without a registry of its own, jsonschema fetches what a $ref names.
    validator: Validator = draft(schema, registry=Registry())
    return validator


def _dangling(schema: Mapping[str, Any]) -> str | None:
    """Return a reference to what is not in the schema, or None."""
    from referencing import Registry, Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    root: Resource[Any] = Resource.from_contents(schema, default_specification=DRAFT202012)
    registry: Registry[Any] = Registry()
    pending = [(root, registry.resolver_with_root(root))]
    while pending:
        resource, resolver = pending.pop()
        contents = resource.contents if isinstance(resource.contents, Mapping) else {}
        for reference in (str(contents[key]) for key in _REFERENCES if key in contents):
            try:
                resolver.lookup(reference)
            except Unresolvable:
                return reference
        pending += [(inner, resolver.in_subresource(inner)) for inner in resource.subresources()]
    return None


def _outside(origin: str, reference: str) -> ConfigError:
    return ConfigError(f"{origin} refers to {shown(reference)}, which is not in it", "put it under $defs")


def _endless(origin: str) -> ConfigError:
    return ConfigError(f"{origin} refers to itself without end", "give each $ref a smaller thing to describe")


def check_metadata(metadata: Mapping[str, Any], schema: Mapping[str, Any] | None) -> None:
    """Hold metadata to a schema that `load_schema` returned; None asks for nothing.

    Raises
    ------
    MetadataError
        Naming the first field that is not as the schema asks, in the order of dotted paths, and how many others.
    ConfigError
        When the metadata is not JSON-like, or the schema can't be followed to its end.

    """
    if schema is None:
        return
    from referencing.exceptions import Unresolvable

    origin = "the metadata schema"
    try:
        errors = list(_validator(schema, origin).iter_errors(json_like(metadata, "metadata")))
    except Unresolvable as error:
        raise _outside(origin, error.ref) from error
    except RecursionError as error:
        raise _endless(origin) from error
    found = sorted({violation for error in errors for violation in _violations(error)})
    if found:
        _, what, remedy = found[0]
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise MetadataError(what + others, remedy)


def _violations(error: ValidationError) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield the place, the sentence and the remedy of each field that one error is about."""
    place = tuple(error.absolute_path)
    schema: Mapping[str, Any] = error.schema if isinstance(error.schema, Mapping) else {}
    if error.validator == "required":
        for name in (n for n in error.validator_value if n not in error.instance):
            inner = schema.get("properties", {}).get(name)
            meaning = inner.get("description") if isinstance(inner, Mapping) else None
            remedy = f"add --meta {name}=..." if not place else "add it"
            yield _order((*place, name)), f"{_dotted((*place, name))} is missing", _with(remedy, meaning)
        return
    if error.validator == "additionalProperties" and error.validator_value is False:
        known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for name in (n for n in error.instance if n not in known and not any(re.search(p, n) for p in patterns)):
            yield _order((*place, name)), f"{_dotted((*place, name))} is no field of the schema", "leave it out"
        return
    why = _why(error)
    if why is None:
        message = " ".join(error.message.split())
        yield _order(place), f"{_dotted(place)}: {message[:160]}", "correct it, or choose another schema"
        return
    remedy = f"give --meta {place[0]}=..." if len(place) == 1 else "correct it"
    yield (
        _order(place),
        f"{_dotted(place)} is {_value(error.instance)}, {why}",
        _with(remedy, schema.get("description")),
    )


def _why(error: ValidationError) -> str | None:
    """Return what is wrong with one value, or None where the library's own sentence has to do."""
    asked = error.validator_value
    if error.validator == "type":
        kinds = [asked] if isinstance(asked, str) else asked
        return f"not {' or '.join(_NOUNS[kind] for kind in kinds)}"
    if error.validator == "enum":
        return f"not one of {', '.join(_value(allowed) for allowed in asked)}"
    if error.validator == "const":
        return f"not {_value(asked)}"
    if error.validator in _BOUNDS:
        return _BOUNDS[error.validator].format(asked)
    if error.validator in {"anyOf", "oneOf"} and error.context:
        forms = {inner.relative_schema_path[0]: inner for inner in reversed(error.context)}  # each form's first
        reasons = [None if inner.relative_path else _why(inner) for _, inner in sorted(forms.items())]
        known = [reason for reason in reasons if reason]
        return " and ".join(known) if len(known) == len(reasons) else None
    return None


def _with(remedy: str, meaning: object) -> str:
    return f"{remedy} ({meaning})" if isinstance(meaning, str) and meaning else remedy


def _value(value: object) -> str:
    if isinstance(value, str):
        return shown(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dotted(place: tuple[str | int, ...]) -> str:
    parts = (str(part) for part in place)
    return ".".join(["metadata", *(part if part.isprintable() and len(part) <= 60 else shown(part) for part in parts)])


def _order(place: tuple[str | int, ...]) -> tuple[str, ...]:
    """Return what to sort places by: the tenth item of a list comes after the second."""
    return tuple(f"{part:09d}" if isinstance(part, int) else part for part in place)
