from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from proteus_pipeline.embeddings.stored import NUMPY_DTYPES, content_hash, to_fp32, to_stored
from proteus_pipeline.errors import ProteusError


def patterns() -> np.ndarray:
    """Bit patterns of fp32: random ones, ties, the edges of overflow, infinities, zeros, subnormals."""
    rng = np.random.default_rng(0)
    random = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype("<u4")
    ties = (random[:50_000] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    near = np.concatenate([ties - np.uint32(1), ties + np.uint32(1)])
    edges = [0x00000000, 0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x007FFFFF, 0x00800000,
             0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000]  # fmt: skip
    both = np.array(edges + [e | 0x80000000 for e in edges], dtype="<u4")
    return np.concatenate([random, ties, near, both]).view("<f4")


def test_bf16_is_torchs_rounding_bit_for_bit():
    import torch

    values = patterns()
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view("<u2")
    got = to_stored(values, "bf16")
    assert got.dtype == np.dtype("<u2")
    nan = np.isnan(values)
    assert nan.sum() > 100
    np.testing.assert_array_equal(got[~nan], expected[~nan])
    # Which of the NaNs is nobody's promise; that it is one is.
    assert np.isnan(to_fp32(got, "bf16")[nan]).all()


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
def test_a_nan_stays_one(bits: int):
    value = np.array([bits], dtype="<u4").view("<f4")
    for stored in NUMPY_DTYPES:
        assert np.isnan(to_fp32(to_stored(value, stored), stored)).all()


def test_what_is_stored_widens_and_rounds_back_to_itself():
    every = np.arange(1 << 16, dtype="<u4").astype("<u2")
    for stored, array in (("bf16", every), ("fp16", every.view("<f2"))):
        wide = to_fp32(array, stored)
        assert wide.dtype == np.float32
        sound = ~np.isnan(wide)
        back = to_stored(wide[sound], stored)
        assert back.tobytes() == array[sound].tobytes()
    values = patterns()
    assert to_fp32(to_stored(values, "fp32"), "fp32").tobytes() == values.tobytes()


def test_fp16_rounds_as_numpy_does_and_keeps_infinities():
    values = np.array([0.1, -65519.0, 1e-8, np.inf, -np.inf], dtype=np.float32)
    np.testing.assert_array_equal(
        to_stored(values, "fp16"), np.array([0.1, -65504, 0, np.inf, -np.inf], dtype=np.float16)
    )


@pytest.mark.filterwarnings("error")
def test_large_arrays_go_by_torch_and_have_numpys_bits(monkeypatch: pytest.MonkeyPatch):
    import torch

    values = patterns()
    values = values[np.abs(values) < 65520].copy()
    values.flags.writeable = False
    every = np.tile(np.arange(1 << 16, dtype="<u2").view("<f2"), (3, 1))
    sound = ~np.isnan(every[0])
    cuts = [
        (values, every),
        (values[::2], every.T),
        (values[:32769], every[:, 1:]),
        (values[:40960].reshape(-1, 320), every),
    ]
    torches = torch.from_numpy
    for narrow, wide in cuts:
        used: list[int] = []
        monkeypatch.setattr(torch, "from_numpy", lambda a, used=used: used.append(a.size) or torches(a))
        assert to_stored(narrow, "fp16").tobytes() == narrow.astype("<f2").tobytes()
        got, expected = to_fp32(wide, "fp16"), wide.astype("<f4")
        assert got.shape == wide.shape
        assert len(used) == 4
        same = got.view("<u4") == expected.view("<u4")
        assert (same | np.isnan(expected)).all()
        assert np.isnan(got[np.isnan(expected)]).all()
    assert sound.sum() == 65536 - 2 * 1023
    # What is no number has numpy's bits, whether torch is loaded or not.
    odd = np.concatenate([values, np.array([np.nan, np.inf], dtype="<f4")])
    assert to_stored(odd, "fp16").tobytes() == odd.astype("<f2").tobytes()


def test_arrays_as_they_come_are_widened_by_torch_as_by_numpy(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.arange(40000, dtype="<u4").astype("<u2").view("<f2"))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    unaligned = np.frombuffer(b"x" + mapped.tobytes(), "<f2", offset=1)
    for array in (mapped, mapped[::-1], unaligned, np.broadcast_to(mapped[:400], (100, 400)), mapped.astype(">f2")):
        wide = to_fp32(array, "fp16")
        assert type(wide) is np.ndarray and wide.flags.writeable and wide.flags.owndata
        expected = array.astype("<f4")
        assert ((wide.view("<u4") == expected.view("<u4")) | np.isnan(expected)).all()


def test_without_torch_numpy_does_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    values = patterns()
    values = values[np.abs(values) < 65520]
    narrow = to_stored(values, "fp16")
    assert narrow.tobytes() == values.astype("<f2").tobytes()
    assert to_fp32(narrow, "fp16").tobytes() == narrow.astype("<f4").tobytes()


@pytest.mark.parametrize("company", [[], [np.inf], [np.nan]])
def test_a_value_beyond_fp16_is_an_error_in_any_company(company: list[float]):
    with pytest.raises(ProteusError, match=r"-70000 does not fit into fp16; use embedding.stored=bf16"):
        to_stored(np.array([1.0, -70000.0, *company], dtype=np.float32), "fp16")


def test_a_widened_array_is_its_owners():
    for stored in NUMPY_DTYPES:
        array = to_stored(np.ones((16, 4), dtype=np.float32), stored)
        array.flags.writeable = False
        row = to_fp32(array[3], stored)
        row += 1
        assert row.nbytes == 16
        assert not np.shares_memory(row, array)


def test_content_hashes_tell_dtype_shape_and_bits_apart():
    array = np.arange(6, dtype=np.float32)
    kept = content_hash(array, "fp32")
    assert kept == content_hash(np.asfortranarray(array), "fp32")
    assert kept == "e073996be1f917586bb895c9da6549c2"
    shaped = array.reshape(2, 3)
    assert content_hash(np.asfortranarray(shaped), "fp32") == content_hash(shaped, "fp32")
    flipped = array.copy()
    flipped.view("<u4")[5] ^= 1
    others = [
        content_hash(shaped, "fp32"),
        content_hash(array.reshape(3, 2), "fp32"),
        content_hash(flipped, "fp32"),
        content_hash(to_stored(array, "fp16"), "fp16"),
        content_hash(to_stored(array, "bf16"), "bf16"),
        content_hash(to_stored(array, "fp16").view("<u2"), "bf16"),
    ]
    assert len({kept, *others}) == 7
