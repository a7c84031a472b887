"""``proteus run``: overrides into params.yaml, ``dvc repro``, and what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteus_pipeline.config.composition import PARAMS, Composition, compose, read_params
from proteus_pipeline.config.overrides import parse, write_params
from proteus_pipeline.embeddings.computing import Embedded
from proteus_pipeline.embeddings.manifest import read_manifest
from proteus_pipeline.errors import ProteusError, StaleLockError, StorageError, Terminated
from proteus_pipeline.identity.names import Reference
from proteus_pipeline.registry.events import greatest
from proteus_pipeline.registry.lock import Locked, read_lock, write_lock
from proteus_pipeline.registry.provision import provide
from proteus_pipeline.stages.compose import LOCK, resolve
from proteus_pipeline.stages.notes import quiet
from proteus_pipeline.stages.project import CANDIDATE, COUNTS, MANIFEST, RUN_PAGE, STAGES, Project
from proteus_pipeline.stages.report import write_page
from proteus_pipeline.stores.files import write_atomic

if TYPE_CHECKING:
    import psutil

# In which DVC runs a stage's command, beside $SHELL.
_SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "csh", "tcsh", "fish"}
_DVC_ENDS_S, _LOOK_S = 1.0, 0.2


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
    with _lock_kept_on_error(project):
        if update:
            update_lock(project, composition, refresh=True)
        # Everything that can be wrong is found before params.yaml is touched, versions and input files included.
        resolve(project, composition, progress)
        write_params(project.work, overrides)
    before = project.run_log().get("stages", {})
    started = time.perf_counter()
    _reproduce(project, force=force)
    summary = _summarise(project, before, time.perf_counter() - started)
    write_page(project, project.work / RUN_PAGE)
    return summary


@contextmanager
def _lock_kept_on_error(project: Project) -> Iterator[None]:
    """Put models.lock back as it was when what follows fails."""
    path = project.work / LOCK
    old = path.read_bytes() if path.exists() else None
    try:
        yield
    except BaseException:
        if old is not None and path.read_bytes() != old:
            write_atomic(path, old)
        raise


def _entries(path: Path) -> tuple[Embedded, ...]:
    """Return what a manifest lists; nothing where there is none, or an idle candidate's."""
    try:
        return read_manifest(path).entries
    except StorageError:
        return ()


def _reproduce(project: Project, *, force: bool) -> None:
    options = [*(["--force"] if force else []), *(["--quiet"] if quiet() else [])]
    command = [sys.executable, "-m", "dvc", "repro", *options]
    # The stages call `proteus`: the one beside this interpreter, also where no environment is activated.
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))  # noqa: PTH120
    with subprocess.Popen(command, cwd=project.work, env=os.environ | {"PATH": path}) as child:
        code = _ended(child)
    if code:
        raise ProteusError("the pipeline did not finish", "the lines above say which stage failed, and why")


def _ended(dvc: subprocess.Popen[bytes]) -> int:
    """Wait until DVC has ended, interrupted or not, and return its code; an interruption is raised then.

    A terminal sends its Ctrl-C to DVC and the stage too: they finish what they hold and let go of their locks. A SIGTERM may be this
    process's alone, of ``kill`` or as the first process of a container. DVC ends at once of one: where it is still there, the
    stages were not told either. Then they are told, and not DVC, which would leave them behind: it ends as its stage fails.
    """
    import psutil

    first: KeyboardInterrupt | None = None
    tell: float | None = None
    told: set[psutil.Process] = set()
    while True:
        try:
            if tell is not None and time.monotonic() >= tell:
                with suppress(psutil.Error):
                    for stage in _commands(psutil.Process(dvc.pid)):
                        if stage not in told:
                            told.add(stage)
                            stage.terminate()
            code = dvc.wait(timeout=None if tell is None else _LOOK_S)
            break
        except subprocess.TimeoutExpired:
            continue
        except Terminated as interrupt:
            first = first or interrupt
            tell = time.monotonic() + (_DVC_ENDS_S if tell is None else 0)  # who says it twice is in a hurry
        except KeyboardInterrupt as interrupt:
            first = first or interrupt
    if first is not None:
        raise first
    return code


def _commands(process: psutil.Process) -> Iterator[psutil.Process]:
    """Yield the commands that a process runs, not the shells that it runs them in."""
    for child in process.children():
        if child.name() in {*_SHELLS, os.path.basename(os.environ.get("SHELL", ""))}:  # noqa: PTH119 - it may be empty
            yield from _commands(child)
        else:
            yield child


def _summarise(project: Project, before: dict[str, Any], seconds: float) -> RunSummary:
    """Mark the stages that DVC skipped or restored, with the counts of what is there now, not of an earlier run."""
    log = project.run_log()
    stages: dict[str, dict[str, Any]] = {}
    for name in STAGES:
        section = log.get("stages", {}).get(name, {})
        skipped = section.get("finished") == before.get(name, {}).get("finished")
        stages[name] = _standing(project, name) | {"status": "unchanged"} if skipped else section
    log["stages"] = stages
    log["seconds"] = round(seconds, 3)
    project.write_run_log(log)
    return RunSummary(stages, seconds)


def _standing(project: Project, stage: str) -> dict[str, Any]:
    """Return what a stage's outputs say, for a stage that did not run."""
    if stage in {"embed", "compare"}:
        path = project.work / (MANIFEST if stage == "embed" else CANDIDATE)
        model = project.composed["stages"][stage]["model"]["reference"]
        entries = _entries(path)
        idle: dict[str, float] = dict.fromkeys(("hits", "derived", "computed", "tokens"), 0)
        idle |= dict.fromkeys(("seconds", "saved_seconds", "gpu_seconds", "saved_gpu_seconds"), 0.0)
        return idle | {"model": model, "sequences": len(entries), "unique": len({e.key for e in entries})}
    if stage == "prepare":
        return dict(json.loads((project.work / COUNTS).read_text(encoding="utf-8")))
    return {}


def floating_references(composition: Composition) -> list[str]:
    """Return the references of the configuration that models.lock must hold."""
    used = {composition.settings.stages.embed.model, composition.settings.stages.compare.model}
    return sorted({str(r) for r in map(Reference.parse, filter(None, used)) if not r.exact})


def update_lock(
    project: Project, composition: Composition, *, refresh: bool, dry_run: bool = False
) -> dict[str, Locked]:
    """Lock the configuration's floating references; those that are locked stay unless `refresh`. Returns the changes."""
    path = project.work / LOCK
    known = read_lock(path)
    wanted = floating_references(composition)
    changed: dict[str, Locked] = {}
    for reference in dict.fromkeys([*wanted, *(known if refresh else ())]):
        if refresh or reference not in known:
            entry = _meaning(project, reference, known)
            if known.get(reference) != entry:
                changed[reference] = entry
    if changed and not dry_run:
        write_lock(path, known | changed)
    return changed


def _meaning(project: Project, reference: str, known: dict[str, Locked]) -> Locked:
    """Return what a floating reference means now; a fresh clone, which has no tags, first gets the version it can."""
    name = Reference.parse(reference).name
    if not project.manager.list_versions(name):
        entry = project.catalogue.get(name)
        if reference in known:
            provide(project.manager, f"{name}@v{known[reference].version}", project.catalogue)
        elif entry:
            provide(project.manager, f"{name}@v{greatest(entry.versions)}", project.catalogue)
    return Locked.of(project.manager.resolve(reference))


def check_lock(project: Project, composition: Composition) -> None:
    """Make sure that each floating reference means now what models.lock says.

    Raises
    ------
    StaleLockError
        When one does not, or is not locked.

    """
    known = read_lock(project.work / LOCK)
    for reference in floating_references(composition):
        now = _meaning(project, reference, known)
        if known.get(reference) != now:
            said = f"v{known[reference].version}" if reference in known else "nothing"
            raise StaleLockError(
                f"{reference} means v{now.version} now, and models.lock says {said}", "run: proteus model lock --update"
            )
