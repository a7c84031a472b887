"""Each kind of product against float64, and against itself wherever a row stands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from proteus_pipeline.models.device import has_bf16
from proteus_pipeline.models.products import Bf16Product, Fp32Product, PackedBf16Product, Product, can_pack, joined

ROWS, INPUTS, OUTPUTS = 256, 72, 40
Make = Callable[[torch.Tensor, torch.Tensor, bool], Product]
KINDS: dict[str, tuple[Make, torch.dtype, bool]] = {
    "fp32": (lambda w, b, gelu: Fp32Product(w, b, gelu=gelu), torch.float32, True),
    "fp32, in parts": (lambda w, b, gelu: Fp32Product(w, b, gelu=gelu, columns=16), torch.float32, True),
    "packed bf16": (
        lambda w, b, gelu: PackedBf16Product(w, b, ROWS, gelu=gelu),
        torch.bfloat16,
        can_pack() and has_bf16(),
    ),
    "packed bf16, of finer weights and sums": (
        lambda w, b, gelu: PackedBf16Product(w, b, ROWS, gelu=gelu, weights=2, sums=2),
        torch.bfloat16,
        can_pack() and has_bf16(),
    ),
    "bf16": (lambda w, b, gelu: Bf16Product(w, b, native=True, gelu=gelu), torch.bfloat16, True),
    "bf16 in fp32": (lambda w, b, gelu: Bf16Product(w, b, native=False, gelu=gelu), torch.bfloat16, True),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Make, torch.dtype]:
    make, dtype, here = KINDS[request.param]
    if not here:
        pytest.skip("this CPU has no such product")
    return make, dtype


def _numbers(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, INPUTS, generator=random).to(dtype).float() for n in (ROWS, OUTPUTS))
    return x, weight, torch.randn(OUTPUTS, generator=random)


@pytest.mark.parametrize("gelu", [False, True])
def test_a_product_is_the_product(kind: tuple[Make, torch.dtype], gelu: bool):
    make, dtype = kind
    x, weight, bias = _numbers(dtype)
    exact = x.double() @ weight.double().t() + bias.double()
    if gelu:
        exact = torch.nn.functional.gelu(exact)
    product = make(weight, bias, gelu)
    got = product(x)
    bound = 1e-6 if dtype == torch.float32 else 2**-8  # bf16 keeps 8 bits
    assert (got.double() - exact).abs().max() <= bound * exact.abs().max()
    out = torch.full((ROWS, 3 * OUTPUTS), torch.nan)[:, :OUTPUTS].contiguous()
    assert product(x, out) is out
    assert torch.equal(out, got.float())


def test_a_product_is_added(kind: tuple[Make, torch.dtype]):
    make, dtype = kind
    x, weight, bias = _numbers(dtype)
    product, residual = make(weight, bias, False), torch.randn(ROWS, OUTPUTS)
    exact = residual.double() + x.double() @ weight.double().t() + bias.double()
    product.add_to(residual, x)
    assert residual.dtype == torch.float32
    bound = 1e-6 if dtype == torch.float32 else 2**-8
    assert (residual.double() - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("gelu", [False, True])
def test_a_row_has_the_same_bits_wherever_it_stands(kind: tuple[Make, torch.dtype], gelu: bool):
    make, dtype = kind
    x, weight, bias = _numbers(dtype)
    product = make(weight, bias, gelu)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    assert torch.equal(product(x[order]), product(x)[order])


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("outputs", [32, 320, 336, 480, 960, 1280])
def test_the_parts_of_a_product_are_it_in_any_order(outputs: int, gelu: bool):
    x, weight, bias = (torch.randn(*shape) for shape in ((48, 64), (outputs, 64), (outputs,)))
    product = Fp32Product(weight, bias, gelu=gelu, columns=320)
    whole, residual = product(x), torch.randn(48, outputs)
    out, added = torch.full_like(whole, torch.nan), residual.clone()
    for part in product.parts(x, out)[::-1]:
        part()
    assert torch.equal(out, whole)
    product.add_to(residual, x)
    for part in product.parts_added(added, x)[::-1]:
        part()
    assert torch.equal(added, residual)
    assert len(product.parts(x, out)) == -(-outputs // 320)


def _apart(product: Product, x: torch.Tensor, exact: torch.Tensor) -> float:
    """How far what is added is from the exact product, in the root of the mean square, over that of the product."""
    residual = torch.zeros(exact.shape)
    product.add_to(residual, x)
    return float((residual.double() - exact).norm() / exact.norm())


@pytest.mark.skipif(not (can_pack() and has_bf16()), reason="this CPU has no such product")
def test_a_second_product_adds_what_rounding_left_of_a_sum():
    x, weight, bias = _numbers(torch.bfloat16)
    exact = x.double() @ weight.double().t() + bias.double()
    once, twice = (PackedBf16Product(weight, bias, ROWS, gelu=False, sums=n) for n in (1, 2))
    assert _apart(once, x, exact) > 1e-3
    assert _apart(twice, x, exact) < 2**-15


@pytest.mark.parametrize("native", [False, True])
def test_weights_of_two_numbers_are_finer(native: bool):
    if native and not (can_pack() and has_bf16()):
        pytest.skip("this CPU has no such product")
    x, *_ = _numbers(torch.bfloat16)
    weight, bias = torch.randn(OUTPUTS, INPUTS), torch.zeros(OUTPUTS)
    exact = x.double() @ weight.double().t()

    def make(weights: int) -> Product:
        if native:
            return PackedBf16Product(weight, bias, ROWS, gelu=False, weights=weights, sums=2)
        return Bf16Product(weight, bias, native=False, gelu=False, weights=weights)

    one, two = make(1), make(2)
    assert _apart(one, x, exact) > 1e-3
    assert _apart(two, x, exact) < 2**-15
    assert two.nbytes - one.nbytes == (2 * weight.numel() if native else 0)


def test_pieces_are_joined_in_a_copy():
    weight = torch.randn(8, 4)
    pieces = [weight[:4].view(2, 2, 4).transpose(0, 1), weight[4:]]
    whole = joined(iter(pieces), 8)
    expected = weight[[0, 2, 1, 3, 4, 5, 6, 7]]
    weight.zero_()
    assert torch.equal(whole, expected)
    with pytest.raises(ValueError, match="8 outputs have 4 rows of weights"):
        joined(pieces[:1], 8)


def test_a_weight_is_used_where_it_lies():
    weight, bias, x = torch.randn(8, 4), torch.randn(8), torch.randn(3, 4)
    before = bias.clone()
    product = Fp32Product(weight, bias, gelu=False)
    weight.zero_()
    bias += 1
    assert torch.equal(product(x), before.expand(3, 8))
