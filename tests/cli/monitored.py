"""A project with two versions of a tiny model, and what happens in it, for the tests of its metrics."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import ROOT, make_checkpoint

from proteus_pipeline import ModelCacheManager, ModelVersionManager
from proteus_pipeline.cli.main import main
from proteus_pipeline.models.folder import write_folder
from proteus_pipeline.stores.counts import counting

FASTA = ">a\nMKTAYIAKQRQISFVKSHFSRQ\n>b\nMKVLAAGIAKQR\n>c\nMSTAYGGIA\n"
CHOICES = ("model=m@v1.0.0", "embedding.layer=-1")


class Monitored:
    """The project at `root`, in which this process stands."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.weights = [root.parent / f"weights {seed}" for seed in (0, 1)]
        self.fasta = root.parent / "some.fasta"

    @classmethod
    def make(cls, root: Path) -> Monitored:
        made = cls(root)
        shutil.copytree(ROOT / "conf", root / "conf")
        shutil.copy(ROOT / "params.yaml", root)
        for seed, folder in enumerate(made.weights):
            write_folder(make_checkpoint(seed=seed), folder)
        made.fasta.write_text(FASTA)
        made.register("1.0.0", 0)
        return made

    def proteus(self, *words: str, code: int = 0) -> None:
        assert main(words) == code, words

    def register(self, version: str, weights: int, code: int = 0) -> None:
        self.proteus("model", "register", "m", "--version", version, "--weights", str(self.weights[weights]), code=code)

    def embed(self, *words: str) -> None:
        self.proteus("embed", str(self.fasta), *CHOICES, *words)

    def work(self) -> None:
        """Register, conflict, roll back; compute what a group lacks, derive, hit, evict; find damage; load models and let them go."""
        self.register("1.1.0", 1)
        self.register("1.0.0", 1, code=5)
        self.proteus("model", "rollback", "m@v1.0.0")
        (self.root.parent / "group" / "index").mkdir(parents=True)
        self.embed("embedding.pooling=per_residue", "cache.shared=../group")
        self.embed()
        self.embed()
        self.embed("embedding.pooling=cls", "cache.max_bytes=1000")
        segment = next((self.root / ".proteus/cache/seg").glob("*.zip"))
        data = bytearray(segment.read_bytes())
        data[60:90] = bytes(30)
        segment.write_bytes(data)
        self.proteus("cache", "verify", code=4)
        with counting(lambda: self.root / ".proteus/metrics"):
            models = ModelCacheManager(version_manager=ModelVersionManager(self.root))
            models.preload("m@v1.0.0", "m@v1.1.0")
            models.get_or_load("m")
            models.clear_cache()


@contextmanager
def serving(root: Path, *words: str) -> Iterator[str]:
    """Start ``proteus monitor --serve`` on a free port, yield its address, and stop it as Ctrl-C does."""
    command = [sys.executable, "-m", "proteus_pipeline", "monitor", "--serve", "0", *words]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), process.stderr.read()
            yield address.removesuffix("/metrics")
        finally:
            process.send_signal(2)
            out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "stopped\n", "")
