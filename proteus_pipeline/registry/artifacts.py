"""The ``artifacts:`` section of dvc.yaml, by which gto and ``dvc artifacts`` find a model's weights."""

from __future__ import annotations

import io
from pathlib import PurePosixPath
from typing import Any

from proteus_pipeline.errors import StorageError


def _load(text: str) -> tuple[Any, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML()
    yaml.width = 120
    yaml.preserve_quotes = True
    try:
        value = yaml.load(text) or {}
    except YAMLError as error:
        raise StorageError("dvc.yaml at HEAD is no YAML", "mend it and commit") from error
    if not isinstance(value, dict):
        raise StorageError("dvc.yaml at HEAD holds no mapping", "mend it and commit")
    if value.get("artifacts") is None:
        value.pop("artifacts", None)
    elif not isinstance(value["artifacts"], dict):
        raise StorageError("artifacts: in dvc.yaml at HEAD holds no mapping", "mend it and commit")
    return yaml, value


def declares_artifact(dvc_yaml: str, name: str) -> bool:
    """Say whether a dvc.yaml's text names the model's folder as an artifact."""
    _, value = _load(dvc_yaml)
    entry = value.get("artifacts", {}).get(name)
    return isinstance(entry, dict) and PurePosixPath(str(entry.get("path"))) == PurePosixPath("models", name)


def declare_artifact(dvc_yaml: str, name: str) -> str:
    """Return a dvc.yaml's text with the model among its artifacts; comments and order stay."""
    if declares_artifact(dvc_yaml, name):
        return dvc_yaml
    yaml, value = _load(dvc_yaml)
    artifacts = value.setdefault("artifacts", {})
    entry = artifacts[name] if isinstance(artifacts.get(name), dict) else {"type": "model"}
    artifacts[name] = entry
    entry["path"] = f"models/{name}"
    out = io.StringIO()
    yaml.dump(value, out)
    return out.getvalue()
