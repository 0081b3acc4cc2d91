"""`act_and_mul` on every backend, against float64."""

from __future__ import annotations

import random

import pytest
import torch

import cupaged
from cupaged.backends.reference import activate
from cupaged.fused_checks import ACTIVATIONS

from .fused_cases import DTYPES, LAYOUTS, bits, check_rounded, check_surroundings, moved, placed

pytestmark = pytest.mark.operator("act_and_mul")

# Where the exponential overflows or vanishes, and numbers whose square or cube does.
EDGES = [0.0, 1e-30, 1e-6, 0.5, 1.0, 5.0, 10.0, 17.0, 87.0, 88.8, 90.0, 104.0, 126.0, 128.0, 200.0, 1e4]
LARGE = [1e10, 1e15, 1e20, 1e38]


def check_products(actual: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str) -> None:
    """Check products of float64 gates; the sigmoid and erf have the error of floats about 1."""
    exact = activate(gate, activation) * up
    check_rounded(actual, exact, 5e-7 * (gate * up).abs().where(gate > -20, 20 * up.abs()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_act_and_mul(backend, seed, dtype, activation, layout):
    rng = random.Random(seed)
    device, generator = backend[1], torch.Generator().manual_seed(seed)
    num_rows = rng.choice([1, 2, 3, rng.randrange(4, 30)])
    size = rng.choice([1, 5, 8, 24, 100, rng.randrange(1, 700), 1536])
    values = torch.randn(num_rows, 2 * size, generator=generator)
    values *= 10.0 ** torch.randint(-3, 2, values.shape, generator=generator)
    input, input_memory = placed(values.to(dtype), layout, rng)
    out, out_memory = placed(
        torch.full((num_rows, size), float("nan"), dtype=dtype), rng.choice(LAYOUTS), rng
    )
    x, x_memory = moved(input, input_memory, device)
    target, target_memory = moved(out, out_memory, device)
    given = rng.random() < 0.5
    result = cupaged.act_and_mul(x, activation=activation, out=target if given else None)
    assert (result is target) == given
    assert result.dtype == dtype
    gate, up = input.double().chunk(2, dim=1)
    check_products(result, gate, up, activation)
    assert torch.equal(bits(x_memory), bits(input_memory))
    check_surroundings(target, target_memory)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_edges(backend, dtype, activation):
    """Large gates do not overflow on the way, and NaN stays NaN."""
    device = backend[1]
    edges = torch.tensor(EDGES + (LARGE if dtype != torch.float16 else []))
    gate = torch.cat([edges, -edges]).to(dtype)
    up = torch.ones_like(gate)
    result = cupaged.act_and_mul(torch.cat([gate, up])[None].to(device), activation=activation)
    check_products(result[0], gate.double(), up.double(), activation)
    special = torch.tensor([[float("nan"), 1.0, 1.0, float("nan")]], dtype=dtype)
    assert cupaged.act_and_mul(special.to(device), activation=activation).isnan().all()


def test_no_rows(backend):
    assert cupaged.act_and_mul(torch.empty(0, 64, device=backend[1]), activation="silu").shape == (0, 32)
