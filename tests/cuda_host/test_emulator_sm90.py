"""The emulation of Hopper's instructions: right results, and what is planted in `kernels/` must be caught."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cupaged.backends.cuda.specs import KernelSpec

from .emulator import EmulationError, HostLauncher

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulation with")

KERNELS = Path(__file__).parent / "kernels"
DTYPES = {torch.float16: "CUPAGED_FP16", torch.bfloat16: "CUPAGED_BF16"}
SEEDS = range(8)


def launch(name, args, *, block, smem=0, seed=0, dtype=torch.bfloat16, **defines):
    defines["CUPAGED_DTYPE"] = DTYPES[dtype]
    spec = KernelSpec(f"{name}.cu", name, tuple((k, str(v)) for k, v in defines.items()))
    args = [np.int32(arg) if isinstance(arg, int) else arg for arg in args]
    HostLauncher(seed, KERNELS).launch(spec, (1, 1, 1), (block, 1, 1), smem, args)


def integers(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("columns", "transposed"),
    [*((n, 0) for n in (64, 80, 96, 128, 192, 256)), *((n, 1) for n in (64, 128, 192, 256))],
)
def test_products(dtype, columns, transposed):
    depth = 80
    generator = torch.Generator().manual_seed(columns)
    a = torch.randn(64, depth, generator=generator).to(dtype)
    b = torch.randn(depth, columns, generator=generator).to(dtype)
    for seed in range(2):
        out = torch.zeros(64, columns)
        args = (a, b if transposed else b.T.contiguous(), out, depth, columns, transposed)
        smem = 64 * 256 + max(256 * columns, -(-columns // 64) * 128 * depth)
        launch("wgmma_product", args, block=128, smem=smem, seed=seed, dtype=dtype)
        expected = 1 + 2 * (a.double() @ b.double())
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-5)


def layout(shape, stride):
    """The distances of all elements of one mode of a layout, its parts from the fastest on."""
    parts = [np.arange(size) * step for size, step in zip(shape, stride)]
    return sum(np.meshgrid(*reversed(parts), indexing="ij")).ravel()


def elements(image: torch.Tensor, start: int, rows, columns) -> torch.Tensor:
    """A matrix in shared memory. The swizzle: bits 3 to 5 of an element's number by bits 6 to 8."""
    numbers = torch.from_numpy(start // 2 + rows[:, None] + columns[None, :])
    return image[numbers ^ (numbers >> 6 & 7) << 3]


@pytest.mark.parametrize(
    ("start", "row_bytes", "panel_bytes"),
    [(0, 1024, 0), (3072, 1024, 8192), (1024, 2048, 3072), (2048, 4096, 1024)],
)
def test_layouts_of_matrices(start, row_bytes, panel_bytes):
    """Against the canonical layouts of CUTLASS, with 8 elements in a chunk."""
    a_start, size = 48 * 1024, 128 * 1024
    image = torch.randint(-500, 500, (size // 2,), generator=torch.Generator().manual_seed(start))
    image = image.to(torch.float16)
    row, panel = row_bytes // 2, panel_bytes // 2
    group = 8, 2

    def product(a_start, b_start, transposed):
        out = torch.zeros(64, 128 if transposed else 80)
        numbers = (a_start, row_bytes, b_start, row_bytes, panel_bytes, transposed)
        args = (image.view(torch.int16), out, size // 16, *numbers)
        launch("wgmma_layout", args, block=128, smem=size, dtype=torch.float16)
        return out.double()

    k = layout(group, (1, 8))
    for advance in (0, 32, 64, 96):
        first = start + advance
        a = elements(image, a_start + advance, layout((8, 8), (64, row)), k)
        b = elements(image, first, layout((8, 10), (64, row)), k)
        assert torch.equal(product(a_start + advance, first, 0), a.double() @ b.double().T)
    b = elements(image, start, layout(group, (64, row)), layout((8, 8, 2), (1, 8, panel)))
    assert torch.equal(product(0, start, 1)[:16], b.double())


@pytest.mark.parametrize(
    ("a_start", "row_bytes", "b_start", "panel_bytes", "transposed", "message"),
    [
        (
            0,
            1024,
            128,
            8192,
            0,
            "a panel at byte 128 of its dynamic shared memory, which does not start at a multiple of 1024",
        ),
        (0, 1024, 112, 8192, 0, "from byte 112 of a panel's rows on, beyond their end"),
        (0, 1024, 32, 8192, 1, "from byte 32 of a panel's rows on, beyond their end"),
        (0, 512, 0, 8192, 0, "row_bytes 512, no multiple of 1024"),
        (0, 1024, 0, 512, 1, "panel_bytes 512, no multiple of 1024"),
        (0, 1024, 0, 8192 + 8, 1, "distance of 8200 bytes, it must be a multiple of 16"),
        (0, 1024, 8, 8192, 0, "which is no multiple of 16"),
        (0, 1024, 8192, 8192, 0, "byte 16384 of its dynamic shared memory, which has an end before"),
        (0, 1024, 16384, 8192, 0, "is not in shared memory"),
        (8192, 8192, 0, 8192, 0, "byte 16384 of its dynamic shared memory, which has an end before"),
    ],
)
def test_matrices_that_cannot_be(a_start, row_bytes, b_start, panel_bytes, transposed, message):
    size = 16 * 1024
    image = torch.zeros(size // 2, dtype=torch.int16)
    numbers = (a_start, row_bytes, b_start, row_bytes, panel_bytes, transposed)
    args = (image, torch.zeros(64, 128), size // 16, *numbers)
    with pytest.raises(EmulationError, match=message):
        launch("wgmma_layout", args, block=128, smem=size, dtype=torch.float16)


BARRIERS = {
    1: "mbarrier_init on .*, which is not in shared memory",
    2: "mbarrier_init on .*, which is no multiple of 8",
    3: "mbarrier_init at block_barriers.cu:.* with a count of 0",
    4: "mbarrier_wait at block_barriers.cu:.* with a parity of 2",
    5: "mbarrier_wait at block_barriers.cu:.* misses a phase|no thread can go on",
    6: "on barrier 0, 1 to 15 are possible",
    7: "of 48 threads, the block has 64 and whole warps take part",
    8: "the warp comes to named barrier 1 at .*, where it has been in this round",
}


def error_of(function, *args, **options) -> str:
    try:
        function(*args, **options)
    except EmulationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("fault", range(9))
def test_barriers(fault):
    errors = []
    for seed in SEEDS:
        out = torch.zeros(32, dtype=torch.int32)
        args = (torch.tensor([7], dtype=torch.int32), out)
        errors.append(error_of(launch, "block_barriers", args, block=64, seed=seed, FAULT=fault))
        if not errors[-1]:
            assert out.tolist() == [7] * 32
    if fault == 5:  # unless the waiters have come in time
        errors = [error for error in errors if error]
        assert errors
    assert all(re.search(BARRIERS[fault], error) if fault else not error for error in errors)


TILES = 5
NOT_FENCED = "reads byte .* of its dynamic shared memory, which .* did not fence for the async proxy"
COPYING = "is still copying there"
# The error that a fault must give, or None where results may also be wrong.
FAULTS = {
    "MissingProductWait": None,
    "ProductWaitTooWeak": None,
    "MissingCommit": None,
    "MissingProductFence": "without a wgmma_fence since the last wait",
    "UseBeforeWait": None,
    "OtherAccumulatorsInWait": None,
    "WriteBeforeWait": "accumulators were written before a wait for them",
    "ScaleBeforeWait": None,
    "WrongRowBytes": None,
    "WrongPanelBytes": None,
    "MissingFullWait": None,
    "PhaseNotFlipped": None,
    "EarlyRelease": None,
    "WarpSkipsProduct": "divergent warpgroup",
    "MissingSwizzle": None,
    "MissingEmptyWait": None,
    "EmptyParityWrong": "no thread can go on: .*mbarrier_wait at wgmma_ring.cu",
    "MissingProxyFence": NOT_FENCED,
    "ProxyFenceBeforeCopies": NOT_FENCED,
    "MissingProxyFenceAfterStore": NOT_FENCED,
    "MissingCopyWait": None,
    "MissingWarpSync": None,
    "PanelsNotAligned": "which does not start at a multiple of 1024",
    "BarrierNotInitialised": "on a barrier that is not initialised",
    "BarrierInitialisedTwice": "on a barrier that is in use",
    "CountTooLarge": "no thread can go on: .*mbarrier_wait at wgmma_ring.cu",
    "TooFewThreads": "no thread can go on: .*named_barrier_sync at wgmma_ring.cu",
    "DifferentThreads": "named barrier 1 of .* threads at .* it has",
    "MissingNamedBarrier": None,
    "TooManyRegisters": "the block has 65536 registers then, it was launched with 64512",
}


def fault_numbers() -> dict[str, int]:
    enum = re.search(r"enum Fault {(.*?)}", (KERNELS / "wgmma_ring.cu").read_text(), re.DOTALL)
    return {name: i for i, name in enumerate(re.findall(r"\bk(\w+),", enum[1]))}


def ring(seed, fault="None", dtype=torch.bfloat16) -> tuple[str, bool]:
    """The error, and whether the result is right."""
    a = integers(128, 64, dtype=dtype, seed=seed)
    keys = integers(64 * TILES, 64, dtype=dtype, seed=seed + 1)
    values = integers(64 * TILES, 128, dtype=dtype, seed=seed + 2)
    out = torch.zeros(128, 128)
    args = (a, keys, values, out, TILES, fault_numbers()[fault])
    error = error_of(launch, "wgmma_ring", args, block=384, smem=68 * 1024, seed=seed, dtype=dtype)
    expected = 2 * (a.double() @ keys.double().T) @ values.double()
    return error, torch.equal(out.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_ring_gives_right_results(dtype):
    for seed in range(16):
        assert ring(seed, dtype=dtype) == ("", True), f"seed {seed}"


def test_all_faults_are_tested():
    assert ["None", *FAULTS] == list(fault_numbers())


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_ring_are_caught(fault):
    results = [ring(seed, fault) for seed in SEEDS]
    if FAULTS[fault]:
        assert all(re.search(FAULTS[fault], error) for error, _ in results)
    caught = sum(error != "" or not right for error, right in results)
    assert caught >= len(SEEDS) // 4, f"caught under {caught} of {len(SEEDS)} seeds"
