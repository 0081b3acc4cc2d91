"""The emulation of Hopper's instructions: right results, and what is planted in `kernels/` must be caught."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cupaged.compile import KernelSpec

from .emulator import HostLauncher

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulation with")

KERNELS = Path(__file__).parent / "kernels"
WARPGROUP = 128
DTYPES = {torch.float16: "CUPAGED_FP16", torch.bfloat16: "CUPAGED_BF16"}


def launch(name, args, *, block=WARPGROUP, smem=0, seed=0, **defines):
    spec = KernelSpec(f"{name}.cu", name, tuple((k, str(v)) for k, v in defines.items()))
    HostLauncher(seed, KERNELS).launch(spec, (1, 1, 1), (block, 1, 1), smem, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("columns", [32, 64, 80, 96, 112, 128, 192, 256])
def test_products(dtype, transposed, columns):
    depth = 80
    generator = torch.Generator().manual_seed(columns)
    a = torch.randn(64, depth, generator=generator).to(dtype)
    b = torch.randn(depth, columns, generator=generator).to(dtype)
    for seed in range(2):
        out = torch.zeros(64, columns)
        launch(
            "wgmma_product",
            (a, b if transposed else b.T.contiguous(), out),
            smem=64 * 256 + max(256 * columns, (columns + 63) // 64 * 128 * depth),
            seed=seed,
            CUPAGED_DTYPE=DTYPES[dtype],
            COLUMNS=columns,
            DEPTH=depth,
            TRANSPOSED=transposed,
        )
        expected = 1 + 2 * (a.double() @ b.double())
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-5)
