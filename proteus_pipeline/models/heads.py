"""ESM-2's two heads: logits over the alphabet, and contacts by a regression over all attention maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proteus_pipeline.errors import ModelError
from proteus_pipeline.models.checkpoint import EMBEDDING, Checkpoint

if TYPE_CHECKING:
    import torch

_DENSE = "lm_head.dense"
_REGRESSION = "esm.contact_head.regression"


class LanguageHead:
    """fair-esm's RobertaLMHead: dense, GELU, norm, and the token embedding as decoder unless the checkpoint has its own.

    In fp32 whatever the precision: it is a thousandth of the work.

    Raises
    ------
    ModelError
        When the checkpoint has no such head.

    """

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        import torch

        t = checkpoint.tensors
        if f"{_DENSE}.weight" not in t:
            raise ModelError(
                "these weights have no language-model head, so they give no logits",
                "use an official checkpoint, or one that was saved with its lm_head",
            )
        names = (
            f"{_DENSE}.weight",
            f"{_DENSE}.bias",
            "lm_head.layer_norm.weight",
            "lm_head.layer_norm.bias",
            "lm_head.bias",
        )
        self._dense, self._dense_bias, self._norm, self._norm_bias, self._bias = (
            t[name].to(device, torch.float32, copy=True)
            for name in names  # what they lie in may change
        )
        decoder = "lm_head.decoder.weight"
        self._decoder = t[decoder if decoder in t else EMBEDDING].to(device, torch.float32, copy=True)
        self._eps = float(checkpoint.architecture.layer_norm_eps)

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        parts = (self._dense, self._dense_bias, self._norm, self._norm_bias, self._bias, self._decoder)
        return sum(part.nbytes for part in parts)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (T, V) logits of (T, D) hidden states after the final norm."""
        from torch.nn import functional

        x = functional.linear(hidden, self._dense, self._dense_bias)
        x = functional.gelu(x)
        x = functional.layer_norm(x, x.shape[-1:], self._norm, self._norm_bias, self._eps)
        return functional.linear(x, self._decoder, self._bias)


class ContactHead:
    """fair-esm's ContactPredictionHead: a logistic regression over symmetrised, corrected attention maps.

    Raises
    ------
    ModelError
        When the checkpoint has no such head.

    """

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        import torch

        t, a = checkpoint.tensors, checkpoint.architecture
        if f"{_REGRESSION}.weight" not in t:
            raise ModelError(
                "these weights have no contact head, so they give no contacts",
                "use an official checkpoint with its contact regression",
            )
        self._weight = t[f"{_REGRESSION}.weight"].to(device, torch.float32, copy=True).view(a.layers, a.heads)
        self._bias = float(t[f"{_REGRESSION}.bias"])

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        return self._weight.nbytes

    def add(self, logits: torch.Tensor, layer: int, first: int, attention: torch.Tensor) -> None:
        """Add some heads of one layer to (L, L) logits: `attention` is (n, L + 2, L + 2), start and end included.

        A map is summed with its transpose, and what its rows and columns have in common is taken off: average product
        correction (Dunn et al. 2008, doi:10.1093/bioinformatics/btm604).
        """
        import torch

        inner = attention[:, 1:-1, 1:-1]
        both = inner + inner.transpose(1, 2)
        rows = both.sum(-1, keepdim=True)
        total = rows.sum(-2, keepdim=True)
        both -= rows * rows.transpose(1, 2) / total  # symmetric: sums of columns are those of rows
        logits += torch.einsum("n,nij->ij", self._weight[layer, first : first + attention.shape[0]], both)

    def contacts(self, logits: torch.Tensor) -> torch.Tensor:
        """Return (L, L) probabilities."""
        return (logits + self._bias).sigmoid()
