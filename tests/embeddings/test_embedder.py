from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from entries import headers

from proteus_pipeline.embeddings import embedder, job
from proteus_pipeline.embeddings.cache import EmbeddingCache
from proteus_pipeline.embeddings.embedder import Outcome, embed
from proteus_pipeline.embeddings.index import SegmentHeader
from proteus_pipeline.embeddings.publication import Publication
from proteus_pipeline.embeddings.recipe import Recipe, windows
from proteus_pipeline.embeddings.stored import to_fp32, to_stored
from proteus_pipeline.errors import ConfigError, ModelError
from proteus_pipeline.models.checkpoint import canonical
from proteus_pipeline.models.encoder import Encoded, Encoder, Outputs, make_encoder
from proteus_pipeline.models.pooling import pool, pool_residues

RECIPE = Recipe(layer=2)
SEQUENCES = [("MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 3)[i : i + 10 + 3 * i] for i in range(12)]


@pytest.fixture(scope="module")
def real() -> Encoder:
    return make_encoder(make_checkpoint())


class Counting:
    """The real encoder, and what it was asked for."""

    def __init__(self, encoder: Encoder, fail_after: int | None = None) -> None:
        self.architecture = encoder.architecture
        self.made = 0
        self.encoded: list[str] = []
        self._encoder = encoder
        self._fail_after = fail_after

    def __call__(self) -> Counting:
        self.made += 1
        return self

    def compute(
        self, sequences: Sequence[str], outputs: Outputs, token_budget: int = 2048
    ) -> Iterator[tuple[int, Encoded]]:
        for index, encoded in self._encoder.compute(sequences, outputs, token_budget):
            if len(self.encoded) == self._fail_after:
                raise ModelError("the device is gone", "try again")
            self.encoded.append(sequences[index])
            yield index, encoded

    def flops(self, length: int) -> float:
        return self._encoder.flops(length)

    def peak(self) -> float:
        return self._encoder.peak()


@dataclass
class Told:
    """A progress bar that remembers, and that may be interrupted."""

    interrupt_at: int | None = None
    started: list[tuple[int, int, int]] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)

    def start(self, total: int, hits: int, tokens: int, peak: float) -> None:
        self.started.append((total, hits, tokens))
        assert peak == 0.0, "nothing here is worth measuring what the machine can do"

    def advance(self, sequences: int, tokens: int, flops: float) -> None:
        assert flops > 0
        self.steps.append((sequences, tokens))
        if len(self.steps) == self.interrupt_at:
            raise KeyboardInterrupt


class Lab:
    """One cache, one encoder."""

    def __init__(self, path: Path, encoder: Encoder) -> None:
        self.path, self._encoder = path, encoder
        self.last: Counting

    def embed(
        self,
        sequences: Sequence[str],
        recipe: Recipe = RECIPE,
        *,
        told: Told | None = None,
        fail_after: int | None = None,
        device_class: str = "cpu/test",
    ) -> Outcome:
        self.last = Counting(self._encoder, fail_after)
        outcome = embed(
            sequences,
            trunk="f" * 32,
            recipe=recipe,
            cache=EmbeddingCache(self.path),
            encoder=self.last,
            attest=lambda: (device_class, "2.0.0"),
            token_budget=100,
            progress=told,
        )
        assert outcome.sequences == len(sequences) == len(outcome.entries)
        assert outcome.hits + outcome.derived + outcome.computed == outcome.unique == len(set(sequences))
        assert [e.key for e in outcome.entries] == [recipe.key("f" * 32, s) for s in sequences]
        return outcome

    def values(self, outcome: Outcome) -> list[np.ndarray]:
        cache = EmbeddingCache(self.path)
        arrays = [cache.get(e.key) for e in outcome.entries]
        return [a for a in arrays if a is not None]

    def hidden(self, sequence: str, layer: int = 2) -> np.ndarray:
        ((_, hidden),) = self._encoder.encode([sequence], [layer], 2048)
        return hidden[layer]


@pytest.fixture
def lab(tmp_path: Path, real: Encoder) -> Lab:
    return Lab(tmp_path / "cache", real)


def test_what_is_computed_once_is_not_computed_again(lab: Lab):
    first = lab.embed(SEQUENCES)
    assert (first.hits, first.computed, first.saved_seconds) == (0, 12, 0.0)
    assert sorted(lab.last.encoded) == sorted(SEQUENCES)
    assert first.tokens == sum(len(s) + 2 for s in SEQUENCES)
    assert first.seconds > 0
    second = lab.embed(SEQUENCES)
    assert (second.hits, second.computed, second.tokens) == (12, 0, 0)
    assert lab.last.made == 0  # the model is not even loaded
    assert second.entries == first.entries
    assert second.saved_seconds > 0
    attested = [h.attestation for h in headers(lab.path)]
    assert second.saved_seconds == pytest.approx(sum(a.seconds for a in attested))
    assert {a.device_class for a in attested} == {"cpu/test"}
    stats = EmbeddingCache(lab.path).stats()
    assert (stats["entries"], stats["hits"], stats["misses"]) == (12, 12, 12)


def test_what_a_gpu_computed_is_saved_gpu_time(lab: Lab):
    lab.embed(SEQUENCES[:6], device_class="cuda/sm_90")
    lab.embed(SEQUENCES[6:])
    on_gpu, on_cpu = lab.embed(SEQUENCES[:6]), lab.embed(SEQUENCES[6:])
    assert on_gpu.saved_gpu_seconds == on_gpu.saved_seconds > 0
    assert on_cpu.saved_gpu_seconds == 0 < on_cpu.saved_seconds
    both = lab.embed(SEQUENCES)
    assert both.saved_gpu_seconds == pytest.approx(on_gpu.saved_seconds)


def test_each_miss_is_explained(lab: Lab):
    lab.embed(SEQUENCES[:3])
    outcome = lab.embed(SEQUENCES[:4], Recipe(layer=1))
    assert outcome.misses == {"layer": 3, "never seen": 1}
    assert {m.sequence: m.differs for m in outcome.explained} == dict.fromkeys(SEQUENCES[:3], ("layer",)) | {
        SEQUENCES[3]: ("never seen",)
    }
    assert outcome.explained[0].nearest is not None and outcome.explained[0].nearest["layer"] == 2
    assert lab.embed(SEQUENCES[:4], Recipe(layer=1)).explained == ()


def test_of_many_misses_all_are_counted_and_the_first_explained(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedder, "MOST_EXPLAINED", 2)
    outcome = lab.embed(SEQUENCES[:5])
    assert outcome.misses == {"never seen": 5}
    assert [m.sequence for m in outcome.explained] == SEQUENCES[:2]


def test_one_new_sequence_is_one_computed(lab: Lab):
    lab.embed(SEQUENCES)
    outcome = lab.embed([*SEQUENCES, "MKV"])
    assert (outcome.hits, outcome.computed, lab.last.encoded) == (12, 1, ["MKV"])
    assert lab.embed(SEQUENCES[3:]).computed == 0


def test_order_and_repetition_are_no_reason_to_compute(lab: Lab):
    first = dict(zip(SEQUENCES, lab.embed(SEQUENCES).entries, strict=True))
    shuffled = random.Random(0).sample(SEQUENCES * 2, 24)
    outcome = lab.embed(shuffled)
    assert (outcome.sequences, outcome.unique, outcome.hits, outcome.computed) == (24, 12, 12, 0)
    assert list(outcome.entries) == [first[s] for s in shuffled]


def test_equal_sequences_are_computed_once(lab: Lab):
    outcome = lab.embed(["MKV", "MKL", "MKV", "MKV"])
    assert (outcome.sequences, outcome.unique, outcome.computed, outcome.tokens) == (4, 2, 2, 10)
    assert sorted(lab.last.encoded) == ["MKL", "MKV"]
    assert outcome.entries[0] == outcome.entries[2] == outcome.entries[3] != outcome.entries[1]


def test_nothing_asked_is_nothing_done(lab: Lab):
    outcome = lab.embed([])
    assert (outcome.entries, outcome.unique, lab.last.made) == ((), 0, 0)


@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "per_residue"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_values_are_the_encoders_pooled_and_rounded(lab: Lab, layer: int, pooling: str, stored: str):
    recipe = Recipe(layer=layer, pooling=pooling, stored=stored)
    outcome = lab.embed(SEQUENCES[:4], recipe)
    assert {e.stored for e in outcome.entries} == {stored}
    for sequence, entry, array in zip(SEQUENCES, outcome.entries, lab.values(outcome), strict=False):
        expected = to_fp32(to_stored(pool(lab.hidden(sequence, layer), pooling), stored), stored)
        assert array.shape == entry.shape == ((len(sequence), 32) if pooling == "per_residue" else (32,))
        assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "per_residue"])
def test_long_sequences_are_averaged_over_their_windows(lab: Lab, pooling: str):
    recipe = Recipe(layer=2, pooling=pooling, window=10, overlap=4)
    sequences = ["MKTAYIAKQRQISFVKSHFSRQLEE", "MKTAYIAKQR", "ISFVKSHFSRQ"]
    outcome = lab.embed(sequences, recipe)
    spans = windows(25, 10, 4)
    assert len(spans) == 4
    parts = [sequences[0][a:b] for a, b in spans]
    assert sorted(lab.last.encoded) == sorted([*parts, sequences[1], sequences[2][:10], sequences[2][1:]])
    assert outcome.tokens == 12 * 4 + 12 + 12 * 2
    long, exact, _ = lab.values(outcome)
    assert exact.tobytes() == pool(lab.hidden(sequences[1]), pooling).tobytes()
    hidden = [lab.hidden(part) for part in parts]
    if pooling == "cls":
        np.testing.assert_allclose(long, np.mean([h[0] for h in hidden], axis=0), rtol=1e-6, atol=1e-7)
        return
    # Each residue by hand: the mean of its rows in the windows that hold it.
    rows = [
        np.mean([h[1 + r - a] for h, (a, b) in zip(hidden, spans, strict=True) if a <= r < b], axis=0, dtype=np.float64)
        for r in range(25)
    ]
    residues = np.array(rows).astype(np.float32)
    expected = residues if pooling == "per_residue" else pool_residues(residues, pooling)
    assert long.shape == expected.shape
    np.testing.assert_allclose(long, expected, rtol=1e-6, atol=1e-7)


def test_a_window_recomputes_only_what_is_longer(lab: Lab):
    lab.embed(SEQUENCES)
    long = [s for s in SEQUENCES if len(s) > 30]
    outcome = lab.embed(SEQUENCES, Recipe(layer=2, window=30, overlap=5))
    assert outcome.computed == len(long) > 0
    assert outcome.hits == len(SEQUENCES) - len(long) > 0


def test_an_interruption_keeps_what_was_finished(lab: Lab):
    told = Told(interrupt_at=5)
    with pytest.raises(KeyboardInterrupt):
        lab.embed(SEQUENCES, told=told)
    finished = lab.last.encoded[:5]
    outcome = lab.embed(SEQUENCES)
    assert (outcome.hits, outcome.computed) == (5, 7)
    assert sorted(lab.last.encoded) == sorted(set(SEQUENCES) - set(finished))
    assert lab.embed(SEQUENCES).computed == 0


@contextmanager
def interrupted_at(line: int) -> Iterator[None]:
    """Raise KeyboardInterrupt before the given one, from 0, of the lines that the computing loop goes through."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal left
        if frame.f_code is not job.Job._compute_unclaimed.__code__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(outer)


def test_an_interruption_at_any_line_is_told_as_such_and_keeps_what_was_finished(tmp_path: Path, real: Encoder):
    for line in itertools.count():
        lab, told = Lab(tmp_path / str(line), real), Told()
        try:
            with interrupted_at(line):
                lab.embed(SEQUENCES[:4], told=told)
            break
        except KeyboardInterrupt:
            assert lab.embed(SEQUENCES[:4]).hits >= len(told.steps), f"line {line}"
    assert line > 20


@pytest.mark.parametrize("size", [300, job.PUBLISH_BYTES])
def test_an_interruption_while_publishing_keeps_what_was_being_published(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, size: int
):
    monkeypatch.setattr(job, "PUBLISH_BYTES", size)
    publish, calls = Publication.publish, []

    def interrupted_first(publication: Publication, *args: Any, **kwargs: Any) -> SegmentHeader:
        calls.append(publication)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return publish(publication, *args, **kwargs)

    monkeypatch.setattr(Publication, "publish", interrupted_first)
    with pytest.raises(KeyboardInterrupt):
        lab.embed(SEQUENCES)
    assert calls[0] is calls[1]
    kept = sum(len(publication) for publication in set(calls))
    # With small lots, the first one's error is seen after 1 to 3 more entries.
    assert 4 <= kept <= 6 if size == 300 else kept == 12
    assert lab.embed(SEQUENCES).hits == kept


def test_so_does_an_error_of_the_encoder(lab: Lab):
    with pytest.raises(ModelError, match="the device is gone"):
        lab.embed(SEQUENCES, fail_after=4)
    assert lab.embed(SEQUENCES).hits == 4


def test_an_interruption_within_a_windowed_sequence_stores_no_part_of_it(lab: Lab):
    recipe = Recipe(layer=2, window=10, overlap=4)
    with pytest.raises(ModelError):
        lab.embed([SEQUENCES[-1]], recipe, fail_after=2)
    assert EmbeddingCache(lab.path).stats()["entries"] == 0
    assert lab.embed([SEQUENCES[-1]], recipe).computed == 1


@pytest.mark.parametrize(("name", "value"), [("PUBLISH_BYTES", 300), ("PUBLISH_SECONDS", 0.0)])
def test_long_work_is_published_as_it_comes(lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str, value: float):
    monkeypatch.setattr(job, name, value)
    seen = []

    class Watching(Told):
        def advance(self, sequences: int, tokens: int, flops: float) -> None:
            super().advance(sequences, tokens, flops)
            seen.append(EmbeddingCache(lab.path).stats()["entries"])

    lab.embed(SEQUENCES, told=Watching())
    step = 3 if name == "PUBLISH_BYTES" else 1  # 128 bytes an entry
    # One lot may be on its way while the next is computed.
    assert all(n // step * step - step <= number <= n // step * step for n, number in enumerate(seen))
    assert seen == sorted(seen)
    assert seen[-1] > 0
    assert lab.embed(SEQUENCES).hits == 12


def test_a_damaged_entry_is_computed_again(lab: Lab, caplog: pytest.LogCaptureFixture):
    recipe = Recipe(layer=2, pooling="per_residue")
    first = lab.embed(SEQUENCES, recipe)
    cache = EmbeddingCache(lab.path)
    key = first.entries[3].key
    (entry,) = cache.candidates([key])[key]
    with (lab.path / "seg" / entry.segment).open("r+b") as file:
        file.seek(entry.offset + entry.nbytes // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    second = lab.embed(SEQUENCES, recipe)
    assert (second.hits, second.computed, lab.last.encoded) == (11, 1, [SEQUENCES[3]])
    assert second.entries == first.entries  # and is the same
    assert "fails its checksum" in caplog.text
    caplog.clear()
    assert lab.embed(SEQUENCES, recipe).hits == 12
    assert caplog.text == ""


def test_progress_is_told_what_happens(lab: Lab):
    told = Told()
    lab.embed(SEQUENCES[:4], told=told)
    assert told.started == [(4, 0, sum(len(s) + 2 for s in SEQUENCES[:4]))]
    assert sorted(told.steps) == sorted((1, len(s) + 2) for s in SEQUENCES[:4])
    told = Told()
    outcome = lab.embed(SEQUENCES * 2, told=told)
    assert told.started == [(12, 4, outcome.tokens)]
    assert len(told.steps) == 8
    assert sum(tokens for _, tokens in told.steps) == outcome.tokens
    told = Told()
    lab.embed(SEQUENCES, told=told)
    assert (told.started, told.steps) == ([(12, 12, 0)], [])
    told = Told()
    outcome = lab.embed(SEQUENCES, Recipe(layer=2, window=10, overlap=4), told=told)
    ((_, _, tokens),) = told.started
    assert tokens == outcome.tokens == sum(n for _, n in told.steps) > sum(len(s) + 2 for s in SEQUENCES)


@pytest.mark.parametrize("window", [0, 12])
def test_attention_weighs_residues_over_all_windows(lab: Lab, real: Encoder, window: int):
    sequence = SEQUENCES[-1]
    recipe = Recipe(layer=2, pooling="attention", window=window, overlap=4 if window else 0)
    (stored,) = lab.values(lab.embed([sequence], recipe))
    spans = windows(len(sequence), window, recipe.overlap)
    hidden, received, count = np.zeros((len(sequence), 32)), np.zeros(len(sequence)), np.zeros(len(sequence))
    for start, end in spans:
        ((_, part),) = real.compute([sequence[start:end]], Outputs(layers=(2,), received=(2,)))
        hidden[start:end] += part.hidden[2][1:-1]
        received[start:end] += part.received[2]
        count[start:end] += 1
    weights, hidden = received / count, hidden / count[:, None]
    assert np.allclose(stored, (weights[:, None] * hidden).sum(0) / weights.sum(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="layer 0 is before any attention"):
        Recipe(layer=0, pooling="attention")


def test_weights_that_give_no_numbers_leave_nothing_in_the_cache(lab: Lab, real: Encoder):
    tensors = dict(make_checkpoint().tensors)
    tensors["esm.encoder.layer.0.output.dense.bias"] = torch.full((32,), float("nan"))
    broken = Lab(lab.path, make_encoder(canonical(real.architecture, tensors, "broken")))
    with pytest.raises(ModelError, match="these weights give what is no number"):
        broken.embed(SEQUENCES)
    assert EmbeddingCache(lab.path).stats()["entries"] == 0


def test_hits_are_served_where_the_device_that_is_asked_for_is_not_here(lab: Lab):
    lab.embed(SEQUENCES)

    def no_gpu() -> str:
        raise ConfigError("runtime.device=cuda: torch sees 0 GPUs", "use runtime.device=cpu")

    outcome = embed(
        SEQUENCES,
        trunk="f" * 32,
        recipe=RECIPE,
        cache=EmbeddingCache(lab.path, device_class=no_gpu),
        encoder=lambda: pytest.fail("nothing is missing"),
        attest=lambda: pytest.fail("nothing is missing"),
    )
    assert (outcome.hits, outcome.computed) == (len(SEQUENCES), 0)
    assert outcome.other_classes == {"cpu/test": len(SEQUENCES)}
