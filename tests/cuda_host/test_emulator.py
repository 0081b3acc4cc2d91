"""The emulation itself: it must give right results, and it must catch what is planted in `kernels/`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cupaged.backends.cuda.specs import KernelSpec

from .emulator import EmulationError, HostLauncher

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulation with")

KERNELS = Path(__file__).parent / "kernels"
SEEDS = range(8)


def launch(name, args, *, grid=1, block=32, smem=0, seed=0, **defines):
    spec = KernelSpec(f"{name}.cu", name, tuple((k, str(v)) for k, v in defines.items()))
    HostLauncher(seed, KERNELS).launch(spec, (grid, 1, 1), (block, 1, 1), smem, args)


def floats(n: int) -> torch.Tensor:
    return torch.arange(1.0, n + 1)


# Each returns the result and what it must be.


def missing_barrier(seed, fault):
    x, out = floats(256), torch.zeros(256)
    launch("missing_barrier", (x, out), grid=2, block=128, seed=seed, FAULT=fault)
    return out, x.view(2, 128).flip(1).flatten()


def reused_buffer(seed, fault):
    x, out = floats(128), torch.zeros(128)
    launch("reused_buffer", (x, out, np.int32(5)), block=128, seed=seed, FAULT=fault)
    return out, x.roll(-5 * 32)


def missing_warp_barrier(seed, fault):
    x, out = floats(32), torch.zeros(32)
    launch("missing_warp_barrier", (x, out), seed=seed, FAULT=fault)
    return out, x.flip(0)


def missing_wait(seed, fault):
    x, out = floats(256), torch.zeros(256)
    launch("missing_wait", (x, out), seed=seed, FAULT=fault)
    expected = x.clone().view(64, 4)
    expected[33::2] = 0
    return out, expected.flatten()


def foreign_copy(seed, fault):
    x, out = floats(256), torch.zeros(256)
    launch("foreign_copy", (x, out), block=64, seed=seed, FAULT=fault)
    return out, x.view(64, 4).flip(0).flatten()


def source_changes(seed, fault):
    x, out = floats(128), torch.zeros(128)
    launch("source_changes", (x, out), seed=seed, FAULT=fault)
    return out, floats(128)


def reused_target(seed, fault):
    x, out = torch.zeros(512), torch.zeros(128 * 16)
    for block in range(16):
        launch("reused_target", (x, out[128 * block :][:128]), seed=100 * seed + block, FAULT=fault)
    return out, floats(4).repeat(512)


def uninitialised(seed, fault):
    x, out = floats(64), torch.zeros(64)
    launch("uninitialised", (x, out), block=64, smem=256 if fault == 2 else 0, seed=seed, FAULT=fault)
    return out, torch.full((64,), x.sum())


def wrong_blocks(seed, fault):
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    launch("wrong_blocks", (counter, out), grid=8, seed=seed, block=1, FAULT=fault)
    return out, torch.full((8,), 5, dtype=torch.int32)


WRONG_RESULTS = [
    (missing_barrier, 1),
    (reused_buffer, 1),
    (missing_warp_barrier, 1),
    (missing_wait, 1),
    (missing_wait, 2),
    (missing_wait, 3),
    (foreign_copy, 1),
    (source_changes, 1),
    (reused_target, 1),
    (uninitialised, 1),
    (uninitialised, 2),
    (uninitialised, 3),
    (uninitialised, 4),
    (wrong_blocks, 1),
]


@pytest.mark.parametrize(("case", "fault"), WRONG_RESULTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_faults_show_as_wrong_results(case, fault):
    wrong = [not torch.equal(*case(seed, fault)) for seed in SEEDS]
    assert sum(wrong) >= len(SEEDS) // 4, f"seen under {sum(wrong)} of {len(SEEDS)} seeds"


@pytest.mark.parametrize("case", dict.fromkeys(case for case, _ in WRONG_RESULTS), ids=lambda c: c.__name__)
def test_corrected_twins_give_right_results(case):
    for seed in SEEDS:
        actual, expected = case(seed, 0)
        assert torch.equal(actual, expected), f"seed {seed}"


def error_of(name, args, **options) -> str:
    try:
        launch(name, args, **options)
    except EmulationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("n", [5, 32, 1024])
@pytest.mark.parametrize("fault", range(6))
def test_global_bounds(fault, n):
    """Writes are always caught. A read is an error at the guarded end and NaN at the other."""
    errors = []
    for seed in SEEDS:
        x, out = floats(n), torch.zeros(n)
        errors.append(error_of("out_of_bounds", (x, out, np.int32(n)), block=n, seed=seed, FAULT=fault))
        right = torch.equal(out, x)
        assert (errors[-1] == "") == right if fault == 0 else errors[-1] or not right
    messages = [e for e in errors if e]
    for message in messages:
        fault_of_thread = "block (0, 0, 0), thread (" in message and "access out of bounds, at" in message
        assert fault_of_thread or "wrote outside a tensor" in message
    if fault in (2, 4, 5):
        assert len(messages) == len(SEEDS)
    elif fault and n > 5:  # 5 floats do not end at a multiple of 16 bytes
        assert messages


SHARED_FAULTS = {
    1: "access beyond its dynamic shared memory, at byte 128 of 128",
    2: "outside its dynamic shared memory",
    3: "array index out of bounds at shared_bounds.cu",
    4: "array index out of bounds at shared_bounds.cu",
    5: "not in shared memory",
}


@pytest.mark.parametrize("fault", range(6))
def test_shared_bounds(fault):
    x, out = floats(32), torch.zeros(32)
    args = (x, out, np.int32(32))
    if fault:
        with pytest.raises(EmulationError, match=SHARED_FAULTS[fault]):
            launch("shared_bounds", args, smem=128, FAULT=fault)
    else:
        launch("shared_bounds", args, smem=128, FAULT=fault)
        assert torch.equal(out, x)


DIVERGENT = {
    1: r"divergent barrier: it waits in __syncthreads at .*, but thread \(\d+, 0, 0\) in __syncthreads at",
    2: r"no thread can go on: .*__syncthreads at .*__shfl_xor_sync at",
    3: r"exited",
    4: r"divergent warp: it waits in __shfl_xor_sync at .*, but thread",
    5: r"which it is not in",
}


@pytest.mark.parametrize("fault", range(6))
def test_divergence(fault):
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    for seed in SEEDS:
        if fault:
            with pytest.raises(EmulationError, match=DIVERGENT[fault]):
                launch("divergent_barrier", (x, out), block=64, seed=seed, FAULT=fault)
        else:
            launch("divergent_barrier", (x, out), block=64, seed=seed, FAULT=fault)
            assert torch.equal(out[:32], x[:32] ^ 1)


ARITHMETIC = {
    1: "integer overflow at arithmetic.cu",
    2: "misaligned address at arithmetic.cu",
    3: "division by zero",
    4: "stack overflow",
}


@pytest.mark.parametrize("fault", range(5))
def test_arithmetic(fault):
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    args = (x, out, np.int32(1))
    if fault:
        with pytest.raises(EmulationError, match=ARITHMETIC[fault]):
            launch("arithmetic", args, FAULT=fault)
    launch("arithmetic", args, FAULT=0)  # also: an error leaves the emulation usable
    assert torch.equal(out, x[1:33])


def test_collectives():
    n = 64
    x = torch.randint(0, 100, (n,), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    x[7] = 40
    lane, base = np.arange(n) % 32, np.arange(n) // 32 * 32
    v = x.numpy()

    def take(source):
        return v[base + source]

    def ballot(predicate, lanes=32):
        first = np.arange(n) // lanes * lanes
        bits = [sum(int(predicate[f + j]) << (f + j) % 32 for j in range(lanes)) for f in first]
        return np.array(bits, dtype=np.uint32).view(np.int32)

    def part(source, width):
        return lane // width * width + source % width

    warps = v.reshape(-1, 32)
    expected = [
        take(5),
        take(part(lane + 3, 8)),
        take(np.where(lane < 3, lane, lane - 3)),
        take(np.where(lane % 16 < 3, lane, lane - 3)),
        take(np.where(lane > 28, lane, lane + 3)),
        take(np.where(lane % 8 > 4, lane, lane + 3)),
        take(lane ^ 9),
        take(np.where((lane ^ 9) >= lane // 8 * 8 + 8, lane, lane ^ 9)),
        ballot(v % 3 == 0),
        (warps == 40).any(1).repeat(32),
        (warps != 40).all(1).repeat(32),
        take(np.where(lane < 16, 2, 18)),
        ballot(v % 2 == 0, 16),
        np.full(n, (v % 5 == 0).sum()),
        np.full(n, 1),
        np.full(n, 0),
        take(lane ^ 1),
    ]
    for seed in SEEDS:
        out = torch.full((len(expected), n), -7, dtype=torch.int32)
        launch("collectives", (x, out), block=n, seed=seed)
        for row, want in enumerate(expected):
            np.testing.assert_array_equal(out[row].numpy(), want, err_msg=f"row {row}, seed {seed}")


def test_atomics():
    words, total = torch.tensor([0, 0, 99, -1, 255, 0, 0, 0, 0], dtype=torch.int32), torch.zeros(1)
    launch("atomics", (words, total), grid=3, block=50)
    i = np.arange(150)
    expected = [i.sum(), -300, 0, 149, 0, 255, np.bitwise_xor.reduce(i)]
    assert words[:7].tolist() == expected
    assert words[8].item() == 150 % 7
    assert total.item() == 75


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [0, 1])
def test_matrix_multiplication(dtype, columns):
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    out = torch.zeros(16, 8)
    name = {torch.float16: "CUPAGED_FP16", torch.bfloat16: "CUPAGED_BF16"}[dtype]
    launch("matrix", (a, b.T.contiguous() if columns else b, out), CUPAGED_DTYPE=name, B_COLUMNS=columns)
    torch.testing.assert_close(out.double(), 1 + 2 * (a.double() @ b.double()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transpose", [False, True])
def test_load_matrix(count, transpose):
    rows = torch.arange(count * 64, dtype=torch.int16)
    out = torch.zeros(count, 8, 4, dtype=torch.int32)
    name = f"ldmatrix_x{count}{'_trans' if transpose else ''}"
    launch("load_matrix", (rows, out), COUNT=count, LOAD=name, FAULT=0)
    matrices = rows.view(count, 8, 8)
    if transpose:
        matrices = matrices.transpose(1, 2)
    assert torch.equal(out.view(torch.int16).view(count, 8, 8), matrices)
    with pytest.raises(EmulationError, match=r"ldmatrix on .*, which is no multiple of 16"):
        launch("load_matrix", (rows, out), COUNT=count, LOAD=name, FAULT=1)


def test_arguments_are_checked_against_the_parameters():
    x, out = floats(4), torch.zeros(4)
    with pytest.raises(EmulationError, match="3 parameters, 2 were given"):
        launch("out_of_bounds", (x, out), FAULT=0)
    for wrong in (np.int64(4), np.float32(4), x):
        with pytest.raises(EmulationError, match="parameter 2 is of kind i, 4 bytes"):
            launch("out_of_bounds", (x, out, wrong), FAULT=0)
    with pytest.raises(EmulationError, match="access out of bounds, at address"):
        launch("out_of_bounds", (None, out, np.int32(4)), FAULT=0)


@pytest.mark.parametrize(
    ("grid", "block", "smem", "message"),
    [
        ((1, 1, 1), (1025, 1, 1), 0, "block"),
        ((1, 1, 1), (64, 32, 1), 0, "2048 threads, its bound is 1024"),
        ((0, 1, 1), (32, 1, 1), 0, "grid"),
        ((1, 65536, 1), (32, 1, 1), 0, "grid"),
        ((1, 1, 1), (32, 1, 1), 227 * 1024 - 127, "shared memory"),
    ],
)
def test_launches_that_cuda_refuses(grid, block, smem, message):
    spec = KernelSpec("shared_bounds.cu", "shared_bounds", (("FAULT", "0"),))
    with pytest.raises(EmulationError, match=message):
        HostLauncher(0, KERNELS).launch(spec, grid, block, smem, (floats(1), torch.zeros(1), np.int32(1)))


def test_views_of_one_storage_share_memory():
    """The output overlaps the input's storage; the rest of it is not touched."""
    storage = floats(12)
    launch("out_of_bounds", (storage[2:6], storage[6:10], np.int32(4)), FAULT=0)
    assert storage.tolist() == [1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 11, 12]


def test_a_seed_repeats_a_run():
    runs = [missing_barrier(seed, 1)[0].view(torch.int32) for seed in (3, 3, 4, 5, 6)]
    assert torch.equal(runs[0], runs[1])
    assert any(not torch.equal(runs[0], other) for other in runs[2:])


def test_launch_bounds():
    out = torch.zeros(65, dtype=torch.int32)
    launch("bounded", (out,), block=64)
    with pytest.raises(EmulationError, match="a block of 65 threads, its bound is 64"):
        launch("bounded", (out,), block=65)


@pytest.mark.parametrize("fault", [1, 2])
def test_a_launch_that_does_not_end(fault):
    spec = KernelSpec("endless.cu", "endless", (("FAULT", str(fault)),))
    launcher = HostLauncher(0, KERNELS, time_limit_s=0.3)
    with pytest.raises(EmulationError, match="the launch does not end"):
        launcher.launch(spec, (1, 1, 1), (32, 1, 1), 0, (torch.zeros(1, dtype=torch.int32),))


@pytest.mark.matrix
def test_fibers_of_other_processors():
    """What switches fibers where there is no code for the processor passes these tests, too."""
    if "CUPAGED_HOST_UCONTEXT" in os.environ.get("CXXFLAGS", ""):
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    selected = "collectives or barrier or bounds or divergence or arithmetic"
    environment = {**os.environ, "CXXFLAGS": "-DCUPAGED_HOST_UCONTEXT"}
    done = subprocess.run([*command, "-k", selected], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
