"""What only the CPU backend promises: results that do not depend on threads, kernels compiled once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases import draw
from cupaged.backends.cpu import backend as cpu
from cupaged.backends.cpu import ir

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
        out = torch.full_like(problem.query, float("nan"))
        cpu.paged_attention(
            problem.query,
            problem.kv_cache,
            problem.block_tables,
            problem.seq_lens,
            problem.query_start_loc,
            out,
            None,
            problem.params(),
        )
        results.append(out)
    assert torch.equal(*results)


def test_torch_keeps_its_number_of_threads():
    """numba's OpenMP pool, as it starts, sets the number of threads that torch reads."""
    code = (
        "import torch; torch.set_num_threads(1); import numba, cupaged\n"
        "cupaged.copy_blocks(torch.zeros(2, 2, 1, 8, 8), torch.tensor([[0, 1]]))\n"
        "print(torch.get_num_threads(), numba.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"], done.stderr


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
    cpu.paged_attention(query, kv_cache, table, torch.tensor([2], dtype=torch.int32), None, out, None, params)
    assert torch.equal(out[0, 0], ((low.float() + high.float()) / 2).to(torch.bfloat16))


def test_a_second_process_compiles_nothing(tmp_path):
    code = (
        "import torch, numba, cupaged; from cupaged.backends.cpu import backend, memory\n"
        "cache = torch.zeros(2, 2, 1, 8, 8); mapping = torch.tensor([[0, 1]])\n"
        "cupaged.copy_blocks(cache, mapping)\n"
        "stats = backend._kernel(memory.build_move_blocks).stats\n"
        "print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))"
    )
    seen = []
    for _ in range(2):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout.strip())
    assert seen == ["0 1", "1 0"]


@pytest.mark.matrix  # the kernels are compiled again, for that CPU
@pytest.mark.parametrize(
    "which", ["test_decode and 80 and bfloat16", "test_quantised_cache and decode and float32 and e4m3"]
)
def test_results_are_right_on_a_cpu_with_narrower_registers(which):
    if ir.NATIVE != 16:
        pytest.skip("this CPU has no AVX-512: every other test is this one")
    features = ",".join(
        f"+{f}" for f in ("avx", "avx2", "fma", "f16c", "bmi", "bmi2", "popcnt", "lzcnt", "sse4.2")
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "tests/kernels/test_attention.py"]
    command += ["--backend", "cpu", "-k", which]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout
