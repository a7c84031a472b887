"""Hydra overrides on the command line, and params.yaml, where they end up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.config.composition import SECTIONS, compose, read_params
from proteus_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def parse(overrides: Sequence[str]) -> dict[str, Any]:
    """Return overrides as a nested mapping of plain values.

    >>> parse(["embedding.layer=6", "data.fasta='my proteins.fa'"])
    {'embedding': {'layer': 6}, 'data': {'fasta': 'my proteins.fa'}}

    Raises
    ------
    ConfigError
        When one breaks Hydra's grammar, adds or deletes keys, or is a sweep.

    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    nested: dict[str, Any] = {}
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(
                f"{text!r} is no Hydra override",
                "write KEY=VALUE, with quotes round a value that has spaces, commas or =",
            ) from error
        if override.is_sweep_override():
            raise ConfigError(
                f"{text!r} is a sweep", f"quote the value, or queue the grid: dvc exp run --queue -S {text!r}"
            )
        if override.is_add() or override.is_force_add() or override.is_delete():
            raise ConfigError(f"{text!r} adds or deletes a key", "the settings are fixed: KEY=VALUE")
        if not override.key_or_group:
            raise ConfigError(f"{text!r} is no Hydra override", "write KEY=VALUE")
        *parents, leaf = _key(override).split(".")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{text!r} sets a key of a value set before", "leave one of the two out")
        if isinstance(place.get(leaf), dict):
            raise ConfigError(f"{text!r} replaces keys set before it", "leave one of the two out")
        place[leaf] = override.value()
    return nested


def _key(override: Override) -> str:
    """Return where an override's value belongs: a choice of a group's file is kept apart from the group's keys."""
    key = str(override.key_or_group)
    return f"groups.{key}" if key in SECTIONS and isinstance(override.value(), str) else key


def _as_written(text: str) -> str:
    """Return an override as params.yaml takes it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(text)
    key = str(override.key_or_group)
    return _key(override) + text.strip()[len(key) :]


def write_params(root: Path, overrides: Sequence[str]) -> None:
    """Check overrides, and write them to params.yaml by DVC's own function: the bytes that ``-S`` would write.

    Raises
    ------
    ConfigError
        When one is wrong; params.yaml is then as it was.

    """
    path = root / "params.yaml"
    changes = parse(overrides)
    written = [_as_written(text) for text in overrides]
    compose(root, read_params(path), changes=changes)
    if not overrides:
        return
    if not path.exists():
        raise ConfigError(
            f"{path.name} does not exist", f"git checkout {path.name}: what a run may change stands there"
        )
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides
    from hydra.errors import HydraException

    try:
        apply_overrides(str(path), written)
    except (DvcException, HydraException) as error:
        # DVC's own sentence is "Invalid --set-param value"; Hydra's names the key.
        line = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"params.yaml does not take {' '.join(overrides)} ({line})", "git checkout params.yaml"
        ) from error
