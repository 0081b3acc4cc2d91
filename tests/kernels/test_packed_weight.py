"""Linear layers over packed weights: right against float64, and the same bits in every batch."""

from __future__ import annotations

import random

import pytest
import torch

from cupaged.backends.cpu import ir
from cupaged.backends.cpu.packed_weight import PackedWeight, can_pack

from .narrower import check_on_narrower_cpu


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return a weight, a bias and inputs with NaN around them."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    outputs = rng.choice([1, 7, 16, 31, 32, 33, rng.randint(1, 200)])
    inputs = 2 * rng.choice([1, 2, 31, 32, rng.randint(1, 300)])
    rows = rng.choice([*range(1, 14), 47, 48, 49, rng.randint(1, 150)])
    weight = torch.randn(outputs, inputs).to(dtype)
    bias = torch.randn(outputs).to(dtype) if rng.random() < 0.5 else None
    around = torch.full((rows, inputs + rng.choice([0, 1, 8])), float("nan"), dtype=dtype)
    x = around[:, :inputs]
    x.copy_(torch.randn(rows, inputs))
    return weight, bias, x


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x @ weight.T if bias is None else x @ weight.T + bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_close_to_float64(seed, dtype):
    rng = random.Random(seed)
    for _ in range(20):
        weight, bias, x = drawn(rng.randrange(2**32), dtype)
        exact = multiply(x.double(), weight.double(), None if bias is None else bias.double())
        actual = PackedWeight(weight, bias).multiply(x)
        assert actual.shape == exact.shape
        assert actual.dtype == dtype
        # Each of n roundings of a float32 sum is at most 2**-24 of the sum of magnitudes; then the dtype's.
        magnitudes = multiply(x.double().abs(), weight.double().abs(), None)
        magnitudes += 0 if bias is None else bias.double().abs()
        allowed = magnitudes * (x.shape[1] + 2) * 2**-24 + exact.abs() * torch.finfo(dtype).eps / 2 * 1.01
        assert ((actual.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_of_a_row_depend_on_nothing_else(seed, dtype):
    """Not on the other rows, nor on the shape and strides of the inputs, nor on the number of threads."""
    rng = random.Random(seed)
    for _ in range(10):
        weight, bias, x = drawn(rng.randrange(2**32), dtype)
        packed = PackedWeight(weight, bias)
        whole = packed.multiply(x)
        torch.set_num_threads(rng.choice([1, 2, 3]))
        assert torch.equal(packed.multiply(x), whole)
        first = rng.randrange(len(x))
        last = rng.randint(first + 1, len(x))
        assert torch.equal(packed.multiply(x[first:last]), whole[first:last])
        assert torch.equal(packed.multiply(x[None, :, None]), whole[None, :, None])
        assert torch.equal(packed.multiply(x.T.contiguous().T), whole)
        assert torch.equal(packed.multiply(x[first]), whole[first])


def test_a_layer_of_many_panels_is_divided_among_threads(seed):
    torch.manual_seed(seed)
    weight, x = torch.randn(3000, 600), torch.randn(100, 600)
    packed = PackedWeight(weight)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(packed.multiply(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0], x @ weight.T, rtol=1e-4, atol=1e-3)


def test_no_rows():
    assert PackedWeight(torch.ones(3, 4)).multiply(torch.ones(2, 0, 4)).shape == (2, 0, 3)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(3, 4, dtype=torch.float16),
        torch.ones(3, 4, dtype=torch.float64),
        torch.ones(3, 5, dtype=torch.bfloat16),
        torch.ones(0, 4),
        torch.ones(4),
        torch.ones(3, 4, device="meta"),
    ],
    ids=lambda weight: f"{weight.dtype} {list(weight.shape)} {weight.device}",
)
def test_what_cannot_be_packed(weight):
    assert not can_pack(weight)


def test_bfloat16_is_left_to_matrix_units(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not can_pack(torch.ones(3, 4, dtype=torch.bfloat16))
    assert can_pack(torch.ones(3, 4)) == ir.HAS_FMA


@pytest.mark.matrix  # the kernels are compiled again, for that CPU
def test_results_are_right_on_a_cpu_with_narrower_registers():
    check_on_narrower_cpu(__file__)
