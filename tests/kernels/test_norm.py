"""`rms_norm` on every backend, against float64."""

from __future__ import annotations

import random

import pytest
import torch

import cupaged
from cupaged.backends.reference import normalise

from .fused_cases import DTYPES, LAYOUTS, bits, check_rounded, check_surroundings, moved, placed

pytestmark = pytest.mark.operator("rms_norm")


def check_norm(
    actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float
) -> None:
    """Check the norm of float64 rows x. The sum of squares has the error of a sum of many floats."""
    rms = (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
    magnitude = (x / rms).abs() * (abs(offset) + weight.double().abs())
    check_rounded(actual, normalise(x, weight.double(), epsilon, offset), 4e-6 * magnitude)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "residual", "input norm"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rms_norm(backend, seed, dtype, kind, layout):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    device = backend[1]
    num_rows = rng.choice([1, 2, 3, rng.randrange(4, 40)])
    size = rng.choice([1, 7, 8, 24, 64, 100, 576, 1000, rng.randrange(1, 700), 4096])
    weight_dtype = rng.choice([dtype, torch.float32])
    offset, epsilon = rng.choice([0.0, 1.0, -0.3]), rng.choice([1e-6, 1e-5, 1e-3])
    scale = 10.0 ** rng.uniform(-4, 2)

    def drawn(*shape, factor=1.0, dtype=dtype):
        return (factor * torch.randn(*shape, generator=generator)).to(dtype)

    input, input_memory = placed(drawn(num_rows, size, factor=scale), layout, rng)
    residual, residual_memory = placed(drawn(num_rows, size, factor=scale), rng.choice(LAYOUTS), rng)
    out, out_memory = placed(torch.full_like(input, float("nan")), rng.choice(LAYOUTS), rng)
    weight, weight_memory = placed(drawn(size, dtype=weight_dtype), layout, rng)
    input_weight, input_weight_memory = placed(drawn(size, dtype=weight_dtype), layout, rng)

    x, x_memory = moved(input, input_memory, device)
    total, total_memory = moved(residual, residual_memory, device)
    target, target_memory = moved(out, out_memory, device)
    where = rng.choice(["new", "out", "input"])
    weights = [
        moved(*pair, device)[0] for pair in ((weight, weight_memory), (input_weight, input_weight_memory))
    ]
    options = {"epsilon": epsilon, "weight_offset": offset}
    if kind != "plain":
        options["residual"] = total
    if kind == "input norm":
        options["input_weight"] = weights[1]
    if where != "new":
        options["out"] = target if where == "out" else x
    result = cupaged.rms_norm(x, weights[0], **options)

    exact = input.double()
    if kind == "residual":  # each sum is exact to a rounding
        exact = (input.float() + residual.float()).to(dtype).double()
        assert torch.equal(total.cpu().double(), exact)
    elif kind == "input norm":
        normed = normalise(input.double(), input_weight.double(), epsilon, offset)
        rms = (exact.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
        magnitude = (exact / rms).abs() * (abs(offset) + input_weight.double().abs())
        check_rounded(total, normed + residual.double(), 4e-6 * magnitude + 1e-7 * residual.double().abs())
        exact = total.cpu().double()
    check_norm(result, exact, weight, epsilon, offset)
    assert result.dtype == dtype
    if where == "new":
        assert result.is_contiguous()
    else:
        assert result is options["out"]
    if where != "input":
        assert torch.equal(bits(x), bits(input))
    if kind == "plain":
        assert torch.equal(bits(total_memory), bits(residual_memory))
    for view, memory in ((x, x_memory), (total, total_memory), (target, target_memory)):
        check_surroundings(view, memory)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(backend, seed, dtype):
    """Bit for bit, but in torch; a row of zeros stays zero, one with NaN is NaN alone."""
    device, generator = backend[1], torch.Generator().manual_seed(seed)
    rows = torch.randn(70, 576, generator=generator).to(dtype)
    residual = torch.randn(70, 576, generator=generator).to(dtype)
    weight = torch.randn(576, generator=generator).to(dtype).to(device)
    rows[3], residual[3] = 0, 0
    rows[5, 7] = float("nan")

    def normed(first, last):
        total = residual[first:last].clone().to(device)
        return bits(cupaged.rms_norm(rows[first:last].to(device), weight, residual=total)), bits(total)

    together = normed(0, 70)
    for row in (0, 3, 4, 5, 6, 69) if backend[0] != "reference" else ():
        for alone, all_rows in zip(normed(row, row + 1), together):
            assert torch.equal(alone[0], all_rows[row])
    result = together[0].view(dtype)
    assert not result[3].any()
    assert result[5].isnan().all()
    assert not result[4].isnan().any()


def test_no_rows(backend):
    empty = torch.empty(0, 64, device=backend[1])
    weight = torch.ones(64, device=backend[1])
    assert cupaged.rms_norm(empty, weight, residual=empty.clone()).shape == (0, 64)
