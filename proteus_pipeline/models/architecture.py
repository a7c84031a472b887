"""What a model's tensors mean: the part of a digest that shapes alone do not say."""

from __future__ import annotations

from dataclasses import dataclass

from proteus_pipeline.errors import ConfigError

# fair-esm 2.0.0, esm.data.Alphabet.from_architecture("ESM-1b"): the alphabet of every ESM-2 checkpoint.
ESM2_TOKENS = (
    "<cls>", "<pad>", "<eos>", "<unk>",
    *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """The shape and arithmetic of an ESM-2 encoder, and nothing else: names, dates and dropout rates stay out.

    Attributes
    ----------
    layers, width, heads, ffn_width
        Number of blocks, embedding dimension, attention heads, feed-forward dimension.
    positions
        How positions enter: ``rotary`` in every ESM-2.
    token_dropout
        Whether embeddings are scaled by 0.88 at inference, as training with 12% masks asks.
    emb_layer_norm_before
        Whether a layer norm follows the token embedding.
    layer_norm_eps
        As text, since it is part of a digest; ``1e-05`` in ESM-2.
    tokens
        The vocabulary, in the order of the embedding's rows.

    """

    layers: int
    width: int
    heads: int
    ffn_width: int
    positions: str = "rotary"
    token_dropout: bool = True
    emb_layer_norm_before: bool = False
    layer_norm_eps: str = "1e-05"
    tokens: tuple[str, ...] = ESM2_TOKENS

    @property
    def family(self) -> str:
        """The family whose arithmetic it is: `proteus_pipeline.models.encoder.FAMILIES`."""
        return "esm2"

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    def flops(self, length: int) -> float:
        """Return the floating-point operations that a sequence of `length` residues takes.

        A token takes 24 D^2 + 4 (L + 2) D in each block, with a feed-forward of 4 D: two for each product and sum.
        """
        tokens = length + 2
        products = 2 * self.width * (4 * self.width + 2 * self.ffn_width)
        return float(tokens * self.layers * (products + 4 * tokens * self.width))

    def identity(self) -> dict[str, object]:
        """Return what enters a component's digest."""
        return {
            "family": self.family,
            "layers": self.layers,
            "width": self.width,
            "heads": self.heads,
            "ffn_width": self.ffn_width,
            "positions": self.positions,
            "token_dropout": self.token_dropout,
            "emb_layer_norm_before": self.emb_layer_norm_before,
            "layer_norm_eps": self.layer_norm_eps,
            "tokens": list(self.tokens),
        }


def resolve_layer(layer: int, layers: int) -> int:
    """Return a layer counted from 0, for one that may count from the end: -1 is the last of `layers`.

    Raises
    ------
    ConfigError
        When the model has no such layer.

    """
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ConfigError(f"embedding.layer is {layer!r}", "use a whole number; -1 is the last layer")
    resolved = layer if layer >= 0 else layers + 1 + layer
    if not 0 <= resolved <= layers:
        raise ConfigError(
            f"embedding.layer is {layer}, and the model has {layers} layers", f"use {-layers - 1} to {layers}"
        )
    return resolved
