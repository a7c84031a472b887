"""The same bits in every company."""

from __future__ import annotations

import gc
import hashlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_checkpoint

from proteus_pipeline.errors import ConfigError, ModelError
from proteus_pipeline.identity import digests
from proteus_pipeline.models import blocks
from proteus_pipeline.models.architecture import Architecture
from proteus_pipeline.models.checkpoint import Checkpoint
from proteus_pipeline.models.device import device_class, resolve_device
from proteus_pipeline.models.encoder import Encoder, make_encoder
from proteus_pipeline.models.esm2 import _token_table
from proteus_pipeline.models.pooling import pool
from proteus_pipeline.models.products import Fp32Product
from proteus_pipeline.models.shapes import Shapes
from proteus_pipeline.stages.drift import drift

GOLDEN = ROOT / "tests" / "models" / "golden_embeddings.json"
SHORT = ("MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "M", "GSHMENKWRLVVAPPXXLLDE")
HELD_OUT = ("ACDEFGHIKLMNPQRSTVWY" * 3, "WWWWWWWW", "MSTNPKPQRKTKRNTNRRPQDVKFPGGGQIVGGVYLLPRRGPRLGVRA")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(one: dict[int, np.ndarray], two: dict[int, np.ndarray]) -> bool:
    """Compare bits, so that 0.0 is not -0.0 and NaN is itself."""
    return one.keys() == two.keys() and all(
        one[n].shape == two[n].shape and one[n].tobytes() == two[n].tobytes() for n in one
    )


def one_by_one(encoder: Encoder, sequences: list[str], layers: list[int]) -> list[dict[int, np.ndarray]]:
    return [next(encoder.encode([s], layers))[1] for s in sequences]


def test_real_proteins_alone_and_in_any_batch_are_the_same_bits(checkpoint: Checkpoint, proteins: dict[str, str]):
    by_length = sorted(proteins.values(), key=len)
    encoder, sequences, layers = make_encoder(checkpoint), by_length[:56] + by_length[-4:], [0, 3, 6]
    torch.set_num_threads(1)
    alone = one_by_one(encoder, sequences, layers)
    rng = np.random.default_rng(0)
    for budget, count, number in ((4096, 1, 60), (301, 1, 12), (1500, 2, 20), (100_000, 3, 8)):
        torch.set_num_threads(count)
        order = rng.permutation(60)[:number]
        got = dict(encoder.encode([sequences[i] for i in order], layers, budget))
        assert len(got) == number
        assert all(same(got[place], alone[i]) for place, i in enumerate(order)), (budget, count)


def test_every_strict_product_has_a_shape_that_only_the_proteins_length_decides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "shapes_of", lambda _: Shapes((48, 96, 256), 320, 256, 16))
    # Many CPUs give the same bits for other shapes too, so that comparing bits alone would not notice.
    shapes: list[tuple[int, int]] = []
    write, add = Fp32Product._write, Fp32Product._add

    def watched(self: Fp32Product, x: torch.Tensor, out: torch.Tensor, columns: slice) -> None:
        shapes.append((x.shape[0], columns.stop - columns.start))
        write(self, x, out, columns)

    def watched_too(self: Fp32Product, residual: torch.Tensor, x: torch.Tensor, columns: slice) -> None:
        shapes.append((x.shape[0], columns.stop - columns.start))
        add(self, residual, x, columns)

    monkeypatch.setattr(Fp32Product, "_write", watched)
    monkeypatch.setattr(Fp32Product, "_add", watched_too)
    wide = make_checkpoint(width=160)
    tiles = {"M": 48, "M" * 46: 48, "M" * 47: 96, "M" * 94: 96, "M" * 95: 256, "MKV" * 200: 256}
    widths = [240, 240, 160, 320, 320, 160]  # of queries, keys and values, output, and the two of the feed-forward
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for company in ([], ["MKV" * 20], ["MKV" * 300, "MKV"]):
            for sequence, most in tiles.items():
                shapes.clear()
                list(make_encoder(wide).encode([sequence, *company], [2]))
                expected = {
                    (tiles.get(s, 96 if len(s) == 60 else 48 if s == "MKV" else 256), w)
                    for s in (sequence, *company)
                    for w in widths
                }
                assert set(shapes) == expected
                counts = {rows: shapes.count((rows, 240)) for rows, _ in expected}
                if not company:  # two blocks, two parts of one width, and as many tiles as it fills
                    assert counts == {most: 2 * 2 * -(-(len(sequence) + 2) // most)}
                assert all(
                    shapes.count((rows, 160)) == n and shapes.count((rows, 320)) == n for rows, n in counts.items()
                )
    shapes.clear()
    list(make_encoder(wide, numerics="tolerant").encode(["MKV"], [2]))
    assert {rows for rows, _ in shapes} == {5}
    monkeypatch.setattr(blocks, "shapes_of", lambda _: Shapes((64,), 160, 64, 1))
    shapes.clear()
    list(make_encoder(wide).encode(["MKV"], [2]))
    assert set(shapes) == {(64, 160)}  # the tiles and the columns of the device class


def test_mixed_is_next_to_fp32_on_real_weights(checkpoint: Checkpoint, proteins: dict[str, str]):
    # Random weights have no channels of large numbers, by which rounding is seen.
    sequences = sorted(proteins.values(), key=len)[::3]
    exact, rough = (dict(make_encoder(checkpoint, precision=p).encode(sequences, [6])) for p in ("fp32", "mixed"))
    order = range(len(sequences))
    drifts = drift([str(i) for i in order], [exact[i][6] for i in order], [rough[i][6] for i in order])
    least = min(d.cosine for d in drifts)
    assert 0.9999 <= least < 1


def test_what_a_mask_hides_behind_the_last_sequence_is_a_number(monkeypatch: pytest.MonkeyPatch):
    made, make = [], torch.Tensor.new_empty

    def of_no_numbers(self: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        made.append(make(self, *args, **options).fill_(torch.nan))
        return made[-1]

    monkeypatch.setattr(blocks, "shapes_of", lambda _: Shapes((48, 96, 256), 320, 256, 16))
    encoder = make_encoder(make_checkpoint(width=32))
    monkeypatch.setattr(torch.Tensor, "new_empty", of_no_numbers)
    qkv = encoder._start(["MKV" * 10, "M"]).qkv  # type: ignore[attr-defined]
    assert made
    assert qkv.shape == (48 + 15, 96)
    assert torch.equal(qkv[48:], torch.zeros(15, 96))


def test_a_sequence_of_no_numbers_leaves_its_neighbour_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "shapes_of", lambda _: Shapes((48, 96, 256), 320, 256, 16))
    spoilt = make_checkpoint(width=32)
    encoder = make_encoder(spoilt)
    encoder._embedding[_token_table(spoilt.architecture)[ord("X")]] = torch.nan  # type: ignore[attr-defined]
    ((_, alone),) = encoder.encode(["M" * 27], [2])
    for company in (["M" * 27, "X" * 26], ["X" * 26, "M" * 27]):
        got = dict(encoder.encode(company, [2]))
        assert same(got[company.index("M" * 27)], alone)
        assert np.isnan(got[company.index("X" * 26)][2]).all()


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
@pytest.mark.parametrize("which", ["small", "real"])
def test_lower_precisions_are_the_same_bits_too(checkpoint: Checkpoint, precision: str, which: str):
    encoder = make_encoder(make_checkpoint(width=64) if which == "small" else checkpoint, precision=precision)
    layers = [1, 2]  # two blocks: bf16 products are slow on CPUs without the instructions
    torch.set_num_threads(1)
    alone = one_by_one(encoder, list(SHORT), layers)
    for count, company in ((1, (*SHORT, *HELD_OUT)), (2, SHORT[::-1]), (7, SHORT)):
        torch.set_num_threads(count)
        got = dict(encoder.encode(company, layers, 300))
        assert all(same(got[company.index(s)], alone[i]) for i, s in enumerate(SHORT)), count


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
def test_many_thread_counts_give_the_same_bits(precision: str):
    # A head is 16 wide at least in every published ESM-2. With 8, torch's attention depends on the thread count.
    encoder = make_encoder(make_checkpoint(width=96), precision=precision)
    torch.set_num_threads(1)
    alone = one_by_one(encoder, list(SHORT), [1, 2])
    for count in (2, 3, 5, 6, 7, 11):
        torch.set_num_threads(count)
        got = dict(encoder.encode(SHORT, [1, 2], 2000))
        assert all(same(got[i], alone[i]) for i in range(3)), count


@pytest.mark.parametrize("which", ["tiny", "real"])
def test_tolerant_is_near_to_strict(tiny: Checkpoint, checkpoint: Checkpoint, proteins: dict[str, str], which: str):
    model, sequences = (tiny if which == "tiny" else checkpoint), list(proteins.values())[::10]
    layers = list(range(model.architecture.layers + 1))
    strict = dict(make_encoder(model).encode(sequences, layers))
    tolerant = dict(make_encoder(model, numerics="tolerant").encode(sequences, layers))
    for layer in layers:
        size = max(np.abs(strict[i][layer]).max() for i in strict)
        assert max(np.abs(strict[i][layer] - tolerant[i][layer]).max() for i in strict) <= 5e-6 * size


@pytest.mark.parametrize(("precision", "bound"), [("mixed", 2e-2), ("bf16", 4e-2)])
@pytest.mark.parametrize("numerics", ["strict", "tolerant"])
def test_lower_precisions_are_near_to_fp32_and_are_not_it(
    tiny: Checkpoint, precision: str, bound: float, numerics: str
):
    exact = dict(make_encoder(tiny).encode(HELD_OUT, [2]))
    rough = dict(make_encoder(tiny, precision=precision, numerics=numerics).encode(HELD_OUT, [2]))
    apart = max(np.abs(exact[i][2] - rough[i][2]).max() / np.abs(exact[i][2]).max() for i in exact)
    assert 1e-5 < apart < bound
    assert rough[0][2].dtype == np.float32


def test_a_long_protein_is_the_same_alone_and_in_company(tiny: Checkpoint, proteins: dict[str, str]):
    pieces = "".join(proteins.values())
    long, encoder = pieces[:3000], make_encoder(tiny)
    short_first = next(encoder.encode([pieces[:50]], [2]))[1]  # the rotary table is small here, and grows
    alone = next(encoder.encode([long], [2]))[1]
    assert alone[2].shape == (3002, 32)
    together = dict(make_encoder(tiny).encode([pieces[:50], long, pieces[60:90]], [2], 10_000))
    assert same(together[1], alone)
    assert same(together[0], short_first)


def test_all_layers_in_one_pass_are_each_layers_own_pass(tiny: Checkpoint):
    encoder = make_encoder(tiny)
    every = dict(encoder.encode(HELD_OUT, [2, 0, 1, 1]))
    for layer in (0, 1, 2):
        single = dict(encoder.encode(HELD_OUT, [layer]))
        assert all(same(single[i], {layer: every[i][layer]}) for i in range(3))


def test_layer_0_is_the_scaled_embedding(tiny: Checkpoint):
    hidden = dict(make_encoder(tiny).encode(["MKV"], [0]))[0][0]
    tokens = [tiny.architecture.tokens.index(t) for t in ("<cls>", "M", "K", "V", "<eos>")]
    assert np.array_equal(hidden, (tiny.tensors["esm.embeddings.word_embeddings.weight"][tokens] * 0.88).numpy())


def test_the_order_and_the_neighbours_of_residues_matter(tiny: Checkpoint):
    encoder = make_encoder(tiny)
    one, two, three = (dict(encoder.encode([s], [2]))[0][2] for s in ("MKVL", "MKLV", "MKVV"))
    assert not np.allclose(one[1], two[1])
    assert not np.allclose(one[1], three[1])


def test_golden_embeddings(checkpoint: Checkpoint, proteins: dict[str, str]):
    golden = json.loads(GOLDEN.read_text())
    shortest = sorted(proteins, key=lambda name: (len(proteins[name]), name))[:3]
    assert sorted(golden["proteins"]) == sorted(shortest)
    got = dict(make_encoder(checkpoint).encode([proteins[n] for n in shortest], [3, 6]))
    on_this_class = golden["bits"].get(device_class("cpu"))
    for index, name in enumerate(shortest):
        for layer in (3, 6):
            stored = np.array(golden["proteins"][name][str(layer)], dtype=np.float32)
            assert stored.shape == (320,)
            mean = pool(got[index][layer], "mean")
            assert np.abs(mean - stored).max() <= 1e-5 * max(1.0, np.abs(stored).max())
            if on_this_class and on_this_class["torch"] == torch.__version__.split("+")[0]:
                residues = pool(got[index][layer], "per_residue")
                assert digests.of_content("F32", residues.shape, residues.tobytes()) == on_this_class[name][str(layer)]


def test_no_input_no_output(tiny: Checkpoint):
    assert list(make_encoder(tiny).encode([], [1])) == []


def test_weights_and_results_are_left_alone(tiny: Checkpoint):
    before = {n: hashlib.sha256(t.numpy().tobytes()).digest() for n, t in tiny.tensors.items()}
    for precision in ("fp32", "bf16"):
        encoder = make_encoder(tiny, precision=precision)
        first = dict(encoder.encode(SHORT, [0, 1, 2]))
        copies = {i: {n: a.copy() for n, a in arrays.items()} for i, arrays in first.items()}
        list(encoder.encode(HELD_OUT, [0, 1, 2]))
        assert all(same(first[i], copies[i]) for i in first)
    assert {n: hashlib.sha256(t.numpy().tobytes()).digest() for n, t in tiny.tensors.items()} == before


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"precision": "fp8"}, "embedding.precision is 'fp8'; use one of fp32, mixed, bf16"),
        ({"precision": "FP32"}, "embedding.precision is 'FP32'; use one of fp32, mixed, bf16"),
        ({"numerics": "fast"}, "embedding.numerics is 'fast'; use one of strict, tolerant"),
    ],
)
def test_unknown_settings_are_named(tiny: Checkpoint, setting: dict[str, str], line: str):
    with pytest.raises(ConfigError) as caught:
        make_encoder(tiny, **setting)
    assert str(caught.value) == line


def test_architectures_that_are_not_computed_are_refused(tiny: Checkpoint):
    for change, said in (({"positions": "absolute"}, "absolute positions"), ({"emb_layer_norm_before": True}, "norm")):
        with pytest.raises(ModelError, match=said):
            make_encoder(replace(tiny, architecture=replace(tiny.architecture, **change)))


def test_letters_become_fair_esms_tokens():
    import esm

    alphabet = esm.data.Alphabet.from_architecture("ESM-1b")
    table = _token_table(Architecture(1, 8, 2, 32))
    for letter in "ACDEFGHIKLMNPQRSTVWYXBUZO.-":
        assert table[ord(letter)] == alphabet.get_idx(letter)
    assert table[ord("J")] == table[ord("a")] == alphabet.unk_idx


def test_a_gpu_that_is_not_there_is_an_error():
    count = torch.cuda.device_count()
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda:0" if count else "cpu")
    with pytest.raises(ConfigError, match=f"torch sees {count} GPUs"):
        resolve_device(f"cuda:{count}")
    for wanted in ("gpu", "cuda:x", "cuda:-1", "mps", ""):
        with pytest.raises(ConfigError, match=r"use auto, cpu, cuda or cuda:N"):
            resolve_device(wanted)


def test_a_device_class_names_kind_instructions_and_vendor():
    kind, *rest = device_class("cpu").split("/")
    assert kind == "cpu"
    assert len(rest) == 3
    assert all(rest)


def test_an_encoder_that_nobody_holds_is_gone_at_once(tiny: Checkpoint):
    """Two versions are compared one after the other: their copies of the weights need not be in memory at once."""
    gc.disable()
    try:
        encoder = make_encoder(tiny)
        list(encoder.encode(SHORT, [2]))
        gone = weakref.ref(encoder)
        del encoder
        assert gone() is None
    finally:
        gc.enable()
