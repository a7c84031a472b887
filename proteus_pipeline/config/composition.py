"""conf/ and params.yaml, composed by Hydra into typed settings, with the file and key of whatever is wrong.

Hydra's own application wrapper is not used: under DVC it would skip stages whose settings changed, since DVC sees
files, not compositions. One stage composes, and the others list the keys they use.
"""

from __future__ import annotations

import copy
import difflib
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from proteus_pipeline.config.schema import Settings
from proteus_pipeline.errors import ConfigError, ProteusError

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = "conf"
PARAMS = "params.yaml"
COMMAND_LINE = "the command line"
# The groups of settings: conf/ has a folder for each. (conf/model/ is the catalogue of weights: `model=` is a version.)
SECTIONS = ("data", "embedding", "probe", "report", "cache", "runtime", "cluster")
# Where params.yaml keeps which file of a group is chosen, apart from the group's own keys.
_CHOICE = "groups."


@dataclass(frozen=True)
class Composition:
    """Typed settings, and where each came from."""

    settings: Settings
    origins: dict[str, str]

    def origin(self, key: str) -> str:
        """Return the file that set a dotted key."""
        return self.origins.get(key, f"{CONF}/config.yaml")

    def blame(self, error: ProteusError, key: str) -> ConfigError:
        """Return an error about a key's value as one that names the key's file."""
        named = error.what.startswith(f"{key} ")
        return ConfigError(f"{self.origin(key)}: {error.what if named else f'{key}: {error.what}'}", error.remedy)


def read_params(path: Path) -> dict[str, Any]:
    """Return params.yaml as it is; a missing file overrides nothing."""
    return _read_yaml(path) if path.exists() else {}


def compose(
    root: Path, params: Mapping[str, Any], params_name: str = PARAMS, *, changes: Mapping[str, Any] | None = None
) -> Composition:
    """Compose conf/ under `root`, and lay the keys of `params`, then of `changes`, that are not null over it.

    `params` are called `params_name` in errors, and `changes` the command line.

    ``groups: {data: mine}``, or ``data: mine`` itself, takes conf/data/mine.yaml for the group.

    Raises
    ------
    ConfigError
        For an unknown key, a missing value (``???``), a wrong type, a file that is no YAML or not there: one line
        that names the file and the key.

    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    conf = root / CONF
    if not (conf / "config.yaml").is_file():
        raise ConfigError(
            f"{conf}/config.yaml does not exist", "run this in a proteus project, or restore conf/ from git"
        )
    given = {key: value for key, value in _leaves(overlay(params, changes or {})) if value is not None}
    typed = {key for key, _ in _leaves(changes or {})}
    chosen = {k: v for k, v in given.items() if isinstance(v, str) and k in SECTIONS}
    chosen |= {k.removeprefix(_CHOICE): given.pop(k) for k in list(given) if k.startswith(_CHOICE)}
    for group, option in chosen.items():
        if group not in SECTIONS or not isinstance(option, str):
            raise ConfigError(
                f"{params_name}: {_CHOICE}{group}={option} chooses nothing", f"groups: {', '.join(SECTIONS)}"
            )
    composed = _hydra_compose(conf, chosen)
    origins = _origins(conf, composed, chosen)
    schema = OmegaConf.structured(Settings)
    merged = schema
    for key, value in _leaves(OmegaConf.to_container(composed, resolve=False)):
        merged = _set(merged, key, value, origins.get(key, f"{CONF}/config.yaml"))
    for key, value in given.items():
        if key not in chosen:
            origins[key] = COMMAND_LINE if key in typed else params_name
            merged = _set(merged, key, value, origins[key])
    for key in known_keys():
        where = origins.get(key, f"{CONF}/config.yaml")
        try:
            OmegaConf.select(merged, key, throw_on_missing=True)
        except MissingMandatoryValue as error:
            raise ConfigError(f"{where}: {key} has no value", f"set it there, or run with {key}=VALUE") from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{where}: {key}: {_first_line(error)}", "correct the ${...}") from error
    settings = OmegaConf.to_object(merged)
    assert isinstance(settings, Settings)  # noqa: S101 - what OmegaConf.structured was given
    return Composition(settings, origins)


def _hydra_compose(conf: Path, chosen: Mapping[str, str]) -> DictConfig:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    for group, option in chosen.items():
        if not (conf / group / f"{option}.yaml").is_file():
            options = ", ".join(sorted(p.stem for p in (conf / group).glob("*.yaml")))
            raise ConfigError(f"{group}={option}: {CONF}/{group}/{option}.yaml does not exist", f"there are: {options}")
    for path in sorted(conf.rglob("*.yaml")):
        _read_yaml(path, f"{CONF}/{path.relative_to(conf).as_posix()}")
    try:
        with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
            return hydra_compose("config", [f"{group}={option}" for group, option in chosen.items()])
    except yaml.MarkedYAMLError as error:
        # Hydra is stricter than YAML: a key may not stand twice.
        mark = error.problem_mark
        place = f"{CONF}/{Path(mark.name).relative_to(conf.resolve())}, line {mark.line + 1}" if mark else f"{CONF}/"
        raise ConfigError(f"{place}: {error.problem}", "correct it, or git checkout it") from error
    except (HydraException, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(f"{CONF}/ can't be composed: {_first_line(error)}", "correct the defaults list") from error


def _origins(conf: Path, composed: DictConfig, chosen: Mapping[str, str]) -> dict[str, str]:
    """Return the file of each leaf: conf/config.yaml wins where it sets the key, as _self_ comes last."""
    own = dict(_leaves(_read_yaml(conf / "config.yaml")))
    origins: dict[str, str] = {}
    defaults = own.pop("defaults", [])
    files = {g: o for item in defaults if isinstance(item, dict) for g, o in item.items()} | dict(chosen)
    for key, _ in _leaves(_plain(composed)):
        group = key.split(".", 1)[0]
        inside = f"{CONF}/{group}/{files.get(group, 'default')}.yaml"
        origins[key] = f"{CONF}/config.yaml" if key in own or group not in files else inside
    return origins


def _set(merged: Any, key: str, value: Any, where: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = known_keys()
    if any(k.startswith(f"{key}.") for k in known):
        if value == {}:
            return merged
        raise ConfigError(f"{where}: {key} is a group of settings, not {value!r}", "set one of its keys")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else "the keys are those of conf/"
        raise ConfigError(f"{where}: {key} is no setting", remedy)
    try:
        OmegaConf.update(merged, key, value, merge=True)
    except (OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where}: {key}: {_first_line(error)}", "correct its value") from error
    return merged


def overlay(params: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return params with nested changes laid over them."""
    merged = copy.deepcopy(dict(params))
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = overlay(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return merged


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Return every setting's dotted key."""
    from omegaconf import OmegaConf

    value = OmegaConf.to_container(OmegaConf.structured(Settings), resolve=False)
    return tuple(key for key, _ in _leaves(value))


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not prefix):
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _plain(config: DictConfig) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=False)


def _read_yaml(path: Path, name: str | None = None) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{name or path.name}{line} is no YAML", "correct it, or git checkout it") from error
    except OSError as error:
        raise ConfigError(f"{name or path} can't be read ({error.strerror})", "check its permissions") from error
    if not isinstance(value, dict | None):
        raise ConfigError(f"{name or path.name} holds no mapping", "write it as key: value")
    try:
        json.dumps(value, default=str)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{name or path.name} holds a value that contains itself", "write it without aliases"
        ) from error
    return value or {}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
