from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import git, make_checkpoint

from proteus_pipeline.errors import IntegrityError
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.registry.git import Git
from proteus_pipeline.registry.lock import resolve_locked
from proteus_pipeline.registry.records import EventRecord
from proteus_pipeline.registry.tags import read_events
from proteus_pipeline.registry.versions import ModelVersionManager

LATER = b"T\n\nproteus-record: 9\n{}\n"
BROKEN = [
    b"T\n\nproteus-record: 1\n{\n",
    b"T\n\nproteus-record: 1\n",
    b"T\n\nproteus-record: 1\n" + b"[" * 100_000 + b"\n",
    b"T\n\nproteus-record: 1\n\xff\xfe\n",
    LATER,
]


@dataclass
class Given:
    """A model to register."""

    name: str
    checkpoint: Checkpoint
    source: Mapping[str, Any] = field(default_factory=dict)


@pytest.fixture
def manager(repository: Path) -> ModelVersionManager:
    return ModelVersionManager(repository)


def put_tag(root: Path, tag: str, message: bytes, tagger: bytes = b"A <a@example.org>", *, date: int = 1) -> str:
    """Write a tag object of any bytes, as somebody who means harm would."""
    head = git(root, "rev-parse", "HEAD")
    data = f"object {head}\ntype commit\ntag {tag}\ntagger ".encode() + tagger + f" {date} +0000\n\n".encode() + message
    made = subprocess.run(
        ["git", "-C", str(root), "hash-object", "-t", "tag", "-w", "--literally", "--stdin"],
        input=data,
        capture_output=True,
        check=True,
    )
    git(root, "update-ref", f"refs/tags/{tag}", made.stdout.decode().strip())
    return head


def forged(head: str, separators: tuple[bytes, bytes]) -> bytes:
    between, after = separators
    fields = [b"esm2@v1.0.0", head.encode(), head.encode(), b"1", b"A", b"5"]
    return b"x" + after + b"\n" + between.join([*fields, b"hello"]) + after + b"\n" + between.join([*fields, b"hello"])


@pytest.mark.parametrize("separators", [(b"\x1f", b"\x1e"), (b"\0", b"\0"), (b"\0", b"\n"), (b"\0", b"")])
def test_no_message_or_tagger_can_pass_for_another_tag(repository: Path, separators: tuple[bytes, bytes]):
    head = git(repository, "rev-parse", "HEAD")
    old = b"x\x1e\nesm2@v1.0.0\x1ftag\x1f" + head.encode() + b"\x1f\x1f1\x1fA\x1fhello\x1e\n"
    put_tag(repository, "x@v0.0.1", forged(head, separators))
    put_tag(repository, "x@v0.0.2", old)
    put_tag(repository, "x@v0.0.3", b"m\n", tagger=b"A\x1f\x1e\0esm2@v1.0.0\0 <a@b>")
    git(repository, "tag", "y@v1.0.0")
    events = read_events(Git(repository))
    assert [(e.tag, e.commit) for e in events] == [
        ("x@v0.0.1", head), ("x@v0.0.2", head), ("x@v0.0.3", head), ("y@v1.0.0", head)
    ]  # fmt: skip


def test_messages_of_any_bytes_keep_the_tags_apart(repository: Path):
    messages = [
        b"",
        b"\n",
        b"\n\n\n",
        b"\xff\xfe\n",
        b"a\0b\n",
        "é\u2028\r\n".encode(),
        b"no line end",
        bytes(range(256)),
    ]
    for number, message in enumerate(messages):
        put_tag(repository, f"m@v1.{number}.0", message)
    blob = subprocess.run(
        ["git", "-C", str(repository), "hash-object", "-w", "--stdin"], input=b"x", capture_output=True, check=True
    )
    git(repository, "tag", "m@v2.0.0", blob.stdout.decode().strip())
    tags = [e.tag for e in read_events(Git(repository), "m")]
    assert tags == [f"m@v1.{number}.0" for number in range(len(messages))], "and none for the tag of a file"


def test_a_repository_of_no_tags_has_no_events(repository: Path):
    assert read_events(Git(repository)) == []


@pytest.mark.parametrize("message", BROKEN)
def test_a_damaged_record_stops_only_those_who_ask_for_it(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, message: bytes
):
    manager.register_version(Given("m", tiny), "1.0.0")
    put_tag(repository, "other@v1.0.0", message)
    put_tag(repository, "m@v9.0.0", message, date=4_000_000_000)
    listed = {v.reference: v for found in manager.list_models().values() for v in found}
    assert {r for r, v in listed.items() if v.damage} == {"other@v1.0.0", "m@v9.0.0"}
    assert listed["m@v9.0.0"].current
    assert manager.get_version("m", "1.0.0").checkpoint.model_digest == tiny.model_digest
    assert manager.resolve("m@1.x").version == "1.0.0"
    assert resolve_locked(manager, "m@v1.0.0", {}).version == "1.0.0"
    for reference in ("m", "m@latest", "m@9.x", "m@v9.0.0", "other"):
        with pytest.raises(IntegrityError, match="record"):
            manager.resolve(reference)
    with pytest.raises(IntegrityError):
        manager.get_version("m", "9.0.0")
    with pytest.raises(IntegrityError):
        listed["m@v9.0.0"].checkpoint  # noqa: B018
    with pytest.raises(IntegrityError):
        manager.register_version(Given("m", tiny), "9.0.0")


def test_a_registration_beside_a_damaged_record_leaves_its_number_free(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint
):
    manager.register_version(Given("m", tiny), "1.0.0")
    put_tag(repository, "m@v9.0.0", LATER)
    version = manager.register_version(Given("m", make_checkpoint(seed=1)), "1.1.0")
    assert version.record
    assert version.record.sequence == 3


def test_a_thousand_tags_are_read_by_one_process(
    manager: ModelVersionManager, repository: Path, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    """How long that takes beside git, benchmarks/registry_listing.py says."""
    manager.register_version(Given("m", tiny), "1.0.0")
    oid = git(repository, "rev-parse", "refs/tags/m@v1.0.0")
    lines = "".join(f"create refs/tags/m{n}@v1.0.0 {oid}\n" for n in range(1000))
    subprocess.run(["git", "-C", str(repository), "update-ref", "--stdin"], input=lines.encode(), check=True)
    commands = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: commands.append(command) or run(command, **more))
    assert len(read_events(Git(repository))) == 1001
    assert len(commands) == 1


def test_a_tag_of_a_tag_is_of_its_commit_and_one_of_a_file_or_a_tree_is_no_version(repository: Path):
    here = Git(repository)
    head = git(repository, "rev-parse", "HEAD")
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    git(repository, *who, "tag", "--annotate", "--message", "x", "a", "HEAD")
    git(repository, *who, "tag", "--annotate", "--message", "x", "b", "a")
    git(repository, *who, "tag", "--annotate", "--message", "x", "m@v1.0.0", "b")
    git(repository, *who, "tag", "--annotate", "--message", "x", "m@v1.1.0", "HEAD^{tree}")
    git(repository, "tag", "m@v1.2.0", "HEAD:.gitignore")
    git(repository, "tag", "m@v1.3.0")
    assert [(e.version, e.commit) for e in read_events(here, "m")] == [("1.0.0", head), ("1.3.0", head)]


@pytest.mark.parametrize(
    ("tag", "change"),
    [
        ("m@v1.0.0%5", {"event": ["x"]}),
        ("m@v1.0.0%5", {"event": "registered"}),
        ("m@v1.0.0%5", {"event": "made current"}),
        ("m@v1.0.0%5", {"name": "m@v1.0.0", "version": "zzz", "event": "restored"}),
        ("m@v1.0.0%5", {"name": "m@v1.0.0", "version": "7.7.7", "event": "restored"}),
        ("m@v1.0.0%5", {"sequence": 10**9, "event": "restored"}),
        ("m#current#5", {"version": "zzz", "event": "made current"}),
        ("m#current#5", {"event": "deleted"}),
    ],
)
def test_a_forged_event_is_damage_and_stops_no_listing(repository: Path, tag: str, change: dict[str, Any]):
    event = EventRecord("restored", "m", "1.0.0", 5)
    put_tag(repository, "m@v1.0.0", b"x\n")
    message = EventRecord(**(asdict(event) | change)).message()
    put_tag(repository, tag, message.encode())
    manager = ModelVersionManager(repository)
    assert [v.version for v in manager.list_models()["m"]] == ["1.0.0"]
    (told,) = [e for e in manager.history("m").events if e.tag == tag]
    assert told.damage
    assert [f.part for f in manager.verify() if f.about == tag] == ["record"]


def test_a_light_tag_hides_no_deletion_of_another_version(repository: Path):
    for name in ("m@v1.0.0", "m@v1.0.0!", "m@v9.0.0%7"):
        git(repository, "tag", name)
    assert ModelVersionManager(repository).list_versions("m") == []
