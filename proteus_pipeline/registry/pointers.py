"""Where a version's weights are named in git: a ``.dvc`` file, or an output in ``dvc.lock``.

What this package registers is always ``models/NAME.dvc``, the pointer of one folder, read without a YAML parser. What
``gto register`` or a plain DVC user tagged may lie anywhere: ``artifacts:`` in dvc.yaml then says where.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.records import OBJECT_MD5

_PLAIN = re.compile(r"(?!(?:null|true|false|yes|no|on|off|y|n)$)[a-z][\w-]*", re.IGNORECASE | re.ASCII)
_OURS = re.compile(
    r"outs:\n- md5: (?P<md5>[0-9a-f]{32}\.dir)\n  size: (?P<size>\d+)\n  nfiles: (?P<files>\d+)\n  hash: md5\n"
    r"  path: (?P<path>[A-Za-z0-9_'-]+)\n"
)
_LARGEST = 2**53


@dataclass(frozen=True)
class Pointer:
    """What DVC tracks: the hash of a file, or of a directory object (``.dir``), and what it comes to."""

    md5: str
    size: int
    files: int
    path: str

    @property
    def is_folder(self) -> bool:
        return self.md5.endswith(".dir")

    def text(self) -> str:
        """Return the ``.dvc`` file of a folder as ``dvc add`` writes it."""
        return (
            f"outs:\n- md5: {self.md5}\n  size: {self.size}\n  nfiles: {self.files}\n  hash: md5\n"
            f"  path: {_scalar(self.path)}\n"
        )

    @classmethod
    def parse(cls, text: str, origin: str, path: str | None = None) -> Pointer:
        """Read a ``.dvc`` file; of several outputs, the one at `path`.

        Raises
        ------
        IntegrityError
            When it is none, or holds no such output.

        """
        if found := _OURS.fullmatch(text):
            return cls(found["md5"], int(found["size"]), int(found["files"]), found["path"].strip("'"))
        import yaml

        try:
            outs = (yaml.safe_load(text) or {})["outs"]
            fitting = [out for out in outs if path is None or PurePosixPath(str(out["path"])) == PurePosixPath(path)]
            return _of_output(fitting[0])
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError, yaml.YAMLError) as error:
            raise IntegrityError(f"{origin} is no DVC pointer ({error})", "git checkout it again") from error


def _of_output(out: dict[str, Any]) -> Pointer:
    md5 = str(out["md5"])
    if not OBJECT_MD5.fullmatch(md5) or out.get("hash", "md5") != "md5":
        raise ValueError(f"{md5!r} is no md5 of DVC 3")
    size, files = int(out.get("size", 0)), int(out.get("nfiles", 1))
    if not (0 <= size < _LARGEST and 0 <= files < _LARGEST):
        raise ValueError(f"size {size}, nfiles {files}")
    return Pointer(md5, size, files, str(out["path"]))


def pointer_at(git: Git, commit: str, name: str, ledger: str = "") -> tuple[Pointer, str | None]:
    """Return the pointer to a model's weights at a commit, and the object that the ref `ledger` names, if any.

    Raises
    ------
    IntegrityError
        When there is none, or it can't be read.

    """
    path = f"models/{name}.dvc"
    wanted = [f"{commit}:{path}", f"{commit}:dvc.yaml", f"{commit}:dvc.lock", *([ledger] if ledger else [])]
    found = git.read_objects(wanted)
    own, dvc_yaml, dvc_lock = (o.data.decode("utf-8", "replace") if o else None for o in found[:3])
    entered = found[3].oid if ledger and found[3] else None
    if own is not None:
        return Pointer.parse(own, f"{path} at {commit[:12]}"), entered
    return _artifact(git, commit, name, dvc_yaml, dvc_lock), entered


def _artifact(git: Git, commit: str, name: str, dvc_yaml: str | None, dvc_lock: str | None) -> Pointer:
    """Return the pointer to what dvc.yaml's ``artifacts:`` says the model is."""
    import yaml

    lost = IntegrityError(
        f"commit {commit[:12]} has no models/{name}.dvc, and its dvc.yaml names no artifact {name} that DVC tracks",
        "fetch the tag again from a remote, or dvc add the weights, commit and tag that",
    )
    try:
        path = PurePosixPath(yaml.safe_load(dvc_yaml or "")["artifacts"][name]["path"]).as_posix()
        text = git.read(commit, f"{path}.dvc")
        if text is not None:
            return Pointer.parse(text, f"{path}.dvc at {commit[:12]}", PurePosixPath(path).name)
        stages = yaml.safe_load(dvc_lock or "")["stages"].values()
        outs = [out for stage in stages for out in stage.get("outs", ()) if out["path"] == path]
        return _of_output(outs[0])
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError, yaml.YAMLError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise lost from error


def _scalar(name: str) -> str:
    """Return a name as YAML writes it: in quotes where it would read as a number or a date."""
    if _PLAIN.fullmatch(name):
        return name
    from ruamel.yaml import YAML

    out = io.StringIO()
    YAML().dump({"path": name}, out)
    return out.getvalue().removeprefix("path: ").removesuffix("\n")
