"""A version's weights as a fair-esm model, for code that is written against fair-esm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from proteus_pipeline.errors import ModelError
from proteus_pipeline.models.architecture import ESM2_TOKENS
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.models.reading import fair_esm_to_hf

if TYPE_CHECKING:
    import torch


def to_fair_esm(checkpoint: Checkpoint) -> tuple[torch.nn.Module, Any]:
    """Return ``(esm.model.esm2.ESM2, esm.data.Alphabet)`` with the checkpoint's weights, in eval mode.

    Heads the checkpoint lacks keep fair-esm's random start, as when fair-esm itself loads such a file.

    Raises
    ------
    ModelError
        When fair-esm has no such architecture.

    """
    import esm
    import torch

    a = checkpoint.architecture
    if (a.tokens, a.ffn_width, float(a.layer_norm_eps)) != (ESM2_TOKENS, 4 * a.width, 1e-5):
        raise ModelError("fair-esm's ESM2 fixes its alphabet, a ffn of 4 x width and a layer norm eps of 1e-5", "")
    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    model = esm.model.esm2.ESM2(a.layers, a.width, a.heads, alphabet, token_dropout=a.token_dropout)
    state = model.state_dict()
    for name in state:
        source = checkpoint.tensors.get(fair_esm_to_hf(name))
        if source is not None:
            state[name] = source.to(torch.float32)
    if "lm_head.decoder.weight" not in checkpoint.tensors:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval(), alphabet
