"""`sample` on every backend, against the distribution in float64 (`benchmarks/sampling_cases.py`)."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
import torch

import cupaged
from benchmarks.sampling_cases import NAMES, check_tokens, draw_logits, draw_settings, neutral, weight_errors
from cupaged import backends
from cupaged.backends import reference
from tests.distribution import uniform

from .fused_cases import DTYPES, LAYOUTS, check_surroundings, moved, placed


def check_call(
    device: str, rng: random.Random, dtype: torch.dtype, layout: str, num_rows: int, size: int
) -> None:
    """Check a call whose logits and settings are drawn."""
    logits, memory = placed(draw_logits(rng, num_rows, size, dtype), layout, rng)
    x, x_memory = moved(logits, memory, device)
    settings = draw_settings(rng, num_rows, size)
    out = torch.full((num_rows + 2,), -7, dtype=torch.int64, device=device)
    on_device = {name: value.to(device) for name, value in settings.items()}
    given = rng.random() < 0.5
    tokens = cupaged.sample(x, **on_device, out=out[1:-1] if given else None)
    check_tokens(tokens, logits, settings)
    assert (out[[0, -1]] == -7).all()
    assert torch.equal(tokens.cpu(), out[1:-1].cpu()) == given
    assert tokens.dtype == torch.int64
    check_surroundings(x, x_memory)
    assert torch.equal(x.cpu(), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sample(backend, seed, dtype, layout):
    rng = random.Random(seed)
    size = rng.choice([1, 2, 7, 8, 16, 100, 1000, rng.randrange(1, 3000), rng.randrange(3000, 9000)])
    check_call(backend[1], rng, dtype, layout, rng.randrange(1, 6), size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_vocabularies(backend, seed, dtype):
    rng = random.Random(seed)
    size = rng.choice([32000, 49152, 50257, 128256, 151936, 262144])
    check_call(backend[1], rng, dtype, rng.choice(LAYOUTS), 2, size)


def spread(num_rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Return neutral settings whose numbers are spread over [0, 1): one in each of as many intervals."""
    positions = torch.arange(100 * num_rows)
    numbers = reference.uniform(torch.full_like(positions, seed), torch.zeros_like(positions), positions)
    where = (numbers * num_rows).long()
    first = torch.full((num_rows,), len(positions)).scatter_reduce_(0, where, positions, "amin")
    return neutral(num_rows, seeds=torch.full((num_rows,), seed), positions=first)


def on(device: str, settings: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in settings.items()}


def test_ties_keep_the_lowest_ids(backend, seed):
    """Every token that is kept is drawn, and no other."""
    device, rng = backend[1], random.Random(seed)
    size, repeats = rng.randrange(20, 700), 12  # numbers, more than two for each token
    first, *others = sorted(rng.sample(range(size), 5))
    logits = torch.full((size,), -3.0, dtype=rng.choice(DTYPES))
    logits[others], logits[first] = 2.0, 2.5
    cases = [
        ({"top_k": 1}, 1),
        ({"top_k": 3}, 3),
        ({"min_p": 0.6065}, 5),  # the others have exp(-0.5) of the first
        ({"min_p": 0.6066}, 1),
        ({"top_k": 4, "top_p": 0.3}, 1),  # of the four the first has 0.35, the others 0.22
        ({"top_k": 4, "top_p": 0.5}, 2),
    ]
    settings = {
        name: value.repeat(len(cases)) for name, value in spread(repeats, rng.getrandbits(62)).items()
    }
    for i, (change, _) in enumerate(cases):
        for name, value in change.items():
            settings[name][i * repeats : (i + 1) * repeats] = value
    rows = logits.expand(len(cases) * repeats, size).to(device)
    tokens = cupaged.sample(rows, **on(device, settings)).view(len(cases), repeats).tolist()
    for drawn, (change, kept) in zip(tokens, cases):
        assert set(drawn) == {first, *others[: kept - 1]}, change


def test_a_top_p_that_equals_the_probability_of_some_tokens_keeps_those(backend):
    """Keep 1 to 9 of 10 equally likely tokens for top_p of 0.1 to 0.9, as with Python's floats."""
    device, shares = backend[1], torch.arange(1, 10)
    settings = neutral(9, top_p=shares.double() / 10, seeds=torch.full((9,), 23))
    tokens = cupaged.sample(torch.full((9, 10), 0.5).to(device), **on(device, settings))
    numbers = reference.uniform(*(settings[name] for name in NAMES[4:]))
    assert numbers.max() > 0.9
    assert torch.equal(tokens.cpu(), (numbers * shares).long())


def unmix(bits: int) -> int:
    """Return the 64 bits that SplitMix64's mixing function makes these of."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        bits ^= bits >> shift ^ bits >> 2 * shift  # the inverse of x ^ x >> shift, as 3 shifts are over 64
        bits = bits * pow(factor, -1, 1 << 64) % (1 << 64)
    return (bits - 0x9E3779B97F4A7C15) % (1 << 64)


def with_numbers(numbers: list[float], seed: int) -> dict[str, torch.Tensor]:
    """Return neutral settings with positions for which these numbers are drawn."""
    settings = neutral(len(numbers), seeds=torch.full((len(numbers),), seed))
    before = reference._mix(reference._mix(settings["seeds"]) + settings["indices"])
    wanted = [unmix(int(number * 2**53) << 11) for number in numbers]
    wanted = torch.from_numpy(np.array(wanted, dtype=np.uint64).view(np.int64))
    settings["positions"] = wanted - before
    drawn = reference.uniform(*(settings[name] for name in NAMES[4:]))
    assert drawn.tolist() == numbers
    return settings


def test_a_number_between_two_tokens_is_the_second_ones(backend, seed):
    """Draw each of 4 tokens of equal weight, among others without any, for a quarter of the numbers."""
    device, rng = backend[1], random.Random(seed)
    size = rng.randrange(6, 700)
    possible = sorted(rng.sample(range(1, size - 1), 4))
    logits = torch.full((size,), float("-inf"))
    logits[possible] = 1.0
    last = 2.0**-53  # place of a number
    numbers = [0.0, 0.25 - last, 0.25, 0.5 - last, 0.5, 0.75 - last, 0.75, 1.0 - last]
    settings = with_numbers(numbers, rng.getrandbits(62))
    tokens = cupaged.sample(logits.expand(8, size).to(device), **on(device, settings)).tolist()
    assert tokens == [token for token in possible for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_as_accurate_as_float32(backend, seed, dtype):
    """Numbers close to either side of where the tokens of a float64 distribution meet draw those tokens."""
    device, rng = backend[1], random.Random(seed)
    size, temperature = 12, rng.uniform(1, 2)
    logits = torch.tensor([rng.uniform(-3, 3) for _ in range(size)]).to(dtype)
    exponents = ((logits.double() - logits.double().max()) / temperature).numpy()
    weights = np.exp(exponents)
    cumulative = weights.cumsum() / weights.sum()
    error = 2 * weight_errors(weights, exponents).sum() / weights.sum()
    assert 2 * error < weights.min() / weights.sum()
    meet = cumulative[:-1]
    numbers = np.floor(np.concatenate([meet - error, meet + error]) * 2**53) * 2.0**-53
    settings = with_numbers(numbers.tolist(), rng.getrandbits(62))
    settings["temperature"].fill_(temperature)
    tokens = cupaged.sample(logits.expand(len(numbers), size).to(device), **on(device, settings))
    assert tokens.tolist() == [*range(size - 1), *range(1, size)]


def test_greedy(backend, seed):
    """The first of the largest; NaN and infinities harm no other row, and give a token."""
    device, generator = backend[1], torch.Generator().manual_seed(seed)
    inf, nan = float("inf"), float("nan")
    for size in (1, 5, 3000):
        logits = torch.randn(12, size, generator=generator).mul(4).round().bfloat16()
        logits[1], logits[2], logits[3] = nan, -inf, 0
        logits[4, size // 2] = inf
        logits[5, : size // 2], logits[6, size // 2 :] = nan, nan
        logits[7, size - 1] = logits[7].max()
        logits[8] = -0.0
        logits[8, size // 3] = 0.0
        for temperature in (0.0, 1.0):
            settings = neutral(12, temperature=torch.full((12,), temperature, dtype=torch.float64))
            tokens = cupaged.sample(logits.to(device), **on(device, settings))
            usable = logits.masked_fill(logits.isnan(), -inf)
            if temperature:
                check_tokens(tokens, logits, settings)
            else:
                ids = torch.arange(size)
                first = torch.where(usable == usable.amax(-1, keepdim=True), ids, size).amin(-1)
                assert torch.equal(tokens.cpu(), first)
            assert tokens[1] == tokens[2] == 0


def test_the_number_is_the_samplers(seed):
    """Bit for bit."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 63), (1 << 63) - 1, (3, 1000), generator=generator)
    expected = uniform(*bits.numpy().view(np.uint64))
    assert np.array_equal(reference.uniform(*bits).numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(backend, seed, dtype):
    device, rng = backend[1], random.Random(seed)
    size = rng.randrange(1, 3000)
    logits = draw_logits(rng, 20, size, dtype).to(device)
    logits[5] = float("nan")
    settings = on(device, draw_settings(rng, 20, size))
    together = cupaged.sample(logits, **settings)
    assert torch.equal(together, cupaged.sample(logits, **settings))
    for row in (0, 4, 6, 19):
        own = {name: value[row : row + 1] for name, value in settings.items()}
        assert cupaged.sample(logits[row : row + 1], **own) == together[row]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulation with")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_and_cuda_draw_the_same_tokens(monkeypatch, two_threads, seed, dtype):
    """All of them: sums are exact, and weights have the same bits."""
    from tests.cuda_host import emulator

    rng = random.Random(seed)
    modules = backends.load("cpu"), emulator.backend(seed, "80")
    for size in (rng.randrange(1, 100), rng.randrange(100, 6000)):
        logits, settings = draw_logits(rng, 24, size, dtype), draw_settings(rng, 24, size)
        tokens = []
        for module in modules:
            monkeypatch.setattr(backends, "for_device", lambda device_type, module=module: module)
            tokens.append(cupaged.sample(logits, **settings))
        assert torch.equal(*tokens)


def test_no_rows(backend):
    settings = on(backend[1], neutral(0))
    assert cupaged.sample(torch.empty(0, 64, device=backend[1]), **settings).shape == (0,)


def test_settings_out_of_range_are_the_nearest_in_range(backend, seed):
    """Nobody waits for a check on the device."""
    device, best = backend[1], 11
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    logits[:, best] = 5.0
    nan = float("nan")
    pairs = [
        ({"temperature": -1.0}, {"temperature": 0.0}),
        ({"temperature": nan}, {"temperature": 0.0}),
        ({"temperature": 1e300}, {"temperature": 1e30}),
        ({"temperature": 1e-300}, {"temperature": 1e-30}),
        ({"top_k": -7}, {}),
        ({"top_k": 1 << 60}, {}),
        ({"top_p": -1.0}, {"top_k": 1}),
        ({"top_p": 7.0}, {}),
        ({"top_p": nan}, {}),
        ({"min_p": 2.0}, {"top_k": 1}),
        ({"min_p": -1.0}, {}),
        ({"min_p": nan}, {}),
    ]
    for pair in pairs:
        tokens = []
        for changes in pair:
            settings = neutral(3, seeds=torch.full((3,), seed))
            for name, value in changes.items():
                settings[name].fill_(value)
            tokens.append(cupaged.sample(logits.to(device), **on(device, settings)).tolist())
        assert tokens[0] == tokens[1], pair
