"""Logits, contacts and received attention against fair-esm on the same weights, and in any company."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from layouts import contact_head, lm_head, trunk

from proteus_pipeline.errors import CacheMemoryError, ConfigError, ModelError
from proteus_pipeline.models import attention, esm2
from proteus_pipeline.models.checkpoint import Checkpoint, canonical
from proteus_pipeline.models.encoder import Encoded, Outputs, make_encoder
from proteus_pipeline.models.fair_esm import to_fair_esm
from proteus_pipeline.models.plan import plan_batches
from proteus_pipeline.models.shapes import Shapes

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 4, "ACDEFGHIKLMNPQRSTVWYXBUZO", "MK", "GSHMENKWRLVVAPP" * 9]


@pytest.fixture(scope="module")
def whole() -> Checkpoint:
    """A small model with both heads."""
    tiny = make_checkpoint(layers=3, width=48, heads=4)
    heads = lm_head(tiny, fair=False) | {f"esm.contact_head.{n}": t for n, t in contact_head(tiny).items()}
    return canonical(tiny.architecture, trunk(tiny) | heads, "whole")


def fair(checkpoint: Checkpoint, sequence: str) -> dict[str, torch.Tensor]:
    model, alphabet = to_fair_esm(checkpoint)
    _, _, tokens = alphabet.get_batch_converter()([("one", sequence)])
    with torch.no_grad():
        found: dict[str, torch.Tensor] = model(tokens, repr_layers=[1], return_contacts=True)
    return found


def everything(checkpoint: Checkpoint, sequences: list[str], budget: int = 2048, **more: str) -> list[Encoded]:
    outputs = Outputs(layers=(3,), received=(1, 3), logits=True, contacts=True)
    done = dict(make_encoder(checkpoint, **more).compute(sequences, outputs, budget))
    return [done[i] for i in range(len(sequences))]


def test_logits_and_contacts_are_fair_esms(whole: Checkpoint):
    for sequence, ours in zip(SEQUENCES, everything(whole, SEQUENCES), strict=True):
        theirs = fair(whole, sequence)
        logits, contacts = theirs["logits"][0].numpy(), theirs["contacts"][0].numpy()
        assert ours.logits is not None
        assert ours.contacts is not None
        assert ours.logits.shape == logits.shape
        assert ours.contacts.shape == contacts.shape == (len(sequence), len(sequence))
        assert np.abs(ours.logits - logits).max() <= 5e-6 * np.abs(logits).max()
        assert np.abs(ours.contacts - contacts).max() <= 5e-6


def test_real_contacts_are_fair_esms(checkpoint: Checkpoint, proteins: dict[str, str]):
    sequences = sorted(proteins.values(), key=len)[::33]
    done = dict(make_encoder(checkpoint).compute(sequences, Outputs(contacts=True)))
    for index, sequence in enumerate(sequences):
        contacts = done[index].contacts
        assert contacts is not None
        assert contacts.max() > 0.3, "a protein has contacts"
        assert np.abs(contacts - fair(checkpoint, sequence)["contacts"][0].numpy()).max() <= 2e-5


def test_received_attention_is_the_mean_of_fair_esms_maps(whole: Checkpoint):
    for sequence, ours in zip(SEQUENCES, everything(whole, SEQUENCES), strict=True):
        maps = fair(whole, sequence)["attentions"][0].numpy()
        for layer in (1, 3):
            inner = maps[layer - 1, :, 1:-1, 1:-1].mean((0, 1))
            assert ours.received[layer].shape == (len(sequence),)
            assert np.abs(ours.received[layer] - inner).max() <= 1e-6


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_they_are_the_same_bits_alone_and_in_company_and_with_fewer_heads_at_once(
    whole: Checkpoint, precision: str, monkeypatch: pytest.MonkeyPatch
):
    together = everything(whole, SEQUENCES, precision=precision)
    alone = [everything(whole, [s], precision=precision)[0] for s in SEQUENCES]
    monkeypatch.setattr(attention, "PROBABILITY_BYTES", 1)
    one_by_one = everything(whole, SEQUENCES, 300, precision=precision)
    for a, b, c in zip(together, alone, one_by_one, strict=True):
        assert a.logits is not None
        assert b.logits is not None
        assert a.logits.tobytes() == b.logits.tobytes()
        assert a.contacts is not None
        assert b.contacts is not None
        assert c.contacts is not None
        assert a.contacts.tobytes() == b.contacts.tobytes()
        assert np.abs(a.contacts - c.contacts).max() <= 1e-6
        for layer in (1, 3):
            assert a.received[layer].tobytes() == b.received[layer].tobytes()


def test_a_head_that_is_not_there_is_said_before_anything_is_computed(tiny: Checkpoint):
    for outputs, head in ((Outputs(logits=True), "language-model"), (Outputs(contacts=True), "contact")):
        with pytest.raises(ModelError, match=f"these weights have no {head} head"):
            next(make_encoder(canonical(tiny.architecture, trunk(tiny), "bare")).compute(["MK"], outputs))


def test_the_default_model_has_contacts_and_no_logits(checkpoint: Checkpoint):
    with pytest.raises(ModelError, match="no language-model head"):
        next(make_encoder(checkpoint).compute(["MK"], Outputs(logits=True)))


def test_where_there_is_no_room_the_plan_shrinks_and_the_bits_stay(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    sequences = ["MKV" * n for n in range(1, 40)]
    before = dict(make_encoder(tiny).encode(sequences, [2]))
    forward, passes = esm2.Esm2Encoder._forward, []

    def full(self: esm2.Esm2Encoder, some: list[str], *rest: object) -> list[Encoded]:
        passes.append(len(some))
        if sum(map(len, some)) > 150:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return forward(self, some, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(esm2.Esm2Encoder, "_forward", full)
    after = dict(make_encoder(tiny).encode(sequences, [2]))
    assert len(passes) > 10
    assert all(after[i][2].tobytes() == before[i][2].tobytes() for i in before)
    with pytest.raises(CacheMemoryError, match=r"a sequence of 300 residues has no room on cpu; embed it in windows"):
        list(make_encoder(tiny).encode(["M" * 300], [2]))


def test_other_errors_of_torch_stay_what_they_are(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> list[Encoded]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(esm2.Esm2Encoder, "_forward", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        list(make_encoder(tiny).encode(["MK", "MKV"], [2]))


def test_attention_of_a_pack_by_the_gpu_s_kernel_is_that_of_each_sequence(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    """The calls that a GPU gets, with torch's kernel, which no CPU has, written out."""
    asked: list[tuple[list[int], int]] = []

    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ends: torch.Tensor,
        *rest: object,
        scale: float,
        num_splits: int,
    ) -> torch.Tensor:
        assert (ends.dtype, num_splits) == (torch.int32, 1)
        asked.append((ends.tolist(), int(rest[-1])))  # type: ignore[call-overload]
        cuts = ends.tolist()
        parts = [
            torch.nn.functional.scaled_dot_product_attention(
                *(t[a:b].transpose(0, 1).float() for t in (q, k, v)), scale=scale
            ).transpose(0, 1)
            for a, b in itertools.pairwise(cuts)
        ]
        return torch.cat(parts).to(q.dtype)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    each = dict(make_encoder(tiny, precision="mixed").encode(SEQUENCES[:3], [2]))
    encoder = make_encoder(tiny, precision="mixed")
    monkeypatch.setattr(encoder, "_together", True)
    together = dict(encoder.encode(SEQUENCES[:3], [2]))
    assert asked[0] == ([0, 134, 161, 165], 134)
    for i in each:
        assert np.abs(each[i][2] - together[i][2]).max() <= 2e-2 * np.abs(each[i][2]).max()


@pytest.mark.parametrize(
    ("numerics", "budget", "planned"), [("strict", 64, 256), ("strict", 300, 300), ("tolerant", 64, 64)]
)
def test_a_gpus_batch_has_no_fewer_tokens_than_the_tile_that_is_filled_up(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch, numerics: str, budget: int, planned: int
):
    asked: list[int] = []

    def plan(lengths: list[int], tokens: int) -> list[list[int]]:
        asked.append(tokens)
        return plan_batches(lengths, tokens)

    monkeypatch.setattr("proteus_pipeline.models.esm2.plan_batches", plan)
    monkeypatch.setattr("proteus_pipeline.models.blocks.shapes_of", lambda _: Shapes((48, 96, 256), 0, 256, 1))
    encoder = make_encoder(tiny, numerics=numerics)
    each = dict(encoder.encode(SEQUENCES, [2]))
    monkeypatch.setattr(encoder, "_on_cpu", False)
    assert dict(encoder.encode(SEQUENCES, [2], budget)).keys() == each.keys()
    assert asked == [planned]
    assert encoder._arithmetic.tiles[-1] == 256  # type: ignore[attr-defined]


def test_flops_are_counted_as_the_formula_says(tiny: Checkpoint):
    encoder, tokens, d, layers = make_encoder(tiny), 52, 32, 2
    assert encoder.flops(50) == tokens * layers * (24 * d * d + 4 * tokens * d)
    assert encoder.peak() > 1e8


@pytest.mark.parametrize("outputs", [Outputs(layers=(0, 7)), Outputs(layers=(-1,)), Outputs(received=(0,))])
def test_layers_that_are_not_there_are_refused_before_anything_is_computed(tiny: Checkpoint, outputs: Outputs):
    with pytest.raises(ConfigError, match="the model has layers 0 to 2"):
        next(make_encoder(tiny).compute(["MK"], outputs))


def test_logits_and_contacts_are_the_same_bits_with_any_threads_and_company(checkpoint: Checkpoint):
    """The real width, where torch's own products are other bits with other thread counts."""
    a = checkpoint.architecture
    random = torch.Generator().manual_seed(0)
    head = {"dense.weight": (a.width, a.width), "dense.bias": (a.width,), "layer_norm.weight": (a.width,)}
    head |= {"layer_norm.bias": (a.width,), "bias": (33,)}
    tensors = {f"lm_head.{n}": torch.randn(size, generator=random) * 0.1 for n, size in head.items()}
    model = canonical(a, dict(checkpoint.tensors) | tensors, "with a head")
    sequences = ["MKTAYIAKQRQISFVKSHFS"[:n] for n in range(1, 21)] + ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ" * 10]
    outputs, before = Outputs(logits=True, contacts=True), torch.get_num_threads()
    found = []
    try:
        for threads, company in ((1, True), (2, True), (3, True), (1, False), (2, False), (3, False)):
            torch.set_num_threads(threads)
            encoder = make_encoder(model)
            if company:
                done = dict(encoder.compute(sequences, outputs))
            else:
                done = {i: next(encoder.compute([s], outputs))[1] for i, s in enumerate(sequences)}
            arrays = [x for i in range(len(sequences)) for x in (done[i].logits, done[i].contacts)]
            found.append([x.tobytes() for x in arrays if x is not None])
    finally:
        torch.set_num_threads(before)
    assert all(one == found[0] for one in found[1:])
    assert len(found[0]) == 2 * len(sequences)
