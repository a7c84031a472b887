"""What pyproject.toml can't say: a wheel carries what `proteus init` makes projects of, which is this repository's own."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
TEMPLATE = ("conf", "dvc.yaml", "params.yaml", "data/demo100.fasta", "data/README.md")


class BuildWithTemplate(build_py):
    """Copies the template into the package; an editable installation reads it where it is."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "proteus_pipeline", "template")
        for name in TEMPLATE:
            source = ROOT / name
            for path in sorted(source.rglob("*.yaml")) if source.is_dir() else [source]:
                copy = target / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


setup(cmdclass={"build_py": BuildWithTemplate})
