"""What ``proteus init`` makes a project of: this repository's own conf/, dvc.yaml, params.yaml and example.

A wheel carries them (setup.py), and an editable installation has them beside the package. There is one difference to the
repository: where its dvc.yaml lists source files, a project's lists the package's version.
"""

from __future__ import annotations

import io
import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from proteus_pipeline.errors import StorageError
from proteus_pipeline.stages.project import RUN, RUN_PAGE

VERSION_KEY = "proteus_version"
MINE = "conf/data/mine.yaml"
_PACKAGE = Path(__file__).resolve().parent.parent
_CODE = "proteus_pipeline/"


def template_folder() -> Path:
    """Return the folder of the template.

    Raises
    ------
    StorageError
        When the installation has none.

    """
    for folder in (_PACKAGE / "template", _PACKAGE.parent):
        if (folder / "dvc.yaml").is_file() and (folder / "conf" / "config.yaml").is_file():
            return folder
    raise StorageError(f"{_PACKAGE} has no template of a project", "install proteus_pipeline again, from a wheel")


def project_files(model: str, fasta: str | None = None, labels: str | None = None) -> dict[str, bytes]:
    """Return the pipeline's files of a new project, by their paths.

    Parameters
    ----------
    model
        An exact reference.
    fasta, labels
        Paths of the user's own files in the project; without `fasta`, the example comes along.

    """
    folder = template_folder()
    # conf/ here may hold more than git has: a wheel takes what is there, too.
    texts = {f"conf/{p.relative_to(folder / 'conf').as_posix()}": _text(p) for p in _yaml_files(folder / "conf")}
    texts["conf/config.yaml"] = _set(texts["conf/config.yaml"], "model", model)
    if fasta is None:
        texts |= {name: _text(folder / name) for name in ("data/demo100.fasta", "data/README.md")}
    else:
        demo = texts.pop("conf/data/demo.yaml")
        mine = _set(_set(demo.partition("\n")[2], "fasta", fasta), "labels", labels)
        texts[MINE] = f"# Your own proteins.\n{mine}"
        texts["conf/config.yaml"] = texts["conf/config.yaml"].replace("- data: demo\n", "- data: mine\n")
    texts["params.yaml"] = _text(folder / "params.yaml")
    texts["dvc.yaml"] = pipeline(_text(folder / "dvc.yaml"))
    return {name: text.encode() for name, text in (texts | _ignored(texts["dvc.yaml"])).items()}


def pipeline(dvc_yaml: str) -> str:
    """Return this repository's dvc.yaml as a project's: the version of the package stands for its source files.

    A project has no source files for DVC to watch, and another version may give other results: each stage depends on
    the version, which composed.yaml holds. An upgrade runs the stages once, and what is in the cache is not computed again.
    """
    from ruamel.yaml import YAML

    handler = YAML()
    handler.width = 120
    handler.preserve_quotes = True
    handler.indent(mapping=2, sequence=4, offset=2)
    value = handler.load(dvc_yaml)
    value.pop("artifacts", None)
    for stage in value["stages"].values():
        for number in reversed(range(len(stage.get("deps", ())))):
            if str(stage["deps"][number]).startswith(_CODE):
                del stage["deps"][number]
        if not stage.get("deps"):
            stage.pop("deps", None)
        for params in stage.get("params", ()):
            params["composed.yaml"].insert(0, VERSION_KEY)
    out = io.StringIO()
    handler.dump(value, out)
    return out.getvalue().rstrip() + "\n"


def _ignored(dvc_yaml: str) -> dict[str, str]:
    """Return the .gitignore files that `dvc repro` would write at its first run, and leave the tree changed by."""
    lines: dict[str, list[str]] = {".gitignore": [".venv/", "/.proteus/", "__pycache__/", f"/{RUN}", f"/{RUN_PAGE}"]}
    for stage in yaml.safe_load(dvc_yaml)["stages"].values():
        for out in stage.get("outs", ()):
            if isinstance(out, str):
                path = PurePosixPath(out)
                lines.setdefault((path.parent / ".gitignore").as_posix(), []).append(f"/{path.name}")
    return {name: "".join(f"{line}\n" for line in found) for name, found in lines.items()} | {
        ".dvcignore": "__pycache__\n*.pyc\n.venv\n.proteus\n"
    }


def _set(text: str, key: str, value: Any) -> str:
    """Return YAML with one of its top keys set; comments stay."""
    scalar = yaml.safe_dump(value, allow_unicode=True, width=10**6).removesuffix("...\n").strip()
    changed, count = re.subn(rf"^{key}: .*$", lambda _: f"{key}: {scalar}", text, count=1, flags=re.MULTILINE)
    if not count:
        raise StorageError(f"the template of a project does not set {key}", "install proteus_pipeline again")
    return changed


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.yaml"))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
