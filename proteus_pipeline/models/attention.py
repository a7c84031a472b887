"""Attention over packed rows: of each sequence on its own, so that its shapes are its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Probabilities of one layer are (heads, L, L) fp32; where they are asked for, they are made for so many bytes of heads at once.
PROBABILITY_BYTES = 64 << 20
# A mask is a pass over all scores, which takes as long as one key in so many does where they are taken one by one (a Xeon with AMX).
_WORTH_A_MASK = 64


@dataclass(frozen=True)
class Heads:
    """How a width is made of heads, in which dtype their products are taken, and in multiples of how many keys."""

    count: int
    width: int
    compute: torch.dtype
    key_multiple: int = 1

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values of (L, 3 D) rows, each (heads, L, head_width)."""
        parts = qkv.view(qkv.shape[0], 3, self.count, self.width).permute(1, 2, 0, 3)
        q, k, v = parts.to(self.compute).unbind(0)
        return q, k, v

    @property
    def scale(self) -> float:
        """By what a query's products are scaled: 1/sqrt(head_width)."""
        return float(self.width**-0.5)

    def padded(self, length: int) -> int:
        """Return of how many rows keys and values are taken for a sequence of so many: of some behind it too, if that is faster.

        >>> import torch
        >>> heads = Heads(20, 16, torch.float32, key_multiple=16)
        >>> [heads.padded(length) for length in (16, 30, 300, 1000)]
        [16, 32, 304, 1000]
        """
        over = length % self.key_multiple
        return length + self.key_multiple - over if over * _WORTH_A_MASK > length else length


def attend(heads: Heads, qkv: torch.Tensor, rows: slice, out: torch.Tensor) -> None:
    """Write one sequence's attention: of its rows among (T, 3 D) ones to (L, D) ones, which may be the queries' own.

    Of the rows behind it, `Heads.padded` may take some: they are masked, and no bit depends on them.
    """
    import torch

    length = rows.stop - rows.start
    keys = heads.padded(length)
    q, k, v = (t.unsqueeze(0) for t in heads.split(qkv[rows.start : rows.start + keys]))
    mask = None
    if keys > length:
        mask = q.new_zeros((1, keys))
        mask[:, length:] = -torch.inf
    product = partial(
        torch.nn.functional.scaled_dot_product_attention, q[:, :, :length], attn_mask=mask, scale=heads.scale
    )
    attended = product(k, v)
    if keys > length and not isfinite(attended.sum()):
        # What is no number stays so under a mask: that of the next sequence is none of this one's.
        k, v = k.clone(), v.clone()
        k[:, :, length:], v[:, :, length:] = 0, 0
        attended = product(k, v)
    out.view(-1, heads.count, heads.width).copy_(attended.squeeze(0).transpose(0, 1))


def attend_together(heads: Heads, qkv: torch.Tensor, out: torch.Tensor, lengths: Sequence[int]) -> None:
    """As `attend`, of all sequences of a pack, by torch's own kernel for that, which takes 16 bits on a GPU."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    rows = sum(lengths)
    ends = torch.tensor([0, *lengths], dtype=torch.int32, device=qkv.device).cumsum(0, dtype=torch.int32)
    q, k, v = qkv[:rows].view(rows, 3, heads.count, heads.width).to(heads.compute).unbind(1)
    # One split: by itself the kernel splits as the longest sequence of the pack asks, and bits would depend on company.
    attended: torch.Tensor = varlen_attn(  # type: ignore[assignment]  # a tuple only where more is asked for
        q, k, v, ends, ends, max(lengths), max(lengths), scale=heads.scale, num_splits=1
    )
    out[:rows].view(rows, heads.count, heads.width).copy_(attended)


def probabilities(heads: Heads, qkv: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield one sequence's attention probabilities for some heads after the other: the first head, and (n, L, L) fp32."""
    import torch

    q, k, _ = heads.split(qkv)
    length = qkv.shape[0]
    step = max(1, PROBABILITY_BYTES // (4 * length * length))
    for first in range(0, heads.count, step):
        some = slice(first, first + step)
        # As F.scaled_dot_product_attention does: the scale on the products, the softmax in fp32.
        scores = torch.matmul(q[some], k[some].transpose(1, 2)).float() * heads.scale
        yield first, torch.softmax(scores, dim=-1)
