"""What a trunk's digest sees, bit for bit, and what it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import contact_head, lm_head, trunk

from proteus_pipeline.errors import ModelError
from proteus_pipeline.models.checkpoint import (
    EMBEDDING,
    Checkpoint,
    canonical,
    component_of,
    dtype_name,
    inv_freq,
    tensor_bytes,
)

TINY = make_checkpoint()


def with_bit_flipped(checkpoint: Checkpoint, name: str, bit: int) -> Checkpoint:
    tensor = checkpoint.tensors[name].clone()
    octets = tensor.view(-1).view(torch.uint8)
    octets[bit // 8 % len(octets)] ^= 1 << bit % 8
    return canonical(checkpoint.architecture, {**checkpoint.tensors, name: tensor}, "flipped")


@pytest.mark.parametrize("name", sorted(TINY.tensors))
@settings(max_examples=8)
@given(bit=st.integers(0, 1 << 30))
def test_one_changed_bit_of_any_tensor_changes_the_trunk_digest(name: str, bit: int):
    assert with_bit_flipped(TINY, name, bit).trunk_digest != TINY.trunk_digest


def test_the_real_models_digests_see_the_last_bit_of_every_tensor(checkpoint: Checkpoint):
    before = checkpoint.tensor_digests
    for name, tensor in checkpoint.tensors.items():
        flipped = replace(
            checkpoint, tensors={name: with_flip(tensor)}
        ).tensor_digests  # one tensor at a time: the rest of the digest is a function of these
        assert flipped[name] != before[name]


def with_flip(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1).view(torch.uint8)[-1] ^= 1
    return changed


def test_digests_depend_on_neither_the_order_of_tensors_nor_their_layout_in_memory():
    turned = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in sorted(TINY.tensors.items(), reverse=True)}
    assert not turned[EMBEDDING].is_contiguous()
    assert canonical(TINY.architecture, turned, "turned").digests == TINY.digests


def test_two_tensors_swapped_are_another_trunk():
    one, two = (f"esm.encoder.layer.{i}.intermediate.dense.weight" for i in (0, 1))
    swapped = {**TINY.tensors, one: TINY.tensors[two], two: TINY.tensors[one]}
    assert canonical(TINY.architecture, swapped, "swapped").trunk_digest != TINY.trunk_digest


def test_heads_do_not_enter_the_trunk_digest_and_do_enter_the_models():
    heads = {
        "lm_head": lm_head(TINY, fair=False),
        "contact_head": {f"esm.contact_head.{n}": t for n, t in contact_head(TINY).items()},
        "classifier": {"classifier.dense.weight": torch.ones(2, 32)},
        "pooler": {"pooler.dense.bias": torch.ones(32)},
    }
    seen = {TINY.model_digest}
    for name, head in heads.items():
        read = canonical(TINY.architecture, trunk(TINY) | head, name)
        assert set(read.digests) == {"trunk", name}
        assert read.trunk_digest == TINY.trunk_digest
        seen.add(read.model_digest)
        changed = {n: t + 1 for n, t in head.items()}
        seen.add(canonical(TINY.architecture, trunk(TINY) | changed, name).model_digest)
    assert len(seen) == 1 + 2 * len(heads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_stored_in_another_precision_are_another_trunk(dtype: torch.dtype):
    other = canonical(TINY.architecture, {n: t.to(dtype) for n, t in TINY.tensors.items()}, "it")
    assert other.trunk_digest != TINY.trunk_digest
    widened = {n: t.float() for n, t in other.tensors.items()}
    assert canonical(TINY.architecture, widened, "it").trunk_digest != other.trunk_digest


def test_the_same_bytes_under_another_dtype_are_another_trunk():
    half = {n: t.half() for n, t in TINY.tensors.items() if "inv_freq" not in n}
    brain = {n: t.view(torch.bfloat16) for n, t in half.items()}
    one, two = (canonical(TINY.architecture, tensors, "it") for tensors in (half, brain))
    assert one.trunk_digest != two.trunk_digest


def test_inv_freq_is_kept_bit_for_bit_widened_without_loss_and_written_only_where_absent():
    name = "esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq"
    other = name.replace("layer.0", "layer.1")
    odd = torch.tensor([1.0, 0.3, 0.2, 0.1])
    assert torch.equal(canonical(TINY.architecture, {**TINY.tensors, name: odd}, "it").tensors[name], odd)
    half = canonical(TINY.architecture, {**TINY.tensors, name: odd.half()}, "it")
    assert half.tensors[name].dtype == torch.float32
    assert half.digests == canonical(TINY.architecture, {**TINY.tensors, name: odd.half().float()}, "it").digests
    assert half.trunk_digest != TINY.trunk_digest
    partly = {n: t for n, t in half.tensors.items() if n != other}  # a file may carry it for some layers
    assert torch.equal(canonical(TINY.architecture, partly, "it").tensors[other], inv_freq(TINY.architecture))


def test_the_formula_is_fair_esms(checkpoint: Checkpoint):
    from esm.rotary_embedding import RotaryEmbedding

    for model in (TINY, checkpoint):
        a = model.architecture
        assert torch.equal(inv_freq(a), RotaryEmbedding(dim=a.head_width).inv_freq)


def test_the_real_model_holds_rounded_frequencies_and_they_stay(checkpoint: Checkpoint):
    for index in range(6):
        kept = checkpoint.layer(index)["attention.self.rotary_embeddings.inv_freq"]
        assert torch.equal(kept, kept.half().float())
        assert not torch.equal(kept, inv_freq(checkpoint.architecture))


def test_what_no_forward_pass_reads_is_left_out():
    extra = {
        "esm.embeddings.position_ids": torch.arange(4),
        "embeddings.position_embeddings.weight": torch.ones(4, 32),
    }
    assert canonical(TINY.architecture, {**TINY.tensors, **extra}, "it").digests == TINY.digests


@pytest.mark.parametrize("name", sorted(n for n in TINY.tensors if "inv_freq" not in n))
def test_each_tensor_is_needed_in_its_shape(name: str):
    rest = {n: t for n, t in TINY.tensors.items() if n != name}
    with pytest.raises(ModelError, match="lacks 1 of ESM-2's tensors, " + name.replace(".", r"\.")):
        canonical(TINY.architecture, rest, "it")
    with pytest.raises(ModelError, match="has shape"):
        canonical(TINY.architecture, {**rest, name: torch.zeros(3, 3)}, "it")


def test_dtypes_are_safetensors_names_and_others_are_refused():
    from safetensors.torch import save

    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64):
        tensor = torch.zeros(2, dtype=dtype)
        assert f'"dtype":"{dtype_name(tensor)}"'.encode() in save({"x": tensor})
    with pytest.raises(ModelError, match="dtype int8"):
        dtype_name(torch.zeros(1, dtype=torch.int8))


def test_bytes_are_c_order_little_endian():
    assert bytes(tensor_bytes(torch.tensor([[1, 2], [3, 4]]).t())) == b"".join(
        n.to_bytes(8, "little") for n in (1, 3, 2, 4)
    )
    assert bytes(tensor_bytes(torch.tensor(1.0))) == b"\x00\x00\x80\x3f"


def test_components_are_told_by_name():
    assert [component_of(n) for n in ("esm.encoder.x", "esm.embeddings.y", "esm.contact_head.regression.bias")] == [
        "trunk",
        "trunk",
        "contact_head",
    ]
