"""Thousands of registered versions for the benchmarks: a few by the real code, the others by git fast-import.

What fast-import writes is what a registration would have: the real versions go through it a second time, and have to come
out as the same tag objects. Digests are random, so that nothing compresses that would not in life.
"""

from __future__ import annotations

import datetime
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from proteus_pipeline import ModelVersionManager
from proteus_pipeline.config.composition import PARAMS, compose, read_params
from proteus_pipeline.identity.digests import of_model
from proteus_pipeline.models.architecture import Architecture
from proteus_pipeline.models.checkpoint import Checkpoint, trunk_shapes
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.pointers import Pointer
from proteus_pipeline.registry.records import VersionRecord
from proteus_pipeline.registry.refs import LEDGER
from proteus_pipeline.registry.version import ModelVersion

PROJECT = Path(__file__).resolve().parent.parent
MODELS = 20
_BEGAN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
_PEOPLE = ("Ada Lovelace", "Barbara McClintock", "Dorothy Hodgkin", "Margaret Dayhoff", "Rosalind Franklin")
_REASONS = ("two more epochs", "half the learning rate", "without the membrane proteins", "")
_SCRATCH = "refs/heads/being-imported"


@dataclass(frozen=True)
class Given:
    """A model to register."""

    name: str
    checkpoint: Checkpoint
    source: dict[str, str]


@dataclass(frozen=True)
class Written:
    """A version as git holds it: its record, the files of its commit that HEAD has not, who made both, and when."""

    record: VersionRecord
    files: dict[str, str]
    author: str
    committed: int
    tagged: int

    @property
    def tag(self) -> str:
        return f"{self.record.name}@v{self.record.version}"


def random_model(name: str, layers: int = 1, width: int = 8, seed: int = 0) -> Given:
    """Return a model of random weights."""
    import torch

    architecture = Architecture(layers, width, 4, 4 * width)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: torch.rand(shape, generator=generator) for n, shape in trunk_shapes(architecture).items()}
    return Given(name, Checkpoint(architecture, tensors), {"origin": "epoch_1.pt"})


def copy_project(root: Path) -> Git:
    """Make a repository of one commit that holds this project's files: a version's settings come from its project."""
    for name in Git(PROJECT).run("ls-files", "-z").rstrip("\0").split("\0"):
        if (PROJECT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PROJECT / name, root / name)
    git = Git(root)
    git.run("init", "--quiet", "--initial-branch=main")
    git.run("config", "gc.auto", "0")  # when to pack is for the benchmark to say
    git.run("add", "--all")
    git.run("commit", "--quiet", "--message=a project", env=git.identity_env())
    return git


def register_many(git: Git, total: int) -> None:
    """Register `total` versions over `MODELS` models."""
    manager, numbers = ModelVersionManager(git.root, max_versions=None), random.Random(0)
    configuration = asdict(compose(git.root, read_params(git.root / PARAMS)).settings)
    real = []
    # Two versions of the first model: the second one's parent is not null.
    for place, (model, number) in enumerate([(0, 0), (0, 1), *((model, 0) for model in range(1, MODELS))]):
        given = random_model(f"esm2_t33_tuned_{model:02d}", seed=place)
        told = _metadata(numbers)
        real.append(manager.register_version(given, _number(number), told, configuration=configuration))
    versions = [_read(git, version) for version in real]
    firsts = [v for v in versions if v.record.parent is None]
    # One after another over the models, as laboratories work; the first model's second version is there.
    places = ((place % MODELS, place // MODELS) for place in range(MODELS + 1, total))
    versions += [_later(firsts[model], number, numbers) for model, number in places]
    stream = b"".join(_stream(versions, str(git.head())))
    # The limit keeps the objects loose, each a file, as a registration leaves them.
    git.run_bytes("-c", "fastimport.unpackLimit=10000000", "fast-import", "--quiet", data=stream)
    git.run("update-ref", "-d", _SCRATCH)
    _enter(git, versions, real)


def _enter(git: Git, versions: list[Written], real: list[ModelVersion]) -> None:
    """Give each tag its entry in the ledger; the real ones, written again, have to be what they were."""
    printed = git.run("for-each-ref", "--format=%(refname:strip=2) %(objectname)", "refs/tags/")
    tags = dict(line.split(" ") for line in printed.split("\n"))
    if set(tags) != {v.tag for v in versions} or any(tags[v.tag] != v.oid for v in real):
        raise SystemExit("what fast-import wrote is not what a registration writes")
    new = set(tags) - {v.tag for v in real}
    git.run("update-ref", "--stdin", data="".join(f"create {LEDGER}{tag} {tags[tag]}\n" for tag in sorted(new)))


def _read(git: Git, version: ModelVersion) -> Written:
    """Return what a real registration wrote."""
    assert version.record is not None
    paths = (f"models/{version.name}.dvc", "dvc.yaml", "models/.gitignore")
    files = {path: str(git.read(version.commit, path)) for path in paths}
    author, committed = git.run("show", "--no-patch", "--format=%an <%ae>%n%ct", version.commit).split("\n")
    return Written(version.record, files, author, int(committed), version.time)


def _later(first: Written, number: int, numbers: random.Random) -> Written:
    """Return a later version of a model, or of one that is the 650M's shape: other weights, other words, another time."""
    name, person = first.record.name, numbers.choice(_PEOPLE)
    pointer = Pointer(f"{numbers.randbytes(16).hex()}.dir", 2_609_537_105, 41, name)
    author = {"name": person, "email": f"{person.split()[1].lower()}@example.org", "fallback": False}
    time = _BEGAN + datetime.timedelta(hours=number, seconds=numbers.randrange(3600))
    components = {part: _digest(numbers) for part in ("trunk", "lm_head", "contact_head")}
    record = replace(
        first.record,
        version=_number(number),
        sequence=number + 1,
        model_digest=of_model(components),
        components=components,
        architecture=Architecture(33, 1280, 20, 5120).identity(),
        weights={"md5": pointer.md5, "sha256": _digest(numbers, 32), "size": pointer.size, "files": pointer.files},
        source={"origin": f"epoch_{numbers.randrange(100)}.pt"},
        metadata=_metadata(numbers),
        parent=_number(number - 1),
        author=author,
        time=time.isoformat(timespec="seconds"),
        reason=numbers.choice(_REASONS),
    )
    files = {**first.files, f"models/{name}.dvc": pointer.text()}
    seconds = int(time.timestamp())
    return Written(record, files, f"{person} <{author['email']}>", seconds, seconds)


def _metadata(numbers: random.Random) -> dict[str, Any]:
    return {
        "training_data": "UR50D, then 41,300 membrane proteins of UniProt 2026_01",
        "architecture": "transformer",
        "parameters": "650M",
        "licence": "MIT",
        "epochs": numbers.randrange(1, 40),
        "learning_rate": numbers.choice((1e-5, 3e-5, 1e-4)),
        "validation_loss": round(numbers.uniform(2, 3), 4),
        "seed": numbers.randrange(1000),
    }


def _stream(versions: list[Written], head: str) -> Iterator[bytes]:
    """Yield git fast-import's words for each version's commit, a child of HEAD, and its tag."""
    for mark, v in enumerate(versions, 1):
        name, number = v.record.name, v.record.version
        yield f"commit {_SCRATCH}\nmark :{mark}\ncommitter {v.author} {v.committed} +0000\n".encode()
        yield _data(f"{name} {number}\n\nRegistered by proteus; only its tag leads here.\n")
        yield f"from {head}\n".encode()
        for path, text in v.files.items():
            yield f"M 100644 inline {path}\n".encode() + _data(text)
        yield f"tag {v.tag}\nfrom :{mark}\ntagger {v.author} {v.tagged} +0000\n".encode() + _data(v.record.message())


def _data(text: str) -> bytes:
    data = text.encode()
    return b"data %d\n%b\n" % (len(data), data)


def _digest(numbers: random.Random, size: int = 16) -> str:
    return numbers.randbytes(size).hex()


def _number(number: int) -> str:
    return f"{1 + number // 100}.{number // 10 % 10}.{number % 10}"
