"""The project a stage runs in: its files here, its tags, weights and cache at DVC's root."""

from __future__ import annotations

import datetime
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from proteus_pipeline.errors import StorageError
from proteus_pipeline.registry.places import project_root
from proteus_pipeline.stores.files import write_atomic
from proteus_pipeline.stores.places import scheme_of

if TYPE_CHECKING:
    from proteus_pipeline.embeddings.cache import EmbeddingCache
    from proteus_pipeline.models.sources import ModelEntry
    from proteus_pipeline.registry.versions import ModelVersionManager
    from proteus_pipeline.serving.model_cache import ModelCacheManager
    from proteus_pipeline.stores.redis import RedisClient

STAGES = ("compose", "prepare", "embed", "probe", "compare", "contacts", "report")
COMPOSED = "composed.yaml"
SEQUENCES = "prepared/sequences.fasta"
LABELS = "prepared/labels.csv"
COUNTS = "prepared/counts.json"
MANIFEST = "results/embeddings.json"
CANDIDATE = "results/candidate.json"
METRICS = "metrics.json"
PREDICTIONS = "results/predictions.csv"
MAP = "results/map.csv"
DRIFT = "results/drift.json"
DRIFTS = "results/drift.csv"
CONTACTS = "results/contacts.json"
REPORT = "results/report.html"
RUN = "results/run.json"
CLUSTER = ".proteus/cluster"
DEVICE = ".proteus/device.json"
RUN_PAGE = "results/run.html"
_PACKAGES = (
    "proteus_pipeline", "torch", "numpy", "scikit-learn", "zarr", "numcodecs", "xxhash", "hydra-core", "dvc", "gitpython"
)  # fmt: skip


@dataclass(frozen=True)
class Project:
    """Where a stage's files are (`work`), and where tags, weights and the cache are (`home`).

    They differ in the temporary workspaces of ``dvc exp run --temp`` and ``--queue``.
    """

    work: Path
    home: Path

    @classmethod
    def find(cls) -> Project:
        """Return the project around the working directory.

        Raises
        ------
        StorageError
            When there is none.

        """
        home = project_root()
        if home is None:
            raise StorageError(
                f"{Path.cwd()} is not in a git repository with DVC",
                "work in the folder of a project, or make one: proteus init DIR",
            )
        # DVC runs a stage in its workspace; a person may stand in any folder below the root.
        return cls(Path.cwd() if "DVC_ROOT" in os.environ else home, home)

    @property
    def composed(self) -> dict[str, Any]:
        """What the compose stage wrote."""
        try:
            value = yaml.safe_load((self.work / COMPOSED).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StorageError(f"{COMPOSED} does not exist", "run: dvc repro compose") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise StorageError(f"{COMPOSED} is damaged", "run: dvc repro compose") from error
        if not isinstance(value, dict):
            raise StorageError(f"{COMPOSED} is damaged", "run: dvc repro compose")
        return value

    @cached_property
    def manager(self) -> ModelVersionManager:
        """The project's own registry."""
        from proteus_pipeline.registry.versions import ModelVersionManager

        return ModelVersionManager(self.home)

    @cached_property
    def catalogue(self) -> dict[str, ModelEntry]:
        """Where weights come from, by model name: conf/model/."""
        from proteus_pipeline.models.sources import load_catalogue

        return load_catalogue(self.work / "conf" / "model")

    def cache(self, composed: dict[str, Any]) -> EmbeddingCache:
        """Return the embedding cache that a composed configuration names."""
        from proteus_pipeline.embeddings.cache import EmbeddingCache

        settings = composed["cache"]
        device = composed["runtime"]["device"]
        return EmbeddingCache(
            self.home / Path(settings["path"]).expanduser(),
            accept=settings["accept"],
            device_class=lambda: self.device_class(device),
            shared=self.place(settings["shared"]) if settings["shared"] else None,
            max_bytes=settings["max_bytes"],
            policy=settings["policy"],
            redis=self._redis(settings.get("redis")),
            local_bytes=settings["local_bytes"],
            write_back=settings["write_back"],
        )

    def device_class(self, wanted: str) -> str:
        """Return the class of the device that ``runtime.device`` means here."""
        from proteus_pipeline.models.device import remembered_class
        from proteus_pipeline.registry.home import private_folder

        with suppress(StorageError):  # it keeps itself out of git; what can't be kept there is asked again
            private_folder(self.home)
        return remembered_class(wanted, self.home / DEVICE)

    def _redis(self, setting: str | None) -> RedisClient | None:
        """Return the Redis of a setting or of the environment: one client of each, which says once that it is gone."""
        from proteus_pipeline.stores.redis import RedisClient
        from proteus_pipeline.stores.redis_url import given_url

        url = given_url(setting)
        if url is not None and url not in self._clients:
            self._clients[url] = RedisClient(url)
        return self._clients[url] if url is not None else None

    @cached_property
    def _clients(self) -> dict[str, RedisClient]:
        return {}

    def place(self, location: str) -> Path | str:
        """Return where another cache lies: a path from the project's root, or a URL as it is."""
        return location if scheme_of(location) else self.home / Path(location).expanduser()

    def models(self, composed: dict[str, Any]) -> ModelCacheManager:
        """Return the loaded models of a composed configuration: those of one precision, numerics and device."""
        from proteus_pipeline.serving.model_cache import ModelCacheManager

        runtime, embedding = composed["runtime"], composed["embedding"]
        key = embedding["precision"], embedding["numerics"], *runtime.items()
        if key not in self._loaded:
            self._loaded[key] = ModelCacheManager(
                runtime["max_memory_gb"],
                version_manager=self.manager,
                precision=embedding["precision"],
                numerics=embedding["numerics"],
                device=runtime["device"],
                tokens_per_batch=runtime["tokens_per_batch"],
            )
        return self._loaded[key]

    @cached_property
    def _loaded(self) -> dict[tuple[Any, ...], ModelCacheManager]:
        return {}

    def find_file(self, path: str) -> Path:
        """Return an input file: as named from the workspace, or from DVC's root where the workspace lacks it."""
        here = self.work / Path(path).expanduser()
        return here if here.exists() else self.home / Path(path).expanduser()

    def record(self, stage: str, **facts: Any) -> None:
        """Put a stage's section into results/run.json, beside what is true of the whole run."""
        value = self.run_log()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        value["stages"] = value.get("stages", {}) | {stage: facts | {"status": "run", "finished": now}}
        value["commit"] = commit_of(self.home)
        value["packages"] = {p: version for p in _PACKAGES if (version := installed(p))}
        self.write_run_log(value)

    def record_time(self, stage: str, seconds: float) -> None:
        """Put into a stage's section how long all of it took: `record` says that of embedding alone."""
        value = self.run_log()
        section = value.get("stages", {}).get(stage)
        if isinstance(section, dict):
            section["elapsed"] = round(seconds, 3)
            self.write_run_log(value)

    def run_log(self) -> dict[str, Any]:
        """Return results/run.json, or an empty mapping where there is none that can be read."""
        try:
            value = json.loads((self.work / RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def write_run_log(self, value: dict[str, Any]) -> None:
        """Replace results/run.json."""
        write_atomic(self.work / RUN, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def commit_of(root: Path) -> dict[str, Any]:
    """Return HEAD's commit id, and whether tracked files differ from it; nulls before the first commit."""
    import git

    try:
        repo = git.Repo(root)
        return {"id": repo.head.commit.hexsha, "dirty": repo.is_dirty()}
    except (git.GitError, ValueError, OSError):
        return {"id": None, "dirty": None}


def installed(package: str) -> str | None:
    """Return a package's version, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
