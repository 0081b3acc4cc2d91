"""`reshape_and_cache`, `copy_blocks` and `swap_blocks` on every backend: bit for bit."""

from __future__ import annotations

import random
import shutil

import pytest
import torch

import cupaged
from cupaged import backends
from cupaged.backends.cuda.kernels import Kernels
from cupaged.quantisation import LARGEST

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, NaN included."""
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [32, 64, 80, 120, 256])
@pytest.mark.parametrize("layout", ["contiguous", "strided", "unaligned"])
def test_reshape_and_cache(backend, seed, dtype, head_size, layout):
    rng = random.Random(seed)
    device = backend[1]
    generator = torch.Generator().manual_seed(seed)
    num_blocks, block_size = rng.choice([(40, 1), (20, 2), (7, 8), (7, 16), (7, 64)])
    num_kv_heads = rng.choice([1, 2, 5])
    wide = torch.full((num_blocks, 2, 2, num_kv_heads, block_size, head_size), float("nan"), dtype=dtype)
    num_tokens = rng.randrange(1, 40)
    slots = torch.tensor(rng.sample(range(num_blocks * block_size), num_tokens))
    slots[torch.rand(num_tokens, generator=generator) < 0.2] = -1
    padding = int(layout == "unaligned")
    qkv = torch.randn(num_tokens, 3 * num_kv_heads, head_size + padding, generator=generator).to(dtype)
    key, value = (qkv[:, a : a + num_kv_heads, padding:] for a in (num_kv_heads, 2 * num_kv_heads))
    expected = wide.clone()
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // block_size, 1, 0, :, slot % block_size] = key[t]
            expected[slot // block_size, 1, 1, :, slot % block_size] = value[t]
    actual = wide.to(device)
    qkv = qkv.to(device)
    key, value = (qkv[:, a : a + num_kv_heads, padding:] for a in (num_kv_heads, 2 * num_kv_heads))
    if layout == "contiguous":
        key, value = key.contiguous(), value.contiguous()
    cupaged.reshape_and_cache(key, value, actual[:, 1], slots.to(device))
    assert same(actual, expected)


# Where rounding, saturation and the change to subnormals happen, in units of the scale.
EDGES = [0.0, 2**-10, 2**-9, 3 * 2**-10, 2**-7, 2**-6, 2**-17, 2**-16, 3 * 2**-17, 2**-15, 2**-14, 0.5, 1.5]
EDGES += [2.5, 17.0, 18.0, 19.0, 126.5, 127.0, 127.5, 432.0, 447.0, 448.0, 449.0, 464.0, 465.0, 480.0, 1e-9]
EDGES += [53248.0, 57344.0, 57345.0, 61440.0, 65504.0, float("inf"), float("nan")]


def codes_of(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Nearest codes by looking at all of them: values [T, Hkv, D], scale [Hkv] -> uint8 [T, Hkv, D]."""
    scaled = (values.float() * (1.0 / scale)[:, None]).double()
    table = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    usable = torch.nonzero(table.abs() <= LARGEST[dtype])[:, 0]
    usable = usable[torch.argsort(table[usable], stable=True)]
    ordered = table[usable]
    above = torch.searchsorted(ordered, scaled.nan_to_num(0.0)).clamp(0, len(usable) - 1)
    below = (above - 1).clamp(min=0)
    up, down = ordered[above] - scaled, scaled - ordered[below]
    even = usable[above] % 2 == 0
    nearest = usable[torch.where((up < down) | ((up == down) & even), above, below)]
    nearest = torch.where(scaled.isinf(), usable[torch.where(scaled > 0, len(usable) - 1, 0)], nearest)
    if dtype == torch.int8:
        return nearest.masked_fill(scaled.isnan(), 0).to(torch.uint8)
    negative = torch.signbit(scaled) & (table[nearest] == 0)
    nearest = torch.where(table[nearest] == 0, torch.where(negative, 0x80, 0), nearest)
    return nearest.masked_fill(scaled.isnan(), 0x7F).to(torch.uint8)


@pytest.mark.parametrize("cache_dtype", list(LARGEST), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided", "unaligned"])
def test_reshape_and_cache_quantises(backend, seed, dtype, cache_dtype, layout):
    rng = random.Random(seed)
    device = backend[1]
    generator = torch.Generator().manual_seed(seed)
    num_blocks, block_size = rng.choice([(40, 1), (10, 4), (5, 8), (5, 16), (5, 64)])
    num_kv_heads = rng.choice([1, 2, 5])
    head_size = rng.choice([32, 64, 80, 128, 256])
    codes = torch.full((num_blocks, 2, 2, num_kv_heads, block_size, head_size), 0xAB, dtype=torch.uint8)
    num_tokens = rng.randrange(2, 40)
    slots = torch.tensor(rng.sample(range(num_blocks * block_size), num_tokens))
    slots[torch.rand(num_tokens, generator=generator) < 0.2] = -1
    scales = torch.rand(2, num_kv_heads, generator=generator) * 0.1 + 0.001
    scales[:, 0] = 0.25
    padding = int(layout == "unaligned")
    qkv = torch.randn(num_tokens, 3 * num_kv_heads, head_size + padding, generator=generator)
    qkv *= 10.0 ** torch.randint(-4, 4, qkv.shape, generator=generator)
    edges = 0.25 * torch.tensor(EDGES)
    edges = torch.cat([edges, -edges])[torch.randperm(2 * len(EDGES), generator=generator)]
    picked = torch.rand(qkv.shape, generator=generator) < 0.5
    qkv[picked] = edges.repeat(qkv.numel() // len(edges) + 1)[: int(picked.sum())]
    qkv = qkv.to(dtype)
    parts = [slice(a, a + num_kv_heads) for a in (num_kv_heads, 2 * num_kv_heads)]
    expected = codes.clone()
    for i, part in enumerate(parts):
        new = codes_of(qkv[:, part, padding:], scales[i], cache_dtype)
        for t, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[slot // block_size, 1, i, :, slot % block_size] = new[t]
    actual = codes.view(cache_dtype).to(device)
    key, value = (qkv.to(device)[:, part, padding:] for part in parts)
    if layout == "contiguous":
        key, value = key.contiguous(), value.contiguous()
    k_scale, v_scale = scales.to(device)
    cupaged.reshape_and_cache(key, value, actual[:, 1], slots.to(device), k_scale, v_scale)
    assert torch.equal(actual.cpu().view(torch.uint8), expected)


@pytest.mark.parametrize("cache_dtype", list(LARGEST), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_quantised_to_the_nearest_code(backend, seed, dtype, cache_dtype):
    """All numbers of 16 bits, NaN of every sign and payload included; as many drawn ones of 32."""
    device = backend[1]
    if dtype == torch.float32:
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(-(2**31), 2**31, (65536,), generator=generator).to(torch.int32)
        bits = torch.where(bits & 1 == 0, bits, bits & 0x83FFFFFF | 0x3C000000)  # half of them near 1
    else:
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    key = bits.view(dtype).view(256, 1, 256)
    cache = torch.full((2, 2, 1, 128, 256), 0xAB, dtype=torch.uint8).view(cache_dtype).to(device)
    one = torch.ones(1)
    slots = torch.arange(256, device=device)
    keys, ones = key.to(device), one.to(device)
    cupaged.reshape_and_cache(keys, -keys, cache, slots, ones, ones)
    actual = cache.cpu().view(torch.uint8).transpose(0, 1).reshape(2, 256, 1, 256)
    assert torch.equal(actual[0], codes_of(key, one, cache_dtype))
    assert torch.equal(actual[1], codes_of(-key, one, cache_dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, *LARGEST], ids=str)
@pytest.mark.parametrize("block_shape", [(2, 2, 8, 32), (3, 2, 1, 16, 64), (2, 1, 8, 8)])
def test_copy_blocks(backend, seed, dtype, block_shape):
    rng = random.Random(seed)
    cache = torch.randn(20, *block_shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    blocks = rng.sample(range(20), 2 * rng.randrange(1, 8))
    pairs = [(blocks[i], blocks[i + 1]) for i in range(0, len(blocks), 2)]
    pairs.append((pairs[0][0], next(b for b in range(20) if b not in blocks)))  # a source may repeat
    expected = cache.clone()
    for source, target in pairs:
        expected[target] = cache[source]
    actual = cache.to(backend[1])
    cupaged.copy_blocks(actual, torch.tensor(pairs, device=backend[1]))
    assert same(actual, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, *LARGEST], ids=str)
@pytest.mark.parametrize("direction", ["out", "in"])
def test_swap_blocks(backend, seed, dtype, direction):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, 8, 32)
    gpu = torch.randn(12, *shape, generator=generator).to(dtype).to(backend[1])
    cpu = torch.randn(9, *shape, generator=generator).to(dtype)
    if backend[1] == "cuda":
        cpu = cpu.pin_memory()
    src, dst = (gpu, cpu) if direction == "out" else (cpu, gpu)
    count = rng.randrange(1, 9)
    mapping = torch.tensor(
        list(zip(rng.sample(range(src.shape[0]), count), rng.sample(range(dst.shape[0]), count)))
    )
    expected = dst.cpu().clone()
    for source, target in mapping.tolist():
        expected[target] = src[source].cpu()
    cupaged.swap_blocks(src, dst, mapping)
    if backend[1] == "cuda":
        torch.cuda.synchronize()
    assert same(dst, expected)


class Recorder:
    """A launcher that keeps the pairs which a kernel copied, over another that runs it."""

    def __init__(self, real, reaches=True):
        self._real, self._reaches = real, reaches
        self.pairs: list[tuple[int, int]] = []

    def __getattr__(self, name):
        return getattr(self._real, name)

    def reaches(self, tensor, device):
        return self._reaches

    def prepare(self, call, device):
        launch = self._real.prepare(call, device)
        return lambda tensors: self.pairs.extend(map(tuple, tensors[2].tolist())) or launch(tensors)


@pytest.mark.parametrize("case", ["mixed", "strided", "out of reach", "odd size", "odd place", "odd stride"])
def test_long_runs_are_swapped_by_copies_and_the_others_by_a_kernel(seed, monkeypatch, case):
    """A block is 64 bytes, and 192 make a long run. Where no kernel can help everything is copied."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build the emulation with")
    from tests.cuda_host import emulator

    launcher = Recorder(emulator.HostLauncher(seed), reaches=case != "out of reach")
    kernels = Kernels(launcher, copy_engine_bytes=192)
    monkeypatch.setattr(backends, "for_device", lambda device_type: kernels)
    size = 15 if case == "odd size" else 16
    # Elements from a block to the next in source and target, and before the target's first.
    src_stride, dst_stride, before = {"strided": (32, 48, 0), "odd stride": (16, 17, 0)}.get(
        case, (size, size, int(case == "odd place"))
    )
    memory = torch.randn(2, 2000, generator=torch.Generator().manual_seed(seed))
    src = memory[0].as_strided((20, size), (src_stride, 1))
    dst = memory[1].as_strided((30, size), (dst_stride, 1), 2000 + before)
    short, long = [(3, 9), (4, 10), (0, 29), (19, 2)], [(10, 14), (11, 15), (12, 16)]
    pairs = short[:2] + long + short[2:]
    expected = dst.clone()
    for source, target in pairs:
        expected[target] = src[source]
    cupaged.swap_blocks(src, dst, torch.tensor(pairs))
    assert torch.equal(dst, expected)
    # With a stride no block is next to another.
    assert launcher.pairs == {"mixed": short, "strided": pairs}.get(case, [])


def test_empty_calls_write_nothing(backend):
    device = backend[1]
    cache = torch.randn(3, 2, 1, 8, 32, device=device)
    before = cache.clone()
    none = torch.empty(0, 1, 32, device=device)
    cupaged.reshape_and_cache(none, none, cache, torch.empty(0, dtype=torch.int64, device=device))
    cupaged.reshape_and_cache(
        torch.randn(2, 1, 32, device=device),
        torch.randn(2, 1, 32, device=device),
        cache,
        torch.tensor([-1, -1], device=device),
    )
    cupaged.copy_blocks(cache, torch.empty(0, 2, dtype=torch.int64, device=device))
    cupaged.swap_blocks(cache, cache, torch.empty(0, 2, dtype=torch.int64))
    assert torch.equal(cache, before)
