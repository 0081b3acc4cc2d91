"""`rope_and_cache` on every backend: queries against float64, the cache bit for bit.

A key is rotated as a query is, and stored as `reshape_and_cache` stores it.
"""

from __future__ import annotations

import random

import pytest
import torch

import cupaged
from cupaged.backends.reference import normalise, rotate
from cupaged.quantisation import LARGEST

from .fused_cases import DTYPES, LAYOUTS, bits, check_rounded, check_surroundings, moved, placed

QUANTISED = list(LARGEST)


class Case:
    """Tensors of a call, drawn: a merged projection, angles, a cache, and weights of the norms."""

    def __init__(self, seed, dtype, cache_dtype, rotation, layout, device, head_size=None, pairs=None):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.rng, self.dtype, self.device = rng, dtype, device
        sizes = [16, 32, 64, 80, 128, 256] + ([] if cache_dtype else [8, 24, 120])
        self.head_size = head_size or rng.choice(sizes)
        others = [layout] if head_size else LAYOUTS  # of the tensors beside the projection
        self.num_tokens = rng.choice([1, 2, 3, rng.randrange(4, 30)])
        self.num_heads, self.num_kv_heads = rng.choice([(1, 1), (9, 3), (4, 1), (3, 3), (5, 2)])
        heads = self.num_heads + 2 * self.num_kv_heads

        def drawn(*shape, factor=1.0, dtype=dtype):
            return (factor * torch.randn(*shape, generator=generator)).to(dtype)

        # A key of a few hundred saturates some codes.
        values = drawn(self.num_tokens, heads, self.head_size, factor=10.0 ** rng.uniform(-2, 2))
        self.qkv, self.qkv_memory = placed(values, layout, rng)
        self.options = {}
        self.cos = self.sin = None
        if rotation != "none":
            half = self.head_size // 2
            self.options["interleaved"] = rotation == "interleaved"
            pairs = pairs or rng.choice([half, half, half // 2, rng.randrange(1, half + 1)])
            angles = 100.0 * torch.rand(self.num_tokens, pairs, generator=generator)
            stretch, angle_dtype = rng.choice([1.0, 1.2]), rng.choice([dtype, torch.float32])
            self.cos, self.sin = (
                moved(*placed((stretch * f(angles)).to(angle_dtype), rng.choice(others), rng), device)[0]
                for f in (torch.cos, torch.sin)
            )
        if head_size or rng.random() < 0.5:
            weight_dtype = rng.choice([dtype, torch.float32])
            self.options |= {"epsilon": rng.choice([1e-6, 1e-3]), "weight_offset": rng.choice([0.0, 1.0])}
            for name in ("query_weight", "key_weight"):
                weight = placed(drawn(self.head_size, dtype=weight_dtype), rng.choice(others), rng)
                self.options[name] = moved(*weight, device)[0]
        num_blocks, block_size = rng.choice([(56, 1), (28, 2), (7, 8), (7, 16), (7, 64)])
        shape = (num_blocks, 2, 2, self.num_kv_heads, block_size, self.head_size)
        if cache_dtype is None:
            self.cache_memory = torch.full(shape, float("nan"), dtype=dtype)
        else:
            self.cache_memory = torch.full(shape, 0xAB, dtype=torch.uint8).view(cache_dtype)
            scales = torch.rand(2, self.num_kv_heads, generator=generator) * 0.1 + 0.001
            self.options["k_scale"], self.options["v_scale"] = scales.to(device)
        slots = torch.tensor(rng.sample(range(num_blocks * block_size), self.num_tokens))
        slots[torch.rand(self.num_tokens, generator=generator) < 0.2] = -1
        self.slots = slots.to(device)

    def parts(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return query, key and value of a projection."""
        return qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)

    def new_cache(self) -> torch.Tensor:
        memory = self.cache_memory
        return memory.clone() if self.device == "cpu" else memory.to(self.device)

    def exact(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Return heads normalised and rotated in float64."""
        x = x.double()
        if weight is not None:
            x = normalise(x, weight.cpu().double(), self.options["epsilon"], self.options["weight_offset"])
        if self.cos is not None:
            cos, sin = self.cos.cpu().double(), self.sin.cpu().double()
            x = rotate(x, cos, sin, self.options["interleaved"])
        return x

    def slack(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Return an error that float32 may make: relative to the head's largest value before rotation."""
        x = x.double()
        if weight is not None:
            rms = (x.square().mean(dim=-1, keepdim=True) + self.options["epsilon"]).sqrt()
            x = x / rms * (self.options["weight_offset"] + weight.cpu().double().abs())
        if self.cos is None and weight is None:
            return torch.zeros_like(x)
        return (2e-6 * x.abs().amax(dim=-1, keepdim=True)).expand_as(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache_dtype", [None, *QUANTISED], ids=str)
@pytest.mark.parametrize("rotation", ["halves", "interleaved", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_and_cache(backend, seed, dtype, cache_dtype, rotation, layout):
    check_call(Case(seed, dtype, cache_dtype, rotation, layout, backend[1]))


# Heads whose pairs end within 16 bytes, or that have more of those than a warp has lanes; and codes of 16-bit
# keys, which lie in two places. The pairs of dtypes are those of `tests.thinning`: each is another kernel.
SIZES = [
    (torch.float32, None, 256, 125),
    (torch.float16, None, 120, 60),
    (torch.bfloat16, None, 80, 16),
    (torch.bfloat16, torch.float8_e5m2, 128, 64),
    (torch.float16, torch.int8, 96, 12),
]


@pytest.mark.parametrize(("dtype", "cache_dtype", "head_size", "pairs"), SIZES)
@pytest.mark.parametrize("rotation", ["halves", "interleaved"])
def test_sizes_of_heads(backend, seed, dtype, cache_dtype, head_size, pairs, rotation):
    """With norms, aligned."""
    check_call(Case(seed, dtype, cache_dtype, rotation, "contiguous", backend[1], head_size, pairs))


def check_call(case: Case) -> None:
    qkv, memory = moved(case.qkv, case.qkv_memory, case.device)
    query, key, value = case.parts(qkv)
    cache = case.new_cache()
    cupaged.rope_and_cache(query, key, value, case.cos, case.sin, cache[:, 1], case.slots, **case.options)

    original, key_before, value_before = case.parts(case.qkv)
    weight = case.options.get("query_weight")
    check_rounded(query, case.exact(original, weight), case.slack(original, weight))
    assert torch.equal(bits(key), bits(key_before))
    assert torch.equal(bits(value), bits(value_before))
    check_surroundings(qkv, memory)

    # The same keys as queries, then written as they are.
    turned = key.clone()
    as_query = {**case.options, "query_weight": case.options.get("key_weight")}
    skipped = torch.full_like(case.slots, -1)
    cupaged.rope_and_cache(
        turned, key, value, case.cos, case.sin, case.new_cache()[:, 1], skipped, **as_query
    )
    expected = case.new_cache()
    scales = case.options.get("k_scale"), case.options.get("v_scale")
    cupaged.reshape_and_cache(turned, value, expected[:, 1], case.slots, *scales)
    assert torch.equal(bits(cache), bits(expected))
    weight = case.options.get("key_weight")
    check_rounded(turned, case.exact(key_before, weight), case.slack(key_before, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_token_does_not_depend_on_the_others(backend, seed, dtype, interleaved):
    """Bit for bit, but in torch; NaN stays in its head."""
    device, generator = backend[1], torch.Generator().manual_seed(seed)
    num_tokens = 60
    qkv = torch.randn(num_tokens, 15, 64, generator=generator).to(dtype)
    qkv[7, 2, 3] = float("nan")
    angles = torch.rand(num_tokens, 32, generator=generator) * 6
    weights = torch.randn(2, 64, generator=generator).to(dtype).to(device)

    def written(first, last):
        query, key, value = qkv[first:last].clone().to(device).split((9, 3, 3), dim=1)
        cache = torch.zeros(8, 2, 3, 8, 64, dtype=dtype, device=device)
        cos, sin = angles[first:last].cos().to(device), angles[first:last].sin().to(device)
        cupaged.rope_and_cache(
            query,
            key,
            value,
            cos,
            sin,
            cache,
            torch.arange(first, last, device=device),
            interleaved=interleaved,
            query_weight=weights[0],
            key_weight=weights[1],
        )
        # [blocks, 2, heads, slots, D] -> [tokens, 2, heads, D]
        return query.cpu(), cache.cpu().permute(0, 3, 1, 2, 4).flatten(0, 1)[first:last]

    together = written(0, num_tokens)
    for token in (0, 6, 7, 8, num_tokens - 1) if backend[0] != "reference" else ():
        for alone, all_tokens in zip(written(token, token + 1), together):
            assert torch.equal(bits(alone[0]), bits(all_tokens[token]))
    nan_heads = together[0].isnan().any(dim=2)
    assert nan_heads[7].nonzero().flatten().tolist() == [2]
    assert int(nan_heads.sum()) == 1
    assert not together[1].isnan().any()


def test_no_tokens(backend):
    device = backend[1]
    cache = torch.zeros(2, 2, 1, 8, 16, device=device)
    heads, angles = torch.empty(0, 1, 16, device=device), torch.empty(0, 8, device=device)
    slots = torch.empty(0, dtype=torch.int64, device=device)
    cupaged.rope_and_cache(heads, heads, heads, angles, angles, cache, slots)
    assert not cache.any()
