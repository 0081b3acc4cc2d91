"""Theoretical occupancy against NVIDIA's own calculator, `cuda_occupancy.h`, and by hand."""

from __future__ import annotations

import random
import shutil
import subprocess

import pytest

from cupaged.backends.cuda import compile as kc
from cupaged.backends.cuda import occupancy
from cupaged.backends.cuda import specs as kernel_specs

CALCULATOR = """
#include <climits>
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
    int major, minor, warps, threads, regs, shared, per_sm, reserved;
    while (scanf("%d %d %d %d %d %d %d %d", &major, &minor, &warps, &threads, &regs, &shared, &per_sm,
                 &reserved) == 8) {
        cudaOccDeviceProp device;
        device.computeMajor = major;
        device.computeMinor = minor;
        device.maxThreadsPerBlock = 1024;
        device.maxThreadsPerMultiprocessor = 32 * warps;
        device.regsPerBlock = device.regsPerMultiprocessor = 65536;
        device.warpSize = 32;
        device.sharedMemPerBlock = 48 * 1024;
        device.sharedMemPerMultiprocessor = per_sm;
        device.sharedMemPerBlockOptin = per_sm - reserved;
        device.reservedSharedMemPerBlock = reserved;
        device.numSms = 1;
        cudaOccFuncAttributes function;
        function.maxThreadsPerBlock = 1024;
        function.numRegs = regs;
        function.sharedSizeBytes = 0;
        function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        function.maxDynamicSharedSizeBytes = shared;
        function.numBlockBarriers = 1;
        cudaOccDeviceState state;
        cudaOccResult result;
        const int status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state,
                                                                   threads, shared);
        printf("%d\\n", status == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -status);
    }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_nvidias_calculator_agrees(tmp_path, seed):
    source, program = tmp_path / "calculator.cpp", tmp_path / "calculator"
    source.write_text(CALCULATOR)
    include = kc.toolkit_include_dir()
    subprocess.run(["g++", "-O1", "-w", f"-I{include}", str(source), "-o", str(program)], check=True)
    rng = random.Random(seed)
    drawn = []
    for arch, (warps, _) in occupancy.MOST.items():
        reserved = 1024 if int(arch) >= 80 else 0
        per_sm = kernel_specs.SHARED_MEMORY[arch] + reserved
        for _ in range(300):
            threads = 32 * rng.randint(1, 32)
            registers = rng.randint(1, min(255, 65536 // threads // 8 * 8))
            shared = rng.choice([0, rng.randrange(kernel_specs.SHARED_MEMORY[arch] + 1), rng.randrange(8192)])
            drawn.append((arch, warps, threads, registers, shared, per_sm, reserved))
    lines = [
        f"{arch[:-1]} {arch[-1]} {warps} {threads} {registers} {shared} {per_sm} {reserved}"
        for arch, warps, threads, registers, shared, per_sm, reserved in drawn
    ]
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    expected = [int(line) for line in done.stdout.split()]
    assert len(expected) == len(drawn)
    for (arch, _, threads, registers, shared, *_), blocks in zip(drawn, expected):
        found = occupancy.of(arch, threads, registers, shared)
        assert found.blocks == blocks, (arch, threads, registers, shared, found)


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "share", "limit"),
    [
        # 64 warps of 4: 16 blocks.
        ("90a", 128, 32, 0, 16, 1.0, "warps"),
        # 168 * 32 = 5376 registers a warp, 3 in each of 4 partitions of 16384: 12 warps, 3 blocks.
        ("90a", 128, 168, 0, 3, 12 / 64, "registers"),
        # 233472 bytes over 33920 + 1024: 6.
        ("90a", 128, 40, 33920, 6, 24 / 64, "shared memory"),
        # 65536 over 33920 rounded up to 34048: 1.
        ("75", 128, 40, 33920, 1, 4 / 32, "shared memory"),
        # One warp a block: the number of blocks.
        ("86", 32, 16, 0, 16, 16 / 48, "blocks"),
    ],
)
def test_by_hand(arch, threads, registers, shared, blocks, share, limit):
    found = occupancy.of(arch, threads, registers, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == pytest.approx(share)
