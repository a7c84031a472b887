"""``proteus init``: a user's own repository, made whole beside its place and then moved there."""

from __future__ import annotations

import errno
import os
import re
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

import yaml

from proteus_pipeline.errors import ConfigError, SequenceError, StorageError, VersionNotFoundError
from proteus_pipeline.identity.names import Reference
from proteus_pipeline.models.sources import load_catalogue
from proteus_pipeline.registry.events import greatest
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.home import DVC_FILES, commit_first, sweep_unfinished, unfinished
from proteus_pipeline.registry.lock import write_lock
from proteus_pipeline.sequences.fasta import read_fasta
from proteus_pipeline.sequences.labels import read_labels
from proteus_pipeline.sequences.rules import clean
from proteus_pipeline.stages.compose import LOCK, rules_of
from proteus_pipeline.stages.project import installed
from proteus_pipeline.stages.template import MINE, project_files, template_folder
from proteus_pipeline.stores.files import storage_error, write_atomic

EXAMPLE = "data/demo100.fasta"
# Beyond it, an input file is left to `dvc add`: git keeps every version of a file in every clone.
_LARGEST_IN_GIT = 10_000_000


@dataclass(frozen=True)
class NewProject:
    """What was made.

    Attributes
    ----------
    root
        Its folder.
    model
        The version that it starts with; its weights are fetched by the first run.
    fasta, sequences
        Its proteins, and how many.
    notes
        What its user should know before the first run, a sentence each.

    """

    root: Path
    model: str
    fasta: str
    sequences: int
    notes: tuple[str, ...]


def create(
    folder: Path, *, model: str | None = None, fasta: Path | None = None, labels: Path | None = None
) -> NewProject:
    """Make a project in `folder`, which is new or empty: whole, or not at all.

    Parameters
    ----------
    folder
        Where.
    model
        A model of the catalogue; the demonstration model by default.
    fasta, labels
        Files of the user's own, which are copied; without `fasta`, 100 proteins come along.

    Raises
    ------
    StorageError
        When there is something in `folder`, when it lies in a git repository, or when it can't be made.
    VersionNotFoundError
        When the catalogue does not have the model.
    SequenceError
        When a file can't be used.

    """
    _check_place(folder)
    reference = _exact(model)
    if labels and not fasta:
        raise ConfigError(f"--labels {labels}: labels are of proteins", "give their --fasta too")
    sequences, notes = _looked_at(fasta, labels) if fasta else (_count(template_folder() / EXAMPLE), [])
    names = _names(fasta, labels)
    files = project_files(reference, names.get(fasta), names.get(labels))
    shown = names.get(fasta) or EXAMPLE
    files["README.md"] = _readme(folder, reference, shown, own=fasta is not None)
    large = [name for path, name in names.items() if path and path.stat().st_size > _LARGEST_IN_GIT]
    for name in large:
        notes.append(f"{name} is too large for git: track it with dvc add {name}")
    _make(folder, files, {path: name for path, name in names.items() if path}, large)
    return NewProject(folder, reference, shown, sequences, tuple(notes))


def _check_place(folder: Path) -> None:
    if shutil.which("git") is None:
        raise StorageError("git is not installed", "install git, 2.30 or later")
    if os.path.lexists(folder) and not folder.is_dir():
        raise StorageError(f"{folder} is a file", "name a new folder")
    here = folder.absolute()
    for place in (here, *here.parents):
        if (place / ".git").exists():
            what = "is a git repository" if place == here else f"lies in a git repository, {place}"
            raise StorageError(f"{folder} {what}", "name a new folder outside of it")
    try:
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise storage_error("read", folder, error) from error
    if found:
        raise StorageError(f"{folder} is not empty: it has {found[0]}", "name a new or empty folder")


def _exact(model: str | None) -> str:
    """Return the exact reference of a model of the catalogue; the template's own where none is named."""
    conf = template_folder() / "conf"
    if model is None:
        return str(yaml.safe_load((conf / "config.yaml").read_text(encoding="utf-8"))["model"])
    wanted = Reference.parse(model)
    catalogue = load_catalogue(conf / "model")
    entry = catalogue.get(wanted.name)
    if entry is None:
        raise VersionNotFoundError(
            f"{wanted.name} is no model that proteus init can fetch",
            f"there are: {', '.join(catalogue)}; one of your own is registered in the new project: proteus model register",
        )
    number = wanted.selector if wanted.exact else greatest(entry.versions)
    if number not in entry.versions:
        raise VersionNotFoundError(f"{wanted.name} has no version {number}", f"there are: {', '.join(entry.versions)}")
    return f"{wanted.name}@v{number}"


def _looked_at(fasta: Path, labels: Path | None) -> tuple[int, list[str]]:
    """Return how many proteins a file has, and what the pipeline would refuse of it.

    The rules are the user's to choose, in the project; a file that is none is refused here.
    """
    for option, path in (("--fasta", fasta), ("--labels", labels)):
        if path and path.exists() and not (path.is_file() or path.is_dir()):
            # It is read three times, and a pipe can be read once.
            raise SequenceError(f"{option}: {path} is no regular file", "write it to a file first")
    try:
        ids = {record.id for record in read_fasta(fasta)}
        if labels:
            read_labels(labels, ids)
    except SequenceError as error:
        remedy = re.sub(r"\bdata\.(fasta|labels)=PATH", r"--\1 PATH", error.remedy)
        raise SequenceError(error.what, remedy) from error
    demo = yaml.safe_load((template_folder() / "conf/data/demo.yaml").read_text(encoding="utf-8"))
    try:
        clean(read_fasta(fasta), rules_of(demo))
    except SequenceError as error:
        remedy = re.sub(r"(?<=\bwith )(data\.\w+=\w+)", r"proteus run \1", error.remedy)
        return len(ids), [f"the first run would refuse it: {error.what}; {remedy}"]
    return len(ids), []


def _count(fasta: Path) -> int:
    return sum(1 for _ in read_fasta(fasta))


def _names(fasta: Path | None, labels: Path | None) -> dict[Path | None, str]:
    """Return where in a project its user's files go: under their own names, as far as these are harmless."""
    names: dict[Path | None, str] = {}
    for path, otherwise in ((fasta, "proteins.fasta"), (labels, "labels.csv")):
        if path:
            name = re.sub(r"[^\w.+-]", "_", path.name).lstrip("-.") or otherwise
            taken = {"data/README.md", "data/.gitignore", *names.values()}
            names[path] = f"data/{otherwise if f'data/{name}' in taken else name}"
    return names


def _readme(folder: Path, reference: str, fasta: str, *, own: bool) -> bytes:
    text = resources.files("proteus_pipeline.stages").joinpath("new_project.md").read_text(encoding="utf-8")
    name = reference.partition("@")[0]
    values = {"title": folder.absolute().name, "model": reference, "name": name, "fasta": fasta}
    values |= {"version": installed("proteus_pipeline") or "", "settings": MINE if own else "conf/data/demo.yaml"}
    return Template(text).substitute(values).encode()


def _make(folder: Path, files: dict[str, bytes], copied: dict[Path, str], large: list[str]) -> None:
    here = folder.absolute()
    sweep_unfinished(here)
    made = unfinished(here)
    try:
        made.mkdir(parents=True)
        git = Git(made)
        git.run("init", "--quiet")
        files = files | {name: text.encode() for name, text in DVC_FILES.items()}
        if large:
            files["data/.gitignore"] = "".join(f"/{name.removeprefix('data/')}\n" for name in large).encode()
        for name, data in files.items():
            write_atomic(made / name, data)
        write_lock(made / LOCK, {})
        (made / "data").mkdir(exist_ok=True)
        for source, name in copied.items():
            shutil.copyfile(source, made / name)
        names = {*files, LOCK, *copied.values()}
        commit_first(git, sorted(names.difference(large)), "A project for proteus")
        _move(made, here)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise storage_error("make", folder, error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _move(made: Path, folder: Path) -> None:
    """Put what was made in its place: by one rename, or into a folder that is there, in which a shell may stand."""
    if not folder.exists():
        try:
            made.rename(folder)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise
            raise StorageError(f"{folder} was made by somebody else meanwhile", "name another folder") from error
        return
    moved: list[Path] = []
    try:
        # .git comes first: of two that fill one folder, one fails there, and takes nothing along.
        for path in sorted(made.iterdir(), key=lambda p: p.name != ".git"):
            path.rename(folder / path.name)
            moved.append(folder / path.name)
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise
