"""Plans that are kept: what a call launches is the same whether or not calls like it came before."""

from __future__ import annotations

import random

import pytest
import torch

import cupaged
from cupaged import backends
from cupaged.backends.cuda import kernels
from cupaged.backends.cuda.kernels import Kernels
from cupaged.sampling_checks import SETTINGS


class Recorder:
    """A launcher that keeps what it was told to launch, on which tensors."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.prepared = 0

    def arch(self, device):
        return "90a"

    def sm_count(self, device):
        return 4

    def empty(self, shape, dtype, device):
        return torch.zeros(shape, dtype=dtype)

    def prepare(self, call, device):
        self.prepared += 1

        def launch(tensors):
            self.launches.append((call, device, [None if t is None else (t.dtype, t.shape) for t in tensors]))

        return launch


@pytest.fixture
def recorded(monkeypatch):
    """Makes the public functions launch on a new recorder, and gives it."""

    def start() -> Recorder:
        recorder = Recorder()
        backend = Kernels(recorder)
        monkeypatch.setattr(backends, "for_device", lambda device_type: backend)
        return recorder

    return start


def misaligned(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """The same values ``by`` elements further into memory that starts at a multiple of 64 bytes."""
    flat = torch.empty(tensor.numel() + by, dtype=tensor.dtype)
    return flat[by:].view(tensor.shape).copy_(tensor)


class Calls:
    """Draws calls that differ in one thing or another, from few values each: many are alike."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._kept: dict[tuple, torch.Tensor] = {}

    def _tensor(self, *shape: int, dtype: torch.dtype, by: int = 0) -> torch.Tensor:
        """One tensor for each description, so that addresses are the same in every run."""
        key = (shape, dtype, by)
        if key not in self._kept:
            self._kept[key] = misaligned(torch.zeros(shape, dtype=dtype), by)
        return self._kept[key]

    def attention(self):
        pick = self._rng.choice
        dtype, heads = pick([torch.float32, torch.bfloat16]), pick([2, 4])
        seqs, width, block = pick([1, 3]), pick([4, 80]), pick([8, 16])
        query_len = pick([None, None, 1, 4, 16])
        tokens = seqs * (query_len or 1)
        wide = self._tensor(tokens, heads, 2 * 64, dtype=dtype, by=pick([0, 0, 1]))
        query = wide[..., :64] if pick([True, False]) else self._tensor(tokens, heads, 64, dtype=dtype)
        quantised = pick([None, None, torch.int8])
        cache = self._tensor(9, 2, 2, 2, block, 64, dtype=quantised or dtype)[:, pick([0, 1])]
        one = self._tensor(2, dtype=torch.float32)
        scales = {} if quantised is None else {"k_scale": one + 1, "v_scale": one + 1}
        starts = None if query_len is None else torch.arange(seqs + 1, dtype=torch.int32) * query_len
        out = pick([None, self._tensor(tokens, heads, 64, dtype=dtype, by=pick([0, 2]))])
        options = {
            "scale": pick([None, 0.5]),
            "causal": pick([True, False]),
            "sliding_window": pick([None, 20]),
            "logits_soft_cap": pick([None, 30.0]),
            "max_query_len": None if starts is None else pick([None, query_len]),
            "batch_invariant": pick([True, False]),
            "shared_prefix": pick([True, False]),
            "return_lse": pick([True, False]),
            **scales,
        }
        lengths = torch.full((seqs,), 16, dtype=torch.int32)
        tables = self._tensor(seqs, width, dtype=torch.int32)
        arguments = query, cache, tables, lengths, starts
        return lambda: cupaged.paged_attention(*arguments, **options, out=out)

    def cache_write(self):
        pick = self._rng.choice
        dtype, tokens = pick([torch.float16, torch.float32]), pick([1, 5])
        cache = self._tensor(9, 2, 2, 2, 8, 64, dtype=dtype)[:, pick([0, 1])]
        key, value = (self._tensor(tokens, 2, 64, dtype=dtype, by=pick([0, 0, 1])) for _ in range(2))
        return lambda: cupaged.reshape_and_cache(key, value, cache, torch.arange(tokens))

    def fused(self):
        pick = self._rng.choice
        dtype, tokens, by = pick([torch.float16, torch.float32]), pick([1, 5]), pick([0, 0, 1, 2, 4])
        numbers = {"epsilon": pick([1e-6, 1e-5]), "weight_offset": pick([0.0, 1.0])}
        operator = pick(["rms_norm", "act_and_mul", "rope_and_cache", "sample"])
        if operator == "sample":
            x = self._tensor(tokens, pick([64, 60]), dtype=dtype, by=by)
            settings = {name: torch.zeros(tokens, dtype=kind) for name, kind in SETTINGS.items()}
            return lambda: cupaged.sample(x, **settings)
        if operator == "act_and_mul":
            x, activation = self._tensor(tokens, 64, dtype=dtype, by=by), pick(["silu", "gelu"])
            return lambda: cupaged.act_and_mul(x, activation=activation)
        if operator == "rms_norm":
            x, residual = (self._tensor(tokens, 64, dtype=dtype, by=by) for _ in range(2))
            weights = [self._tensor(64, dtype=torch.float32, by=pick([0, 0, 1])) for _ in range(2)]
            more = pick([{}, {"residual": residual}, {"residual": residual, "input_weight": weights[1]}])
            return lambda: cupaged.rms_norm(x, weights[0], **more, **numbers)
        query, key, value = (self._tensor(tokens, 2, 64, dtype=dtype, by=by) for _ in range(3))
        cache = self._tensor(3, 2, 2, 8, 64, dtype=dtype)
        angles = pick([None, self._tensor(tokens, pick([16, 12]), dtype=torch.float32, by=pick([0, 1]))])
        weight = pick([None, self._tensor(64, dtype=dtype, by=pick([0, 1]))])
        options = {"interleaved": pick([True, False]), "query_weight": weight, "key_weight": weight} | numbers
        slots = self._tensor(tokens, dtype=torch.int64, by=pick([0, 1]))
        arguments = query, key, value, angles, angles, cache, slots
        return lambda: cupaged.rope_and_cache(*arguments, **options)


@pytest.mark.parametrize("kept", [kernels.PLANS, 3])
def test_a_kept_plan_is_the_one_that_would_be_made(recorded, monkeypatch, seed, kept):
    monkeypatch.setattr(kernels, "PLANS", kept)
    draw = Calls(seed)
    draws = draw.attention, draw.cache_write, draw.attention, draw.fused
    calls = [draws[i % 4]() for i in range(600)]
    together = recorded()
    for call in calls:
        call()
    alone = []
    for call in calls:
        recorder = recorded()
        call()
        alone += recorder.launches
    assert together.launches == alone
    if kept > 3:
        assert together.prepared < len(alone)  # calls were alike


def test_a_refused_layout_is_refused_again(recorded):
    """What was wrong once is no known layout afterwards."""
    recorded()
    cache, key = torch.zeros(2, 2, 1, 8, 8), torch.zeros(3, 1, 8)
    for _ in range(3):
        with pytest.raises(ValueError, match="slot_mapping must be"):
            cupaged.reshape_and_cache(key, key, cache, torch.zeros(2, dtype=torch.int64))


def test_what_is_not_aligned_is_not_taken_for_something_else(recorded):
    """Calls that differ in which tensor begins 8 bytes after a multiple of 16, in any order."""
    tensors = {name: torch.zeros(3, 2, 64) for name in ("query", "key", "value")}
    tensors |= {name: torch.zeros(3, 32) for name in ("cos", "sin")}
    tensors |= {"slot_mapping": torch.arange(3)}
    tensors |= {name: torch.zeros(64) for name in ("query_weight", "key_weight")}
    moved = {name: misaligned(tensor, 8 // tensor.element_size()) for name, tensor in tensors.items()}
    cache = torch.zeros(2, 2, 2, 8, 64)
    for names in (["slot_mapping", *tensors], [*reversed(tensors), "slot_mapping"]):
        recorder = recorded()
        for name in names:
            arguments = {n: misaligned(tensor, 0) for n, tensor in tensors.items()} | {name: moved[name]}
            cupaged.rope_and_cache(**arguments, kv_cache=cache)
        aligned = [bool(call.arguments.aligned) for call, *_ in recorder.launches]
        assert aligned == [name == "slot_mapping" for name in names]


@pytest.mark.parametrize("operator", ["reshape_and_cache", "rope_and_cache"])
def test_a_cache_that_is_not_aligned_is_refused_every_time(recorded, operator):
    recorded()
    cache, key = torch.zeros(2, 2, 1, 8, 8), torch.zeros(3, 1, 8)

    def write(cache):
        if operator == "reshape_and_cache":
            cupaged.reshape_and_cache(key, key, cache, torch.arange(3))
        else:
            cupaged.rope_and_cache(key.clone(), key, key, None, None, cache, torch.arange(3))

    for by in (0, 1, 1, 0):
        moved = misaligned(cache, by)
        if by:
            with pytest.raises(ValueError, match="kv_cache must start at a multiple of 16 bytes"):
                write(moved)
        else:
            write(moved)
