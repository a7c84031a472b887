"""The packed encoder against fair-esm itself, and against fair-esm in float64, on the same real weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from conftest import make_checkpoint
from layouts import contact_head, lm_head, trunk

from proteus_pipeline.errors import ModelError
from proteus_pipeline.models.architecture import ESM2_TOKENS, Architecture
from proteus_pipeline.models.checkpoint import Checkpoint, canonical, trunk_shapes
from proteus_pipeline.models.encoder import make_encoder
from proteus_pipeline.models.fair_esm import to_fair_esm


@dataclass
class Distance:
    """The largest and the mean square difference seen, per layer."""

    largest: dict[int, float] = field(default_factory=dict)
    squares: dict[int, float] = field(default_factory=dict)
    count: dict[int, int] = field(default_factory=dict)

    def add(self, layer: int, difference: np.ndarray) -> None:
        wide = difference.astype(np.float64)
        self.largest[layer] = max(self.largest.get(layer, 0.0), float(np.abs(wide).max()))
        self.squares[layer] = self.squares.get(layer, 0.0) + float((wide**2).sum())
        self.count[layer] = self.count.get(layer, 0) + wide.size

    def rms(self, layer: int) -> float:
        return (self.squares[layer] / self.count[layer]) ** 0.5


def hidden_states(model: torch.nn.Module, alphabet: object, sequence: str, layers: list[int]) -> dict[int, np.ndarray]:
    _, _, tokens = alphabet.get_batch_converter()([("one", sequence)])
    with torch.no_grad():
        return {n: t[0].numpy() for n, t in model(tokens, repr_layers=layers)["representations"].items()}


# The one slow test here: 100 proteins through fair-esm, and 20 of them in float64.
def test_all_demo_proteins_agree_with_fair_esm_and_are_as_near_to_float64(
    checkpoint: Checkpoint, proteins: dict[str, str]
):
    layers, sequences = list(range(7)), list(proteins.values())
    assert len(sequences) == 100
    ours = dict(make_encoder(checkpoint).encode(sequences, layers))
    model, alphabet = to_fair_esm(checkpoint)
    exact_model = to_fair_esm(checkpoint)[0].double()
    apart, size, ours_exact, fair_exact = Distance(), Distance(), Distance(), Distance()
    for number, sequence in enumerate(sequences):
        fair = hidden_states(model, alphabet, sequence, layers)
        exact = hidden_states(exact_model, alphabet, sequence, layers) if number % 5 == 0 else {}
        for layer in layers:
            assert ours[number][layer].shape == fair[layer].shape == (len(sequence) + 2, 320)
            apart.add(layer, ours[number][layer] - fair[layer])
            size.add(layer, fair[layer])
            if exact:
                assert exact[layer].dtype == np.float64
                ours_exact.add(layer, ours[number][layer] - exact[layer])
                fair_exact.add(layer, fair[layer] - exact[layer])
    for layer in layers:
        assert apart.largest[layer] <= 5e-6 * size.largest[layer], layer
        assert ours_exact.largest[layer] <= 2 * fair_exact.largest[layer], layer
        assert ours_exact.rms(layer) <= 2 * fair_exact.rms(layer), layer


def test_random_weights_agree_with_and_without_token_dropout(tiny: Checkpoint, proteins: dict[str, str]):
    for dropout in (True, False):
        architecture = Architecture(2, 32, 4, 128, token_dropout=dropout)
        checkpoint = canonical(architecture, tiny.tensors, "tiny")
        model, alphabet = to_fair_esm(checkpoint)
        for sequence in ("M", "ACDEFGHIKLMNPQRSTVWYXBUZO.-", next(iter(proteins.values()))):
            ours = dict(make_encoder(checkpoint).encode([sequence], [0, 1, 2]))[0]
            fair = hidden_states(model, alphabet, sequence, [0, 1, 2])
            for layer in (0, 1, 2):
                assert np.abs(ours[layer] - fair[layer]).max() <= 5e-6 * np.abs(fair[layer]).max()


def test_stored_frequencies_are_what_fair_esm_computes_with(tiny: Checkpoint):
    name = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"
    given = {name.format(i): torch.tensor([1.0, 0.4 + 0.1 * i, 0.2, 0.05]) for i in (0, 1)}
    checkpoint = canonical(tiny.architecture, {**tiny.tensors, **given}, "it")
    model, alphabet = to_fair_esm(checkpoint)
    sequence = "ACDEFGHIKLMNPQRSTVWY" * 4
    fair = hidden_states(model, alphabet, sequence, [2])[2]
    ours = dict(make_encoder(checkpoint).encode([sequence], [2]))[0][2]
    formula = dict(make_encoder(tiny).encode([sequence], [2]))[0][2]
    assert np.abs(ours - fair).max() <= 5e-6 * np.abs(fair).max()
    assert np.abs(formula - fair).max() > 1e-3 * np.abs(fair).max()


def test_heads_are_handed_over(tiny: Checkpoint):
    heads = lm_head(tiny, fair=False) | {f"esm.contact_head.{n}": t for n, t in contact_head(tiny).items()}
    model, alphabet = to_fair_esm(canonical(tiny.architecture, trunk(tiny) | heads, "whole"))
    state = model.state_dict()
    assert torch.equal(state["lm_head.bias"], heads["lm_head.bias"])
    assert torch.equal(state["lm_head.weight"], state["embed_tokens.weight"])
    assert torch.equal(state["contact_head.regression.weight"], heads["esm.contact_head.regression.weight"])
    assert not model.training
    _, _, tokens = alphabet.get_batch_converter()([("one", "ACDEFG")])
    assert model.predict_contacts(tokens).shape == (1, 6, 6)


def test_an_untied_language_head_is_handed_over(tiny: Checkpoint):
    heads = lm_head(tiny, fair=False)
    heads["lm_head.decoder.weight"] += 1
    state = to_fair_esm(canonical(tiny.architecture, trunk(tiny) | heads, "untied"))[0].state_dict()
    assert torch.equal(state["lm_head.weight"], heads["lm_head.decoder.weight"])


def test_half_precision_weights_are_widened(tiny: Checkpoint):
    half = canonical(tiny.architecture, {n: t.half() for n, t in tiny.tensors.items()}, "half")
    state = to_fair_esm(half)[0].state_dict()
    assert {t.dtype for t in state.values()} == {torch.float32}


@pytest.mark.parametrize(
    "change", [{"ffn_width": 64}, {"layer_norm_eps": "1e-12"}, {"tokens": (*ESM2_TOKENS[:-2], "<mask>", "<null_1>")}]
)
def test_what_fair_esm_fixes_otherwise_is_refused(change: dict[str, object]):
    architecture = Architecture(**({"layers": 1, "width": 32, "heads": 4, "ffn_width": 128} | change))
    tensors = {n: torch.zeros(s) for n, s in trunk_shapes(architecture).items()}
    with pytest.raises(ModelError, match="fair-esm's ESM2 fixes"):
        to_fair_esm(canonical(architecture, tensors, "it"))


def test_a_model_of_another_shape_is_handed_over():
    model, _ = to_fair_esm(make_checkpoint(layers=3, width=24, heads=2))
    assert (model.num_layers, model.embed_dim, model.attention_heads) == (3, 24, 2)
