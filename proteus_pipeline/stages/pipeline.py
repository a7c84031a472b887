"""``proteus run``: overrides into params.yaml, ``dvc repro``, and what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from proteus_pipeline.config.composition import PARAMS, Composition, compose, read_params
from proteus_pipeline.config.overrides import parse, write_params
from proteus_pipeline.errors import ProteusError, StaleLockError
from proteus_pipeline.identity.names import Reference
from proteus_pipeline.registry.lock import Locked, read_lock, write_lock
from proteus_pipeline.stages.compose import LOCK, resolve
from proteus_pipeline.stages.project import Project

STAGES = ("compose", "prepare", "embed", "probe", "compare", "report")


@dataclass(frozen=True)
class RunSummary:
    """What a run did, stage by stage: the sections of results/run.json."""

    stages: dict[str, dict[str, Any]]
    seconds: float


def run_pipeline(
    project: Project,
    overrides: Sequence[str],
    progress: Callable[[int, int | None], None] | None = None,
    *,
    locked: bool = False,
    update: bool = False,
    force: bool = False,
) -> RunSummary:
    """Write overrides to params.yaml as ``dvc exp run -S`` does, and run ``dvc repro``.

    Raises
    ------
    ConfigError
        When an override is wrong; params.yaml is then as it was.
    StaleLockError
        With `locked`, when models.lock does not say what the references mean now.
    ProteusError
        When a stage fails; it has said why.

    """
    params = read_params(project.work / PARAMS)
    composition = compose(project.work, params, changes=parse(overrides))
    if locked:
        check_lock(project, composition)
    if update:
        update_lock(project, composition, refresh=True)
    # Everything that can be wrong is found before params.yaml is touched, versions and input files included.
    resolve(project, composition, progress)
    write_params(project.work, overrides)
    before = project.run_log().get("stages", {})
    started = time.perf_counter()
    command = [sys.executable, "-m", "dvc", "repro", *(["--force"] if force else [])]
    # The stages call `proteus`: the one beside this interpreter, also where no environment is activated.
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))  # noqa: PTH120
    done = subprocess.run(command, cwd=project.work, check=False, env=os.environ | {"PATH": path})
    if done.returncode:
        raise ProteusError("the pipeline did not finish", "the lines above say which stage failed, and why")
    return _summarise(project, before, time.perf_counter() - started)


def _summarise(project: Project, before: dict[str, Any], seconds: float) -> RunSummary:
    """Mark the stages that DVC skipped: their counts in results/run.json are then this run's, not an earlier one's."""
    log = project.run_log()
    stages = {name: log.get("stages", {}).get(name, {}) for name in STAGES}
    for section, name in zip(stages.values(), STAGES, strict=True):
        if section.get("finished") == before.get(name, {}).get("finished"):
            idle = {
                key: 0
                for key in ("hits", "derived", "computed", "tokens", "seconds", "saved_seconds")
                if key in section
            }
            section.update(idle | {"status": "unchanged"})
    log["stages"] = stages
    log["seconds"] = round(seconds, 3)
    project.write_run_log(log)
    return RunSummary(stages, seconds)


def floating_references(composition: Composition) -> list[str]:
    """Return the references of the configuration that models.lock must hold."""
    used = {composition.settings.stages.embed.model, composition.settings.stages.compare.model}
    parsed = sorted(str(r) for r in map(Reference.parse, filter(None, used)) if not r.exact)
    return list(dict.fromkeys(parsed))


def update_lock(project: Project, composition: Composition, *, refresh: bool) -> dict[str, Locked]:
    """Lock the configuration's floating references; those that are locked stay unless `refresh`. Returns the changes."""
    path = project.work / LOCK
    known = read_lock(path)
    wanted = floating_references(composition)
    changed: dict[str, Locked] = {}
    for reference in dict.fromkeys([*wanted, *(known if refresh else ())]):
        if refresh or reference not in known:
            entry = Locked.of(project.manager.resolve(reference))
            if known.get(reference) != entry:
                changed[reference] = entry
    if changed:
        write_lock(path, known | changed)
    return changed


def check_lock(project: Project, composition: Composition) -> None:
    """Make sure that each floating reference means now what models.lock says.

    Raises
    ------
    StaleLockError
        When one does not, or is not locked.

    """
    known = read_lock(project.work / LOCK)
    for reference in floating_references(composition):
        now = Locked.of(project.manager.resolve(reference))
        if known.get(reference) != now:
            said = f"v{known[reference].version}" if reference in known else "nothing"
            raise StaleLockError(
                f"{reference} means v{now.version} now, and models.lock says {said}", "run: proteus model lock --update"
            )
