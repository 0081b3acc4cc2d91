"""What only the CPU backend promises: results that do not depend on threads, kernels compiled once."""

from __future__ import annotations

import ctypes
import math
import os
import random
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import cupaged
from benchmarks.cases import Problem, draw
from cupaged import checks
from cupaged.backends.cpu import backend as cpu
from cupaged.backends.cpu import launch
from cupaged.fused_checks import ACTIVATIONS
from cupaged.layout import Layout

from .narrower import check_on_narrower_cpu

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def attend(problem: Problem) -> torch.Tensor:
    out = torch.full_like(problem.query, float("nan"))
    tensors = problem.query, problem.kv_cache, problem.block_tables, problem.seq_lens, problem.query_start_loc
    cpu.paged_attention(*tensors, out, None, problem.params(), Layout())
    return out


@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(seed, mode, dtype):
    problem = draw(
        seed,
        dtype=dtype,
        head_size=64,
        block_size=16,
        num_kv_heads=3,
        group=3,
        seq_lens=[1, 700, 1500, 64],
        query_lens=None if mode == "decode" else [1, 100, 3, 64],
    )
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(attend(problem))
    assert torch.equal(*results)


def test_kernels_run_on_the_threads_of_torch():
    code = (
        "import os, torch, cupaged; torch.set_num_threads(2)\n"
        "def threads(): return len(os.listdir('/proc/self/task'))\n"
        "x = torch.ones(1000, 1000); y = x + x; before = threads()\n"
        "cache, mapping = torch.zeros(2, 2, 8, 256, 64), torch.tensor([[0, 1]])\n"
        "cupaged.copy_blocks(cache, mapping); y = x + x\n"
        "print(threads() - before, torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "2"], done.stderr


def test_without_an_openmp_library_a_pool_of_threads_does_the_work(seed, monkeypatch):
    problem = draw(
        seed, dtype=torch.float32, head_size=64, block_size=16, num_kv_heads=2, group=2, seq_lens=[1500, 9]
    )
    results, used = [], []
    pool = launch._pool()

    def team(work, data, threads, flags):
        used.append(threads)
        pool(work, data, threads, flags)

    counted = launch._TEAM(team)
    torch.set_num_threads(2)
    for address in (launch._team(), ctypes.cast(counted, ctypes.c_void_p).value):
        monkeypatch.setattr(launch, "_team", lambda address=address: address)
        results.append(attend(problem))
    assert torch.equal(*results)
    assert used == [2, 2]  # attention, and the merge of KV splits


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_what_the_kernel_refuses_is_what_the_check_refuses(seed, mode):
    """The kernel checks lengths and ids itself, and the check with torch's operations finds the reason."""
    rng = random.Random(seed)
    for _ in range(200):
        lens = [rng.choice([0, 1, 8, rng.randint(1, 60)]) for _ in range(rng.randint(1, 4))]
        queries = None if mode == "decode" else [rng.randint(0, length) for length in lens]
        problem = draw(
            rng.randrange(2**32),
            dtype=torch.float32,
            head_size=8,
            block_size=8,
            num_kv_heads=1,
            group=1,
            seq_lens=lens,
            query_lens=queries,
        )
        window = rng.choice([None, 1, 7, 30])
        changed = [problem.block_tables, problem.seq_lens]
        changed += [] if problem.query_start_loc is None else [problem.query_start_loc]
        values = rng.choice(changed).view(-1)
        if values.numel() and rng.random() < 0.9:
            values[rng.randrange(values.numel())] = rng.choice(
                [-(2**31), -1, 0, 1, 8, 9, 61, 10**6, 2**31 - 1]
            )
        tensors = (problem.query, problem.kv_cache, problem.block_tables, problem.seq_lens)
        try:
            checks.attention_ids(*tensors, problem.query_start_loc, window)
            expected = None
        except ValueError as error:
            expected = str(error)
        out = torch.full_like(problem.query, float("nan"))
        params = cpu.AttentionParams(scale=1.0, sliding_window=window)
        refusal = nullcontext() if expected is None else pytest.raises(ValueError, match=re.escape(expected))
        with refusal:
            cpu.paged_attention(*tensors, problem.query_start_loc, out, None, params, Layout())
        assert expected is None or out.isnan().all()  # nothing was written


def test_bfloat16_is_rounded_to_nearest_even():
    """A sequence of two equal keys gives the mean of two values: a tie between two bfloat16 numbers."""
    low = torch.tensor([1.0, 1.0078125, -1.0, -1.0078125, 2.0, 2.015625, 3e38, 0.0]).to(torch.bfloat16)
    high = torch.tensor([1.0078125, 1.015625, -1.0078125, -1.015625, 2.015625, 2.03125, 3e38, 0.0])
    high = high.to(torch.bfloat16)
    kv_cache = torch.zeros(1, 2, 1, 8, 8, dtype=torch.bfloat16)
    kv_cache[0, 1, 0, 0], kv_cache[0, 1, 0, 1] = low, high
    query, out = torch.zeros(1, 1, 8, dtype=torch.bfloat16), torch.empty(1, 1, 8, dtype=torch.bfloat16)
    params = cpu.AttentionParams(scale=1.0)
    table = torch.zeros(1, 1, dtype=torch.int32)
    cpu.paged_attention(
        query, kv_cache, table, torch.tensor([2], dtype=torch.int32), None, out, None, params, Layout()
    )
    assert torch.equal(out[0, 0], ((low.float() + high.float()) / 2).to(torch.bfloat16))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_accurate_where_they_vanish(activation):
    """To some units in the last place of the result, where 1 + erf or 1 + tanh would have no digit left."""
    gate = torch.linspace(-6.0, 9.0, 20001)
    out = cupaged.act_and_mul(torch.stack([gate, torch.ones_like(gate)], 1), activation=activation)
    x = gate.double()
    exact = {
        "silu": x * torch.sigmoid(x),
        "gelu": x * torch.special.erfc(-x / math.sqrt(2)) / 2,
        "gelu_tanh": x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    }[activation]
    error = (out[:, 0].double() - exact).abs() / exact.abs().clamp(min=1e-30)
    assert error.max() < 4e-6


@pytest.mark.matrix
def test_a_second_process_compiles_nothing(tmp_path):
    code = (
        "import torch, cupaged; from cupaged.backends.cpu import memory, prepared\n"
        "cache = torch.zeros(2, 2, 1, 8, 8); mapping = torch.tensor([[0, 1]])\n"
        "cupaged.copy_blocks(cache, mapping)\n"
        "print(prepared.kernel_of(memory.build_move_blocks, memory.Blocks).cache_hits)"
    )
    seen = []
    for _ in range(2):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout.strip())
    assert seen == ["0", "2"]  # the entry and the work


@pytest.mark.matrix  # the kernels are compiled again, for that CPU
@pytest.mark.parametrize(
    ("file", "which"),
    [
        ("test_attention.py", "test_decode and 80 and bfloat16"),
        ("test_attention.py", "test_quantised_cache and decode and float32 and e4m3"),
        ("test_mla.py", "test_sizes and bfloat16"),
        ("test_norm.py", "bfloat16"),
        ("test_activation.py", "bfloat16"),
        ("test_rope.py", "test_rope_and_cache and bfloat16 and None"),
        ("test_sample.py", "not cuda"),
    ],
)
def test_results_are_right_on_a_cpu_with_narrower_registers(file, which):
    check_on_narrower_cpu("-m", "", f"tests/kernels/{file}", "--backend", "cpu", "-k", which)
