"""`reachable` lists what the public functions launch: all of it, and nothing else."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

import cupaged
from benchmarks.sampling_cases import neutral
from cupaged import backends
from cupaged.backends.cuda import specs as kernel_specs
from cupaged.backends.cuda.kernels import Kernels
from cupaged.backends.cuda.reachable import reachable
from cupaged.backends.cuda.specs import KernelSpec
from cupaged.checks import BLOCK_SIZES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
BLOCK_SIZE = 16
LONG = 600 // BLOCK_SIZE  # blocks of a sequence that is divided into KV splits


class Recorder:
    """A launcher that keeps which kernels it was asked for, and launches nothing."""

    def __init__(self, arch: str) -> None:
        self.specs: set[KernelSpec] = set()
        self._arch = arch

    def arch(self, device):
        return self._arch

    def sm_count(self, device):
        return 4

    def empty(self, shape, dtype, device):
        return torch.empty(tuple(shape), dtype=dtype)

    def reaches(self, tensor, device):
        return True

    def upload(self, tensor, device):
        return tensor

    def prepare(self, call, device):
        self.specs.add(call.spec)
        return lambda tensors: None


@pytest.fixture
def launched(monkeypatch):
    """Make the public functions plan for an architecture; gives the set of kernels that they ask for."""

    def on(arch: str) -> set[KernelSpec]:
        recorder = Recorder(arch)
        kernels = Kernels(recorder)
        monkeypatch.setattr(backends, "for_device", lambda device_type: kernels)
        return recorder.specs

    return on


def attend(dtype: torch.dtype, cache_dtype: torch.dtype, head_size: int, group: int, decodes: bool) -> None:
    """Call attention for 32 sequences that share a long prompt, or one of 32 query tokens."""
    num_seqs = 32 if decodes else 1
    ones = torch.ones(1)
    cupaged.paged_attention(
        torch.empty(32, group, head_size, dtype=dtype),
        torch.empty(1, 2, 1, BLOCK_SIZE, head_size, dtype=cache_dtype),
        torch.zeros(num_seqs, LONG, dtype=torch.int32),
        torch.full((num_seqs,), LONG * BLOCK_SIZE, dtype=torch.int32),
        None if decodes else torch.tensor([0, 32], dtype=torch.int32),
        shared_prefix=decodes,
        **({"k_scale": ones, "v_scale": ones} if cache_dtype in QUANTISED else {}),
    )


def attend_latents(dtype: torch.dtype, sizes: tuple[int, int], num_heads: int) -> None:
    """Call latent attention for 2 sequences of a token, and for one of 2."""
    for starts in (None, torch.tensor([0, 2], dtype=torch.int32)):
        num_seqs = 2 if starts is None else 1
        cupaged.mla_attention(
            torch.empty(2, num_heads, sizes[0], dtype=dtype),
            torch.empty(1, BLOCK_SIZE, sizes[0], dtype=dtype),
            torch.zeros(num_seqs, LONG, dtype=torch.int32),
            torch.full((num_seqs,), LONG * BLOCK_SIZE, dtype=torch.int32),
            starts,
            scale=1.0,
            value_size=sizes[1],
        )


# Without tensor cores, with them, with less shared memory, with warpgroups. Each other is like one of these.
DAILY_ARCHS = ("75", "80", "86", "90a")
ARCHS = [
    arch if arch in DAILY_ARCHS else pytest.param(arch, marks=pytest.mark.matrix)
    for arch in kernel_specs.ARCHS
]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_call_and_only_calls_launch_what_is_listed(arch, launched):
    """All dtypes, head sizes (those that are refused too) and tiles of query heads."""
    specs = launched(arch)
    for dtype, cache_dtype in product(DTYPES, (*DTYPES, *QUANTISED)):
        for head_size in range(1, 273):
            try:
                attend(dtype, cache_dtype, head_size, 1, decodes=False)
            except ValueError:
                continue
            for group in (1, 2, 3, 5, 9):
                attend(dtype, cache_dtype, head_size, group, decodes=True)
        if cache_dtype == dtype or cache_dtype in QUANTISED:
            key, cache = torch.empty(1, 1, 16, dtype=dtype), torch.empty(1, 2, 1, 8, 16, dtype=cache_dtype)
            scales = dict.fromkeys(("k_scale", "v_scale"), torch.ones(1)) if cache_dtype != dtype else {}
            cupaged.reshape_and_cache(key, key, cache, torch.zeros(1).long(), **scales)
            cupaged.rope_and_cache(key, key, key, None, None, cache, torch.zeros(1).long(), **scales)
        cupaged.merge_attention_states(torch.empty(2, 1, 1, 8, dtype=dtype), torch.empty(2, 1, 1))
        for sizes in ((192, 104), (320, 8), (560, 512)):
            for num_heads in (3, 17, 128):
                attend_latents(dtype, sizes, num_heads)
        latents = torch.empty(1, 8, dtype=dtype), torch.empty(1, 16, dtype=dtype)
        cupaged.concat_and_cache_mla(*latents, torch.empty(1, 8, 24, dtype=dtype), torch.zeros(1).long())
        for size in (8, 7, 5000):
            cupaged.rms_norm(torch.empty(1, size, dtype=dtype), torch.empty(size))
            cupaged.act_and_mul(torch.empty(1, 2 * size, dtype=dtype), activation="silu")
            cupaged.sample(torch.empty(1, size, dtype=dtype), **neutral(1))
    for unit in (1, 16):
        cupaged.copy_blocks(torch.empty(2, unit, dtype=torch.int8), torch.tensor([[0, 1]]))
    listed = reachable(arch)
    assert len(listed) == len(set(listed))
    assert [str(spec) for spec in specs - set(listed)] == []
    assert [str(spec) for spec in set(listed) - specs] == []


def test_drawn_calls_launch_what_is_listed(launched, seed):
    """Any settings, numbers of tokens and heads, layouts and lengths."""
    rng = random.Random(seed)
    listed = {arch: set(reachable(arch)) for arch in kernel_specs.ARCHS}
    for _ in range(300):
        arch = rng.choice(kernel_specs.ARCHS)
        specs = launched(arch)
        dtype = rng.choice(DTYPES)
        cache_dtype = rng.choice((dtype, *QUANTISED))
        quantised = cache_dtype in QUANTISED
        head_size = rng.randrange(16, 257, 16) if quantised else rng.randrange(8, 257, 8)
        num_kv_heads, block_size = rng.randint(1, 3), rng.choice(BLOCK_SIZES)
        num_heads, num_seqs = num_kv_heads * rng.choice([1, 2, 3, 4, 7, 8, 16, 71]), rng.randint(1, 9)
        width = -(-rng.choice([1, 40, 600, 5000]) // block_size)
        lengths = torch.tensor([rng.randint(0, width * block_size) for _ in range(num_seqs)]).int()
        starts = [0]
        for length in lengths.tolist():
            starts.append(starts[-1] + min(length, rng.choice([1, 1, 5, 40])))
        decodes = rng.random() < 0.4
        num_tokens = num_seqs if decodes else starts[-1] + rng.randint(0, 3)
        memory = torch.empty(num_tokens, num_heads, head_size + rng.choice([0, 3, 8]), dtype=dtype)
        scales = dict.fromkeys(("k_scale", "v_scale"), torch.ones(num_kv_heads)) if quantised else {}
        cupaged.paged_attention(
            memory[..., :head_size],
            torch.empty(1, 2, num_kv_heads, block_size, head_size, dtype=cache_dtype),
            torch.zeros(num_seqs, width, dtype=torch.int32),
            lengths,
            None if decodes else torch.tensor(starts, dtype=torch.int32),
            causal=rng.random() < 0.7,
            sliding_window=rng.choice([None, None, 1, 100, 3000]),
            logits_soft_cap=rng.choice([None, 30.0]),
            alibi_slopes=rng.choice([None, torch.ones(num_heads)]),
            sinks=rng.choice([None, torch.ones(num_heads)]),
            max_query_len=rng.choice([None, 1, 8, 9]),
            batch_invariant=rng.random() < 0.5,
            shared_prefix=rng.random() < 0.5,
            return_lse=rng.random() < 0.5,
            **scales,
        )
        assert specs <= listed[arch], (arch, [str(spec) for spec in specs - listed[arch]])


@pytest.mark.parametrize("arch", kernel_specs.ARCHS)
def test_what_is_compiled_ahead_of_time_is_listed(arch):
    assert set(kernel_specs.variants(arch)) <= set(reachable(arch))


def test_usual_calls_launch_what_is_compiled_ahead_of_time(launched):
    """On Hopper in the most common head size: plain decode and prefill, over 16-bit and quantised caches."""
    specs = launched("90a")
    for dtype, cache_dtype in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.int8)):
        for group in (1, 40):
            attend(dtype, cache_dtype, 128, group, decodes=True)
            attend(dtype, cache_dtype, 128, group, decodes=False)
    assert specs <= set(kernel_specs.variants("90a"))
