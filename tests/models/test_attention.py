"""Attention over packed rows, against its definition, and with keys of the next sequence masked."""

from __future__ import annotations

import pytest
import torch

from proteus_pipeline.models.attention import Heads, attend
from proteus_pipeline.models.device import has_bf16

COUNT, WIDTH = 4, 16


def attended(heads: Heads, qkv: torch.Tensor, rows: slice) -> torch.Tensor:
    out = qkv.clone()[rows, : COUNT * WIDTH]
    attend(heads, qkv, rows, out)
    return out


def defined(qkv: torch.Tensor, rows: slice) -> torch.Tensor:
    q, k, v = qkv[rows].double().view(-1, 3, COUNT, WIDTH).permute(1, 2, 0, 3)
    chances = torch.softmax(q @ k.transpose(1, 2) * WIDTH**-0.5, -1)
    return (chances @ v).transpose(0, 1).reshape(-1, COUNT * WIDTH)


# Attention in bf16 is for CPUs that multiply it; some others have no kernel for it.
DTYPES = [torch.float32, *([torch.bfloat16] if has_bf16() else [])]


@pytest.mark.parametrize("together", [1, 16])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 300, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_what_it_is_defined_to_be(together: int, length: int, dtype: torch.dtype):
    qkv = torch.randn((length + 40, 3 * COUNT * WIDTH), generator=torch.Generator().manual_seed(length)).to(dtype)
    rows = slice(5, 5 + length)
    got = attended(Heads(COUNT, WIDTH, dtype, together), qkv, rows)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), defined(qkv, rows), atol=2e-6 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("length", [1, 15, 17, 33, 300, 505, 521, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bit_depends_on_the_rows_behind_a_sequence(length: int, dtype: torch.dtype):
    heads, rows = Heads(COUNT, WIDTH, dtype, 16), slice(3, 3 + length)
    assert heads.padded(length) > length
    qkv = torch.randn(length + 40, 3 * COUNT * WIDTH).to(dtype)
    expected = attended(heads, qkv, rows)
    assert torch.isfinite(expected).all()
    for other in (0.0, -1e30, 3e38, torch.nan, torch.inf, torch.randn(37, 3 * COUNT * WIDTH)):
        qkv[rows.stop :] = other
        assert torch.equal(attended(heads, qkv, rows), expected)
    qkv[rows.stop - 1] = torch.nan
    assert torch.isnan(attended(heads, qkv, rows)).all()


def test_attention_may_lie_where_the_queries_were():
    heads, rows = Heads(COUNT, WIDTH, torch.float32, 16), slice(0, 30)
    qkv = torch.randn(46, 3 * COUNT * WIDTH)
    expected, rest = attended(heads, qkv, rows), qkv.clone()
    attend(heads, qkv, rows, qkv[rows, : COUNT * WIDTH])
    assert torch.equal(qkv[rows, : COUNT * WIDTH], expected)
    assert torch.equal(qkv[30:], rest[30:])
